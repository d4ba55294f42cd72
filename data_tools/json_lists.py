"""The lists of a large JSON object, element by element, in little memory."""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Final

from vlm_sft.errors import UserError
from vlm_sft.utils.reading import open_regular

CHUNK: Final = 1 << 22
"""Characters read at a time."""
MAX_VALUE: Final = 1 << 26
"""No single element or other value may be longer, in characters."""

_SPACE: Final = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Element:
    """One element of one list: `document[key][position]` is `value`."""

    key: str
    position: int
    value: Any


def read_lists(
    path: Path, keys: Collection[str], optional: Collection[str] = ()
) -> Iterator[Element]:
    """The elements of the lists that the file's object has under `keys`, in the file's order.

    What stands under other keys is read over. Lists under `optional` may be missing.

    Raises:
        UserError: There is no such file; it is no JSON object in UTF-8; a key stands twice; a list
            is missing (known at the end, when everything else has been yielded).
    """
    try:
        file = TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file", code="data_file_missing") from None
    seen: set[str] = set()
    with file:
        text = _Text(file, path)
        if text.next() != "{":
            raise _not_coco(path, next(iter(keys)))
        for key in text.names():
            if key in seen:
                raise text.fault(f"the key {key!r} stands twice")
            seen.add(key)
            if key not in keys and key not in optional:
                text.value()
            elif text.next() == "[":
                for position, value in enumerate(text.elements()):
                    yield Element(key, position, value)
            else:
                raise _not_coco(path, key)
        if text.next():
            raise text.fault("there is more behind the object's end")
    for key in keys:
        if key not in seen:
            raise _not_coco(path, key)


class _Text:
    """A file's text, of which a part is in memory, and a place in it."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file = file
        self.path = path
        self.buffer = ""
        self.place = 0
        self.before = 0  # characters in front of the buffer
        self.decode = json.JSONDecoder().raw_decode

    def next(self) -> str:
        """The next character that is no white space, not taken; empty at the end."""
        while True:
            match = _SPACE.match(self.buffer, self.place)
            assert match is not None
            self.place = match.end()
            if self.place < len(self.buffer):
                return self.buffer[self.place]
            if not self._more():
                return ""

    def names(self) -> Iterator[str]:
        """The keys of the object that begins here; each one's value is to be taken in between."""
        for _ in self._between("{", "}"):
            key = self.value()
            if not isinstance(key, str):
                raise self.fault("a key is no text")
            self._take(":")
            yield key

    def elements(self) -> Iterator[Any]:
        """The elements of the list that begins here."""
        for _ in self._between("[", "]"):
            yield self.value()

    def _between(self, opening: str, closing: str) -> Iterator[None]:
        self._take(opening)
        if self.next() == closing:
            self.place += 1
            return
        while True:
            yield
            if self.next() == closing:
                self.place += 1
                return
            self._take(",")

    def value(self) -> Any:
        """The value that begins here."""
        self.next()
        while True:
            try:
                value, end = self.decode(self.buffer, self.place)
            except json.JSONDecodeError as error:
                at = self.before + error.pos
                if len(self.buffer) - self.place > MAX_VALUE or not self._more():
                    raise self.fault(error.msg, at) from None
            except RecursionError:
                raise self.fault("lists within lists too deep to read") from None
            except ValueError as error:  # a whole number of thousands of digits
                raise self.fault(str(error)) from None
            else:
                # A number at the buffer's end (`1`, and what is left of `1.5e+3` cut at its point
                # or sign) may go on in the next part of the file.
                length = end - self.place
                if end + 2 < len(self.buffer) or not self._more():
                    self.place += length
                    return value

    def _take(self, character: str) -> None:
        if self.next() != character:
            raise self.fault(f"expected {character!r}")
        self.place += 1

    def _more(self) -> bool:
        """Read on, as much as is left here at least: a long value is tried a few times only."""
        rest = self.buffer[self.place :]
        try:
            chunk = self.file.read(max(CHUNK, len(rest)))
        except UnicodeDecodeError as error:
            raise self.fault(f"not UTF-8: {error.reason}") from None
        self.before += self.place
        self.buffer, self.place = rest + chunk, 0
        return bool(chunk)

    def fault(self, problem: str, at: int | None = None) -> UserError:
        """What is wrong with the file, with the character where it was found."""
        at = self.before + self.place if at is None else at
        return UserError(
            f"{self.path}: is not valid JSON ({problem}, at character {at}); download or write it "
            "again",
            code="json_syntax",
        )


def _not_coco(path: Path, key: str) -> UserError:
    return UserError(
        f"{path}: expected COCO's form, an object with a list {key!r}, and found none",
        code="data_file_unreadable",
    )
