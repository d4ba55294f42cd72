"""Read a folder of images with captions beside them: `name.jpg` and `name.txt`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from vlm_sft.data.columns import IMAGE_SUFFIXES
from vlm_sft.data.record_formats import MAX_RECORD_BYTES, Columns, RawRecord, RawRecords
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.image_paths import nearest_existing
from vlm_sft.utils.reading import read_text

_COLUMNS: Final = Columns(id="id", image="image", text="text")


def open_caption_folder(folder: Path) -> RawRecords:
    """Open a folder in which each image has a text file of the same name; subfolders count.

    A record's id is the name without the ending, relative to the folder; records are in the order
    of their ids. An image without a text file, and a text file without an image or with two, are
    each the error of one record. Names that begin with a dot are ignored.

    Raises:
        UserError: The folder has no image, or no text file at all.
    """
    stems: dict[str, list[str]] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(place, folder)
        for name in names:
            stem, suffix = os.path.splitext(name)
            if not name.startswith(".") and suffix.lower() in (*IMAGE_SUFFIXES, ".txt"):
                key = stem if below == "." else f"{below}{os.sep}{stem}"
                stems.setdefault(key, []).append(suffix)
    num_texts = sum(_is_text(suffix) for found in stems.values() for suffix in found)
    num_images = sum(map(len, stems.values())) - num_texts
    if not num_images or not num_texts:
        raise UserError(
            f"{folder}: found {num_images:,} images and {num_texts:,} captions; expected a data "
            "file, a folder with metadata.csv or metadata.jsonl (imagefolder), images with a .txt "
            "file of the same name, Parquet files, or a folder that `datasets` saved",
            code="data_file_unreadable",
        )
    return RawRecords(len(stems), _read(folder, stems), columns=_COLUMNS)


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
        near = nearest_existing(folder / f"{stem}.jpg")
        message = f"a caption without its image (searched {folder / stem}.jpg, .png, ...){near}"
    else:
        near = nearest_existing(folder / f"{stem}.txt")
        message = f"an image without its caption (searched {folder / stem}.txt){near}"
    return RecordError("unpaired", message, record_id=stem, where=where)


def _is_text(suffix: str) -> bool:
    return suffix.lower() == ".txt"
