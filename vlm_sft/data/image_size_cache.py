"""A cache of the sizes of image files across runs, so that their headers are read once."""

import os
import sqlite3
from pathlib import Path
from typing import Final

from vlm_sft.data.conversation import ImageSource
from vlm_sft.data.image_layout import Size
from vlm_sft.errors import UserError
from vlm_sft.utils.ownership import CACHE, own_directory

FILE_NAME: Final = "image_sizes.sqlite"
_TABLE: Final = (
    "sizes (path BLOB PRIMARY KEY, bytes INTEGER, modified INTEGER, width INTEGER, height INTEGER) "
    "WITHOUT ROWID"
)
_PENDING: Final = 1000
"""Sizes that are written to the file at once."""


class CachedImageSizes:
    """Looks up the size of an upright image that this or another run has read before.

    An image file is the same as before if its absolute path, its number of bytes and the time of
    its last modification are. Embedded images are not cached. Several processes may use the cache
    at once (SQLite).

    Args:
        folder: Contains `image_sizes.sqlite`; created and marked if missing or empty.

    Attributes:
        hits: Number of images that were found.
        misses: Number of image files whose header was read.

    Raises:
        UserError: The folder or the file in it cannot be used, or is not a cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / FILE_NAME
        self._pending: list[tuple[bytes, int, int, int, int]] = []
        self.hits = self.misses = 0
        try:
            own_directory(folder, CACHE, setting="data.cache_dir")
            self._table = sqlite3.connect(self._path, timeout=60)
            if not self._is_ours():
                raise UserError(
                    f"data.cache_dir: {self._path} is a database that vlm_sft did not write; "
                    "nothing was changed. Give another folder",
                    code="not_ours",
                )
            self._table.execute("PRAGMA journal_mode=WAL")
            self._table.execute("PRAGMA synchronous=NORMAL")
            self._table.execute(f"CREATE TABLE IF NOT EXISTS {_TABLE}")
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def size_of(self, image: ImageSource) -> Size:
        """Return the width and height of an upright image.

        Raises:
            ImageError: Its header cannot be read.
            UserError: The cache cannot be used.
        """
        from vlm_sft.data.images import upright_size  # needs torch

        if isinstance(image, bytes):
            return upright_size(image)[:2]
        try:
            found = os.stat(image)
        except (OSError, ValueError):
            return upright_size(image)[:2]  # raises what is wrong with the file
        state = found.st_size, found.st_mtime_ns
        key = os.fsencode(os.path.abspath(image))
        try:
            row = self._table.execute(
                "SELECT bytes, modified, width, height FROM sizes WHERE path = ?", (key,)
            ).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        if row is not None and row[:2] == state:
            self.hits += 1
            return row[2], row[3]
        size = upright_size(image)[:2]
        self.misses += 1
        self._pending.append((key, *state, *size))
        if len(self._pending) >= _PENDING:
            self.flush()
        return size

    def flush(self) -> None:
        """Write the sizes that were read to the file.

        Raises:
            UserError: The file cannot be written.
        """
        try:
            with self._table:
                self._table.executemany(
                    "INSERT OR REPLACE INTO sizes VALUES (?, ?, ?, ?, ?)", self._pending
                )
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        self._pending.clear()

    def _is_ours(self) -> bool:
        rows = self._table.execute("SELECT sql FROM sqlite_master").fetchall()
        return not rows or rows == [(f"CREATE TABLE {_TABLE}",)]

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"data.cache_dir: {self._path} cannot be used ({error}); give another folder with "
            "enough space, or move the file away",
            code="cache_unusable",
        )
