"""Tokenized records in a temporary Arrow file, so that a data set takes almost no memory."""

import os
import tempfile
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import pyarrow as pa

from vlm_sft.data.conversation import Conversation, ImagePart, ImageSource, Part, TextPart, Turn
from vlm_sft.data.tokenize import TokenizedRecord
from vlm_sft.utils.constants import IGNORE_INDEX

BATCH_BYTES: Final = 2**20
"""Records are collected up to about this size before they are written."""

_PART: Final = pa.struct([("text", pa.string()), ("image", pa.int32())])  # one of the two is null
_TURN: Final = pa.struct(
    [
        ("role", pa.string()),
        ("supervised", pa.bool_()),
        ("image_separator", pa.string()),
        ("parts", pa.list_(_PART)),
    ]
)
_IMAGE: Final = pa.struct([("path", pa.binary()), ("bytes", pa.binary())])  # one is null
SCHEMA: Final = pa.schema(
    [
        ("id", pa.string()),
        ("where", pa.binary()),  # paths need not be Unicode
        ("input_ids", pa.list_(pa.int32())),  # one IMAGE_TOKEN_ID per image
        ("supervised", pa.list_(pa.bool_())),
        ("turns", pa.list_(_TURN)),
        ("images", pa.list_(_IMAGE)),
    ]
)


class RecordStore:
    """Append records, then read them by index, in this process, its forks and its pickled copies.

    Reading maps the file into memory: nothing is loaded before it is used, and all processes of a
    machine share the pages. The file is in the temporary directory (`TMPDIR`) and is deleted with
    the object that created it.
    """

    def __init__(self) -> None:
        with _explained("the temporary directory"):
            descriptor, self.path = tempfile.mkstemp(prefix="vlm-sft-", suffix=".arrow")
        self._file = os.fdopen(descriptor, "wb")
        self._writer = pa.ipc.new_file(self._file, SCHEMA)
        self._pending: list[dict[str, Any]] = []
        self._num_pending_bytes = 0
        self._first_rows = array("q")  # index of the first record of each batch in the file
        self._length = 0
        self._batches: list[Any] | None = None
        weakref.finalize(self, _remove, self.path, self._file, os.getpid())

    def __len__(self) -> int:
        return self._length

    def append(self, record: Conversation, tokenized: TokenizedRecord) -> None:
        """Add a record.

        Raises:
            OSError: The temporary directory is full; the error names the file and `TMPDIR`.
        """
        images = [
            {"bytes": image} if isinstance(image, bytes) else {"path": os.fsencode(image)}
            for image in record.images
        ]
        ids = np.array(tokenized.input_ids, dtype=np.int32)
        labels = np.array(tokenized.labels, dtype=np.int32)
        self._pending.append(
            {
                "id": record.id,
                "where": os.fsencode(record.where),
                "input_ids": ids,
                "supervised": labels != IGNORE_INDEX,
                "turns": [_turn_to_row(turn) for turn in record.turns],
                "images": images,
            }
        )
        self._length += 1
        self._num_pending_bytes += 9 * len(ids)  # ids, flags, and about the text they encode
        self._num_pending_bytes += sum(len(image.get("bytes", b"")) for image in images)
        if self._num_pending_bytes >= BATCH_BYTES:
            self._write_pending()

    def finish(self) -> None:
        """Write what is pending; call it once, after the last `append` and before reading."""
        self._write_pending()
        with _explained(self.path):
            self._writer.close()
            self._file.close()

    def _write_pending(self) -> None:
        if self._pending:
            self._first_rows.append(self._length - len(self._pending))
            with _explained(self.path):
                self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=SCHEMA))
        self._pending, self._num_pending_bytes = [], 0

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a record's ids `[n]` int32 and which of them are supervised, `[n]` bool."""
        ids = self._value("input_ids", index).values.to_numpy()
        supervised = self._value("supervised", index).values.to_numpy(zero_copy_only=False)
        return ids, supervised

    def conversation(self, index: int) -> Conversation:
        """Return a record as it was appended."""
        turns = tuple(map(_turn_from_row, self._value("turns", index).as_py()))
        images = tuple(map(_image_from_row, self._value("images", index).as_py()))
        return Conversation(self._value("id", index).as_py(), turns, images, self.where(index))

    def image(self, index: int, number: int) -> ImageSource:
        """Return a record's image of that number, from 0."""
        return _image_from_row(self._value("images", index).values[number].as_py())

    def where(self, index: int) -> str:
        """Return a record's file and line."""
        return os.fsdecode(self._value("where", index).as_py())

    def _value(self, column: str, index: int) -> Any:
        """Return one value of a record as an Arrow scalar, without copying it."""
        if self._batches is None:
            reader = pa.ipc.open_file(pa.memory_map(self.path))
            self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        number = bisect_right(self._first_rows, index) - 1
        return self._batches[number][column][index - self._first_rows[number]]

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs for reading; it opens the file again."""
        return {
            "path": self.path,
            "_first_rows": self._first_rows,
            "_length": self._length,
            "_batches": None,
        }


def _turn_to_row(turn: Turn) -> dict[str, Any]:
    parts = [
        {"text": part.text} if isinstance(part, TextPart) else {"image": part.index}
        for part in turn.parts
    ]
    return {
        "role": turn.role,
        "supervised": turn.supervised,
        "image_separator": turn.image_separator,
        "parts": parts,
    }


def _turn_from_row(row: dict[str, Any]) -> Turn:
    parts: tuple[Part, ...] = tuple(
        ImagePart(part["image"]) if part["text"] is None else TextPart(part["text"])
        for part in row["parts"]
    )
    return Turn(row["role"], parts, row["supervised"], row["image_separator"])


def _image_from_row(row: dict[str, bytes | None]) -> ImageSource:
    content, path = row["bytes"], row["path"]
    if content is not None:
        return content
    assert path is not None
    return Path(os.fsdecode(path))


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """Add to the error of a failed write what the file is for and how to move it elsewhere."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error} (records are kept there while a command runs; set "
        reason += "TMPDIR to a directory with more space)"
        raise OSError(error.errno, reason, error.filename or place) from None


def _remove(path: str, file: IO[bytes], owner: int) -> None:
    if os.getpid() == owner:  # a fork must not delete the file of its parent
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            os.unlink(path)
