"""A folder with settings and an append-only file of lines, which a repeated command continues."""

import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from vlm_sft.errors import ConfigError, UserError
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.console import echo
from vlm_sft.utils.escape import shortened
from vlm_sft.utils.filesystem import lock
from vlm_sft.utils.ownership import MADE_BY, made_by, own_directory
from vlm_sft.utils.reading import StrictJsonError, parse_json, read_json

SETTINGS: Final = "settings.json"

Line = TypeVar("Line")
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class LineFormat(Generic[Key, Line]):
    """How the lines of a log are written, and what they are called in messages.

    Attributes:
        command: The command that writes the folder, e.g. `evaluate`.
        kind: The kind of folder in the ownership marker, e.g. `evaluation`.
        file: Name of the file of lines.
        noun: What a line is, with its article, e.g. `an answer`.
        about: What it belongs to, e.g. `question`.
        key: What a line belongs to; every key has one line.
        write: Returns a line as values for JSON.
        read: Returns a line from such values; raises TypeError if they are of another form.
    """

    command: str
    kind: str
    file: str
    noun: str
    about: str
    key: Callable[[Line], Key]
    write: Callable[[Line], Mapping[str, Any]]
    read: Callable[[Any], Line]


class KeyedLog(Generic[Key, Line]):
    """The lines of a folder, appended as they are computed and read again at the next start.

    One process at a time can open it. A batch is appended by one write; if a kill cuts it, the
    incomplete line is removed at the next start and only the missing lines are appended.

    Args:
        folder: The folder; new, empty, or of an earlier start with the same settings.
        form: The format of its lines.
        settings: What the lines depend on, as values for JSON.
        planned: The keys of all lines.
        inputs: Files and folders that are read; none of them may be the folder.

    Attributes:
        lines: All lines so far by key.

    Raises:
        UserError: The folder holds something else, is in use, or its file of lines is damaged.
        ConfigError: It was started with other settings; the message names the first of them.
    """

    def __init__(
        self,
        folder: Path,
        form: LineFormat[Key, Line],
        settings: Mapping[str, Any],
        planned: Iterable[Key],
        *,
        inputs: Iterable[str | Path] = (),
    ) -> None:
        own_directory(folder, form.kind, inputs=inputs, setting="--out")
        self._form, self._path = form, folder / form.file
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if lock(self._descriptor, self._path, wait=False) == "held_elsewhere":
                raise UserError(
                    f"{folder}: another process writes into this folder; wait for it, or give "
                    "another --out",
                    code="folder_in_use",
                )
            _require_same(folder / SETTINGS, settings, form.command)
            self.lines: dict[Key, Line] = self._read(set(planned))
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def append(self, lines: Iterable[Line]) -> list[Line]:
        """Append the lines that are not there yet, and return them.

        Raises:
            OSError: The disk is full or fails.
        """
        new = {self._form.key(line): line for line in lines}
        new = {key: line for key, line in new.items() if key not in self.lines}
        data = b"".join(self._line(line) for line in new.values())
        while data:
            data = data[os.write(self._descriptor, data) :]
        self.lines |= new
        return list(new.values())

    def _line(self, line: Line) -> bytes:
        return json.dumps(self._form.write(line), ensure_ascii=False).encode() + b"\n"

    def _read(self, planned: set[Key]) -> dict[Key, Line]:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.ftruncate(self._descriptor, len(whole))
            echo(
                f"warning: {self._path}: the last line was cut when a process was ended; its "
                f"{len(data) - len(whole):,} bytes were removed"
            )
        lines: dict[Key, Line] = {}
        for number, text in enumerate(whole.splitlines(), 1):
            line = self._parsed(number, text)
            key = self._form.key(line)
            if key not in planned or key in lines:
                noun = self._form.noun.split()[-1]
                what = f"a second {noun} to" if key in lines else f"{self._form.noun} to an unknown"
                name = shortened(str(getattr(key, "id", key)), 100)
                raise self._damaged(number, f"{what} {self._form.about} {name!r}")
            lines[key] = line
        return lines

    def _parsed(self, number: int, text: bytes) -> Line:
        try:
            return self._form.read(parse_json(text.decode()))
        except (StrictJsonError, UnicodeDecodeError, TypeError) as error:
            raise self._damaged(number, f"not {self._form.noun} ({error})") from None

    def _damaged(self, number: int, what: str) -> UserError:
        return UserError(
            f"{self._path}:{number}: {what}; the file was edited or damaged: remove that line to "
            f"have it computed again, or give another --out",
            code="data_file_unreadable",
        )


def _require_same(path: Path, settings: Mapping[str, Any], command: str) -> None:
    """Write the settings of a new folder, or compare them with those that it was started with.

    Raises:
        ConfigError: They differ.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        write_json(path, {MADE_BY: made_by(command), **settings})
        return
    before = {key: value for key, value in read_json(path).items() if key != MADE_BY}
    old, new = _flat(before), _flat(settings)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            found, now = (shortened(repr(values.get(key)), 80) for values in (old, new))
            raise ConfigError(
                f"{path.parent}: was started with {key} = {found}, and is now asked for {now}; "
                "use the same settings, or give another --out",
                code="settings_changed",
            )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted keys."""
    if isinstance(tree, Mapping):
        items: Iterable[tuple[Any, Any]] = tree.items()
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        items = enumerate(tree)
    else:
        return {prefix.rstrip("."): tree}
    flat: dict[str, Any] = {}
    for name, child in items:
        flat |= _flat(child, f"{prefix}{name}.")
    return flat
