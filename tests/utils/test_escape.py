"""Untrusted text is escaped before it reaches a terminal."""

import ast
import io
import json
from pathlib import Path

import pytest
from rich.table import Table

from vlm_sft.errors import ConfigError, ImageError, RecordError, UserError, error_line
from vlm_sft.utils.console import Console, echo, echo_json
from vlm_sft.utils.escape import MAX_SHOWN, escape_control, escape_control_line, shortened

HOSTILE = "a\x1b[2J\x9b\r\x07\u202eb\u2066\u200b\U000e0041\ufeffc"


def dangerous(text: str) -> set[str]:
    return set(text) & set(HOSTILE) - set("abc[2J")


@pytest.mark.parametrize(
    "error",
    [
        UserError(HOSTILE),
        ConfigError(HOSTILE),
        ImageError("image_broken", f"{HOSTILE}\nerror VS001: forged"),
        RecordError("format", HOSTILE + "\nforged", record_id=HOSTILE, where=f"{HOSTILE}\nx:1"),
    ],
)
def test_error_lines_contain_no_control_characters(error: UserError) -> None:
    assert dangerous(str(error)) == set() == dangerous(error_line(error))
    assert not isinstance(error, RecordError | ImageError) or "\n" not in error_line(error)


def test_further_lines_of_a_message_cannot_pass_for_lines_of_the_command() -> None:
    first, *others = error_line(UserError("a\nerror VS001: forged\nthe run can start")).split("\n")
    assert first == "error VS002: a"
    assert len(others) == 2 and all(line.startswith("    ") for line in others)


def test_a_message_of_five_megabytes_is_shortened_in_every_kind_of_error() -> None:
    text = "x" * 5_000_000
    errors = [
        UserError(text),
        ImageError("image_broken", text),
        RecordError("format", text, record_id=text, where=text),
    ]
    for error in errors:
        assert len(error_line(error)) < MAX_SHOWN + 100
        assert len(getattr(error, "message", "")) <= MAX_SHOWN


def test_shortening_keeps_both_ends_and_reports_the_length() -> None:
    short = shortened("a" * 100 + "b" * 100, 64)
    assert len(short) == 64 and short[0] == "a" and short[-1] == "b" and "200 characters" in short
    assert shortened("a" * 64, 64) == "a" * 64


def test_escaping_is_idempotent() -> None:
    once = escape_control(HOSTILE)
    assert escape_control(once) == once and escape_control_line(once) == once


def test_say_and_the_console_show_hostile_text_harmlessly() -> None:
    file = io.StringIO()
    echo(HOSTILE, file=file)
    console = Console(file=file, force_terminal=True, width=200)
    console.print(HOSTILE, markup=False, highlight=False)
    table = Table(title="t")
    table.add_column("name")
    table.add_row(HOSTILE)
    console.print(table)
    shown = file.getvalue()
    assert not {"\x9b", "\r", "\x07", "\u202e", "\u2066", "\u200b"} & set(shown)
    assert "\x1b[2J" not in shown and shown.count("␛[2J") == 3


def test_json_for_other_programs_commands_no_terminal_and_reads_back_as_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    value = {HOSTILE + "\x7f\u0085": ["é ü 图", HOSTILE, "\t"]}
    echo_json(value)
    shown = capsys.readouterr().out
    assert dangerous(shown) == set() and "\x7f" not in shown and "é ü 图" in shown
    assert json.loads(shown) == value


ROOT = Path(__file__).parent.parent.parent
ALLOWED = {
    "__main__.py",  # a completion script, which the shell reads
    "config/__main__.py",  # YAML and JSON, which escape control characters themselves
    "commands/run_command.py",  # errors, which escape their own message
    "errors/__main__.py",
    "export/gguf/run_llama_cpp.py",  # numbers as JSON, for the process that started it
    "utils/console.py",
}
"""Modules that may print without the console's escaping."""


def test_every_text_goes_to_the_terminal_through_the_one_function() -> None:
    for file in sorted(ROOT.glob("vlm_sft/**/*.py")):
        if file.relative_to(ROOT / "vlm_sft").as_posix() in ALLOWED:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            place = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name != "print", f"{place}: use vlm_sft.utils.console.echo"
                assert not name.endswith(("stdout.write", "stderr.write")), place
            if isinstance(node, ast.ImportFrom) and node.module == "rich.console":
                names = {alias.name for alias in node.names}
                assert "Console" not in names, f"{place}: use vlm_sft.utils.console.Console"
