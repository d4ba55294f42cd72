"""`explain`: one sample completely, on the terminal, as a page, or as an image with its boxes."""

import sys
from collections.abc import Sequence
from pathlib import Path

from data_tools.instruct.config import InstructConfig
from data_tools.instruct.options import stage_parser
from data_tools.instruct.report import drawing, sample_page, terminal
from data_tools.instruct.report.evidence import deciding
from data_tools.instruct.report.explanation import Explanation, explain
from data_tools.instruct.run_folder import run_inputs
from vlm_sft.commands.parser import CommandParser
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.output_files import write_result


def command(config: InstructConfig, options: Sequence[str]) -> None:
    """Show the sample whose id is among the options.

    Raises:
        UserError: There is no such id (the nearest are named), or no image for `--png`.
    """
    arguments = _parser().read(options)
    found = explain(config, arguments.id)
    if arguments.png:
        _write(arguments.png, image(found), config, found, arguments.overwrite)
        echo(f"{arguments.png}: the image with its boxes", file=sys.stdout)
    if arguments.html:
        page = sample_page.build(found).encode()
        _write(arguments.html, page, config, found, arguments.overwrite)
        echo(f"{arguments.html}: the sample as a page", file=sys.stdout)
    if not arguments.png and not arguments.html:
        from vlm_sft.utils.console import Console

        terminal.show(Console(highlight=False), found, whole_prompt=arguments.prompt)


def _write(
    path: Path, data: bytes, config: InstructConfig, found: Explanation, overwrite: bool
) -> None:
    """Write a result; the run's own files, its annotations and the image are inputs."""
    root = Path(config.output_dir)
    inputs: list[str | Path] = [*run_inputs(config)]
    inputs += [file for file in root.rglob("*") if file.is_file()]
    if found.image is not None:
        inputs.append(found.image_dir / found.image.file_name)
    write_result(path, data, inputs=inputs, overwrite=overwrite)


def _parser() -> CommandParser:
    parser = stage_parser("explain", __doc__)
    parser.add_argument("id", metavar="ID", help="of the sample, or of its request")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the image with its boxes")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write all of it as a page")
    parser.add_argument("--prompt", action="store_true", help="show system text and seed examples")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE, whatever it is")
    return parser


def image(found: Explanation) -> bytes:
    """The image with the boxes that were shown, as PNG.

    Raises:
        UserError: It is not in the index, or cannot be opened.
    """
    if found.image is None:
        raise UserError(f"image {found.request.image} is not in the index; run `index` again")
    opened = drawing.open_image(found.image_dir, found.image)
    if isinstance(opened, str):
        raise UserError(opened)
    checks = deciding(found.sample) if found.sample else ()
    return drawing.png(opened, drawing.marks(found.image, found.request.shown, checks))
