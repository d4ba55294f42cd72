"""Read members of tar files by offset: an index of each file, built once and kept in a cache.

The member `a/1.jpg` of `/data/0.tar` has the path `/data/0.tar/a/1.jpg`, at which no file system
has a file, so that paths of images may also lead into tar files.
"""

import functools
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import pyarrow as pa

from vlm_sft.errors import ImageError, UserError
from vlm_sft.utils.atomic_files import atomic_open
from vlm_sft.utils.filesystem import user_cache
from vlm_sft.utils.image_paths import split_member
from vlm_sft.utils.ownership import CACHE, own_directory
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import open_regular

_BLOCK: Final = 512
_VERSION: Final = 1
_SCHEMA: Final = pa.schema(
    [
        ("name", pa.binary()),  # in the order of the file, as all columns but the last two
        ("offset", pa.uint64()),  # of the content
        ("size", pa.uint64()),
        ("header", pa.binary(8)),  # digest of the block before the content
        ("hash", pa.uint64()),  # of the names, sorted
        ("row", pa.uint32()),  # of the name with that hash
    ]
)


@dataclass(frozen=True)
class Member:
    """A regular file inside a tar file.

    Attributes:
        name: Its name.
        offset: Where its content begins, in bytes.
        size: Its bytes.
        header: Digest of its header, by which a changed tar file is noticed.
    """

    name: str
    offset: int
    size: int
    header: bytes


class TarIndex:
    """The regular files of a tar file, in order and by name.

    The index is mapped into memory: nothing of it is loaded before it is used, and all processes
    of a machine share it.

    Args:
        path: The tar file.
        table: Its members, see `_SCHEMA`.
    """

    def __init__(self, path: Path, table: Any) -> None:
        self.path = path
        self._names, self._headers = table["name"], table["header"]
        columns = (table[name].to_numpy() for name in ("offset", "size", "hash", "row"))
        self._offsets, self._sizes, self._hashes, self._rows = columns

    def __len__(self) -> int:
        return len(self._offsets)

    def member(self, row: int) -> Member:
        """Return the member at a position."""
        name = os.fsdecode(self._names[row].as_py())
        header = self._headers[row].as_py()
        return Member(name, int(self._offsets[row]), int(self._sizes[row]), header)

    def __iter__(self) -> Iterator[Member]:
        """Yield the members in the order of the file."""
        for row in range(len(self)):
            yield self.member(row)

    def find(self, name: str) -> Member | None:
        """Return the member of a name."""
        place = int(np.searchsorted(self._hashes, _hash(os.fsencode(name))))
        while place < len(self) and self._hashes[place] == _hash(os.fsencode(name)):
            member = self.member(int(self._rows[place]))
            if member.name == name:
                return member
            place += 1
        return None

    def read(self, member: Member) -> bytes:
        """Return the content of a member.

        Raises:
            ImageError: The tar file is not the one that was indexed.
            OSError: It cannot be read.
        """
        with open_regular(self.path) as file:
            file.seek(member.offset - _BLOCK)
            data = file.read(_BLOCK + member.size)
        if len(data) != _BLOCK + member.size or _digest(data[:_BLOCK]) != member.header:
            raise ImageError(
                "image_changed",
                f"{self.path}: has changed since its members were indexed ({member.name!r} is not "
                "where it was); put the old file back, or start a new run",
            )
        return data[_BLOCK:]


# --- paths that lead into tar files


def file_size(path: Path) -> int:
    """Return the bytes of a file, or of a member of a tar file.

    Raises:
        FileNotFoundError: There is none.
        UserError: The tar file cannot be indexed.
        OSError: As `os.stat`.
    """
    inside = split_member(path)
    return os.stat(path).st_size if inside is None else _member(*inside)[1].size


def read_member(path: Path) -> bytes | None:
    """Return the content of a member of a tar file; None if the path is not in one.

    Raises:
        FileNotFoundError: The tar file has no such member.
        ImageError: The tar file has changed.
        UserError: It cannot be indexed.
        OSError: It cannot be read.
    """
    inside = split_member(path)
    if inside is None:
        return None
    index, member = _member(*inside)
    return index.read(member)


def _member(tar: Path, name: str) -> tuple[TarIndex, Member]:
    index = open_index(tar)
    member = index.find(name)
    if member is None:
        raise FileNotFoundError(f"{tar} has no member {name!r}")
    return index, member


# --- the index of a file


def open_index(tar: Path) -> TarIndex:
    """Return the index of a tar file: of this process, of the cache, or built now.

    Raises:
        UserError: It is no tar file, compressed, cut short, or has two members of one name.
        OSError: It cannot be read.
    """
    found = os.stat(tar)
    return _open_index(tar, found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _open_index(tar: Path, size: int, modified: int) -> TarIndex:
    state = {"version": _VERSION, "tar": str(tar.resolve()), "bytes": size, "modified": modified}
    key = hashlib.sha256(os.fsencode(tar.resolve())).hexdigest()[:32]
    place = user_cache("tar-index") / f"{key}.arrow"
    table = _cached(place, state)
    if table is None:
        table = _build(tar)
        table = table.replace_schema_metadata({"state": json.dumps(state)})
        # Without a cache, every process indexes the file for itself.
        with suppress(OSError, UserError):
            own_directory(place.parent, CACHE)
            with atomic_open(place) as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_batch(table)
        cached = _cached(place, state)
        table = table if cached is None else cached  # mapped, and not in memory
    return TarIndex(tar, table)


def _cached(place: Path, state: dict[str, Any]) -> Any | None:
    """Return an index from the cache; None if it is missing, damaged or of another file."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(place)))
        metadata = reader.schema.metadata or {}
        if json.loads(metadata[b"state"]) != state or reader.num_record_batches != 1:
            return None
        return reader.get_batch(0)
    except (OSError, pa.ArrowException, ValueError, KeyError):
        return None


def _build(tar: Path) -> Any:
    names: list[bytes] = []
    offsets, sizes, headers = [], [], []
    with open_regular(tar) as file:
        for name, offset, num_bytes in track(_members(tar, file), None, f"indexing {tar.name}"):
            names.append(os.fsencode(name))
            offsets.append(offset)
            sizes.append(num_bytes)
            headers.append(b"")
        for number, offset in enumerate(offsets):
            file.seek(offset - _BLOCK)
            headers[number] = _digest(file.read(_BLOCK))
    hashes = np.fromiter((_hash(name) for name in names), np.uint64, len(names))
    rows = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[rows][1:] == hashes[rows][:-1])
    for place in same:
        first, second = names[rows[place]], names[rows[place + 1]]
        if first == second:
            raise _unusable(tar, f"has two members {os.fsdecode(first)!r}; pack it again")
    arrays = (names, offsets, sizes, headers, hashes[rows], rows.astype(np.uint32))
    columns = [pa.array(a, type=f.type) for a, f in zip(arrays, _SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _members(tar: Path, file: IO[bytes]) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset of the content and size of every regular file.

    Raises:
        UserError: The file is no uncompressed tar file, or cut short.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                # Otherwise all headers stay in memory.
                archive.members = []  # type: ignore[attr-defined]
                if info.isreg() and not info.issparse():
                    # `tar cf a.tar .` writes ./name
                    yield info.name.removeprefix("./"), info.offset_data, info.size
            end = archive.offset
    except tarfile.TarError as error:
        raise _unusable(tar, f"cannot be read as an uncompressed tar file ({error})") from None
    file.seek(end)
    # A tar file ends with a block of zeros. Without it members may be missing, and nothing else
    # would tell: tarfile takes a cut within a file's content for the end.
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise _unusable(tar, "is cut short: its end is missing; copy or pack it again")


def _unusable(tar: Path, problem: str) -> UserError:
    return UserError(f"{tar}: {problem}", code="data_file_unreadable")


def _hash(name: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little"))


def _digest(header: bytes) -> bytes:
    return hashlib.blake2b(header, digest_size=8).digest()
