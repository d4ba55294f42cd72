"""Turn COCO annotations into conversations of LLaVA's form, by rules and without a language model.

Writes stage1.json (caption pairs), stage2.json (conversations of several turns) and build.json
(what was made of what). With --eval-share or --probes it also writes existence.json, counting.json
and halves.json: single questions with their bare answers, for measuring. Every answer is checked
against boxes and captions, as in `vlm-sft data run`, and left out where it is rejected.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from data_tools.rules import DEFAULT_PROBES, FAMILIES, FILES
from vlm_sft.commands.parser import (
    CommandParser,
    heavy_imports,
    number,
    require_folder,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError

EXAMPLES: Final = """examples:
  vlm-sft data build_coco --instances annotations/instances_train2017.json \\
      --captions annotations/captions_train2017.json --images train2017 --out built
  vlm-sft data build_coco --instances I.json --captions C.json --images images \\
      --out built --eval-share 0.1 --answers sentence --turns 6
  vlm-sft data build_coco --instances I.json --captions C.json --images images \\
      --only existence --probes 6 --out-file existence.json
"""


def main(argv: Sequence[str]) -> int:
    """Build the files `argv` asks for; returns the exit code."""
    arguments = parser().read(argv)
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
    require_folder("--images", Path(arguments.images))
    with heavy_imports():
        from data_tools.rules.build import build
    build(arguments)
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft data build_coco", __doc__, EXAMPLES)
    add, share = parser.add_argument, number(0, 1)
    add("--instances", metavar="FILE", help="COCO's instances_*.json: boxes")
    add("--captions", metavar="FILE", help="COCO's captions_*.json")
    add("--images", required=True, metavar="DIR", help="folder of the images")
    add(
        "--follow-symlinks",
        action="store_true",
        help="use images that are symbolic links to a place outside of the folder",
    )
    add("--out", metavar="DIR", help="folder to write")
    seed = "seed of the wording and of which images are held out (default: 0)"
    add("--seed", type=whole_number(0), default=0, metavar="N", help=seed)
    add(
        "--answers",
        choices=["short", "sentence", "evidence"],
        default="short",
        help="'Yes.'; a sentence; or 'I see a cat and a boat, so yes.', one question a record "
        "(default: short)",
    )
    add(
        "--captions-from",
        choices=["captions", "boxes"],
        default="captions",
        help="stage-1 pairs: people's sentences (--captions), or 'A cat and a boat.' from the "
        "boxes, the largest first (default: captions)",
    )
    add(
        "--families",
        nargs="+",
        choices=FAMILIES,
        default=FAMILIES,
        metavar="FAMILY",
        help=f"what conversations ask about: {', '.join(FAMILIES)} (default: everything; "
        "descriptions are people's captions, --captions)",
    )
    add(
        "--turns",
        type=whole_number(1, 100),
        default=8,
        metavar="N",
        help="about how many questions a conversation has: existence is asked in pairs, one "
        "answered yes and one no (default: 8)",
    )
    add(
        "--captions-per-image",
        type=whole_number(1),
        metavar="N",
        help="stage-1 pairs an image (default: all captions)",
    )
    add(
        "--eval-share",
        type=number(0, 0.9),
        default=0.0,
        metavar="SHARE",
        help="share of images held out for evaluation, 0 to 0.9 (default: 0)",
    )
    add(
        "--probes",
        type=whole_number(2, 100),
        metavar="N",
        help="single questions an image and family, on the held-out images, or on all with "
        f"--eval-share 0 (default: {DEFAULT_PROBES} where images are held out, else none)",
    )
    add(
        "--max-faulty",
        type=share,
        default=0.01,
        metavar="SHARE",
        help="share of the boxes, captions or images that may be dropped for one kind of fault; "
        "more is an error (default: 0.01)",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace output files that were edited or that this command did not write",
    )
    add("--only", choices=FILES, help="make one file only")
    add(
        "--out-file",
        metavar="FILE",
        help="with --only: where that file goes, without build.json",
    )
    return parser


if __name__ == "__main__":
    run_command(main)
