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


FAILED: Final = "check failed: the run would stop or skip records; see the lines above"
"""The last line of a failed check."""


class CheckResults:
    """The results of a check, in order.

    Attributes:
        lines: One line per result.
        asides: Subjects of notes that need no action, such as what other programs would do.
        strict: Warnings count as failures.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.lines: list[Line] = []
        self.asides: set[str] = set()
        self.strict = strict

    @property
    def passed(self) -> bool:
        """Whether no result is bad, and with `strict` none is a warning."""
        return not any(is_failure(level, strict=self.strict) for _, level, _ in self.lines)

    def is_bad(self, what: str) -> bool:
        """Return whether a bad result was added for `what`."""
        return any(line[:2] == (what, "bad") for line in self.lines)

    def add(self, what: str, level: Level, text: str) -> None:
        """Add a result."""
        self.lines.append((what, level, text))

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
            self.add(f.what, f.level, f"{f.found}; {f.advice}" if f.advice else f.found)
            if f.level == "note":
                self.asides.add(f.what)

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
        shown = [
            (what, level, text)
            for what, level, text in self.lines
            if asides or level != "note" or what not in self.asides
        ]
        print_lines("check", sorted(shown, key=lambda line: line[1] == "bad"))
        if left := len(self.lines) - len(shown):
            notes = "1 note" if left == 1 else f"{left} notes"
            echo(f"{notes} that need no action: print them with --all", file=sys.stdout)
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
