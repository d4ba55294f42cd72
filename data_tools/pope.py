"""Write POPE questions about the existence of objects, from COCO boxes (arXiv 2305.10355).

Each image gets as many questions about objects that are there as about objects that are not. The
absent objects are chosen in three ways, one file each: `random`; `popular`, the objects that occur
in most images; `adversarial`, those that most often occur together with the objects asked about.
Images that a model was trained on (--training) are left out, by COCO id, by file content and by
perceptual hash.

Boxes are not complete: with --captions, an object that a caption names does not count as absent.
Questions about categories that COCO often leaves without a box have "often_unlabeled": true.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlm_sft.commands.parser import CommandParser, whole_number
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo

if TYPE_CHECKING:
    from data_tools.coco import AnnotatedImage, CocoIndex

KIND: Final = "POPE questions"
"""What the marker of an output folder states that it holds."""

SAMPLINGS: Final = ("random", "popular", "adversarial")
SUMMARY: Final = "pope.json"
OUTPUTS: Final = (*(f"pope_{name}.jsonl" for name in SAMPLINGS), SUMMARY)

OFTEN_UNLABELED: Final = ("person", "car", "chair", "dining table", "cup", "book")
"""Categories that COCO often leaves without a box (RePOPE, arXiv 2504.15707)."""

HASH_DISTANCE: Final = 6
"""Bits of 64 by which the perceptual hashes of equal images may differ."""

EXAMPLES: Final = """examples:
  python -m data_tools.pope --instances annotations/instances_val2014.json --images val2014 \\
      --out pope --training llava_v1_5_mix665k.json
  python -m vlm_sft.evaluate runs/stage2/final --images val2014 \\
      --probes pope/pope_random.jsonl pope/pope_popular.jsonl pope/pope_adversarial.jsonl
"""


def main(argv: Sequence[str]) -> int:
    """Write the questions; return the exit code."""
    arguments = parser().read(argv)
    _require_inputs(arguments)
    from data_tools.coco import read_coco
    from data_tools.findings import finding_lines
    from data_tools.image_check import usable_images
    from vlm_sft.utils.owned_files import own_output, owned_open, write_owned_json

    images_dir, out = Path(arguments.images), Path(arguments.out)
    inputs = [arguments.instances, *([arguments.captions] if arguments.captions else [])]
    own_output(
        out, KIND, OUTPUTS, inputs=[*inputs, *arguments.training], image_roots=[images_dir],
        overwrite=arguments.overwrite,
    )  # fmt: skip
    captions = Path(arguments.captions) if arguments.captions else None
    index = read_coco(Path(arguments.instances), captions, 1.0)
    usable = usable_images(index, images_dir)
    if not usable:
        raise UserError(
            f"--images {images_dir}: not one of the {len(index.images):,} annotated images can be "
            "used; give the folder of these images",
            code="no_records",
        )
    pairs = arguments.questions // 2
    candidates = [
        image for image in usable if len(image.categories) >= max(arguments.min_objects, pairs)
    ]
    seen = trained_images(candidates, images_dir, arguments.training, arguments.training_images)
    allowed = [image for image in candidates if image.id not in seen.images]
    chosen = sorted(
        sorted(allowed, key=lambda image: _order(arguments.seed, "image", image.id))[
            : arguments.count
        ],
        key=lambda image: image.id,
    )
    if not chosen:
        raise UserError(
            f"no image is left: {len(usable):,} usable images, {len(candidates):,} with at least "
            f"{max(arguments.min_objects, pairs)} kinds of objects, {len(seen.images):,} of them "
            "in --training; give other annotations, or a smaller --min-objects or --questions",
            code="no_records",
        )
    counts: dict[str, dict[str, int]] = {}
    for sampling in SAMPLINGS:
        number = 0
        with owned_open(out / f"pope_{sampling}.jsonl") as file:
            for row in questions(index, chosen, sampling, pairs, arguments.seed):
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
        "seed": arguments.seed,
        "image_ids": [image.id for image in chosen],
    }  # fmt: skip
    write_owned_json(out / SUMMARY, summary)
    echo(
        "\n".join([*finding_lines(index.findings.as_dict().values()), *_table(summary, out)]),
        file=sys.stdout,
    )
    return 0


def questions(
    index: "CocoIndex", images: Sequence["AnnotatedImage"], sampling: str, pairs: int, seed: int
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
    from vlm_sft.utils import words

    frequencies, together = index.frequencies(), index.together()
    for image in images:
        present = sorted(image.categories, key=lambda name: _order(seed, image.id, name))[:pairs]
        absent: list[str] = []
        open_names = [name for name in index.categories if _is_absent(image, name)]
        for name in present:
            rest = [other for other in open_names if other not in absent]
            rank: Mapping[str, int] = {"popular": frequencies, "adversarial": together[name]}.get(
                sampling, Counter()
            )
            if found := min(
                rest, key=lambda o: (-rank.get(o, 0), _order(seed, image.id, o)), default=None
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


@dataclass(frozen=True)
class TrainedImages:
    """Images that training records have, too.

    Attributes:
        images: Why each image counts as trained on, by COCO id.
        records: Training records that were read.
        faulty: Training records that cannot be read.
        files: Their images that were compared by content.
        missing: Their images that are not in --training-images.
    """

    images: dict[int, str]
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
    images: Sequence["AnnotatedImage"],
    images_dir: Path,
    training: Iterable[str],
    training_root: str | None,
) -> TrainedImages:
    """Find the images that occur in training records.

    Args:
        images: Images that might be asked about.
        images_dir: Their folder.
        training: Files of training records.
        training_root: Folder of the training images; None: the folder of each file.

    Raises:
        UserError: A file cannot be read, or none of its entries is a record.
    """
    from data_tools.instruct.contamination import coco_id
    from vlm_sft.config.schema import DataFile
    from vlm_sft.data.records import open_records
    from vlm_sft.errors import RecordError
    from vlm_sft.utils.progress import track

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
    found = {image.id: "same COCO id" for image in images if image.id in ids}
    existing = [path for path in names if path.is_file()]
    if not num_records:
        return TrainedImages(found)
    contents = {hashlib.sha256(data).digest() for data in embedded}
    sizes = {path.stat().st_size for path in existing} | {len(data) for data in embedded}
    ours = {image.id: images_dir / image.file_name for image in images if image.id not in found}
    same_size = {number: p for number, p in ours.items() if p.stat().st_size in sizes}
    wanted = {path.stat().st_size for path in same_size.values()}
    contents |= {_digest(path) for path in existing if path.stat().st_size in wanted}
    found |= {n: "same file" for n, path in same_size.items() if _digest(path) in contents}
    theirs: list[Path | bytes] = [*existing, *embedded]
    found |= _similar({n: p for n, p in ours.items() if n not in found}, theirs)
    return TrainedImages(found, num_records, num_faulty, len(theirs), len(names) - len(existing))


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("python -m data_tools.pope", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--instances", required=True, metavar="FILE", help="COCO's instances_*.json, with boxes")
    add("--images", required=True, metavar="DIR", help="folder of the images")
    add("--out", required=True, metavar="DIR", help=f"where {', '.join(OUTPUTS)} are written")
    add("--captions", metavar="FILE", help="COCO's captions_*.json: what they name is not absent")
    add(
        "--count",
        type=whole_number(1),
        default=500,
        metavar="N",
        help="number of images (default: 500, as POPE)",
    )
    add(
        "--questions",
        type=_even,
        default=6,
        metavar="N",
        help="questions per image and file, half of them with the answer yes (default: 6)",
    )
    add(
        "--min-objects",
        type=whole_number(1),
        default=3,
        metavar="N",
        help="kinds of objects that an image has at least (default: 3)",
    )
    add(
        "--training",
        nargs="+",
        default=[],
        metavar="FILE",
        help="records that the model was trained on; their images are not asked about",
    )
    add("--training-images", metavar="DIR", help="their image_root (default: each file's folder)")
    add("--seed", type=whole_number(0), default=0, metavar="N", help="seed (default: 0)")
    add("--overwrite", action="store_true", help="replace edited files in --out")
    return parser


def _require_inputs(arguments: argparse.Namespace) -> None:
    for path in (arguments.instances, arguments.captions, *arguments.training):
        if path is not None and not Path(path).exists():
            raise UserError(f"{path}: no such file", code="data_file_missing")
    for name in ("images", "training_images"):
        path = getattr(arguments, name)
        if path is not None and not Path(path).is_dir():
            raise UserError(f"--{name.replace('_', '-')} {path}: no such folder")


def _even(text: str) -> int:
    value = whole_number(2)(text)
    if value % 2:
        raise argparse.ArgumentTypeError("expected an even number")
    return value


def _is_absent(image: "AnnotatedImage", name: str) -> bool:
    from vlm_sft.utils import words

    return name not in image.categories and not any(
        words.mentions(caption, name) for caption in image.captions
    )


def _order(*values: object) -> bytes:
    return hashlib.sha256(" ".join(map(str, values)).encode()).digest()


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _similar(ours: Mapping[int, Path], theirs: Sequence[Path | bytes]) -> dict[int, str]:
    """Return the images whose perceptual hash is near that of a training image."""
    if not ours or not theirs:
        return {}
    try:
        from imagehash import phash
    except ImportError:
        raise UserError(
            "comparing images with --training needs the package ImageHash: "
            "pip install -e '.[instruct]'"
        ) from None
    import numpy as np

    from vlm_sft.data.images import open_image
    from vlm_sft.errors import ImageError
    from vlm_sft.utils.progress import track

    def hash_of(source: Path | bytes) -> int | None:
        try:
            return int(str(phash(open_image(source))), 16)
        except ImageError:
            return None

    found_hashes = [hash_of(s) for s in track(theirs, len(theirs), "hashing training images")]
    known = np.array([value for value in found_hashes if value is not None], np.uint64)
    near: dict[int, str] = {}
    for number, path in track(ours.items(), len(ours), "comparing images"):
        value = hash_of(path)
        if value is not None and len(known):
            distance = np.bitwise_count(known ^ np.uint64(value)).min()
            if distance <= HASH_DISTANCE:
                near[number] = "similar image"
    return near


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


if __name__ == "__main__":
    run_command(main)
