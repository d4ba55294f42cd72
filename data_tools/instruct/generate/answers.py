"""Store answers in append-only files, in a folder that several processes and runs may share.

    answers/part-00001.jsonl    one `schema.Answer` a line; appended to by one process at a time
    answers/claims              empty; requests in flight, as locks that end with their process

A line is one write: it is complete, or cut when the process was killed, and then it is the last of
its file. The next process that appends to that file removes the cut part and says so. A recorded
answer survives a kill at once, and a power failure after `AnswerWriter.sync`.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from pydantic import ValidationError

from data_tools.instruct.config import InstructConfig
from data_tools.instruct.generate.append_only import append_line, end_last_line
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Answer
from vlm_sft.errors import UserError
from vlm_sft.utils.filesystem import lock, sync, sync_folder

_HEAD: Final = re.compile(rb'\{"request":"([^"\\]+)"')
_BEGINNING: Final = b'{"request":"'
"""First bytes of every file of answers."""


def read_answers(folder: Path) -> "Answers":
    """Return all answers of a folder by request id; none if the folder does not exist.

    Raises:
        UserError: A line is not an answer.
    """
    answers = Answers(folder)
    answers.refresh()
    return answers


def answers_folder(config: InstructConfig) -> Path:
    """Return the folder of a run's answers: its own, or the shared `teacher.answers_dir`."""
    shared = config.teacher.answers_dir
    return Path(shared) if shared else RunFolder(Path(config.output_dir)).answers


class Answers(Mapping[str, Answer]):
    """Answers by request id, in the order of the files; the texts stay in the files.

    If two processes have answered one request, the answer whose text has the smaller SHA-256 is
    taken, so that the choice does not depend on the files.

    Attributes:
        folder: The folder of the files.
        lines: Records in all files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = 0
        self._read: dict[Path, int] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._handles: dict[Path, BinaryIO] = {}

    def refresh(self) -> None:
        """Read what was appended since the last call.

        Raises:
            UserError: A line is not an answer.
        """
        for path in sorted(self.folder.glob("part-*.jsonl")):
            start = self._read.get(path, 0)
            if path.stat().st_size == start:
                continue
            for offset, end, request in _heads(path, start):
                self.lines += 1
                self._read[path] = end
                place = (path, offset)
                known = self._places.setdefault(request, place)
                if known != place:
                    ranked = min(known, place, key=lambda where: _rank(self._answer_at(*where)))
                    self._places[request] = ranked

    def __getitem__(self, request: str) -> Answer:
        return self._answer_at(*self._places[request])

    def __contains__(self, request: object) -> bool:
        return request in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    @property
    def duplicates(self) -> int:
        """Records beyond the first of their request."""
        return self.lines - len(self)

    def _answer_at(self, path: Path, offset: int) -> Answer:
        if path not in self._handles:
            self._handles[path] = path.open("rb")
        file = self._handles[path]
        file.seek(offset)
        try:
            return Answer.model_validate_json(file.readline())
        except ValidationError as error:
            raise _damaged(path, offset, error.errors()[0]["msg"]) from None

    def close(self) -> None:
        """Close the files; a later lookup opens them again."""
        for file in self._handles.values():
            file.close()
        self._handles.clear()

    def __del__(self) -> None:
        self.close()


class AnswerWriter:
    """Appends answers to a file that it has locked.

    Attributes:
        path: The file.
        torn: Bytes of an incomplete last line that were removed.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor, self.path = _own_file(folder)
        try:
            self.torn = end_last_line(self._descriptor, self.path, _BEGINNING)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, answer: Answer) -> None:
        """Record an answer, which then survives a kill of this process.

        Raises:
            OSError: The disk is full or fails; nothing of the answer remains.
        """
        append_line(self._descriptor, answer.model_dump_json().encode() + b"\n", self.path)

    def sync(self) -> None:
        """Sync the file: the answers then survive a power failure."""
        sync(self._descriptor, self.path)

    def close(self) -> None:
        """Sync and close the file."""
        self.sync()
        os.close(self._descriptor)


class Claims:
    """The requests in flight, over all processes that share a folder.

    A claim is a lock on one byte of the file `claims`, at an offset computed from the request; the
    system releases it when the process ends, however that happens. On file systems without locks,
    processes do not see each other's claims: give them shards.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(folder / "claims", os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, request: str) -> bool:
        """Claim a request; return False if another process has claimed it."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _key(request) >> 2)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # a file system without locks
            return True
        return True

    def release(self, request: str) -> None:
        """Release the claim on a request."""
        with suppress(OSError):  # a file system without locks
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, _key(request) >> 2)

    def close(self) -> None:
        """Release all claims."""
        os.close(self._descriptor)


def _heads(path: Path, start: int) -> Iterator[tuple[int, int, str]]:
    """Yield start, end and request id of every complete line from byte `start` on."""
    with path.open("rb") as file:
        file.seek(start)
        offset = start
        for line in file:
            if not line.endswith(b"\n"):
                return
            match = _HEAD.match(line)
            if match is None or not line.endswith(b"}\n"):
                raise _damaged(path, offset, "it is incomplete or of another form")
            yield offset, offset + len(line), match[1].decode()
            offset += len(line)


def _damaged(path: Path, offset: int, why: str) -> UserError:
    return UserError(
        f"{path}: the line at byte {offset:,} is not an answer: {why}; the file was damaged. "
        "Delete that line, and its request is asked again",
        code="answers_damaged",
    )


def _own_file(folder: Path) -> tuple[int, Path]:
    """Lock and return the first file that no process appends to, or a new one."""
    number, flags = 0, os.O_RDWR | os.O_APPEND | os.O_CREAT
    while True:
        number += 1
        path = folder / f"part-{number:05d}.jsonl"
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileExistsError:
            continue
        found = lock(descriptor, path, wait=False)
        if found == "held_elsewhere":
            os.close(descriptor)
            continue
        # Without locks, only a new file is certainly not in use.
        if found == "unsupported" and not flags & os.O_EXCL:
            os.close(descriptor)
            flags |= os.O_EXCL
            continue
        _require_answers(descriptor, path)
        sync_folder(folder)
        return descriptor, path


def _require_answers(descriptor: int, path: Path) -> None:
    """Refuse a file of others before anything is appended to it or removed from its end."""
    head = os.pread(descriptor, len(_BEGINNING), 0)
    if not _BEGINNING.startswith(head):
        os.close(descriptor)
        raise UserError(
            f"{path}: is not a file of recorded answers; nothing was changed. Choose another "
            "output_dir or teacher.answers_dir",
            code="not_ours",
        )


def _key(request: str) -> int:
    return int.from_bytes(hashlib.blake2b(request.encode(), digest_size=8).digest(), "little")


def _rank(answer: Answer) -> tuple[bytes, str]:
    text = hashlib.sha256(answer.text.encode()).digest()
    return text, json.dumps(answer.model_dump(mode="json", exclude={"seconds"}), sort_keys=True)
