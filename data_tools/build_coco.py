"""Turn COCO annotations into conversations of LLaVA's form, by rules and without a language model.

Writes stage1.json (caption pairs), stage2.json (conversations of several turns) and build.json
(what was made of what). With --eval-share or --probes it also writes existence.json, counting.json
and halves.json: single questions with their bare answers, for measuring. Every answer is checked
against boxes and captions, as in `data_tools.instruct`, and left out where it is rejected.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np

from data_tools.coco import AnnotatedImage, CocoIndex, read_coco
from data_tools.digests import file_digest
from data_tools.findings import MAX_FAULTY, finding_lines
from data_tools.image_check import require_few_missing, usable_images
from data_tools.rules import families
from data_tools.rules.datasets import Output, Writer
from data_tools.rules.phrases import AnswerStyle
from vlm_sft.commands.parser import CommandParser
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.output_files import refuse_image, write_result
from vlm_sft.utils.owned_files import own_output, write_owned, write_owned_json
from vlm_sft.utils.ownership import refuse_input

EXAMPLES = """examples:
  python -m data_tools.build_coco --instances annotations/instances_train2017.json \\
      --captions annotations/captions_train2017.json --images train2017 --out built --seed 0
  python -m data_tools.build_coco --instances I.json --captions C.json --images images \\
      --out built --seed 0 --eval-share 0.1 --answers sentence --turns 6
  python -m data_tools.build_coco --instances I.json --captions C.json --images images \\
      --seed 0 --only existence --probes 6 --out-file existence.json
"""

PROBE_FAMILIES: Final = ("existence", "counting", "halves")
FILES: Final = ("stage1", "stage2", *PROBE_FAMILIES)
DEFAULT_PROBES: Final = 6
KIND: Final = "COCO build"
"""What the marker of an output folder says that it holds."""


def main(argv: Sequence[str]) -> int:
    """Build the files `argv` asks for; returns the exit code."""
    arguments = parser().read(argv)
    _check(arguments)
    inputs = {
        name: Path(value)
        for name in ("instances", "captions")
        if (value := getattr(arguments, name)) is not None
    }
    if arguments.out_file is not None:
        _require_out_file(arguments, inputs)
    index, annotated = _read(arguments, inputs)
    if arguments.follow_symlinks and arguments.out_file and Path(arguments.out_file).exists():
        images = Path(arguments.images)
        refuse_input(arguments.out_file, (images / p.file_name for p in index.images))
    train, held_out = _split(index, arguments.seed, arguments.eval_share)
    if arguments.eval_share and not (train and held_out):
        raise UserError(
            f"--eval-share {arguments.eval_share}: of {len(index.images)} images "
            f"{len(held_out)} would be held out; give more images or another share or seed"
        )
    outputs = _outputs(arguments, index, train, held_out)
    receipt = _receipt(arguments, index, inputs, (len(train), len(held_out)), annotated, outputs)
    if arguments.out_file is not None:
        [output] = outputs.values()
        write_result(
            arguments.out_file,
            output.data(),
            inputs=inputs.values(),
            image_roots=[arguments.images],
            overwrite=arguments.overwrite,
        )
    else:
        _write_folder(arguments, inputs, outputs, receipt)
    echo(
        "\n".join([*finding_lines(receipt["findings"].values()), *_table(receipt)]), file=sys.stdout
    )
    return 0


def _require_out_file(arguments: argparse.Namespace, inputs: dict[str, Path]) -> None:
    """Refuse, before the annotations are read, a file that is an input of the command."""
    refuse_input(arguments.out_file, [*inputs.values(), arguments.images])
    refuse_image(Path(arguments.out_file), [arguments.images])


def _read(arguments: argparse.Namespace, inputs: dict[str, Path]) -> tuple[CocoIndex, int]:
    """Read the annotations; return those of usable images, and the number of annotated ones."""
    share, images = arguments.max_faulty, Path(arguments.images)
    remedy = "; --max-faulty 1 drops everything that is faulty"
    index = read_coco(inputs.get("instances"), inputs.get("captions"), share, remedy)
    require_few_missing(index.images, images, share)
    annotated = usable_images(index, images, follow_symlinks=arguments.follow_symlinks)
    index.findings.require_few({"image": len(index.images)}, share, remedy)
    if not annotated:
        raise UserError(
            f"--images {images}: not one of the {len(index.images):,} annotated images can be "
            "used; give annotations that list images, and the folder of these images",
            code="no_records",
        )
    return replace(index, images=annotated), len(index.images)


def _write_folder(
    arguments: argparse.Namespace,
    inputs: dict[str, Path],
    outputs: dict[str, Output],
    receipt: dict[str, Any],
) -> None:
    """Write all files into the output folder, replacing only what this command wrote there."""
    folder = Path(arguments.out)
    sources = [*inputs.values(), Path(arguments.images)]
    names = [*(f"{name}.json" for name in outputs), "build.json"]
    own_output(
        folder,
        KIND,
        names,
        inputs=sources,
        image_roots=[arguments.images],
        overwrite=arguments.overwrite,
    )
    for name, output in outputs.items():
        write_owned(folder / f"{name}.json", output.data())
    write_owned_json(folder / "build.json", receipt)


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("python -m data_tools.build_coco", __doc__, EXAMPLES)
    parser.add_argument("--instances", help="COCO's instances_*.json: boxes")
    parser.add_argument("--captions", help="COCO's captions_*.json")
    parser.add_argument("--images", required=True, help="folder of the images")
    parser.add_argument(
        "--follow-symlinks",
        action="store_true",
        help="use images that are symbolic links to a place outside of the folder",
    )
    parser.add_argument("--out", help="folder to write")
    parser.add_argument("--seed", type=int, required=True, help="0 or more")
    parser.add_argument(
        "--answers",
        choices=get_args(AnswerStyle),
        default="short",
        help="'Yes.'; a sentence; or 'I see a cat and a boat, so yes.', one question a record",
    )
    parser.add_argument(
        "--captions-from",
        choices=["captions", "boxes"],
        default="captions",
        help="stage-1 pairs: people's sentences, or 'A cat and a boat.', the largest first",
    )
    parser.add_argument(
        "--families",
        nargs="+",
        choices=families.FAMILIES,
        default=list(families.FAMILIES),
        help="what conversations ask about (everything)",
    )
    parser.add_argument("--turns", type=int, default=8, help="questions a conversation (8)")
    parser.add_argument(
        "--captions-per-image", type=int, help="stage-1 pairs an image (all captions)"
    )
    parser.add_argument(
        "--eval-share",
        type=float,
        default=0.0,
        help="share of images held out for evaluation, 0..0.9 (0)",
    )
    parser.add_argument(
        "--probes",
        type=int,
        help=f"single questions an image and family, on the held-out images, or on all with "
        f"--eval-share 0 (default: {DEFAULT_PROBES} where images are held out, else none)",
    )
    parser.add_argument(
        "--max-faulty",
        type=float,
        default=MAX_FAULTY,
        metavar="SHARE",
        help="share of the boxes, captions or images that may be dropped for one kind of fault, "
        f"0..1 ({MAX_FAULTY}); more is an error",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace output files that were edited or that this command did not write",
    )
    parser.add_argument("--only", choices=FILES, help="make one file only")
    parser.add_argument("--out-file", help="with --only: where that file goes, without build.json")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.instances is None and arguments.captions is None:
        raise UserError("give --instances, --captions or both: there is nothing to build from")
    if (arguments.out is None) == (arguments.out_file is None):
        raise UserError("give either --out FOLDER, or --only FAMILY with --out-file FILE")
    for name in ("out", "out_file", "images", "instances", "captions"):
        if getattr(arguments, name) == "":
            option = name.replace("_", "-")
            raise UserError(f"--{option}: the name is empty; give a path, or omit --{option}")
    if arguments.out_file is not None and arguments.only is None:
        raise UserError("--out-file holds one file: say which with --only")
    limits = (
        ("--seed", arguments.seed, 0, 2**63),
        ("--turns", arguments.turns, 1, 100),
        ("--captions-per-image", arguments.captions_per_image, 1, 1000),
        ("--eval-share", arguments.eval_share, 0, 0.9),
        ("--probes", arguments.probes, 2, 100),
        ("--max-faulty", arguments.max_faulty, 0, 1),
    )
    for name, value, low, high in limits:
        if value is not None and not low <= value <= high:
            raise UserError(f"{name}: found {value}, expected {low} to {high}")


def _split(
    index: CocoIndex, seed: int, eval_share: float
) -> tuple[tuple[AnnotatedImage, ...], tuple[AnnotatedImage, ...]]:
    """Return images to train on and held-out ones, which depends on an image's id and the seed."""
    aside = {
        image.id
        for image in index.images
        if np.random.default_rng([seed, image.id, 0]).random() < eval_share
    }
    return (
        tuple(image for image in index.images if image.id not in aside),
        tuple(image for image in index.images if image.id in aside),
    )


def _outputs(
    arguments: argparse.Namespace,
    index: CocoIndex,
    train: Sequence[AnnotatedImage],
    held_out: Sequence[AnnotatedImage],
) -> dict[str, Output]:
    """Return the files by their names without ending; held-out images are not in the first two."""
    writer = Writer(index, arguments.seed, arguments.answers)
    wanted = [arguments.only] if arguments.only else list(FILES)
    outputs: dict[str, Output] = {}
    for prefix, annotated in (("", train), ("eval_", held_out)):
        if annotated and not (prefix and arguments.out_file):
            if "stage1" in wanted:
                outputs[f"{prefix}stage1"] = writer.stage1(
                    annotated,
                    from_boxes=arguments.captions_from == "boxes",
                    limit=arguments.captions_per_image,
                )
            if "stage2" in wanted:
                outputs[f"{prefix}stage2"] = writer.stage2(
                    annotated, arguments.turns, arguments.families
                )
    per_image = arguments.probes
    if per_image is None and (held_out or arguments.only in PROBE_FAMILIES):
        per_image = DEFAULT_PROBES
    if per_image is not None:
        for family in PROBE_FAMILIES:
            if family in wanted:
                outputs[family] = writer.probes(family, held_out or train, per_image)
    return outputs


def _receipt(
    arguments: argparse.Namespace,
    index: CocoIndex,
    inputs: dict[str, Path],
    split: tuple[int, int],
    annotated: int,
    outputs: dict[str, Output],
) -> dict[str, Any]:
    used = index.images
    return {
        "command": "data_tools.build_coco",
        "seed": arguments.seed,
        "answers": arguments.answers,
        "captions_from": arguments.captions_from,
        "turns": arguments.turns,
        "eval_share": arguments.eval_share,
        "inputs": {
            name: {"file": path.name, "sha256": file_digest(path)} for name, path in inputs.items()
        },
        "images": {
            "annotated": annotated,
            "all": len(used),
            "train": split[0],
            "set_aside": split[1],
            "without_captions": sum(not image.captions for image in used),
            "without_boxes": sum(not image.boxes for image in used),
            "evaluation_splits": dict(
                sorted(Counter(p.split for p in used if _is_of_evaluation(p)).items())
            ),
        },
        "max_faulty": arguments.max_faulty,
        "findings": index.findings.as_dict(),
        "files": {f"{name}.json": output.summary() for name, output in outputs.items()},
    }


def _is_of_evaluation(image: AnnotatedImage) -> bool:
    return image.split is not None and not image.split.startswith("train")


def _table(receipt: dict[str, Any]) -> Iterator[str]:
    counts = receipt["images"]
    yield (
        f"{counts['all']} of {counts['annotated']} annotated images: "
        f"{counts['train']} to train on, "
        f"{counts['set_aside']} held out"
    )
    if counts["without_boxes"]:
        yield (
            f"{counts['without_boxes']} images have no boxes: what is absent from them is "
            "unknown, so they give captions only"
        )
    if counts["without_captions"]:
        yield f"{counts['without_captions']} images have no captions: no descriptions of them"
    if splits := counts["evaluation_splits"]:
        named = ", ".join(f"{split} {count}" for split, count in splits.items())
        yield (
            f"{sum(splits.values())} images are of COCO's evaluation splits ({named}) and are "
            "kept: do not train on them if you evaluate on these images; the guard of "
            "`data_tools.instruct` leaves them out"
        )
    yield f"{'file':<20} {'records':>8} {'questions':>10}  families"
    for name, made in receipt["files"].items():
        counts = ", ".join(f"{family} {count}" for family, count in made["families"].items())
        yield f"{name:<20} {made['records']:>8} {made['questions']:>10}  {counts}"
        if not made["records"]:
            yield f"{'':<20} empty: the annotations hold nothing that could be asked in balance"
        if made["rejected"]:
            codes = ", ".join(f"{code} {count}" for code, count in made["rejected"].items())
            yield f"{'':<20} left out, for the verifier rejects them: {codes}"
        if "existence_by_category_alone" in made:
            share = made["existence_by_category_alone"]
            yield f"{'':<20} existence guessed from the category's name alone: {share:.1%}"


if __name__ == "__main__":
    run_command(main)
