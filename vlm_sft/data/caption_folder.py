"""Read a folder of images with captions beside them: `name.jpg` and `name.txt`."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from vlm_sft.data.columns import IMAGE_SUFFIXES
from vlm_sft.data.record_formats import MAX_RECORD_BYTES, Columns, RawRecord, RawRecords
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.filesystem import warn_once
from vlm_sft.utils.image_paths import nearest_existing, shown_name
from vlm_sft.utils.reading import read_text

_COLUMNS: Final = Columns(id="id", image="image", text="text")


def open_caption_folder(folder: Path, *, follow_symlinks: bool = False) -> RawRecords:
    """Open a folder in which each image has a text file of the same name; subfolders count.

    A record's id is the name without the ending, relative to the folder; records are in the order
    of their ids. An image without a text file, a text file without an image or with two, and a
    subfolder that cannot be read, are each the error of one record. Names that begin with a dot are
    ignored.

    Args:
        folder: The folder.
        follow_symlinks: Whether subfolders that are symbolic links are read, each folder once;
            otherwise a warning names them.

    Raises:
        UserError: The folder cannot be read, has no image, or no text file at all.
    """
    found = _search(folder, follow_symlinks)
    suffixes = [suffix for of_stem in found.stems.values() for suffix in of_stem]
    num_texts = sum(map(_is_text, suffixes))
    num_images = len(suffixes) - num_texts
    if found.links:
        warn_once(
            f"{folder}: {len(found.links):,} linked subfolders are left out, e.g. "
            f"{shown_name(found.links[0])}; "
            + (
                "their files are read in the folders that they lead to"
                if follow_symlinks
                else "set `follow_symlinks: true` next to `path` to read them"
            )
        )
    if not num_images or not num_texts:
        problem = f"; {found.errors[0].message}" if found.errors else ""
        raise UserError(
            f"{folder}: found {num_images:,} images and {num_texts:,} captions{problem}; expected "
            "a data file, a folder with metadata.csv or metadata.jsonl (imagefolder), images with "
            "a .txt file of the same name, Parquet files, or a folder that `datasets` saved",
            code="data_file_unreadable",
        )
    records = itertools.chain(found.errors, _read(folder, found.stems))
    return RawRecords(len(found.errors) + len(found.stems), records, columns=_COLUMNS)


@dataclass(frozen=True)
class _Found:
    """Files and folders below a folder of captions.

    Attributes:
        stems: Endings of the images and texts of each name without its ending.
        links: Linked subfolders that are left out.
        errors: An error per subfolder that cannot be read.
    """

    stems: dict[str, list[str]] = field(default_factory=dict)
    links: list[str] = field(default_factory=list)
    errors: list[RecordError] = field(default_factory=list)


def _search(folder: Path, follow_symlinks: bool) -> _Found:
    found = _Found()

    def unreadable(error: OSError) -> None:
        below = os.path.relpath(error.filename, folder)
        message = f"the folder {shown_name(below)} cannot be read: {error.strerror}"
        found.errors.append(
            RecordError("data_file_unreadable", message, record_id=below, where=str(error.filename))
        )

    seen: set[str] = set()
    # Links come last: a folder that can be reached without one keeps its name.
    starts = [str(folder)]
    for start in starts:
        for place, folders, names in os.walk(start, onerror=unreadable):
            below = os.path.relpath(place, folder)
            real = os.path.realpath(place)
            if real in seen:  # a second link to it, or a cycle
                found.links.append(below)
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in folders:
                path = os.path.join(place, name)
                if os.path.islink(path) and follow_symlinks:
                    starts.append(path)
                elif os.path.islink(path):
                    found.links.append(os.path.relpath(path, folder))
            for name in names:
                stem, suffix = os.path.splitext(name)
                if not name.startswith(".") and suffix.lower() in (*IMAGE_SUFFIXES, ".txt"):
                    key = stem if below == "." else f"{below}{os.sep}{stem}"
                    found.stems.setdefault(key, []).append(suffix)
    return found


def _read(folder: Path, stems: dict[str, list[str]]) -> Iterator[RawRecord | RecordError]:
    for stem in sorted(stems):
        suffixes = sorted(stems[stem])
        images = [stem + suffix for suffix in suffixes if not _is_text(suffix)]
        texts = [stem + suffix for suffix in suffixes if _is_text(suffix)]
        where = str(folder / (texts or images)[0])
        if len(images) != 1 or len(texts) != 1:
            yield _unpaired(folder, stem, images, texts, where)
            continue
        try:
            text = read_text(where, MAX_RECORD_BYTES).strip()
        except UserError as error:
            yield RecordError(error.reason, str(error), record_id=stem, where=where)
            continue
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
            yield RecordError("data_file_unreadable", message, record_id=stem, where=where)
            continue
        yield RawRecord({"id": stem, "image": images[0], "text": text}, where, stem)


def _unpaired(
    folder: Path, stem: str, images: list[str], texts: list[str], where: str
) -> RecordError:
    if images and texts:
        message = f"{' and '.join([*images, *texts])} have the same name; keep one pair"
    elif texts:
        near = _near(folder / f"{stem}.jpg", texts)
        message = f"a caption without its image (searched {folder / stem}.jpg, .png, ...){near}"
    else:
        near = _near(folder / f"{stem}.txt", images)
        message = f"an image without its caption (searched {folder / stem}.txt){near}"
    return RecordError("unpaired", message, record_id=stem, where=where)


def _near(path: Path, existing: list[str]) -> str:
    """Return the hint of `nearest_existing`, unless it names the record's own file."""
    hint = nearest_existing(path)
    return "" if any(shown_name(os.path.basename(name)) in hint for name in existing) else hint


def _is_text(suffix: str) -> bool:
    return suffix.lower() == ".txt"
