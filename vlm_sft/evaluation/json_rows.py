"""Read the values of a JSON list or of JSON Lines, each with its position for messages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from vlm_sft.errors import UserError
from vlm_sft.utils.image_paths import current_directory_hint, nearest_existing
from vlm_sft.utils.reading import StrictJsonError, parse_json, read_text

MAX_FILE_BYTES: Final = 2**30


def read_values(path: Path, *, missing: str = "", expected: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value with its position: `[index]` in a list, `:line` in JSON Lines.

    A document that is not a list is yielded as a whole, at the position "".

    Args:
        path: The file; an empty one has no values.
        missing: End of the message about a missing file.
        expected: End of the message about a document that is not JSON.

    Raises:
        UserError: The file is missing or not JSON in UTF-8.
    """
    try:
        text = read_text(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        hint = f"{current_directory_hint(path)}{nearest_existing(path)}{missing}"
        raise UserError(f"{path}: no such file{hint}", code="data_file_missing") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror}", code="data_file_unreadable"
        ) from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    first = lines[0][1].strip() if lines else ""
    # JSON Lines have a complete object on the first line; a single line can be either.
    if len(lines) > 1 and first.startswith("{") and first != "{":
        for number, line in lines:
            yield f":{number}", _parsed(line, f"{path}:{number}", "")
    elif lines:
        value = _parsed(text, str(path), expected)
        if isinstance(value, list):
            yield from ((f"[{index}]", item) for index, item in enumerate(value))
        else:
            yield "", value


def _parsed(text: str, where: str, expected: str) -> Any:
    try:
        return parse_json(text)
    except StrictJsonError as error:
        raise UserError(f"{where}: {error}{expected}", code=error.reason) from None
