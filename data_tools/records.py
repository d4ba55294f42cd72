"""Records in LLaVA's form, and the file that holds them."""

import json
from collections.abc import Iterable, Sequence
from typing import IO, Any

IMAGE_MARK = "<image>"
"""Where an image is in a text (LLaVA's data form)."""

IMAGE_LINE = f"{IMAGE_MARK}\n"
"""Opens the first human turn of a record with an image (LLaVA's data form)."""


def llava_record(
    record_id: str,
    image: str | Sequence[str],
    turns: Iterable[tuple[str, str]],
    sample_type: str | None = None,
) -> dict[str, Any]:
    """Return questions with their answers as a record; the images are in the first human turn.

    One image is a name, several are a list of names.

    `sample_type` (`conversation`, `detail`, `reasoning`) is a key that training ignores and
    `data_tools.verify` reads.
    """
    said: list[dict[str, str]] = []
    names = [image] if isinstance(image, str) else list(image)
    for question, answer in turns:
        opening = "" if said else IMAGE_LINE * len(names)
        said.append({"from": "human", "value": opening + question})
        said.append({"from": "gpt", "value": answer})
    where: str | list[str] = names[0] if len(names) == 1 else names
    record: dict[str, Any] = {"id": record_id, "image": where, "conversations": said}
    return record if sample_type is None else record | {"type": sample_type}


def json_line(value: Any) -> bytes:
    """Return a value as a line of JSON."""
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


class JsonList:
    """One JSON list, written as it grows, a record a line."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._separator = file, b"[\n"

    def add(self, record: dict[str, Any]) -> None:
        """Write one record."""
        self._file.write(self._separator + json_line(record).rstrip())
        self._separator = b",\n"

    def finish(self) -> None:
        """Close the list."""
        self._file.write(b"[]\n" if self._separator == b"[\n" else b"\n]\n")
