"""Cached records are found, unchanged, and only under the same tokenizer and settings."""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.tokenize import ChatTokenizer, TokenizedRecord
from vlm_sft.data.tokenize_cache import (
    FILE_NAME,
    CachedChatTokenizer,
    fingerprint,
    require_tokenize_cache,
)
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.ownership import MARKER, own_directory

CHAT_TOKENIZER = ChatTokenizer.from_name("chatml", byte_tokenizer())


def conversation(number: int, *, supervised: bool = True) -> Conversation:
    turns = (
        Turn("user", (ImagePart(0), TextPart(f"\nWhich {number}?"))),
        Turn("assistant", (TextPart(f"This {number}."),)),
        Turn("user", (TextPart("And?"),)),
        Turn("assistant", (TextPart("That."),), supervised),
    )
    return Conversation(str(number), turns, (b"",))


RECORDS = [conversation(number) for number in range(300)]


def same(cached: CachedChatTokenizer, records: list[Conversation]) -> bool:
    return comparable(cached.tokenize_all(records)) == comparable(
        CHAT_TOKENIZER.tokenize_all(records)
    )


def comparable(rows: Iterable[TokenizedRecord | RecordError]) -> list[TokenizedRecord]:
    """Without the answers' places, which are not kept."""
    return [replace(row, answer_spans=()) for row in rows if isinstance(row, TokenizedRecord)]


def test_a_second_run_finds_everything_and_it_is_the_same(tmp_path: Path) -> None:
    first = CachedChatTokenizer(CHAT_TOKENIZER, tmp_path)
    assert same(first, RECORDS)
    assert (first.hits, first.misses) == (0, 300)
    second = CachedChatTokenizer(CHAT_TOKENIZER, tmp_path)
    assert same(second, RECORDS)
    assert (second.hits, second.misses) == (300, 0)


def test_a_changed_record_is_tokenized_again(tmp_path: Path) -> None:
    list(CachedChatTokenizer(CHAT_TOKENIZER, tmp_path).tokenize_all(RECORDS))
    changed = [*RECORDS[:-1], conversation(299, supervised=False)]
    again = CachedChatTokenizer(CHAT_TOKENIZER, tmp_path)
    assert same(again, changed)
    assert (again.hits, again.misses) == (299, 1)


def test_text_that_moves_between_parts_makes_another_record(tmp_path: Path) -> None:
    cached = CachedChatTokenizer(CHAT_TOKENIZER, tmp_path)
    answer = Turn("assistant", (TextPart("Yes."),))
    one = Conversation("a", (Turn("user", (TextPart("x"), ImagePart(0))), answer), (b"",))
    other = Conversation("b", (Turn("user", (ImagePart(0), TextPart("x"))), answer), (b"",))
    assert cached.tokenize(one).input_ids != cached.tokenize(other).input_ids
    assert cached.misses == 2


def test_another_template_system_text_or_set_of_quirks_finds_nothing() -> None:
    tokenizer = byte_tokenizer()
    chat_tokenizers = [
        CHAT_TOKENIZER,
        ChatTokenizer.from_name("vicuna_v1", tokenizer),
        ChatTokenizer.from_name("vicuna_v1", tokenizer, llava_quirks="llava-1.5"),
        ChatTokenizer.from_name("vicuna_v1", tokenizer, default_system="Be short."),
    ]
    assert len({fingerprint(chat_tokenizer) for chat_tokenizer in chat_tokenizers}) == len(
        chat_tokenizers
    )


def test_a_damaged_row_is_tokenized_again(tmp_path: Path) -> None:
    list(CachedChatTokenizer(CHAT_TOKENIZER, tmp_path).tokenize_all(RECORDS[:2]))
    with sqlite3.connect(tmp_path / FILE_NAME) as table:
        rows = table.execute("SELECT key, row FROM rendered").fetchall()
        for key, row in rows:
            flipped = row[:20] + bytes([row[20] ^ 1]) + row[21:]
            table.execute("UPDATE rendered SET row = ? WHERE key = ?", (flipped, key))
    table.close()
    again = CachedChatTokenizer(CHAT_TOKENIZER, tmp_path)
    assert same(again, RECORDS[:2])
    assert (again.hits, again.misses) == (0, 2)


def test_bad_records_raise_each_time_and_are_not_cached(tmp_path: Path) -> None:
    plain = ChatTokenizer.from_name("plain", byte_tokenizer())
    for _ in range(2):
        cached = CachedChatTokenizer(plain, tmp_path)
        (error,) = cached.tokenize_all([RECORDS[0]])
        assert isinstance(error, RecordError)
        assert (cached.hits, cached.misses) == (0, 1)


def test_a_damaged_cache_is_refused_in_one_sentence(tmp_path: Path) -> None:
    own_directory(tmp_path / "cache", "cache")
    text = "not a database, but long enough to be read as one " * 20
    (tmp_path / "cache" / FILE_NAME).write_text(text)
    with pytest.raises(UserError, match=r"rendered\.sqlite cannot be used .*; give another"):
        CachedChatTokenizer(CHAT_TOKENIZER, tmp_path / "cache")


def test_a_directory_with_files_of_others_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"data\.cache_dir .* was not created by vlm_sft"):
        CachedChatTokenizer(CHAT_TOKENIZER, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_database_of_others_is_not_written_into(tmp_path: Path) -> None:
    own_directory(tmp_path, "cache")
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as table, table:
        table.execute("CREATE TABLE mine (name TEXT)")
    before = (tmp_path / FILE_NAME).read_bytes()
    with pytest.raises(UserError, match=r"a database that vlm_sft did not write"):
        CachedChatTokenizer(CHAT_TOKENIZER, tmp_path)
    assert (tmp_path / FILE_NAME).read_bytes() == before


def test_a_cache_without_a_marker_is_used_as_before(tmp_path: Path) -> None:
    list(CachedChatTokenizer(CHAT_TOKENIZER, tmp_path).tokenize_all(RECORDS[:2]))
    (tmp_path / MARKER).unlink()
    again = CachedChatTokenizer(CHAT_TOKENIZER, tmp_path)
    assert same(again, RECORDS[:2]) and again.hits == 2
    assert (tmp_path / MARKER).exists()


def test_a_database_that_holds_only_a_view_of_others_is_not_written_into(tmp_path: Path) -> None:
    own_directory(tmp_path, "cache")
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as table, table:
        table.execute("CREATE VIEW mine AS SELECT 1")
    before = (tmp_path / FILE_NAME).read_bytes()
    for use in (
        lambda: require_tokenize_cache(tmp_path),
        lambda: CachedChatTokenizer(CHAT_TOKENIZER, tmp_path),
    ):
        with pytest.raises(UserError, match=r"a database that vlm_sft did not write"):
            use()
    assert (tmp_path / FILE_NAME).read_bytes() == before
