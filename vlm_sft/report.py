"""Write a training run as one HTML page: `python -m vlm_sft.report RUN`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vlm_sft.commands.parser import CommandParser, heavy_imports
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError

WRITTEN_BY_RUNS: Final = ("metrics.jsonl", "ledger.jsonl", "parts.json", "checkpoints", "final")
"""Names of which every run directory has at least one."""

ABOUT = "Write a training run, finished or interrupted, as one HTML page."

EXAMPLES = """\
examples:
  # writes RUN/report.html; the run may be finished or interrupted
  vlm-sft report runs/stage2_lora

  # writes the page to another file
  vlm-sft report runs/stage2_lora --out stage2.html
"""


def main(argv: Sequence[str]) -> int:
    """Write the report of a run, finished or interrupted, and print its path.

    Raises:
        UserError: The folder is not a run directory, or the page would replace a file that this
            command did not write.
    """
    arguments = parser().read(argv)
    from vlm_sft.checkpoint.run_dir import WRITTEN
    from vlm_sft.utils.console import echo
    from vlm_sft.utils.output_files import require_output_file

    run_dir = arguments.run
    if not any((run_dir / name).exists() for name in WRITTEN_BY_RUNS):
        raise UserError(
            f"{run_dir}: not the output_dir of a training run (it has none of "
            f"{', '.join(WRITTEN_BY_RUNS)}); give the output_dir of a stage"
        )
    out = arguments.out or run_dir / "report.html"
    inputs = [run_dir / name for name in sorted(WRITTEN - {"report.html"})]
    out = require_output_file(out, inputs=inputs, command="report", overwrite=arguments.overwrite)
    with heavy_imports():
        from vlm_sft.inspection.run_report import write_run_report
    echo(write_run_report(run_dir, out), file=sys.stdout)
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser("vlm-sft report", ABOUT, EXAMPLES)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="output_dir of a training run")
    add("--out", type=Path, metavar="FILE", help="the page (default: RUN/report.html)")
    add("--overwrite", action="store_true", help="replace FILE even if `report` did not write it")
    return parser


if __name__ == "__main__":
    run_command(main)
