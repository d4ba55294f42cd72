"""Records and figures for a terminal, a pager, or a file of text."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vlm_sft.data.conversation import TextPart
from vlm_sft.inspection.records import Inspected
from vlm_sft.inspection.statistics import BUCKETS, FREE_TEXT, FigureTable
from vlm_sft.inspection.tokens import Spelled
from vlm_sft.utils.console import Console
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER
from vlm_sft.utils.escape import escape_control

_WIDTH_OF_A_FILE = 160


class _Console(Console):
    """A console whose reader may leave: rich would end the program with code 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def as_text(found: Inspected, spelled: Spelled | None) -> Text:
    """Return a record as text: trained text bold between ⟦ and ⟧, control tokens in color.

    Ordinary text that spells a control token, `<image>` or one of the marks has a backslash before
    it, so that it reads otherwise than the real one without colors too. Control characters stand
    as their symbols (␛), so that data cannot command the terminal.
    """
    text = Text()
    text.append(escape_control(f"── {found.entry.record_id} "), style="bold")
    text.append(f"({escape_control(facts(found, spelled))})\n", style="dim")
    if found.bucket != "trained":
        text.append(f"{BUCKETS[found.bucket]}: {found.entry.reason}: ", style="bold red")
        text.append(escape_control(message(found)) + "\n", style="red")
    if spelled is None:
        for turn in found.conversation.turns if found.conversation else ():
            text.append(f"{turn.role}: ", style="bold dim")
            texts = (
                _escaped(p.text, (IMAGE_PLACEHOLDER,)) if isinstance(p, TextPart) else "<image>"
                for p in turn.parts
            )
            text.append(escape_control("".join(texts)) + "\n", style="dim")
        return text
    for stretch in spelled.stretches:
        is_trained = stretch.fate == "trained"
        if is_trained:
            text.append("⟦", style="bold green")
        for is_control, tokens in groupby(stretch.tokens, key=lambda token: token.is_control):
            style = "bold black on green" if is_trained else "dim"
            spoken = "".join(token.text for token in tokens)
            if not is_control:
                spoken = _escaped(spoken, spelled.control)
            text.append(escape_control(spoken), style="cyan" if is_control else style)
        if is_trained:
            text.append("⟧", style="bold green")
    return text.append("\n")


def _escaped(text: str, control: Sequence[str]) -> str:
    """Put a backslash before what reads like a control token or a mark, and before its own."""
    special = sorted({*control, "⟦", "⟧"}, key=len, reverse=True)
    pattern = "|".join(map(re.escape, special))
    return re.sub(rf"(\\*)({pattern})", r"\1\1\\\2", text)


def facts(found: Inspected, spelled: Spelled | None) -> str:
    """Place and counts of a record in one line."""
    if spelled is None:
        return found.entry.where
    num_images = spelled.num_images
    return (
        f"{found.entry.where}; {spelled.num_text_tokens:,} tokens, with image tokens "
        f"{spelled.length:,}; {spelled.num_trained:,} trained, "
        f"{num_images} image{'' if num_images == 1 else 's'}"
    )


def message(found: Inspected) -> str:
    """The reason in words, without the place that stands above it."""
    error = found.outcome.error
    return found.entry.message if error is None else error.message


def print_tables(console: Console, tables: Sequence[FigureTable]) -> None:
    """Print figures as tables."""
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH_OF_A_FILE)
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
    """The pager of `PAGER`, else less, with its arguments; empty where there is none."""
    command = shlex.split(os.environ.get("PAGER") or "less")
    return command if command and shutil.which(command[0]) else []


@contextmanager
def output(pager: Sequence[str] = (), *, no_color: bool = False) -> Iterator[Console]:
    """A console on stdout, through a pager if one is given; leaving it early is no error."""
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
        pass  # the reader has seen enough
    finally:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
