"""Divide records by groups of equal images: one reading to choose, one to write."""

import argparse
import json
import os
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from data_tools.digests import hashed
from data_tools.mix.read import content_digest
from data_tools.records import JsonList
from data_tools.rules.image_groups import ImageGroups
from vlm_sft.config.hub_address import is_hub_address
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.record_formats import RawRecord, parse_record
from vlm_sft.data.record_writer import data_url
from vlm_sft.data.records import open_record_values
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.escape import encodable, escape_control_line
from vlm_sft.utils.owned_files import own_output, owned_open, write_owned_json
from vlm_sft.utils.progress import track

KIND: Final = "held-out split"
"""What the marker of an output folder states that it holds."""

FILES: Final = ("train.json", "held_out.json", "split.json")

_LEFT_OUT, _TRAIN, _HELD_OUT = range(3)


@dataclass
class _Found:
    """What the first reading keeps of the records.

    Attributes:
        groups: The groups of the usable records.
        keys: A digest of each usable record, which does not depend on its place or id.
        usable: Whether each record can be used, as 0 or 1.
        text_only: Number of usable records without images.
        bad: Unusable records by reason.
        first_bad: The first of them.
    """

    groups: ImageGroups = field(default_factory=ImageGroups)
    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    usable: bytearray = field(default_factory=bytearray)
    text_only: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""


def write_split(arguments: argparse.Namespace) -> None:
    """Write the training and the held-out records, and print how many there are.

    Raises:
        UserError: There are too few records, one of them cannot be used, or a file would be
            replaced that the command did not write.
    """
    out, images = arguments.out, arguments.images
    inputs = [*arguments.records, *filter(None, [arguments.annotations])]
    own_output(out, KIND, FILES, inputs=inputs, image_roots=[images], overwrite=arguments.overwrite)
    files = [_data_file(path, arguments) for path in arguments.records]
    found = _read(files, images, stop=arguments.bad_records == "error")
    if found.groups.counts["images"] and _num_compared(found) == 0:
        raise UserError(
            f"--images {images}: not one of the {found.groups.counts['images']:,} images of the "
            "records can be opened there, so none can be compared; give the folder that "
            "their names start from",
            code="image_missing",
        )
    groups = found.groups.numbers()
    total = len(groups)
    wanted = arguments.held_out
    if isinstance(wanted, float):
        wanted = max(1, round(wanted * total))
    held_out = choose_held_out(np.array(found.keys, np.uint64), groups, wanted, arguments.seed)
    number = int(held_out.sum())
    if wanted >= total or not number:
        sizes = np.unique(groups, return_counts=True)[1] if total else np.zeros(1, int)
        raise UserError(
            f"--held-out {arguments.held_out}: cannot hold out {wanted:,} of {total:,} records in "
            f"{len(sizes) if total else 0:,} groups of equal images (smallest: {sizes.min():,} "
            "records), and train on some; give another number, or more records",
            code="no_records",
        )
    sides = np.zeros(len(found.usable), np.uint8)
    sides[np.frombuffer(found.usable, bool)] = np.where(held_out, _HELD_OUT, _TRAIN)
    written = _write(files, out, sides)
    summary = _summary(arguments, found, groups, held_out, wanted)
    if written != {_TRAIN: total - number, _HELD_OUT: number}:
        raise RuntimeError(f"{written} records were written, expected {summary['records']}")
    write_owned_json(out / FILES[2], summary)
    echo("\n".join(_lines(summary, out, images)), file=sys.stdout)


def choose_held_out(
    keys: NDArray[np.uint64], groups: NDArray[np.uint64], wanted: int, seed: int
) -> NDArray[np.bool_]:
    """Choose whole groups in a random order as long as they fit into `wanted` records.

    Args:
        keys: `[N]`, a digest of each record; equal ones are in one group.
        groups: `[N]`, the number of each record's group.
        wanted: Most records to hold out.
        seed: Decides the order, together with the smallest key of each group.

    Returns:
        `[N]`, whether each record is held out.
    """
    _, which, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    smallest = np.full(len(sizes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(smallest, which, keys)
    order = np.argsort(np.array([hashed(seed, "group", key) for key in smallest], np.uint64))
    chosen = np.zeros(len(sizes), np.bool_)
    left = wanted
    for group in order:
        if sizes[group] <= left:
            chosen[group] = True
            left -= int(sizes[group])
    return chosen[which]


def _data_file(path: str, arguments: argparse.Namespace) -> DataFile:
    """Return one of `--records` as a training configuration has it.

    Raises:
        UserError: Its images are not in `--images`, but inside shards.
    """
    annotations = None if arguments.annotations is None else str(arguments.annotations)
    file = DataFile(
        path=path,
        annotations=annotations,
        image_name=arguments.image_name,
        columns=arguments.columns,
    )
    # Shards refuse an image_root; of an imagefolder it would say that no image is in the folder.
    if os.path.realpath(file.images_start_in()) == os.path.realpath(arguments.images):
        return file
    return file.model_copy(update={"image_root": str(arguments.images)})


def _read(files: list[DataFile], images: Path, *, stop: bool) -> _Found:
    """Read all records once, and open each of their images."""
    found = _Found()
    for raw in _raw_records(files, "comparing the images of"):
        record = _parsed(raw, images)
        found.usable.append(not isinstance(record, RecordError))
        if isinstance(record, RecordError):
            error = record
            if stop:
                raise UserError(
                    f"{error}; fix it, or give --bad-records leave_out to split without it",
                    code=error.reason,
                )
            found.bad[error.reason] += 1
            found.first_bad = found.first_bad or str(error)
            continue
        names = [os.path.relpath(i, images) for i in record.images if isinstance(i, Path)]
        key = hashed(content_digest(record), names)
        found.keys.append(key)
        found.text_only += not record.images
        found.groups.add(key, record.images)
    return found


def _write(files: list[DataFile], out: Path, sides: NDArray[np.uint8]) -> dict[int, int]:
    """Write each record to its side, in a second reading; return the numbers written."""
    written = {_TRAIN: 0, _HELD_OUT: 0}
    names = {Path(file.path).name for file in files if not is_hub_address(file.path)}
    read, short = 0, len(names) == len(files)
    with owned_open(out / FILES[0]) as train, owned_open(out / FILES[1]) as held_out:
        lists = {_TRAIN: JsonList(train), _HELD_OUT: JsonList(held_out)}
        for read, raw in enumerate(_raw_records(files, "writing"), 1):
            side = int(sides[read - 1]) if read <= len(sides) else -1
            if side == -1 or (side != _LEFT_OUT and isinstance(raw, RecordError)):
                raise _changed(files)
            if side != _LEFT_OUT and isinstance(raw, RawRecord):
                lists[side].add(_as_json(raw, short=short))
                written[side] += 1
        if read != len(sides):
            raise _changed(files)
        for each in lists.values():
            each.finish()
    return written


def _raw_records(files: list[DataFile], doing: str) -> Iterator[RawRecord | RecordError]:
    for file in files:
        raw = open_record_values(file)
        yield from track(raw.records, raw.total, f"{doing} {Path(file.path).name}")


def _parsed(raw: RawRecord | RecordError, images: Path) -> Conversation | RecordError:
    if isinstance(raw, RecordError):
        return raw
    try:
        return parse_record(raw, None, images)
    except RecordError as error:
        return error


def _as_json(raw: RawRecord, *, short: bool) -> dict[str, Any]:
    """Return the record as it was read, a row as messages; embedded images become data URLs.

    A record without an id gets its place, `photos.csv:3`, so that logs and reports lead back to it.

    Args:
        raw: The record.
        short: Whether the name of its file is unique among the record files.
    """

    def convert(value: Any) -> str:
        if isinstance(value, bytes):
            return data_url(value)
        raise TypeError(f"a value of type {type(value).__name__}")

    try:
        found: dict[str, Any] = json.loads(json.dumps(raw.value, default=convert, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{raw.where}: the record has what JSON cannot hold ({error}); remove that column",
            code="format",
        ) from None
    if found.get("id") is None:
        place = Path(raw.where).name if short else raw.where
        found["id"] = encodable(escape_control_line(place, 300))
    return found


def _changed(files: list[DataFile]) -> UserError:
    names = ", ".join(file.path for file in files)
    return UserError(f"{names}: changed while they were read; split again", code="data_changed")


def _num_compared(found: _Found) -> int:
    counts = found.groups.counts
    return counts["images"] - counts["missing"] - counts["unreadable"]


def _summary(
    arguments: argparse.Namespace, found: _Found, groups: NDArray[np.uint64],
    held_out: NDArray[np.bool_], wanted: int,
) -> dict[str, Any]:  # fmt: skip
    sizes = np.unique(groups, return_counts=True)[1]
    number, counts = int(held_out.sum()), found.groups.counts
    return {
        "records": {
            "read": len(found.usable), "train": len(groups) - number, "held_out": number,
            "wanted": wanted, "text_only": found.text_only,
            "left_out": dict(sorted(found.bad.items())), "first_left_out": found.first_bad,
        },
        "groups": {"all": len(sizes), "largest": int(sizes.max())},
        "images": {
            **{name: counts[name] for name in ("images", "missing", "unreadable")},
            **{f"first_{kind}": name for kind, name in sorted(found.groups.first.items())},
        },
        "image_root": str(arguments.images),
        "seed": arguments.seed,
    }  # fmt: skip


def _lines(summary: dict[str, Any], out: Path, image_root: Path) -> Iterator[str]:
    """Yield the printed lines."""
    records, groups, images = summary["records"], summary["groups"], summary["images"]
    without = records["text_only"]
    yield (
        f"{records['read']:,} records: {records['train']:,} to train on, {records['held_out']:,} "
        "held out" + (f"; {without:,} of all have no image" if without else "")
    )
    yield (
        f"{groups['all']:,} groups of equal images or texts, {groups['largest']:,} records in the "
        "largest"
    )
    if records["held_out"] < records["wanted"]:
        yield f"{records['wanted']:,} were wanted, but no other group fits"
    if records["left_out"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in records["left_out"].items())
        yield f"records in neither file: {reasons}; first: {records['first_left_out']}"
    if images["missing"]:
        yield (
            f"{images['missing']:,} of {images['images']:,} images do not exist, e.g. "
            f"{images['first_missing']}: compared by path and COCO id only; training refuses them"
        )
    if images["unreadable"]:
        yield (
            f"{images['unreadable']:,} of {images['images']:,} images cannot be opened, e.g. "
            f"{images['first_unreadable']}: compared by path, COCO id and content only"
        )
    yield f"{out / FILES[0]} and {FILES[1]}; images are relative to image_root {image_root}"
