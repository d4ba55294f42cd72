"""Find evaluation images that a model was trained on: by COCO id, file content and look."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools.digests import file_digest
from data_tools.instruct.clean.same_images import hash_image
from data_tools.instruct.contamination import coco_id
from vlm_sft.config.schema import DataFile
from vlm_sft.data.records import open_records
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.progress import track

Key = int | str
"""COCO's id of an image, or a name."""

HASH_DISTANCE: Final = 6
"""Bits of 64 by which the perceptual hashes of equal images may differ."""


@dataclass(frozen=True)
class TrainedImages:
    """Images that training records have, too.

    Attributes:
        images: Why each image counts as trained on, by its key.
        records: Training records that were read.
        faulty: Training records that cannot be read.
        files: Their images that were compared by content.
        missing: Their images that are not in --training-images.
    """

    images: dict[Key, str]
    records: int = 0
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


def trained_images(
    images: Mapping[Key, Path], training: Iterable[str], training_root: str | None
) -> TrainedImages:
    """Find the images that occur in training records.

    Args:
        images: Existing files of evaluation images, by COCO's id or by a name.
        training: Files of training records.
        training_root: Folder of the training images; None: the folder of each file.

    Raises:
        UserError: A file cannot be read, or none of its entries is a record.
    """
    names: dict[Path, None] = {}
    embedded: list[bytes] = []
    num_records = num_faulty = 0
    for path in training:
        before = num_records
        records = open_records(DataFile(path=path, image_root=training_root))
        for record in track(records.conversations, records.total, f"reading {Path(path).name}"):
            if isinstance(record, RecordError):
                num_faulty += 1
                continue
            num_records += 1
            for image in record.images:
                if isinstance(image, bytes):
                    embedded.append(image)
                else:
                    names[image] = None
        if num_records == before:
            raise UserError(
                f"--training {path}: not one of its entries is a training record, or it has no "
                "records; give the records that the model was trained on, as `data.train` has them",
                code="no_records",
            )
    ids = {number for path in names if (number := coco_id(path)) is not None}
    found: dict[Key, str] = {}
    for key, file in images.items():
        number = key if isinstance(key, int) else coco_id(file)
        if number is not None and number in ids:
            found[key] = "same COCO id"
    existing = [path for path in names if path.is_file()]
    if not num_records:
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
    return TrainedImages(found, num_records, num_faulty, len(theirs), len(names) - len(existing))


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
