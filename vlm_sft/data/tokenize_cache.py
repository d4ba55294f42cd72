"""A cache of tokenized records across runs."""

import hashlib
import json
import sqlite3
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from importlib import metadata, resources
from pathlib import Path
from typing import Final

import numpy as np

from vlm_sft.data.conversation import Conversation, ImagePart
from vlm_sft.data.tokenize import CHUNK, ChatTokenizer, TokenizedRecord, batched
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.constants import IGNORE_INDEX
from vlm_sft.utils.filesystem import existing_above, require_writable
from vlm_sft.utils.ownership import CACHE, own_directory, require_directory

FILE_NAME: Final = "rendered.sqlite"
TOKENIZING_MODULES: Final = (
    "image_separator",
    "tokenize",
    "template_runs",
    "chat_template",
    "text_encoder",
    "llava_quirks",
)
_TABLE: Final = "rendered (key BLOB PRIMARY KEY, row BLOB) WITHOUT ROWID"


class CachedChatTokenizer:
    """Looks up records that this or another run has tokenized and proven before.

    A record's key is the sha256 of its turns and of everything else that its ids depend on:
    tokenizer, template, system text, LLaVA quirks, the source code of this package that tokenizes,
    and the version of `tokenizers`. Every row carries a checksum; a damaged row is tokenized
    again. Several processes may use the cache at once (SQLite). Unusable records are not cached.

    Args:
        chat_tokenizer: Tokenizes records that are not in the cache.
        folder: Contains `rendered.sqlite`; created and marked if missing or empty.

    Attributes:
        hits: Number of records that were found.
        misses: Number of records that were tokenized.

    Raises:
        UserError: The folder or the file in it cannot be used, or is not a cache.
    """

    def __init__(self, chat_tokenizer: ChatTokenizer, folder: str | Path) -> None:
        self._chat_tokenizer, self._path = chat_tokenizer, Path(folder) / FILE_NAME
        self._fingerprint = fingerprint(chat_tokenizer)
        self.hits = self.misses = 0
        try:
            own_directory(
                folder, CACHE, adopt=is_tokenize_cache(Path(folder)), setting="data.cache_dir"
            )
            self._table = _open_table(self._path)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(self._path, error) from None

    def tokenize(self, conversation: Conversation) -> TokenizedRecord:
        """Return a record as `ChatTokenizer.tokenize`, without `answer_spans` on a hit."""
        tokenized = next(self.tokenize_all([conversation]))
        if isinstance(tokenized, RecordError):
            raise tokenized
        return tokenized

    def tokenize_all(
        self, conversations: Iterable[Conversation]
    ) -> Iterator[TokenizedRecord | RecordError]:
        """Yield records as `ChatTokenizer.tokenize_all`, without `answer_spans` on a hit."""
        for chunk in batched(conversations, CHUNK):
            keys = [self._key(conversation) for conversation in chunk]
            found = self._look_up(keys)
            missing = [c for c, key in zip(chunk, keys, strict=True) if key not in found]
            self.hits += len(chunk) - len(missing)
            self.misses += len(missing)
            tokenized = self._chat_tokenizer.tokenize_all(missing)
            rows = [found[key] if key in found else next(tokenized) for key in keys]
            self._insert([(k, r) for k, r in zip(keys, rows, strict=True) if k not in found])
            yield from rows

    def _key(self, conversation: Conversation) -> bytes:
        digest = hashlib.sha256(self._fingerprint)
        for turn in conversation.turns:
            digest.update(f"\0{turn.role}\0{turn.supervised}\0{turn.image_separator!r}".encode())
            for part in turn.parts:
                text = f"<{part.index}>" if isinstance(part, ImagePart) else part.text
                kind = "image" if isinstance(part, ImagePart) else "text"
                digest.update(f"\0{kind}\0{len(text)}\0{text}".encode())
        return digest.digest()

    def _look_up(self, keys: Sequence[bytes]) -> dict[bytes, TokenizedRecord]:
        marks = ",".join("?" * len(keys))
        try:
            rows = self._table.execute(
                f"SELECT key, row FROM rendered WHERE key IN ({marks})", keys
            ).fetchall()
        except sqlite3.Error as error:
            raise _unusable(self._path, error) from None
        decoded = ((key, _from_row(row)) for key, row in rows)
        return {key: tokenized for key, tokenized in decoded if tokenized is not None}

    def _insert(self, rows: Sequence[tuple[bytes, TokenizedRecord | RecordError]]) -> None:
        values = [(key, _to_row(row)) for key, row in rows if isinstance(row, TokenizedRecord)]
        try:
            with self._table:
                self._table.executemany("INSERT OR REPLACE INTO rendered VALUES (?, ?)", values)
        except sqlite3.Error as error:
            raise _unusable(self._path, error) from None


def require_tokenize_cache(folder: str | Path) -> None:
    """Check that `CachedChatTokenizer` can use a directory, without changing its content.

    SQLite's locks and journal are tried on a temporary database in the same file system.

    Raises:
        UserError: As `CachedChatTokenizer`.
    """
    folder = Path(folder)
    path = folder / FILE_NAME
    try:
        require_directory(folder, CACHE, adopt=is_tokenize_cache(folder), setting="data.cache_dir")
        if path.exists():
            with closing(sqlite3.connect(path, timeout=60)) as table:
                _require_ours(table, path)
                table.execute("BEGIN IMMEDIATE")  # takes the write lock, which closing releases
        require_writable(folder)
        place = existing_above(folder)
        with tempfile.TemporaryDirectory(dir=place, prefix=".vlm_sft.") as temporary:
            _open_table(Path(temporary) / FILE_NAME).close()
    except (OSError, sqlite3.Error) as error:
        raise _unusable(path, error) from None


def _open_table(path: Path) -> sqlite3.Connection:
    table = sqlite3.connect(path, timeout=60)
    _require_ours(table, path)
    table.execute("PRAGMA journal_mode=WAL")
    table.execute("PRAGMA synchronous=NORMAL")
    table.execute(f"CREATE TABLE IF NOT EXISTS {_TABLE}")
    return table


def _require_ours(table: sqlite3.Connection, path: Path) -> None:
    if not _is_ours(table):
        raise UserError(
            f"data.cache_dir: {path} is a database that vlm_sft did not write; nothing was "
            "changed. Give another folder",
            code="not_ours",
        )


def _unusable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"data.cache_dir: {path} cannot be used ({error}); give another folder with enough space, "
        "or move the file away",
        code="cache_unusable",
    )


def is_tokenize_cache(folder: Path) -> bool:
    """Return whether a directory holds a file of tokenized records."""
    path = folder / FILE_NAME
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(path)) as table:
            return _is_ours(table, empty=False)
    except sqlite3.Error:
        return False


def _is_ours(table: sqlite3.Connection, *, empty: bool = True) -> bool:
    """Return whether a database has our one table and nothing else.

    Views, triggers and indices count: SQLite lists them in `sqlite_master` too.

    Args:
        table: The database.
        empty: Accept an empty database.
    """
    found = [row[0] for row in table.execute("SELECT sql FROM sqlite_master")]
    return found == [f"CREATE TABLE {_TABLE}"] or (empty and not found)


def fingerprint(chat_tokenizer: ChatTokenizer) -> bytes:
    """Return the sha256 of everything but the record that its ids and labels depend on."""
    digest = hashlib.sha256()
    digest.update(json.dumps(chat_tokenizer.describe(), sort_keys=True).encode())
    digest.update(chat_tokenizer.tokenizer.backend_tokenizer.to_str().encode())
    digest.update(metadata.version("tokenizers").encode())
    for name in TOKENIZING_MODULES:
        digest.update((resources.files("vlm_sft.data") / f"{name}.py").read_bytes())
    return digest.digest()


def _to_row(tokenized: TokenizedRecord) -> bytes:
    """Return a checksum, the ids, and one byte per token: whether it is supervised."""
    ids = array("i", tokenized.input_ids).tobytes()
    flags = bytes(label != IGNORE_INDEX for label in tokenized.labels)
    return hashlib.blake2b(ids + flags, digest_size=8).digest() + ids + flags


def _from_row(row: bytes) -> TokenizedRecord | None:
    """Return the record of a row; None if its checksum does not match."""
    checksum, body = row[:8], row[8:]
    if hashlib.blake2b(body, digest_size=8).digest() != checksum:
        return None
    count = len(body) // 5
    ids = np.frombuffer(body, dtype=np.int32, count=count)
    flags = np.frombuffer(body, dtype=np.bool_, offset=4 * count)
    labels = np.where(flags, ids, IGNORE_INDEX)
    return TokenizedRecord(ids.tolist(), labels.tolist(), ())
