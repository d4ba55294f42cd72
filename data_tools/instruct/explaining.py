"""`explain`: one sample completely, on the terminal, as a page, or as a picture with its boxes."""

from collections.abc import Sequence
from pathlib import Path

from data_tools.instruct.config import InstructConfig
from data_tools.instruct.options import stage_parser
from data_tools.instruct.receipts import drawing, sample_page, terminal
from data_tools.instruct.receipts.evidence import deciding
from data_tools.instruct.receipts.explanation import Explanation, explain
from vlm_sft.atomic import write_bytes, write_text
from vlm_sft.command_line import CommandParser
from vlm_sft.errors import UserError


def command(config: InstructConfig, options: Sequence[str]) -> None:
    """Show the sample whose id is among the options.

    Raises:
        UserError: There is no such id (the nearest are named), or no picture for `--png`.
    """
    arguments = _parser().read(options)
    found = explain(config, arguments.id)
    if arguments.png:
        write_bytes(arguments.png, picture(found))
        print(f"{arguments.png}: the picture with its boxes")
    if arguments.html:
        write_text(arguments.html, sample_page.build(found))
        print(f"{arguments.html}: the sample as a page")
    if not arguments.png and not arguments.html:
        from rich.console import Console

        terminal.show(Console(highlight=False), found, whole_prompt=arguments.prompt)


def _parser() -> CommandParser:
    parser = stage_parser("explain", __doc__)
    parser.add_argument("id", metavar="ID", help="of the sample, or of its request")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the picture with its boxes")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write all of it as a page")
    parser.add_argument("--prompt", action="store_true", help="show system text and seed examples")
    return parser


def picture(found: Explanation) -> bytes:
    """The picture with the boxes that were shown, as PNG.

    Raises:
        UserError: It is not in the index, or cannot be opened.
    """
    if found.picture is None:
        raise UserError(f"picture {found.request.picture} is not in the index; run `index` again")
    image = drawing.open_picture(found.images, found.picture)
    if isinstance(image, str):
        raise UserError(image)
    checks = deciding(found.sample) if found.sample else ()
    return drawing.png(image, drawing.marks(found.picture, found.request.shown, checks))
