"""Measure a checkpoint: right answers to probes and caption losses."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlm_sft.commands.parser import (
    CommandParser,
    add_base_option,
    heavy_imports,
    require_file,
    require_folder,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.evaluation.conditions import CONDITIONS, Condition
from vlm_sft.utils.ownership import require_output_file

EXAMPLE = """example:
  vlm-sft evaluate runs/stage2/final --probes held_out/existence.json \\
      held_out/counting.json --images held_out/images --captions held_out/captions.json \\
      --out results.json

A file of probes is a JSON list or JSON lines, in this form or in POPE's:
  {"id": "1", "image": "a.jpg", "question": "Is there a dog?", "answer": "yes"}
  {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}
"""


def main(argv: Sequence[str]) -> int:
    """Measure, print a table, write `--out`; returns the exit code."""
    arguments = parser().read(argv)
    _require_fitting(arguments)
    from vlm_sft.commands.inputs import require_checkpoint
    from vlm_sft.evaluation.probe_files import read_rows

    for path in arguments.probes:
        require_file("--probes", path)
    if arguments.captions is not None:
        require_file("--captions", arguments.captions)
    require_folder("--images", arguments.images)
    require_checkpoint(arguments.checkpoint)
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
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/final or RUN/checkpoints/step-N")
    add(
        "--probes",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of questions with known answers; each gets its own rows in the table",
    )
    add(
        "--beside",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="probes that are asked with the right image alone, whatever the conditions",
    )
    add(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder that image names of probes and captions start from",
    )
    add(
        "--follow-symlinks",
        action="store_true",
        help="let symbolic links below --images lead out of it",
    )
    add("--captions", type=Path, metavar="FILE", help="records of one image each")
    add(
        "--answers",
        choices=["likeliest", "spoken"],
        default="likeliest",
        help="compare the likelihood of the bare answers (default), or let the model speak and "
        "take its last word for it; saying none of them is wrong",
    )
    add(
        "--conditions",
        type=_conditions,
        default=list(CONDITIONS),
        metavar=",".join(CONDITIONS),
        help="which image goes with a question: its own, a blank one, another one's "
        "(default: all three)",
    )
    few = "use the first N images of each file only (default: all)"
    add("--max-images", type=whole_number(1), metavar="N", help=few)
    add(
        "--out",
        type=Path,
        default=Path("results.json"),
        metavar="FILE",
        help="where the figures are written as JSON (default: results.json)",
    )
    replace = "replace --out even if this command did not write it"
    add("--overwrite", action="store_true", help=replace)
    add(
        "--seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="of the bootstrap and of the shuffled images (default: 0)",
    )
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: cuda if available")
    return parser


def _conditions(text: str) -> list[Condition]:
    names = text.split(",")
    if any(name not in CONDITIONS for name in names):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(CONDITIONS)}")
    return [condition for condition in CONDITIONS if condition in names]


def _require_fitting(arguments: argparse.Namespace) -> None:
    arguments.probes += arguments.beside
    if not arguments.probes and not arguments.captions:
        raise UserError("nothing to measure; give --probes FILE, --captions FILE or both")
    stems = [path.stem for path in arguments.probes]
    if twice := next((name for name in stems if stems.count(name) > 1), None):
        raise UserError(f"--probes: two files are named {twice}; rename one or measure it alone")


if __name__ == "__main__":
    run_command(main)
