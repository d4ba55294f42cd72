"""The folder of an evaluation: its settings, and the answers of all its starts."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from vlm_sft.errors import ConfigError, UserError
from vlm_sft.evaluation.suites.tasks import Key
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.console import echo
from vlm_sft.utils.escape import shortened
from vlm_sft.utils.filesystem import lock
from vlm_sft.utils.ownership import MADE_BY, made_by, own_directory
from vlm_sft.utils.reading import StrictJsonError, parse_json, read_json

KIND: Final = "evaluation"
"""Kind of directory in the ownership marker."""

SETTINGS: Final = "settings.json"
ANSWERS: Final = "answers.jsonl"


@dataclass(frozen=True)
class Answer:
    """A line of `answers.jsonl`.

    Attributes:
        task: Name of the task.
        condition: The image condition.
        id: The question's id.
        image: Name of the image that was shown; None: blank, or none.
        prompt: What was asked.
        answer: The model's text.
        tokens: Its length in tokens; None if a server does not say.
        problem: Why there is no answer, e.g. a server's refusal; None if there is one.
    """

    task: str
    condition: str
    id: str
    image: str | None
    prompt: str
    answer: str
    tokens: int | None
    problem: str | None = None

    @property
    def key(self) -> Key:
        """The question and condition that it answers."""
        return Key(self.task, self.condition, self.id)


class AnswerLog:
    """The answers of an evaluation, appended as they arrive and read again at the next start.

    One process at a time can open it. A batch is appended by one write; if a kill cuts it, the
    incomplete line is removed at the next start and only the missing answers are appended.

    Args:
        folder: The evaluation's folder; new, empty, or of an earlier start with the same settings.
        settings: What the answers depend on, as values for JSON.
        planned: The keys of all answers.
        inputs: Files and folders that are read; none of them may be the folder.

    Raises:
        UserError: The folder holds something else, is in use, or its file of answers is damaged.
        ConfigError: It was started with other settings; the message names the first of them.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        planned: Iterable[Key],
        *,
        inputs: Iterable[str | Path] = (),
    ) -> None:
        own_directory(folder, KIND, inputs=inputs, setting="--out")
        self._path = folder / ANSWERS
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if lock(self._descriptor, self._path, wait=False) == "held_elsewhere":
                raise UserError(
                    f"{folder}: another evaluation writes into this folder; wait for it, or give "
                    "another --out",
                    code="folder_in_use",
                )
            _require_same(folder / SETTINGS, settings)
            self.answers: dict[Key, Answer] = self._read(set(planned))
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

    def append(self, answers: Iterable[Answer]) -> None:
        """Append the answers that are not there yet.

        Raises:
            OSError: The disk is full or fails.
        """
        new = [answer for answer in answers if answer.key not in self.answers]
        data = b"".join(_line(answer) for answer in new)
        while data:
            data = data[os.write(self._descriptor, data) :]
        self.answers |= {answer.key: answer for answer in new}

    def _read(self, planned: set[Key]) -> dict[Key, Answer]:
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.ftruncate(self._descriptor, len(whole))
            echo(
                f"warning: {self._path}: the last line was cut when a process was ended; its "
                f"{len(data) - len(whole):,} bytes were removed"
            )
        answers: dict[Key, Answer] = {}
        for number, line in enumerate(whole.splitlines(), 1):
            answer = self._answer(number, line)
            if answer.key not in planned or answer.key in answers:
                what = "a second answer to" if answer.key in answers else "an answer to an unknown"
                raise self._damaged(number, f"{what} question {shortened(answer.id, 100)!r}")
            answers[answer.key] = answer
        return answers

    def _answer(self, number: int, line: bytes) -> Answer:
        try:
            return Answer(**parse_json(line.decode()))
        except (StrictJsonError, UnicodeDecodeError, TypeError) as error:
            raise self._damaged(number, f"not an answer ({error})") from None

    def _damaged(self, number: int, what: str) -> UserError:
        return UserError(
            f"{self._path}:{number}: {what}; the file was edited or damaged: remove that line to "
            "ask the question again, or give another --out",
            code="data_file_unreadable",
        )


def _line(answer: Answer) -> bytes:
    values = {key: value for key, value in asdict(answer).items() if key != "problem" or value}
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _require_same(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new evaluation, or compare them with those that it was started with.

    Raises:
        ConfigError: They differ.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        write_json(path, {MADE_BY: made_by("evaluate"), **settings})
        return
    before = {key: value for key, value in read_json(path).items() if key != MADE_BY}
    old, new = _flat(before), _flat(settings)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            found, now = (shortened(repr(values.get(key)), 80) for values in (old, new))
            raise ConfigError(
                f"{path.parent}: this evaluation was started with {key} = {found}, and is now "
                f"asked for {now}; use the same settings, or give another --out",
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
