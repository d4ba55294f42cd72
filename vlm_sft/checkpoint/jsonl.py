"""Read the JSON-lines files of a run, whatever a kill or an editor left in them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_sft.utils.reading import open_regular


@dataclass(frozen=True)
class Rows:
    """The rows of a file that a run wrote.

    Attributes:
        rows: Its JSON objects, in order.
        num_damaged: Lines that are something else.
    """

    rows: list[dict[str, Any]]
    num_damaged: int = 0


def has_step(row: dict[str, Any]) -> bool:
    """Return whether a row says after how many steps it was written."""
    step = row.get("step")
    return isinstance(step, int) and not isinstance(step, bool) and step >= 0


def read_rows(path: Path, *, is_row: Callable[[dict[str, Any]], bool] = has_step) -> Rows:
    """Read a JSON-lines file; lines that no run wrote whole are counted and skipped.

    A last line that begins like a row and has no end, which a kill leaves, and empty lines are not
    counted. A file that does not exist has no rows.

    Args:
        path: The file.
        is_row: What a JSON object has to fulfill to be a row.

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
