"""Read the annotations for `build_coco`, divide the images, and write its files."""

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_tools.coco import AnnotatedImage, CocoIndex
from data_tools.digests import file_digest
from data_tools.findings import MAX_EXAMPLES, finding_lines
from data_tools.image_check import read_annotated
from data_tools.rules import DEFAULT_PROBES, FILES, PROBE_FAMILIES
from data_tools.rules.datasets import Output, Writer
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.output_files import refuse_image, write_result
from vlm_sft.utils.owned_files import own_output, write_owned, write_owned_json
from vlm_sft.utils.ownership import refuse_input

KIND: Final = "COCO build"
"""What the marker of an output folder says that it holds."""

Images = Sequence[AnnotatedImage]


def build(arguments: argparse.Namespace) -> None:
    """Write the files that the arguments ask for, and print what is in them."""
    named = {"instances": arguments.instances, "captions": arguments.captions}
    inputs = {name: Path(path) for name, path in named.items() if path is not None}
    images_dir, target = Path(arguments.images), arguments.out_file
    if target is not None:
        refuse_input(target, [*inputs.values(), images_dir])
        refuse_image(Path(target), [images_dir])
    index, usable = read_annotated(
        inputs.get("instances"),
        inputs.get("captions"),
        images_dir,
        max_faulty=arguments.max_faulty,
        names=("--images", "--max-faulty "),
        follow_symlinks=arguments.follow_symlinks,
    )
    annotated, index = len(index.images), replace(index, images=usable)
    if arguments.follow_symlinks and target and Path(target).exists():
        refuse_input(target, (images_dir / image.file_name for image in index.images))
    train, held_out = _split(index, arguments.seed, arguments.eval_share)
    outputs = _outputs(arguments, index, train, held_out)
    summary = _summary(arguments, index, inputs, (len(train), len(held_out)), annotated, outputs)
    options: dict[str, Any] = {
        "inputs": [*inputs.values(), images_dir] if target is None else inputs.values(),
        "image_roots": [images_dir],
        "overwrite": arguments.overwrite,
    }
    if target is not None:
        [output] = outputs.values()
        write_result(target, output.data(), **options)
    else:
        folder = Path(arguments.out)
        own_output(folder, KIND, [*(f"{name}.json" for name in outputs), "build.json"], **options)
        for name, output in outputs.items():
            write_owned(folder / f"{name}.json", output.data())
        write_owned_json(folder / "build.json", summary)
    findings = dict(summary["findings"])
    if "captions" not in summary["inputs"]:  # then none is missing
        findings.pop("image_without_captions", None)
    lines = [*finding_lines(findings.values()), *_table(summary)]
    if target is None:
        made = [name for name, output in outputs.items() if output.summary()["records"]]
        lines += _next(arguments.out, arguments.images, made)
    echo("\n".join(lines), file=sys.stdout)


def _split(index: CocoIndex, seed: int, eval_share: float) -> tuple[Images, Images]:
    """Return images to train on and held-out ones, which depends on an image's id and the seed."""
    held_out = {
        image.id
        for image in index.images
        if np.random.default_rng([seed, image.id, 0]).random() < eval_share
    }
    if eval_share and not 0 < len(held_out) < len(index.images):
        raise UserError(
            f"--eval-share {eval_share}: of {len(index.images)} images {len(held_out)} would be "
            "held out; give more images or another share or seed"
        )
    return (
        tuple(image for image in index.images if image.id not in held_out),
        tuple(image for image in index.images if image.id in held_out),
    )


def _outputs(
    arguments: argparse.Namespace, index: CocoIndex, train: Images, held_out: Images
) -> dict[str, Output]:
    """Return the files by their names without ending; held-out images are not in the first two."""
    writer = Writer(index, arguments.seed, arguments.answers)
    wanted = [arguments.only] if arguments.only else FILES
    outputs: dict[str, Output] = {}
    for prefix, images in (("", train), ("eval_", held_out)):
        if not images or (prefix and arguments.out_file):
            continue
        if "stage1" in wanted:
            outputs[f"{prefix}stage1"] = writer.stage1(
                images,
                from_boxes=arguments.captions_from == "boxes",
                limit=arguments.captions_per_image,
            )
        if "stage2" in wanted:
            outputs[f"{prefix}stage2"] = writer.stage2(images, arguments.turns, arguments.families)
    per_image = arguments.probes
    if per_image is None and (held_out or arguments.only in PROBE_FAMILIES):
        per_image = DEFAULT_PROBES
    if per_image is not None:
        for family in PROBE_FAMILIES:
            if family in wanted:
                outputs[family] = writer.probes(family, held_out or train, per_image)
    return outputs


def _summary(
    arguments: argparse.Namespace,
    index: CocoIndex,
    inputs: Mapping[str, Path],
    split: tuple[int, int],
    annotated: int,
    outputs: Mapping[str, Output],
) -> dict[str, Any]:
    """Return the content of build.json."""
    used = index.images
    evaluations = Counter(i.split for i in used if i.split and not i.split.startswith("train"))
    shown = {record["image"] for output in outputs.values() for record in output.records}
    without_records = [i.file_name for i in used if i.boxes and i.file_name not in shown]
    unused = {
        "boxed_without_records": len(without_records),
        "first_boxed_without_records": without_records[:MAX_EXAMPLES],
    }
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
            **({} if arguments.only else unused),
            "evaluation_splits": dict(sorted(evaluations.items())),
        },
        "max_faulty": arguments.max_faulty,
        "findings": index.findings.as_dict(),
        "files": {f"{name}.json": output.summary() for name, output in outputs.items()},
    }


def _table(summary: Mapping[str, Any]) -> Iterator[str]:
    counts = summary["images"]
    yield (
        f"{counts['all']} of {counts['annotated']} annotated images: "
        f"{counts['train']} to train on, {counts['set_aside']} held out"
    )
    if counts["without_boxes"]:
        yield (
            f"{counts['without_boxes']} images have no boxes: what is absent from them is "
            "unknown, so they give captions at most"
        )
    if count := counts.get("boxed_without_records"):
        first = counts["first_boxed_without_records"]
        names = ", ".join(first) + ", ..." * (count > len(first))
        yield (
            f"{count} images with boxes give no records, for nothing that is asked is certain of "
            f"them (small objects, crowds, no question in balance): {names}"
        )
    if counts["without_captions"] and "captions" in summary["inputs"]:
        count = counts["without_captions"]
        yield f"{count} images have no captions: stage2.json does not ask to describe them"
    if splits := counts["evaluation_splits"]:
        named = ", ".join(f"{split} {count}" for split, count in splits.items())
        yield (
            f"{sum(splits.values())} images are of COCO's evaluation splits ({named}) and are "
            "kept: do not train on them if you evaluate on these images; the guard of "
            "`vlm-sft data plan` leaves them out"
        )
    yield f"{'file':<20} {'records':>8} {'questions':>10}  families"
    for name, made in summary["files"].items():
        families = ", ".join(f"{family} {count}" for family, count in made["families"].items())
        yield f"{name:<20} {made['records']:>8} {made['questions']:>10}  {families}"
        if not made["records"]:
            yield f"warning: {name} is empty: {_why_empty(name, summary)}"
        if made["rejected"]:
            codes = ", ".join(f"{code} {count}" for code, count in made["rejected"].items())
            yield f"{'':<20} left out, for the verifier rejects them: {codes}"
        if "existence_by_category_alone" in made:
            share = made["existence_by_category_alone"]
            text = (
                f"{share:.1%} of the questions of existence can be guessed from the category's "
                "name alone (50% is best; more images make it better)"
            )
            yield f"{'':<20} {text}"


def _why_empty(name: str, summary: Mapping[str, Any]) -> str:
    """Return why a file has no records, and the option that fills it if there is one."""
    given, images = summary["inputs"], summary["images"]
    from_boxes = summary["captions_from"] == "boxes"
    if name.endswith("stage1.json") and not from_boxes:
        missing = "no image has a caption"
        if "captions" not in given:
            missing = "captions were not given (--captions FILE)"
        if images["without_boxes"] < images["all"]:
            missing += "; --captions-from boxes writes them from the boxes"
        return missing
    if images["without_boxes"] == images["all"]:
        return (
            "no image has a box" if "instances" in given else "boxes were not given (--instances)"
        )
    return "the annotations hold nothing that could be asked in balance"


def _next(out: str, images: str, made: Sequence[str]) -> Iterator[str]:
    """Yield the commands that train and evaluate on the files.

    Args:
        out: The folder of the files.
        images: The folder of their images.
        made: Names of the files that have records, without ending.
    """
    yield "next:"
    if "stage2" in made:
        first = f"  vlm-sft init --data {shlex.quote(f'{out}/stage2.json')}"
        first += f" --images {shlex.quote(images)}"
        if "stage1" in made:
            first += f" --captions {shlex.quote(f'{out}/stage1.json')}"
        if "eval_stage2" in made:
            first += f" --eval {shlex.quote(f'{out}/eval_stage2.json')}"
        stage1 = (
            "stage 1" if "stage1" in made else "stage 1 (on questions, for there are no captions)"
        )
        yield f"{first}   # {stage1}, stage 2 and a suite"
    elif "stage1" in made:
        yield (
            f"  vlm-sft init --data {shlex.quote(f'{out}/stage1.json')} --images "
            f"{shlex.quote(images)}   # captions for both stages"
        )
    for name in (family for family in PROBE_FAMILIES if family in made):
        yield (
            f"  vlm-sft evaluate RUN/final --probes {shlex.quote(f'{out}/{name}.json')} --images "
            f"{shlex.quote(images)} --conditions right,blank --out {name}-results.json"
        )
    if "stage1" in made or "stage2" in made:
        yield (
            "init asks for the two models (--tower, --llm). Without a model hub, `python "
            "scripts/demo_pieces.py demo/pieces` makes two for a CPU: --tower "
            "demo/pieces/efficientnet-lite0 --llm demo/pieces/smollm2-135m-instruct --gpu cpu "
            "--out my --yes"
        )
