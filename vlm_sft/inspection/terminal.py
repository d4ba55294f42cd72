"""Print records and figures on a terminal, through a pager, or into a text file."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vlm_sft.data.conversation import TextPart
from vlm_sft.inspection.records import Inspected
from vlm_sft.inspection.statistics import BUCKETS, FREE_TEXT, FigureTable
from vlm_sft.inspection.tokens import TokenView, marked
from vlm_sft.utils.console import Console
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER
from vlm_sft.utils.escape import escape_control

_FILE_WIDTH = 160
"""Columns of tables that are not printed on a terminal."""


class _Console(Console):
    """A console that raises BrokenPipeError if its reader quits; rich would exit with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def as_text(found: Inspected, view: TokenView | None) -> Text:
    """Return a record as text: trained text in bold between ⟦ and ⟧, special tokens in color.

    See `TokenView.shown_texts` for what is escaped.
    """
    text = Text()
    text.append(escape_control(f"── {found.entry.record_id} "), style="bold")
    text.append(f"({escape_control(summary_line(found, view))})\n", style="dim")
    if found.bucket != "trained":
        text.append(f"{BUCKETS[found.bucket]}: {found.entry.reason}: ", style="bold red")
        text.append(escape_control(message(found)) + "\n", style="red")
    if view is None:
        for turn in found.conversation.turns if found.conversation else ():
            text.append(f"{turn.role}: ", style="bold dim")
            texts = (
                marked(p.text, (IMAGE_PLACEHOLDER,)) if isinstance(p, TextPart) else "<image>"
                for p in turn.parts
            )
            text.append(escape_control("".join(texts)) + "\n", style="dim")
        return text
    for span in view.spans:
        is_trained = span.kind == "trained"
        if is_trained:
            text.append("⟦", style="bold green")
        style = "bold black on green" if is_trained else "dim"
        for is_special, shown in view.shown_texts(span):
            text.append(shown, style="cyan" if is_special else style)
        if is_trained:
            text.append("⟧", style="bold green")
    return text.append("\n")


def summary_line(found: Inspected, view: TokenView | None) -> str:
    """Return the position and the counts of a record on one line."""
    if view is None:
        return found.entry.where
    num_images = view.num_images
    return (
        f"{found.entry.where}; {view.num_text_tokens:,} tokens, {view.length:,} with image "
        f"tokens; {view.num_trained:,} trained, "
        f"{num_images} image{'' if num_images == 1 else 's'}"
    )


def message(found: Inspected) -> str:
    """Return why a record is not used as it is, without its position."""
    error = found.result.error
    return found.entry.message if error is None else error.message


def print_tables(console: Console, tables: Sequence[FigureTable]) -> None:
    """Print figures as tables; outside of a terminal they are wide enough not to wrap."""
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    for figures in tables:
        shown = Table(title=escape(figures.title), title_justify="left", caption_justify="left")
        shown.caption = escape(figures.note) or None
        for number, name in enumerate(figures.columns):
            right = figures.is_number(number) and name != FREE_TEXT
            shown.add_column(Text(name), justify="right" if right else "left", overflow="fold")
        for row in figures.rows:
            shown.add_row(*(Text(escape_control(cell)) for cell in row))
        console.print(shown)


def pager_command() -> list[str]:
    """Return the pager of `PAGER`, or less, with its arguments; empty if none is installed."""
    command = shlex.split(os.environ.get("PAGER") or "less")
    return command if command and shutil.which(command[0]) else []


@contextmanager
def output(pager: Sequence[str] = (), *, no_color: bool = False) -> Iterator[Console]:
    """Yield a console on stdout, through a pager if one is given; quitting it is not an error."""
    here = _Console(no_color=no_color or None, highlight=False)
    if not pager:
        yield here
        return
    environment = {"LESS": "FRX", "LESSCHARSET": "utf-8", **os.environ}
    process = subprocess.Popen(
        pager, stdin=subprocess.PIPE, text=True, encoding="utf-8", env=environment
    )
    try:
        yield _Console(
            file=process.stdin,
            force_terminal=True,
            color_system="truecolor" if here.color_system == "truecolor" else "standard",
            width=here.width,
            no_color=here.no_color,
            highlight=False,
        )
    except BrokenPipeError:
        pass  # the pager was quit
    finally:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
