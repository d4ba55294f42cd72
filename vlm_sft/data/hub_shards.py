"""Write the records of a stream once: rows as JSON lines, their images in a tar file next to them.

    00000.jsonl, 00000.tar, 00001.jsonl, ...    PER_SHARD records each, in the order of the stream
    progress.json                               what is written, and where the stream goes on

A shard counts once `progress.json` names it. A process that is killed loses the shard that it was
writing, and the next one goes on behind the last one that counts.
"""

import hashlib
import io
import json
import logging
import math
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Final

from vlm_sft.config.schema import DataFile
from vlm_sft.data.record_formats import MAX_RECORD_BYTES, RawRecord, RawRecords
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.filesystem import lock, warn_once
from vlm_sft.utils.ownership import CACHE, own_directory
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import StrictJsonError, open_regular, parse_json, read_json

PER_SHARD: Final = 10_000
SHARD_BYTES: Final = 2**30
"""A shard ends with the batch that reaches one of the two."""

_BATCH: Final = 16
_PROGRESS: Final = "progress.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Shard:
    """What `progress.json` says about a shard: a file of another size is refused."""

    records: int
    rows_bytes: int
    images_bytes: int


@dataclass(frozen=True)
class _Progress:
    """What of a stream is written.

    Attributes:
        shards: In order.
        state: The state of the stream behind the last one.
        complete: Whether the stream has ended there.
    """

    shards: list[_Shard] = field(default_factory=list)
    state: Any = None
    complete: bool = False

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)


def is_complete(folder: Path) -> bool:
    """Return whether a folder has all records of its stream."""
    return _read_progress(folder).complete


def write(folder: Path, stream: Any, total: int, shown: str) -> None:
    """Write the records of a stream that are not in the folder yet.

    Args:
        folder: The folder of the shards.
        stream: An `IterableDataset` in Arrow format.
        total: Number of its records, for the progress; 0 if unknown.
        shown: The address of the data set, for messages.

    Raises:
        UserError: The folder holds something else.
        OSError: The disk is full.
    """
    own_directory(folder, CACHE)
    with open(folder / ".lock", "a+") as file:
        lock(file.fileno(), folder / ".lock", wait=True)
        progress = _read_progress(folder)
        if progress.complete:  # another process has written it meanwhile
            return
        if progress.shards:
            logger.info(f"{shown}: {progress.records:,} records are in {folder}; going on there")
            stream.load_state_dict(progress.state)
        rows = _tracked(stream, progress.records, total, f"writing {shown}")
        ended = False
        while not ended:
            number = len(progress.shards)
            shard, ended = _write_shard(folder, number, rows)
            shards = [*progress.shards, *([shard] if shard.records else [])]
            progress = _Progress(shards, stream.state_dict(), ended)
            write_json(folder / _PROGRESS, asdict(progress))
    logger.info(f"{shown}: {progress.records:,} records are in {folder}")


def _tracked(stream: Any, done: int, total: int, description: str) -> Iterator[list[Any]]:
    """Yield the rows of a batch of records, and show how many batches of the stream are done."""
    batches = stream.iter(batch_size=_BATCH)
    left = math.ceil(max(total - done, 0) / _BATCH) if total else None
    # `track` counts batches: its generator must not run ahead of the state of the stream.
    for batch in track(batches, left, f"{description}, batches of {_BATCH} records"):
        yield embedded_rows(batch)


def _write_shard(folder: Path, number: int, batches: Iterator[list[Any]]) -> tuple[_Shard, bool]:
    """Write the next shard; return it, and whether the stream has ended."""
    records, ended = 0, False
    with (
        _replaced(folder / f"{number:05d}.jsonl") as rows_file,
        _replaced(folder / f"{number:05d}.tar") as tar_file,
        tarfile.open(fileobj=tar_file, mode="w") as archive,
    ):
        images = _Images(archive, f"{number:05d}.tar")
        while records < PER_SHARD and tar_file.tell() < SHARD_BYTES:
            batch = next(batches, None)
            if batch is None:
                ended = True
                break
            for row in batch:
                written = images.moved(row, f"{records:06d}")
                line = json.dumps(written, ensure_ascii=False, allow_nan=False)
                rows_file.write(line.encode() + b"\n")
                records += 1
        rows_bytes = rows_file.tell()
    images_bytes = (folder / f"{number:05d}.tar").stat().st_size
    if images.written == 0:
        (folder / f"{number:05d}.tar").unlink()
        images_bytes = 0
    if records == 0:
        (folder / f"{number:05d}.jsonl").unlink()
    return _Shard(records, rows_bytes, images_bytes), ended


class _Images:
    """Adds the images of rows to a tar file, equal ones once."""

    def __init__(self, archive: tarfile.TarFile, name: str) -> None:
        self._archive, self._name = archive, name
        self._names: dict[bytes, str] = {}

    @property
    def written(self) -> int:
        return len(self._names)

    def moved(self, row: Any, key: str) -> Any:
        """Return a row with the places of its images in their stead, and JSON values only."""
        before = len(self._names)

        def walk(value: Any, column: str) -> Any:
            if isinstance(value, dict):
                if value.keys() == {"bytes", "path"}:
                    data = value["bytes"]
                    place = f"{key}-{len(self._names) - before}"
                    return self._added(data, place) if data else value["path"]
                return {name: walk(item, column or str(name)) for name, item in value.items()}
            if isinstance(value, list):
                return [walk(item, column) for item in value]
            if isinstance(value, float):
                return value if math.isfinite(value) else None
            if isinstance(value, bytes):
                warn_once(f"column {column!r}: its values are bytes but no images; not kept")
                return None
            return str(value) if isinstance(value, date | Decimal) else value

        return walk(row, "")

    def _added(self, data: bytes, key: str) -> str:
        digest = hashlib.sha256(data).digest()
        if digest not in self._names:
            info = tarfile.TarInfo(key)
            info.size = len(data)
            self._archive.addfile(info, io.BytesIO(data))
            self._archive.members = []  # type: ignore[attr-defined]  # or they stay in memory
            self._names[digest] = f"{self._name}/{key}"
        return self._names[digest]


@contextmanager
def _replaced(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that gets its name when it is complete and on the disk."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def _read_progress(folder: Path) -> _Progress:
    path = folder / _PROGRESS
    if not path.exists():
        return _Progress()
    found = read_json(path)
    try:
        shards = [_Shard(**shard) for shard in found["shards"]]
        return _Progress(shards, found["state"], found["complete"])
    except (KeyError, TypeError):
        raise UserError(
            f"{path}: is damaged; delete the folder {folder} to read the data set again",
            code="hub_dataset",
        ) from None


# --- reading


def open_folder(folder: Path, shown: str, file: DataFile) -> RawRecords:
    """Open a folder of shards that is complete.

    Raises:
        UserError: A file is missing or has another size, or the images are inside the shards and
            `image_root` names a folder for them.
    """
    progress = _read_progress(folder)
    has_images = any(shard.images_bytes for shard in progress.shards)
    if has_images and file.image_root is not None:
        raise UserError(
            f"{shown}: its images are inside it; remove `image_root`", code="hub_dataset"
        )
    for number, shard in enumerate(progress.shards):
        for ending, size in (("jsonl", shard.rows_bytes), ("tar", shard.images_bytes)):
            path = folder / f"{number:05d}.{ending}"
            if (path.stat().st_size if path.exists() else 0) != size:
                raise UserError(
                    f"{path}: is missing or was changed; delete the folder {folder} to read "
                    f"{shown} again",
                    code="hub_dataset",
                )
    root = folder if has_images else file.images_start_in()
    return RawRecords(progress.records, _read(folder, progress, shown), image_root=root)


def _read(folder: Path, progress: _Progress, shown: str) -> Iterator[RawRecord | RecordError]:
    index = 0
    for number in range(len(progress.shards)):
        with open_regular(folder / f"{number:05d}.jsonl") as file:
            for line in file:
                if len(line) > MAX_RECORD_BYTES:
                    yield raw_record(None, shown, index)
                else:
                    try:
                        yield raw_record(parse_json(line.decode()), shown, index)
                    except StrictJsonError as error:
                        yield raw_record({}, shown, index).error(error.reason, str(error))
                index += 1


def raw_record(row: Any, shown: str, index: int) -> Any:
    """Return a row with its place, or the error of one that is too large (None)."""
    raw = RawRecord(row, f"{shown}[{index}]", f"index-{index}")
    if row is None:
        return raw.error("line_too_long", f"the record is larger than {MAX_RECORD_BYTES:,} bytes")
    return raw


def embedded_rows(batch: Any) -> list[Any]:
    """Return the rows of an Arrow table, images as their bytes; None for one that is too large."""
    from datasets.table import embed_table_storage

    table = embed_table_storage(batch)
    if table.nbytes <= MAX_RECORD_BYTES:
        rows: list[Any] = table.to_pylist()
        return rows
    singles = (table.slice(row, 1) for row in range(table.num_rows))
    return [None if row.nbytes > MAX_RECORD_BYTES else row.to_pylist()[0] for row in singles]
