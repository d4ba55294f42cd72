"""Choose images and objects for the questions of POPE, and leave out images of training data."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from data_tools.coco import AnnotatedImage, CocoIndex
from data_tools.digests import hashed
from data_tools.findings import finding_lines
from data_tools.image_check import read_annotated
from data_tools.rules import POPE_FILES, POPE_SAMPLINGS
from data_tools.rules.facts import Facts
from data_tools.trained_images import given_records, trained_images
from vlm_sft.errors import UserError
from vlm_sft.utils import words
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import own_output, owned_open, write_owned_json

KIND: Final = "POPE questions"
"""What the marker of an output folder states that it holds."""

OFTEN_UNLABELED: Final = ("person", "car", "chair", "dining table", "cup", "book")
"""Categories that COCO often leaves without a box (RePOPE, arXiv 2504.15707)."""


def write_questions(arguments: argparse.Namespace) -> None:
    """Write the questions that the arguments ask for, and print what was left out."""
    instances, images_dir = Path(arguments.instances), Path(arguments.images)
    captions = Path(arguments.captions) if arguments.captions else None
    out, seed, pairs = Path(arguments.out), arguments.seed, arguments.questions // 2
    inputs = [instances, *([captions] if captions else []), *arguments.training]
    own_output(
        out, KIND, POPE_FILES, inputs=inputs, image_roots=[images_dir],
        overwrite=arguments.overwrite,
    )  # fmt: skip
    index, usable = read_annotated(
        instances, captions, images_dir, max_faulty=1.0, names=("--images", "")
    )
    least = max(arguments.min_objects, pairs)
    candidates = [image for image in usable if len(image.categories) >= least]
    seen = trained_images(
        {image.id: images_dir / image.file_name for image in candidates},
        [given_records(arguments.training, arguments.training_images, arguments.columns)],
    )
    allowed = [image for image in candidates if image.id not in seen.images]
    drawn = sorted(allowed, key=lambda image: hashed(seed, "image", image.id))[: arguments.count]
    chosen = sorted(drawn, key=lambda image: image.id)
    if not chosen:
        raise UserError(
            f"no image is left: {len(usable):,} usable images, {len(candidates):,} with at least "
            f"{least} kinds of objects, {len(seen.images):,} of them in --training; give other "
            "annotations, or a smaller --min-objects or --questions",
            code="no_records",
        )
    counts: dict[str, dict[str, int]] = {}
    for sampling in POPE_SAMPLINGS:
        number = 0
        with owned_open(out / f"pope_{sampling}.jsonl") as file:
            for row in questions(index, chosen, sampling, pairs, seed):
                number += 1
                file.write(json.dumps({"question_id": number, **row}).encode() + b"\n")
        missing = len(chosen) * pairs * 2 - number
        counts[sampling] = {"questions": number, "left_out": missing}
    summary = {
        "images": {
            "annotated": len(index.images), "usable": len(usable),
            "with_enough_objects": len(candidates), "in_training": len(seen.images),
            "wanted": arguments.count, "asked_about": len(chosen),
        },
        "training": seen.summary(),
        "files": counts,
        "captions_checked": captions is not None,
        "seed": seed,
        "image_ids": [image.id for image in chosen],
    }  # fmt: skip
    write_owned_json(out / POPE_FILES[-1], summary)
    lines = [*finding_lines(index.findings.as_dict().values()), *_table(summary, out)]
    echo("\n".join(lines), file=sys.stdout)


def questions(
    index: CocoIndex, images: Sequence[AnnotatedImage], sampling: str, pairs: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield questions, for each image alternately about a present and an absent object.

    An image with fewer than `pairs` objects that are certainly absent gets fewer pairs.

    Args:
        index: All annotations, which give the frequencies.
        images: The images to ask about, each with at least `pairs` kinds of objects.
        sampling: How absent objects are chosen: `random`, `popular` or `adversarial`.
        pairs: Questions of each kind per image.
        seed: Decides which objects are asked about, together with the image's id.
    """
    frequencies, together = index.frequencies(), index.together()
    for image in images:
        present = sorted(image.categories, key=lambda name: hashed(seed, image.id, name))[:pairs]
        absent: list[str] = []
        open_names = [name for name in index.categories if Facts(image).is_absent(name)]
        for name in present:
            rest = [other for other in open_names if other not in absent]
            rank: Mapping[str, int] = {"popular": frequencies, "adversarial": together[name]}.get(
                sampling, Counter()
            )
            if found := min(
                rest, key=lambda o: (-rank.get(o, 0), hashed(seed, image.id, o)), default=None
            ):
                absent.append(found)
        for yes, no in zip(present, absent, strict=False):
            for name, label in ((yes, "yes"), (no, "no")):
                row = {
                    "image": image.file_name,
                    "text": f"Is there {words.article(name)} {name} in the image?",
                    "label": label,
                    "category": name,
                }
                yield row | ({"often_unlabeled": True} if name in OFTEN_UNLABELED else {})


def _table(summary: Mapping[str, Any], out: Path) -> Iterator[str]:
    images, training = summary["images"], summary["training"]
    yield (
        f"{images['annotated']:,} annotated images: {images['usable']:,} usable, "
        f"{images['with_enough_objects']:,} with enough objects, {images['in_training']:,} left "
        f"out because the model was trained on them, {images['asked_about']:,} asked about"
    )
    if images["asked_about"] < images["wanted"]:
        yield (
            f"only {images['asked_about']:,} of the {images['wanted']:,} images of --count: there "
            "are no more"
        )
    for reason, count in training["found"].items():
        yield f"  {count:,} {reason} in --training"
    if training["faulty_records"]:
        total = training["records"] + training["faulty_records"]
        yield (
            f"{training['faulty_records']:,} of the {total:,} records in --training cannot be "
            "read: their images were NOT COMPARED"
        )
    if not training["records"]:
        yield "no --training: whether the model was trained on these images was NOT CHECKED"
    elif training["images_not_found"]:
        yield (
            f"{training['images_not_found']:,} training images were not found, and compared by "
            "name only; give their folder as --training-images"
        )
    if not summary["captions_checked"]:
        yield "no --captions: an absent object is one without a box"
    for name, counts in summary["files"].items():
        left_out = counts["left_out"]
        fewer = f", {left_out:,} fewer for lack of absent objects" if left_out else ""
        yield f"{counts['questions']:>7,} questions  {out / f'pope_{name}.jsonl'}{fewer}"
