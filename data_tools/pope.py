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
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from data_tools.rules import POPE_FILES
from vlm_sft.commands.parser import (
    CommandParser,
    add_columns_option,
    heavy_imports,
    require_file,
    require_folder,
    whole_number,
)
from vlm_sft.commands.run_command import run_command

EXAMPLES: Final = """examples:
  vlm-sft data pope --instances annotations/instances_val2014.json --images val2014 \\
      --out pope --training llava_v1_5_mix665k.json
  vlm-sft evaluate runs/stage2/final --images val2014 \\
      --probes pope/pope_random.jsonl pope/pope_popular.jsonl pope/pope_adversarial.jsonl
"""


def main(argv: Sequence[str]) -> int:
    """Write the questions; return the exit code."""
    arguments = parser().read(argv)
    for option in ("--instances", "--captions"):
        if (path := getattr(arguments, option[2:])) is not None:
            require_file(option, Path(path))
    for path in arguments.training:
        require_file("--training", Path(path))
    for option in ("--images", "--training-images"):
        if (path := getattr(arguments, option[2:].replace("-", "_"))) is not None:
            require_folder(option, Path(path))
    with heavy_imports():
        from data_tools.rules.pope import write_questions
    write_questions(arguments)
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft data pope", __doc__, EXAMPLES)
    add = parser.add_argument
    add("--instances", required=True, metavar="FILE", help="COCO's instances_*.json, with boxes")
    add("--images", required=True, metavar="DIR", help="folder of the images")
    add("--out", required=True, metavar="DIR", help=f"where {', '.join(POPE_FILES)} are written")
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
    add_columns_option(add, "--training")
    add("--training-images", metavar="DIR", help="their image_root (default: each file's folder)")
    add("--seed", type=whole_number(0), default=0, metavar="N", help="seed (default: 0)")
    add("--overwrite", action="store_true", help="replace edited files in --out")
    return parser


def _even(text: str) -> int:
    value = whole_number(2)(text)
    if value % 2:
        raise argparse.ArgumentTypeError("expected an even number")
    return value


if __name__ == "__main__":
    run_command(main)
