"""Plan every recipe in configs/ by the command in its header: plan_recipes.py [FILE].

    python scripts/plan_recipes.py                     # print the table
    python scripts/plan_recipes.py docs/recipes.md     # replace the table in this file

A recipe is a configuration whose header has a line `vlm-sft plan CONFIG --assume ...`. Nothing is
downloaded; a recipe takes a few seconds. The table is between the two marks of FILE.
"""

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vlm_sft.commands.run_command import run_command
from vlm_sft.config.finished import resolve
from vlm_sft.config.method import training_method
from vlm_sft.config.schema import load_config
from vlm_sft.errors import UserError
from vlm_sft.model.dtypes import DTYPES
from vlm_sft.plan import parser as plan_parser
from vlm_sft.planning.assumed import assumed_data_stats, parse_assumed
from vlm_sft.planning.devices import find_device
from vlm_sft.planning.estimate import Estimator
from vlm_sft.planning.gpus import GIB
from vlm_sft.planning.planner import Planner
from vlm_sft.planning.report import METHOD_NAMES
from vlm_sft.planning.step_stats import plan_steps
from vlm_sft.utils.atomic_files import write_text

ROOT: Final = Path(__file__).parent.parent
COMMAND: Final = re.compile(r"^#   vlm-sft plan (?P<arguments>.*--assume .*)$", re.MULTILINE)
BEGIN: Final = "<!-- begin: scripts/plan_recipes.py -->\n"
END: Final = "<!-- end: scripts/plan_recipes.py -->\n"
HEADER: Final = """\
| configuration | trains | GPUs | assumed records: tokens, supervised | tokens of a crop | \
micro-batch of a GPU | checkpointing | memory of a GPU | time |
|---|---|---|---:|---:|---:|---|---:|---:|
"""


@dataclass(frozen=True)
class Recipe:
    """A configuration and the arguments of the plan in its header."""

    path: str
    arguments: argparse.Namespace

    def row(self) -> str:
        """Plan the recipe; return its row of the table."""
        given = self.arguments
        config = resolve(load_config(ROOT / self.path, given.overrides), download=False)
        device = find_device(given.gpu, DTYPES[config.train.precision])
        estimator = Estimator(config, device, gpus=given.gpus, efficiency=given.efficiency)
        assumed = parse_assumed(given.assume)
        steps = plan_steps(config, assumed_data_stats(assumed, config), gpus=given.gpus)
        planner = Planner(estimator, assumed_data_stats(assumed, config), steps, None)
        (option,) = (option for option in planner.by_policy() if option.configured)
        largest, hours = steps.largest, option.speed.hours
        crops = "" if assumed.crops == 1 else f", {assumed.crops} crops"
        fits = "" if option.fits else ", **does not fit**"
        cells = [
            f"`{self.path}`",
            METHOD_NAMES[training_method(config)].removeprefix("stage 2, "),
            f"{given.gpus} x {given.gpu}",
            f"{assumed.count:,}: {assumed.tokens:,}, {assumed.targets:,}{crops}",
            f"{estimator.meta_model.layout_rule.crop_tokens:,}",
            f"{largest.rows} x {largest.length:,}",
            option.policy,
            f"{option.memory.total / GIB:.1f} of {device.memory / GIB:.0f} GiB{fits}",
            f"{hours:.0f} h" if hours >= 10 else f"{hours:.1f} h",
        ]
        return f"| {' | '.join(cells)} |\n"


def recipes() -> Iterator[Recipe]:
    """Yield the recipes in `configs/`, by path."""
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        found = COMMAND.search(path.read_text(encoding="utf-8"))
        if found:
            arguments = plan_parser().read(shlex.split(found["arguments"]))
            yield Recipe(str(path.relative_to(ROOT)), arguments)


def with_table(text: str, table: str) -> str:
    """Return a document with the table between its marks replaced.

    Raises:
        UserError: The document does not have both marks.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"the file needs the lines {BEGIN.strip()} and {END.strip()}; add them")
    return f"{before}{begin}{table}{end}{after}"


def main(argv: list[str]) -> int:
    """Print the table, or write it to a file; see the module."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE")
    given = parser.parse_args(argv)
    table = HEADER + "".join(recipe.row() for recipe in recipes())
    if given.file is None:
        print(table, end="")
    else:
        write_text(given.file, with_table(given.file.read_text(encoding="utf-8"), table))
    return 0


if __name__ == "__main__":
    run_command(main)
