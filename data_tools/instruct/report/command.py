"""`report`: write one HTML page of what was made and what was not, with its charts."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError

from data_tools.instruct.config import InstructConfig
from data_tools.instruct.generate.answers import answers_folder
from data_tools.instruct.index import read_images
from data_tools.instruct.report.charts import charts
from data_tools.instruct.report.counts import count_results
from data_tools.instruct.report.draw import save_figure
from data_tools.instruct.report.outcomes import outcome_lines
from data_tools.instruct.report.page import Report, headline, outcomes, render_report
from data_tools.instruct.report.results import read_results
from data_tools.instruct.run_folder import PLOTS, RunFolder
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import OwnedFiles, remove_owned, write_owned
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import read_json

_SUMMARIES: Final = ("index.json", "plan.json", "cleaning.json", "export/export.json")
"""Files in which stages summarize their results."""


def command(config: InstructConfig) -> None:
    """Write `report/report.html` and its charts; print five figures and all outcomes.

    Raises:
        UserError: Nothing is indexed, or files of the run do not belong together.
    """
    folder = RunFolder(Path(config.output_dir))
    report = read_report(config, folder)
    images = {name: save_figure(figure) for name, figure in charts(report.counts)}
    path = folder.report / "report.html"
    write_owned(path, _render(report, images, folder).encode())
    for name, image in images.items():
        write_owned(folder.report / f"{name}.png", image)
    for name in set(PLOTS) - {f"{name}.png" for name in images}:  # of an earlier report
        remove_owned(folder.report / name)
    echo(f"{path}, and {len(images)} charts as PNG files", file=sys.stdout)
    for value, caption in headline(report.counts):
        echo(f"{value:>16}  {caption}", file=sys.stdout)
    echo("", file=sys.stdout)
    for line in outcome_lines(outcomes(report)):
        echo(line, file=sys.stdout)


def read_report(config: InstructConfig, folder: RunFolder) -> Report:
    """Read a run in one pass over its files.

    Raises:
        UserError: Nothing is indexed, or files of the run do not belong together.
    """
    images = read_images(folder)
    planned = folder.requests.exists()
    results = read_results(folder, answers_folder(config)) if planned else ()
    counts = count_results(
        track(results, description="reading samples"),
        images,
        seed=config.seed,
        good_outcome="kept" if folder.kept.exists() else "accepted",
    )
    summaries = (_read_object(folder.root / name) for name in _SUMMARIES)
    return Report(counts, images, Path(config.coco.images), *summaries)


def _render(report: Report, images: Mapping[str, bytes], folder: RunFolder) -> str:
    """Return the page.

    Raises:
        UserError: A summary was edited, and its values cannot be shown.
    """
    try:
        return render_report(report, images)
    except (TypeError, ValueError, LookupError, AttributeError, TemplateError) as error:
        files = OwnedFiles(folder.root)
        changed = [name for name in _SUMMARIES if not files.is_ours(name)]
        if not changed:
            raise
        raise UserError(
            f"{folder.root / changed[0]}: was changed after its stage wrote it and has values that "
            f"the report cannot show ({error}); run its stage again with --overwrite",
            code="json_syntax",
        ) from error


def _read_object(path: Path) -> Mapping[str, Any]:
    """Return the JSON object in a file; an empty one if there is no file."""
    if not path.exists():
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected a JSON object; the file was damaged, run its stage again",
            code="json_syntax",
        )
    return content
