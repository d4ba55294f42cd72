"""The result of a check: one line for each thing that was examined."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.table import Table
from rich.text import Text

from vlm_sft.checks.tokenizer.under_test import Finding, Level
from vlm_sft.data.duplicates import Repeats
from vlm_sft.data.image_separator import LayoutCheck
from vlm_sft.errors import UserError
from vlm_sft.utils.console import Console, say

Line = tuple[str, Level, str]

_STYLES: dict[Level, str] = {
    "good": "green",
    "note": "cyan",
    "warning": "yellow",
    "bad": "bold red",
}


class Verdict:
    """The lines of the result: what was examined, how good it is, and a few words."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.strict = False

    @property
    def good(self) -> bool:
        """Whether nothing is bad, and with `strict` nothing a warning."""
        return not any(fails(level, strict=self.strict) for _, level, _ in self.lines)

    def add(self, what: str, good: bool, words: str) -> None:
        """Add a line that is good or bad."""
        self.report(what, "good" if good else "bad", words)

    def report(self, what: str, level: Level, words: str) -> None:
        """Add a line of any level."""
        self.lines.append((what, level, words))

    @contextmanager
    def examine(self, what: str) -> Iterator[None]:
        """Add a bad line in place of a user error or a refusal of the system in the block."""
        try:
            yield
        except UserError as error:
            self.report(what, "bad", str(error))
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            self.report(what, "bad", f"{place}{error.strerror or error}")

    def add_findings(self, findings: Sequence[Finding], *, strict: bool) -> None:
        """Add the findings about tokenizer and template; `strict` makes warnings count as bad."""
        self.strict = strict
        for f in findings:
            words = f"{f.found}; {f.advice}" if f.advice else f.found
            self.report(f.what, f.level, words)

    def add_repeats(self, repeats: Repeats) -> None:
        """Add what occurs twice, a warning each, or that nothing does."""
        found = repeats.found()
        for repeat in found:
            self.report("repeats", "warning", str(repeat))
        if not found:
            words = "no id and no record occurs twice"
            if repeats.has_held_out:
                words += ", no held-out image is trained on"
            self.add("repeats", True, words)

    def add_layout(self, layout: LayoutCheck) -> None:
        """Add how questions about images differ from what the model will be asked."""
        warnings = layout.warnings()
        for words in warnings:
            self.report("image layout", "warning", words)
        if layout.num_questions and not warnings:
            words = f"all {layout.num_questions:,} questions about images are asked as trained"
            self.add("image layout", True, words)

    def print(self) -> None:
        """Print one table on stdout, and one line that sums it up."""
        print_lines("check", self.lines)
        outcome = "the run can start" if self.good else "the run cannot start as it is"
        say(outcome, file=sys.stdout)


def fails(level: Level, *, strict: bool) -> bool:
    """Return whether a line of this level makes a check fail."""
    return level == "bad" or (strict and level == "warning")


def print_lines(title: str, lines: Sequence[Line]) -> None:
    """Print lines as a table on stdout."""
    table = Table(title=Text(title), show_header=False)
    for what, level, words in lines:
        shown = "BAD" if level == "bad" else level
        # Long words are paths, which are no use without their end.
        words_in_full = Text(words, overflow="fold")
        table.add_row(Text(what, overflow="fold"), Text(shown, style=_STYLES[level]), words_in_full)
    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console.width = 120
    console.print(table)
