"""`explain`: one sample completely, on the terminal, as a page, or as an image with its boxes."""

import sys
from pathlib import Path

from data_tools.instruct.config import InstructConfig
from data_tools.instruct.report import drawing, sample_page, terminal
from data_tools.instruct.report.evidence import deciding
from data_tools.instruct.report.explanation import Explanation, explain
from data_tools.instruct.run_folder import run_inputs
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.output_files import write_result


def command(
    config: InstructConfig,
    id: str,
    *,
    png: Path | None = None,
    html: Path | None = None,
    prompt: bool = False,
    overwrite: bool = False,
) -> None:
    """Print a sample, or write it as an image or a page.

    Args:
        config: The run's.
        id: Of the sample or of its request.
        png: File for the image with its boxes.
        html: File for the page.
        prompt: Whether to print the system text and the seed examples.
        overwrite: Whether files that this command did not write may be replaced.

    Raises:
        UserError: There is no such id (the nearest are named), or no image for `--png`.
    """
    found = explain(config, id)
    if png:
        _write(png, image(found), config, found, overwrite)
        echo(f"{png}: the image with its boxes", file=sys.stdout)
    if html:
        _write(html, sample_page.build(found).encode(), config, found, overwrite)
        echo(f"{html}: the sample as a page", file=sys.stdout)
    if not png and not html:
        from vlm_sft.utils.console import Console

        terminal.show(Console(highlight=False), found, whole_prompt=prompt)


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
