"""`report`: one HTML page of what was made, and of what was not, with its plots."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from data_tools.instruct.config import InstructConfig
from data_tools.instruct.generate.answers import answers_folder
from data_tools.instruct.index import read_images
from data_tools.instruct.report import page
from data_tools.instruct.report.figures import Figures, gather
from data_tools.instruct.report.journeys import journeys
from data_tools.instruct.report.meanings import meanings
from data_tools.instruct.report.page import Report
from data_tools.instruct.report.plots import plots
from data_tools.instruct.run_folder import PLOTS, RunFolder
from vlm_sft.errors import UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.owned_files import OwnedFiles, remove_owned, write_owned
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import read_json

_RECEIPTS: Final = ("index.json", "plan.json", "export/export.json")
"""What stages write about their results, below the run's folder."""


def command(config: InstructConfig) -> None:
    """Write `report/report.html` and its plots; print where it lies and five figures.

    Raises:
        UserError: Nothing is indexed, or files of the run do not belong together.
    """
    folder = RunFolder(Path(config.output_dir))
    report = read(config, folder)
    path = folder.report / "report.html"
    write_owned(path, _built(report, folder).encode())
    drawn = dict(plots(report.figures))
    for name, data in drawn.items():
        write_owned(folder.report / name, data)
    for old in set(PLOTS) - set(drawn):  # of an earlier report
        remove_owned(folder.report / old)
    echo(f"{path}, and {len(drawn)} plots beside it", file=sys.stdout)
    for figure, words in page.headline(report.figures):
        echo(f"{figure:>16}  {words}", file=sys.stdout)


def _built(report: Report, folder: RunFolder) -> str:
    """Return the page, or name the file that was edited and has other values than a stage writes.

    Raises:
        UserError: A receipt of a stage was changed, and the page cannot be made from it.
    """
    try:
        return page.build(report)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        files = OwnedFiles(folder.root)
        changed = [name for name in _RECEIPTS if not files.is_ours(name)]
        if not changed:
            raise
        raise UserError(
            f"{folder.root / changed[0]}: was changed after its stage wrote it and has values that "
            f"the report cannot show ({error}); run its stage again with --overwrite",
            code="json_syntax",
        ) from error


def read(config: InstructConfig, folder: RunFolder) -> Report:
    """Everything a page is made of, in one pass over the run's files."""
    images = read_images(folder)
    found = journeys(folder, answers_folder(config)) if folder.requests.exists() else ()
    figures: Figures = gather(
        track(found, description="reading samples"),
        images,
        seed=config.seed,
        good_outcome="kept" if folder.kept.exists() else "accepted",
    )
    return Report(
        figures,
        images,
        Path(config.coco.images),
        index=_json(folder.index),
        plan=_json(folder.plan),
        export=_json(folder.exports / "export.json"),
        meanings=meanings(),
    )


def _json(path: Path) -> Mapping[str, Any]:
    """The file's object; empty where there is no such file."""
    if not path.exists():
        return {}
    content: Mapping[str, Any] = read_json(path)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected an object, found something else; the file was damaged, run its "
            "stage again",
            code="json_syntax",
        )
    return content
