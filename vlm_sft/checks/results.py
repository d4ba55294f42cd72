"""Collect and print the results of a check: one line for each thing that was checked."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich.table import Table
from rich.text import Text

from vlm_sft.checks.tokenizer.under_test import Finding, Level
from vlm_sft.data.duplicates import DuplicateFinder
from vlm_sft.data.image_separator import ImageLayoutCheck
from vlm_sft.errors import UserError
from vlm_sft.utils.console import Console, echo

Line = tuple[str, Level, str]
"""What was checked, its level, and a description."""

_STYLES: Final[dict[Level, str]] = {
    "good": "green",
    "note": "cyan",
    "warning": "yellow",
    "bad": "bold red",
}

_ABOUT_OTHERS: Final = frozenset(
    [
        *("no_generation_markers", "generation_markers_not_compared", "generation_mask_differs"),
        *("pad_missing", "pad_is_eos", "pad_is_other", "generation_config_absent"),
        *("sentencepiece_absent", "template_limits"),
    ]
)
"""Codes of notes that change nothing here: what other trainers would do, what was not compared, and
which records a template would refuse, for the files' own records are all tested."""

FAILED: Final = "check failed: the run would stop or skip records; see the lines above"
"""The last line of a failed check."""


class CheckResults:
    """The results of a check, in order.

    Attributes:
        lines: One line per result.
        asides: Notes about what other programs would do, which change nothing here.
        strict: Warnings count as failures.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.lines: list[Line] = []
        self.asides: set[Line] = set()
        self.strict = strict

    @property
    def passed(self) -> bool:
        """Whether no result is bad, and with `strict` none is a warning."""
        return not any(is_failure(level, strict=self.strict) for _, level, _ in self.lines)

    def is_bad(self, what: str) -> bool:
        """Return whether a bad result was added for `what`."""
        return any(line[:2] == (what, "bad") for line in self.lines)

    def add(self, what: str, level: Level, text: str, *, aside: bool = False) -> None:
        """Add a result; `aside` adds it to `asides`, too."""
        self.lines.append((what, level, text))
        if aside:
            self.asides.add(self.lines[-1])

    @contextmanager
    def check(self, what: str) -> Iterator[None]:
        """Turn a UserError or OSError of the block into a bad result for `what`."""
        try:
            yield
        except UserError as error:
            self.add(what, "bad", str(error))
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            self.add(what, "bad", f"{place}{error.strerror or error}")

    def add_findings(self, findings: Sequence[Finding]) -> None:
        """Add the findings about tokenizer and chat template."""
        for f in findings:
            text = f"{f.found}; {f.advice}" if f.advice else f.found
            self.add(f.what, f.level, text, aside=f.code in _ABOUT_OTHERS)

    def add_duplicates(self, duplicates: DuplicateFinder) -> None:
        """Add a warning for each repeated id, record and validation image."""
        found = duplicates.found()
        for repeat in found:
            self.add("repeats", "warning", str(repeat))
        if not found:
            text = "no id and no record occurs twice"
            if duplicates.has_held_out:
                text += ", and no image is in both training and validation data"
            self.add("repeats", "good", text)

    def add_layout(self, layout: ImageLayoutCheck) -> None:
        """Add how the layout of questions about images differs from that of inference."""
        warnings = layout.warnings()
        for text in warnings:
            self.add("image layout", "warning", text)
        if layout.num_questions and not warnings:
            text = f"all {layout.num_questions:,} questions about images have the layout of chat"
            self.add("image layout", "good", text)

    def print(self, *, asides: bool = False) -> None:
        """Print a table on stdout, what is bad at its end, and whether the run can start.

        Args:
            asides: Whether to print the notes of `asides`, too; otherwise they are counted.
        """
        shown = [line for line in self.lines if asides or line not in self.asides]
        print_lines("check", sorted(shown, key=lambda line: line[1] == "bad"))
        if left := len(self.lines) - len(shown):
            notes = "1 note" if left == 1 else f"{left} notes"
            echo(f"{notes} about other programs not shown; --all prints them", file=sys.stdout)
        echo("the run can start" if self.passed else FAILED, file=sys.stdout)


def is_failure(level: Level, *, strict: bool) -> bool:
    """Return whether a result of this level makes a check fail."""
    return level == "bad" or (strict and level == "warning")


def print_lines(title: str, lines: Sequence[Line]) -> None:
    """Print results as a table on stdout."""
    table = Table(title=Text(title), show_header=False)
    for what, level, text in lines:
        shown = "BAD" if level == "bad" else level
        # Fold long words instead of cutting them: most are paths, and the end of a path matters.
        folded = Text(text, overflow="fold")
        table.add_row(Text(what, overflow="fold"), Text(shown, style=_STYLES[level]), folded)
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
