"""Evaluate a checkpoint on questions with known answers and on captions."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm_sft.commands.parser import (
    CHECKPOINT_HELP,
    CommandParser,
    add_base_option,
    add_template_option,
    heavy_imports,
    require_file,
    require_folder,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.evaluation.conditions import IMAGE_CONDITIONS, ImageCondition
from vlm_sft.utils.output_files import require_output_file

EXAMPLE = """example:
  vlm-sft evaluate runs/stage2/final --probes held_out/existence.json \\
      held_out/counting.json --images held_out/images --captions held_out/captions.json \\
      --out results.json

A file of questions is a JSON list or JSON Lines, in this format or in POPE's:
  {"id": "1", "image": "a.jpg", "question": "Is there a dog?", "answer": "yes"}
  {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}
"""


def main(argv: Sequence[str]) -> int:
    """Evaluate, print a table, write `--out`; return the exit code."""
    arguments = parser().read(argv)
    _require_fitting(arguments)
    from vlm_sft.commands.inputs import require_model_source
    from vlm_sft.evaluation.question_files import read_rows

    for path in arguments.probes:
        require_file("--probes", path)
    if arguments.captions is not None:
        require_file("--captions", arguments.captions)
    require_folder("--images", arguments.images)
    require_model_source(arguments.checkpoint)
    captions = [arguments.captions] if arguments.captions else []
    arguments.out = require_output_file(
        arguments.out,
        inputs=[arguments.checkpoint, *arguments.probes, *captions],
        image_roots=[arguments.images],
        command="evaluate",
        overwrite=arguments.overwrite,
    )
    for path in arguments.probes:
        read_rows(path)
    with heavy_imports():
        from vlm_sft.commands.evaluate import run
    return run(arguments)


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft evaluate", __doc__, EXAMPLE)
    add_base_option(parser)
    add_template_option(parser)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    add(
        "--probes",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of questions with known answers; each has its own rows in the table",
    )
    add(
        "--right-only",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of questions that are asked only with the right image",
    )
    add(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the image names in --probes and --captions",
    )
    add(
        "--follow-symlinks",
        action="store_true",
        help="allow symbolic links that leave --images",
    )
    add(
        "--captions",
        type=Path,
        metavar="FILE",
        help="file of records with one image each, to compare losses",
    )
    add(
        "--answers",
        choices=["likeliest", "free_form"],
        default="likeliest",
        help="choose the most likely of the possible answers (default), or generate text and take "
        "the last possible answer in it; a text without one is wrong",
    )
    add(
        "--conditions",
        type=_conditions,
        default=list(IMAGE_CONDITIONS),
        metavar=",".join(IMAGE_CONDITIONS),
        help="images to show with each question: its own, a blank one, another question's "
        "(default: all three)",
    )
    few = "use only the first N images of each file (default: all)"
    add("--max-images", type=whole_number(1), metavar="N", help=few)
    add(
        "--out",
        type=Path,
        default=Path("results.json"),
        metavar="FILE",
        help="JSON file of the results (default: results.json)",
    )
    replace = "replace --out even if this command did not write it"
    add("--overwrite", action="store_true", help=replace)
    add(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="seed of the bootstrap and of the shuffled images (default: 0)",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: cuda if available")
    return parser


def _conditions(text: str) -> list[ImageCondition]:
    names = text.split(",")
    if any(name not in IMAGE_CONDITIONS for name in names):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(IMAGE_CONDITIONS)}")
    return [condition for condition in IMAGE_CONDITIONS if condition in names]


def _require_fitting(arguments: argparse.Namespace) -> None:
    arguments.probes += arguments.right_only
    if not arguments.probes and not arguments.captions:
        raise UserError("nothing to evaluate; give --probes FILE, --captions FILE or both")
    stems = [path.stem for path in arguments.probes]
    if twice := next((name for name in stems if stems.count(name) > 1), None):
        raise UserError(f"--probes: two files are named {twice}; rename one or evaluate it alone")


if __name__ == "__main__":
    run_command(main)
