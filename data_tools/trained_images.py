"""Find evaluation images that a model was trained on: by COCO id, file content and look."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools.digests import file_digest
from data_tools.instruct.clean.same_images import hash_image
from data_tools.instruct.contamination import coco_id
from vlm_sft.config.schema import ColumnNames, DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.records import open_records
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.progress import track

Key = int | str
"""COCO's id of an image, or a name."""

HASH_DISTANCE: Final = 6
"""Bits of 64 by which the perceptual hashes of equal images may differ."""


@dataclass(frozen=True)
class TrainingRecords:
    """Files of records that a model was trained on.

    Attributes:
        files: The files, with the folders of their images.
        named: How the user named them, for errors.
        used: Ids of the records that were trained on; None: all of them.
    """

    files: Sequence[DataFile]
    named: str
    used: AbstractSet[str] | None = None


@dataclass(frozen=True)
class TrainedImages:
    """Images that training records have, too.

    Attributes:
        images: Why each image counts as trained on, by its key.
        records: Training records that were compared.
        not_used: Training records that no update used.
        faulty: Training records that cannot be read.
        files: Their images that were compared by content.
        missing: Their images that are not in --training-images.
    """

    images: dict[Key, str]
    records: int = 0
    not_used: int = 0
    faulty: int = 0
    files: int = 0
    missing: int = 0

    def summary(self) -> dict[str, Any]:
        """Return the counts for JSON."""
        return {
            "records": self.records,
            "faulty_records": self.faulty,
            "images_compared_by_content": self.files,
            "images_not_found": self.missing,
            "found": dict(sorted(Counter(self.images.values()).items())),
        }


def given_records(
    files: Iterable[str | Path],
    image_root: str | Path | None,
    columns: Mapping[str, str] | None = None,
) -> TrainingRecords:
    """Return the files of --training, whose records all count.

    Args:
        files: The files.
        image_root: --training-images.
        columns: --columns.

    Raises:
        UserError: A part of `columns` is none that a table can have.
    """
    root, names = None if image_root is None else str(image_root), ColumnNames.of_option(columns)
    found = [DataFile(path=str(path), image_root=root, columns=names) for path in files]
    return TrainingRecords(found, "--training")


def trained_images(
    images: Mapping[Key, Path], training: Iterable[TrainingRecords]
) -> TrainedImages:
    """Find the images that occur in training records.

    Args:
        images: Existing files of evaluation images, by COCO's id or by a name.
        training: The training records.

    Raises:
        UserError: A file cannot be read, none of its entries is a record, or a used record is in no
            file.
    """
    names: dict[Path, None] = {}
    embedded: list[bytes] = []
    counts: Counter[str] = Counter()
    for source in training:
        waiting = set(source.used or ())
        for file in source.files:
            for record in _records(file, source.named, counts):
                if source.used is not None and record.id not in source.used:
                    counts["not used"] += 1
                    continue
                counts["used"] += 1
                waiting.discard(record.id)
                for image in record.images:
                    if isinstance(image, bytes):
                        embedded.append(image)
                    else:
                        names[image] = None
        if waiting:
            raise UserError(
                f"{source.named}: {len(waiting):,} records that were trained on are not in the "
                f"training data, e.g. {min(waiting)!r}; the files have changed since: restore them",
                code="data_changed",
            )
    ids = {number for path in names if (number := coco_id(path)) is not None}
    found: dict[Key, str] = {}
    for key, path in images.items():
        number = key if isinstance(key, int) else coco_id(path)
        if number is not None and number in ids:
            found[key] = "same COCO id"
    existing = [path for path in names if path.is_file()]
    if not counts["used"]:
        return TrainedImages(found)
    contents = {hashlib.sha256(data).hexdigest() for data in embedded}
    sizes = {path.stat().st_size for path in existing} | {len(data) for data in embedded}
    ours = {key: path for key, path in images.items() if key not in found}
    same_size = {key: path for key, path in ours.items() if path.stat().st_size in sizes}
    wanted = {path.stat().st_size for path in same_size.values()}
    contents |= {file_digest(path) for path in existing if path.stat().st_size in wanted}
    found |= {key: "same file" for key, path in same_size.items() if file_digest(path) in contents}
    theirs: list[Path | bytes] = [*existing, *embedded]
    found |= _similar({key: path for key, path in ours.items() if key not in found}, theirs)
    return TrainedImages(
        found, counts["used"], counts["not used"], counts["faulty"], len(theirs),
        len(names) - len(existing),
    )  # fmt: skip


def _records(file: DataFile, named: str, counts: Counter[str]) -> Iterator[Conversation]:
    """Yield the usable records of a file, and count the faulty ones."""
    found = False
    records = open_records(file)
    for record in track(records.conversations, records.total, f"reading {Path(file.path).name}"):
        if isinstance(record, RecordError):
            counts["faulty"] += 1
            continue
        found = True
        yield record
    if not found:
        raise UserError(
            f"{named} {file.path}: not one of its entries is a training record, or it has no "
            "records; give the records that the model was trained on, as `data.train` has them",
            code="no_records",
        )


def _similar(ours: Mapping[Key, Path], theirs: Sequence[Path | bytes]) -> dict[Key, str]:
    """Return the images whose perceptual hash is near that of a training image."""
    if not ours or not theirs:
        return {}
    hashes = map(hash_image, track(theirs, len(theirs), "hashing training images"))
    known = np.array([value for value in hashes if isinstance(value, int)], np.uint64)
    near: dict[Key, str] = {}
    for key, path in track(ours.items(), len(ours), "comparing images"):
        value = hash_image(path)
        if isinstance(value, int) and len(known):
            distance = np.bitwise_count(known ^ np.uint64(value)).min()
            if distance <= HASH_DISTANCE:
                near[key] = "similar image"
    return near
