"""Write training runs as one HTML page: `python -m vlm_sft.report RUN [RUN ...]`."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from vlm_sft.commands.parser import CommandParser, heavy_imports
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError

WRITTEN_BY_RUNS: Final = (
    "metrics.jsonl",
    "starts.jsonl",
    "ledger.jsonl",
    "parts.json",
    "checkpoints",
    "final",
)
"""Names of which every run directory has at least one."""

ABOUT = "Write training runs, running, interrupted or finished, as one HTML page."

EXAMPLES = """\
examples:
  # writes RUN/report.html; the run may be running, finished or interrupted
  vlm-sft report runs/stage2_lora

  # compares runs: curves over each other, and the settings that differ
  vlm-sft report runs/stage2_lora runs/stage2_qlora --out comparison.html

  # prints the numbers: curves, ledger, answers, settings, time
  vlm-sft report runs/stage2_lora --json
"""


def main(argv: Sequence[str]) -> int:
    """Write the report of runs and print its path, or print their numbers.

    Raises:
        UserError: A folder is not a run directory, or the page would replace a file that this
            command did not write.
    """
    arguments = parser().read(argv)
    runs: list[Path] = arguments.runs
    for run_dir in runs:
        require_run(run_dir)
    require_different(runs)
    if arguments.json and arguments.out is not None:
        raise UserError("--json: prints to the terminal; remove --out, or redirect the output")
    from vlm_sft.checkpoint.run_dir import WRITTEN
    from vlm_sft.utils.console import echo
    from vlm_sft.utils.output_files import require_output_file

    if arguments.json:
        with heavy_imports():
            from vlm_sft.inspection.run_data import different_settings, read_run
        found = [read_run(run_dir) for run_dir in runs]
        numbers: dict[str, Any] = {"runs": [run.as_dict() for run in found]}
        if len(runs) > 1:
            numbers["different_settings"] = different_settings([run.settings for run in found])
        echo(json.dumps(numbers, ensure_ascii=False, indent=2), file=sys.stdout)
        return 0
    default = runs[0] / "report.html" if len(runs) == 1 else Path("comparison.html")
    names = sorted(WRITTEN - {"report.html"})
    out = require_output_file(
        arguments.out or default,
        inputs=[run_dir / name for run_dir in runs for name in names],
        command="report",
        overwrite=arguments.overwrite,
    )
    with heavy_imports():
        from vlm_sft.inspection.run_data import read_run
        from vlm_sft.inspection.run_report import report_page
        from vlm_sft.utils.atomic_files import write_text
    write_text(out, report_page([read_run(run_dir) for run_dir in runs]))
    echo(out, file=sys.stdout)
    return 0


def require_run(run_dir: Path) -> None:
    """Check that a directory is that of a run.

    Raises:
        UserError: It is not; the message names the run that it is inside, if it is a checkpoint.
    """
    if not run_dir.is_dir():
        found = "it is a file" if run_dir.exists() else "there is no such folder"
        raise UserError(f"{run_dir}: {found}; give the output_dir of a stage")
    if any((run_dir / name).exists() for name in WRITTEN_BY_RUNS):
        return
    above = next((p for p in run_dir.resolve().parents[:2] if (p / "metrics.jsonl").exists()), None)
    hint = f"give {above}, which it is a part of" if above else "give the output_dir of a stage"
    raise UserError(
        f"{run_dir}: not the output_dir of a training run (it has none of "
        f"{', '.join(WRITTEN_BY_RUNS)}); {hint}"
    )


def require_different(runs: Sequence[Path]) -> None:
    """Check that no directory is given twice.

    Raises:
        UserError: One is.
    """
    places: dict[str, Path] = {}
    for run_dir in runs:
        place = os.path.realpath(run_dir)
        if place in places:
            raise UserError(f"{run_dir}: is the same run as {places[place]}; give each run once")
        places[place] = run_dir


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft report", ABOUT, EXAMPLES)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="output_dir of a training run")
    add(
        "--out",
        type=Path,
        metavar="FILE",
        help="the page (default: RUN/report.html; of several runs, comparison.html)",
    )
    add("--json", action="store_true", help="print the numbers as JSON instead of writing a page")
    add("--overwrite", action="store_true", help="replace FILE even if `report` did not write it")
    return parser


if __name__ == "__main__":
    run_command(main)
