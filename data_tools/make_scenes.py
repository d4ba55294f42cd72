"""Compose images from emoji art and write them with COCO's own annotations."""

import os
from collections.abc import Sequence
from typing import Final

from vlm_sft.commands.parser import CommandParser, heavy_imports, number, whole_number
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError

EXAMPLES: Final = """examples:
  vlm-sft data make_scenes --out scenes/train --artist openmoji --count 2000 --seed 1
  vlm-sft data make_scenes --out scenes/unseen --artist twemoji --count 300 --seed 2 --max-side 320
  vlm-sft data make_scenes --out scenes/pets --artist twemoji --count 50 --seed 3 \\
      --categories dog,cat,bird --min-objects 1 --max-objects 3
"""


def main(argv: Sequence[str]) -> int:
    """Make the scenes `argv` asks for; returns the exit code."""
    arguments = parser().read(argv)
    if not arguments.out:
        raise UserError("--out: the name is empty; give a folder to write")
    with heavy_imports():
        from data_tools.scenes.files import make_scenes
    make_scenes(arguments)
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft data make_scenes", __doc__, EXAMPLES)
    add, share = parser.add_argument, number(0, 1)
    add("--out", required=True, metavar="DIR", help="folder to write: images/, annotations/")
    add("--artist", required=True, choices=["openmoji", "twemoji"], help="whose drawings")
    add("--count", required=True, type=whole_number(1), metavar="N", help="number of images")
    add("--seed", required=True, type=whole_number(0), metavar="N", help="0 or more")
    add("--categories", metavar="NAMES", help="dog,cat,... or a JSON file (default: all)")
    add(
        "--min-objects",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="fewest categories of an image (default: 1)",
    )
    add(
        "--max-objects",
        type=whole_number(1),
        metavar="N",
        help="most categories of an image (default: 4, or all if fewer)",
    )
    add(
        "--max-instances",
        type=whole_number(1, 20),
        default=3,
        metavar="N",
        help="most objects of a category (default: 3)",
    )
    add(
        "--scale",
        type=number(0.05, 0.9),
        nargs=2,
        default=(0.2, 0.55),
        metavar=("MIN", "MAX"),
        help="objects' longer side as a share of the image's shorter side (default: 0.2 0.55)",
    )
    add(
        "--max-side",
        type=whole_number(96, 4096),
        default=640,
        metavar="N",
        help="longer side in pixels (default: 640, as COCO)",
    )
    add("--augment", type=share, default=0.5, help="how much drawings vary, 0 to 1 (default: 0.5)")
    add("--crowd-share", type=share, default=0.05, help="images with a crowd (default: 0.05)")
    add(
        "--visible-share",
        type=number(0.1, 1),
        default=0.6,
        help="least part of an object that others leave visible, 0.1 to 1 (default: 0.6)",
    )
    add("--backgrounds", metavar="NAMES", help="meadow,water,... (default: all)")
    add(
        "--overwrite",
        action="store_true",
        help="replace files in the folder that were edited or that this command did not write",
    )
    add(
        "--workers",
        type=whole_number(1, 1024),
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; they change no byte of the results (default: all cores)",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
