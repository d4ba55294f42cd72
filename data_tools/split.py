"""Divide records into training and held-out ones, so that no image is in both.

Reads every format that training reads. Writes train.json and held_out.json (the records as they
are, in their order; rows of tables, captions and VQA questions as messages) and split.json (how
many there are, and why). Images are equal by path, by COCO id, by file content or by perceptual
hash, also over several steps; all records of equal images, and text-only records with the same
words, go to the same side. The side depends on the records and the seed, not on their order.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vlm_sft.commands.parser import (
    CommandParser,
    add_columns_option,
    heavy_imports,
    number,
    require_file,
    require_folder,
    whole_number,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.config.hub_address import is_hub_address
from vlm_sft.errors import UserError

EXAMPLES: Final = """examples:
  vlm-sft data split --records mine.json --images images --out split --held-out 0.05
  vlm-sft data split --records photos/captions.csv --images photos --out split --held-out 0.1
  vlm-sft data split --records table.csv --columns image=file,question=q,answer=a \\
      --images photos --out split --held-out 0.1
  vlm-sft data split --records a.json b.jsonl --images images --out split --held-out 500 --seed 1
"""


def main(argv: Sequence[str]) -> int:
    """Write the two files and their counts; return the exit code."""
    arguments = parser().read(argv)
    if arguments.images is not None:
        require_folder("--images", arguments.images)
    if arguments.annotations is not None:
        require_file("--annotations", arguments.annotations)
        if len(arguments.records) != 1:
            raise UserError("--annotations: are of one file of questions; give one --records")
    with heavy_imports():
        from data_tools.rules.split import write_split
        from vlm_sft.commands.inputs import require_records
        from vlm_sft.config.schema import ColumnNames
    arguments.columns = ColumnNames.of_option(arguments.columns)
    for path in arguments.records:
        require_records("--records", path)
    if arguments.images is None:
        arguments.images = _folder_of(arguments.records)
    write_split(arguments)
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft data split", __doc__, EXAMPLES)
    add = parser.add_argument
    add(
        "--records",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files or folders that training reads, or hf://datasets/OWNER/NAME",
    )
    add_columns_option(add, "--records")
    answers = "VQA: the file with the answers to the questions of --records"
    add("--annotations", type=Path, metavar="FILE", help=answers)
    name = "VQA: name of the image of an image_id, e.g. {image_id}.jpg"
    add("--image-name", metavar="TEXT", help=name)
    images = "folder that the image names start from (default: the folder of --records)"
    add("--images", type=Path, metavar="DIR", help=images)
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    add(
        "--held-out",
        type=_share_or_count,
        required=True,
        metavar="SHARE|N",
        help="share of the records below 1, or their number; fewer if groups do not fit",
    )
    add("--seed", type=whole_number(0), default=0, metavar="N", help="seed (default: 0)")
    add(
        "--bad-records",
        choices=["error", "leave_out"],
        default="error",
        help="what to do about records that the trainer cannot use: stop, or leave them out of "
        "both files and count them (default: error)",
    )
    add("--overwrite", action="store_true", help="replace edited files in --out")
    return parser


def _folder_of(records: Sequence[str]) -> Path:
    """Return the folder in which image names start as for training: that of the records.

    Raises:
        UserError: The records are in several folders, or on a hub.
    """
    paths = [Path(name) for name in records]
    folders = [path if path.is_dir() else path.parent for path in paths]
    on_hub = any(is_hub_address(name) for name in records)
    if on_hub or len({folder.resolve() for folder in folders}) > 1:
        place = "on a hub" if on_hub else "in several folders"
        raise UserError(
            f"--images: missing, and the records are {place}; give the folder that the image names "
            "start from"
        )
    return folders[0]


def _share_or_count(text: str) -> float | int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    try:
        share = number(0, 1, above=True)(text)
    except argparse.ArgumentTypeError:
        share = 1.0
    if share == 1:
        raise argparse.ArgumentTypeError("expected a share between 0 and 1, or a number of records")
    return share


if __name__ == "__main__":
    run_command(main)
