"""Compare evaluation images with those of training records, and report the overlap."""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

from data_tools.rules.run_records import origins_of, used_records
from data_tools.trained_images import Key, given_records, trained_images
from vlm_sft.errors import UserError
from vlm_sft.evaluation.scores.files import read_rows
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.console import echo
from vlm_sft.utils.ownership import MADE_BY, made_by

IMAGE_SUFFIXES: Final = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
)


def report_overlap(arguments: argparse.Namespace) -> None:
    """Print how many evaluation images were trained on, and write which.

    Raises:
        UserError: There are no images, or a file is malformed.
    """
    names = _names(arguments.images, arguments.questions)
    existing = {
        name: arguments.images / name for name in names if (arguments.images / name).is_file()
    }
    if not existing:
        raise UserError(
            f"--images {arguments.images}: none of the {len(names):,} images is there",
            code="no_records",
        )
    files: dict[Key, Path] = {name: path for name, path in existing.items()}
    training = [given_records(arguments.training, arguments.training_images, arguments.columns)]
    training += map(used_records, arguments.run)
    seen = trained_images(files, training)
    summary: dict[str, Any] = {
        "images": len(existing),
        "images_not_found": len(names) - len(existing),
        "overlapping": len(seen.images),
        "training": seen.summary() | {"records_not_used": seen.not_used},
        "overlap": {str(name): seen.images[name] for name in sorted(seen.images, key=str)},
    }
    lines = [f"{len(existing):,} evaluation images, {len(seen.images):,} of them trained on"]
    lines += [f"  {count:,} {why}" for why, count in sorted(Counter(seen.images.values()).items())]
    if seen.not_used:
        lines.append(f"{seen.not_used:,} training records were not used in training, do not count")
    for run, origin in origins_of(arguments.run):
        lines.append(
            f"{run} began with {origin}, whose training records were NOT COMPARED; give its run as "
            "--run, too"
        )
    if summary["images_not_found"]:
        lines.append(f"{summary['images_not_found']:,} images are not in --images: NOT COMPARED")
    if seen.faulty:
        lines.append(f"{seen.faulty:,} training records cannot be read: NOT COMPARED")
    if seen.missing:
        lines.append(
            f"{seen.missing:,} training images were not found, and compared by COCO id only; give "
            "their folder as --training-images"
        )
    if arguments.out is not None:
        write_json(arguments.out, {MADE_BY: made_by("overlap"), **summary})
        lines.append(str(arguments.out))
    echo("\n".join(lines), file=sys.stdout)


def _names(images: Path, questions: list[Path]) -> list[str]:
    """Return the names of the images that the questions are about, or of all in the folder."""
    if questions:
        rows = [row for path in questions for row in read_rows(path, ("questions", "annotations"))]
        return list(dict.fromkeys(row.text("image", "file_name") for row in rows))
    found = (path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(str(path.relative_to(images)) for path in found)
