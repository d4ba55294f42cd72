"""Read the JSONL files of a run, including damaged ones."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.utils.reading import open_regular


@dataclass(frozen=True)
class Rows:
    """The content of a JSONL file.

    Attributes:
        rows: The JSON objects, in the order of the file.
        num_damaged: Number of lines that are something else.
    """

    rows: list[dict[str, Any]]
    num_damaged: int = 0


def has_step(row: dict[str, Any]) -> bool:
    """Return whether a row has a valid `step`."""
    step = row.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and step >= 0


def read_rows(path: Path, *, is_row: Callable[[dict[str, Any]], bool] = has_step) -> Rows:
    """Read a JSONL file; damaged lines are counted and skipped.

    Not counted are empty lines and an incomplete last line, which a kill leaves. A file that does
    not exist has no rows.

    Args:
        path: The file.
        is_row: Returns whether a JSON object is a row of this file.

    Raises:
        OSError: The file cannot be read.
        NotARegularFile: It is a directory, a pipe or a device.
    """
    if not path.exists():
        return Rows([])
    with open_regular(path) as file:
        text = file.read().decode("utf-8", errors="replace")
    *lines, last = text.split("\n")
    if not last.startswith("{"):
        lines.append(last)
    lines = [line for line in lines if line.strip()]
    rows = [row for row in map(_object, lines) if row is not None and is_row(row)]
    return Rows(rows, len(lines) - len(rows))


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
