"""One hostile or odd record costs itself, never the others, the memory or the terminal."""

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from vlm_sft.config.schema import DataFile
from vlm_sft.data import images, records
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.images import open_image
from vlm_sft.data.record_formats import RawRecord, parse_record
from vlm_sft.data.records import open_records, read_records
from vlm_sft.errors import ImageError, RecordError, UserError, error_line

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
GOOD = {"id": "good", "conversations": TURNS}


def read(path: Path, **more: Any) -> list[Conversation | RecordError]:
    return list(read_records(DataFile(path=str(path), **more)))


def reasons(path: Path) -> list[str]:
    return [getattr(found, "reason", "good") for found in read(path)]


def parse(record: dict[str, Any], root: str | Path = "/root") -> Conversation:
    return parse_record(RawRecord(record, "data.json[0]", "index-0"), None, Path(root))


def error_of(record: dict[str, Any], root: str | Path = "/root") -> RecordError:
    with pytest.raises(RecordError) as caught:
        parse(record, root)
    return caught.value


# --- image columns without an image

EMPTY = [None, "", [], [None], [""], ["", ""], {"bytes": None, "path": None}, [{}],
         {"bytes": b"", "path": ""}, [{"bytes": None, "path": None}, None]]  # fmt: skip


@pytest.mark.parametrize("key", ["image", "images"])
@pytest.mark.parametrize("value", EMPTY, ids=str)
def test_an_empty_image_column_of_a_text_only_record_is_no_image(key: str, value: Any) -> None:
    for form in ({"conversations": TURNS}, {"instruction": "Hi", "output": "Hello."}):
        assert parse({**form, key: value}).images == ()
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert parse({"messages": chat, key: value}).images == ()


@pytest.mark.parametrize("value", ["", [""], [None], {"bytes": None, "path": None}], ids=str)
def test_an_empty_name_for_a_placeholder_is_called_so(value: Any) -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    assert "an empty image name" in str(error_of({"image": value, "conversations": turns}))
    part = [{"type": "image", "image": ""}, {"type": "text", "text": "What?"}]
    chat = [{"role": "user", "content": part}, {"role": "assistant", "content": "A dog."}]
    assert "an empty image name" in str(error_of({"messages": chat}))


def test_an_empty_column_next_to_a_filled_one_is_ignored() -> None:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    record = parse({"image": "", "images": ["a.jpg"], "conversations": turns})
    assert record.images == (Path("/root/a.jpg"),)


def test_null_structs_of_a_parquet_image_column_are_no_image(tmp_path: Path) -> None:
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    rows = {
        "conversations": [TURNS] * 3,
        "image": pyarrow.array([None, {"bytes": None, "path": None}, {"path": ""}], struct),
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    assert reasons(tmp_path / "a.parquet") == ["good"] * 3


# --- names


def test_links_out_of_the_image_root_need_the_file_s_own_setting(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.jpg").symlink_to("/etc/hostname")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"image": "a.jpg", "conversations": turns}) + "\n")
    (error,) = read(path, image_root=str(tmp_path / "root"))
    assert isinstance(error, RecordError) and error.reason == "image_path"
    assert "follow_symlinks: true" in str(error)
    (record,) = read(path, image_root=str(tmp_path / "root"), follow_symlinks=True)
    assert isinstance(record, Conversation)


def test_a_missing_image_is_explained_by_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "Dog.JPG").write_bytes(b"")
    with pytest.raises(ImageError, match=r"'Dog.JPG' exists, which differs in upper and lower"):
        open_image(tmp_path / "dog.jpg")


def test_a_missing_data_file_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Data.json").write_text("[]")
    with pytest.raises(UserError) as caught:
        open_records(DataFile(path="data.json"))
    assert str(tmp_path) in str(caught.value) and "'Data.json' exists" in str(caught.value)


# --- size, depth, kind


HOSTILE_VALUES = ["x" * 5_000_000, "\x1b[2J\n\u202e", -1e308, True, {"a": {"b": {}}}, [[[[]]]], 2]


@pytest.mark.parametrize("value", HOSTILE_VALUES, ids=lambda v: repr(v)[:20])
def test_odd_values_in_every_place_are_a_bounded_and_visible_message(value: Any) -> None:
    user, answer = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}
    records: list[dict[str, Any]] = [
        {"conversations": value},
        {"conversations": [value]},
        {"conversations": [{"from": value, "value": "Hi"}]},
        {"conversations": [user, {**answer, "loss": value, "weight": "x"}]},
        {"conversations": [user, {**answer, "weight": value}, 1]},
        {"conversations": [{"from": "human", "value": [{"type": value}]}, answer]},
        {"conversations": [{"from": "human", "value": [{"type": "image", "image": value}]}, 1]},
        {"image": value, "conversations": [{"from": "human", "value": "<image>"}, 1]},
        {"instruction": value, "output": 1},
        {"id": [value], "conversations": TURNS},
        {str(value): 1},
    ]
    for record in records:
        line = error_line(error_of(record))
        assert len(line) < 5_000 and line.isprintable()


def deep(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def test_values_nested_almost_too_deeply_are_quoted_without_recursion() -> None:
    for key in ("loss", "weight", "from"):
        turns = [TURNS[0], {**TURNS[1], key: deep(900)}]
        assert len(str(error_of({"conversations": turns}))) < 500


def test_records_beyond_the_limits_of_turns_images_and_ids_are_refused() -> None:
    assert error_of({"conversations": TURNS * 50_000}).reason == "bad_turn"
    many = {"image": ["a.jpg"] * 1_000_000, "conversations": TURNS}
    assert error_of(many).reason == "image_count"
    marks = [{"from": "human", "value": "<image>" * 20_000}, TURNS[1]]
    assert error_of({"image": "a.jpg", "conversations": marks}).reason == "image_count"
    assert error_of({**GOOD, "id": "x" * 5_000_000}).reason == "bad_id"


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_a_record_beyond_the_limit_is_one_error_in_every_format(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 5_000)
    tricky = [{"from": "human", "value": '\\"]}[{' * 3_000}, TURNS[1]]
    rows = [GOOD, {"id": "big", "conversations": tricky}, GOOD, {"id": "b", "x": "y" * 9_000}, GOOD]
    path = tmp_path / f"data.{form}"
    if form == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    expected = ["good", "line_too_long", "good", "line_too_long", "good"]
    if form == "parquet":  # a column that the first row lacks is not in the table
        expected[3] = "format"
    assert reasons(path) == expected


def test_a_list_that_ends_inside_a_too_large_record_is_a_syntax_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 5_000)
    path = tmp_path / "data.json"
    for tail in ('"', "[[", "\\"):
        path.write_text('[{"a": "' + "x" * 9_000 + tail)
        with pytest.raises(UserError, match=r"data\.json:1:\d+: not valid JSON"):
            read(path)


def test_a_huge_record_of_a_list_is_skipped_without_being_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    with path.open("w") as file:
        file.write("[" + " " * 30_000_000 + json.dumps(GOOD) + ',{"id": "')
        for _ in range(300):
            file.write("x" * 1_000_000)
        file.write('"},' + json.dumps(GOOD) + "]")
    tracemalloc.start()
    assert reasons(path) == ["good", "line_too_long", "good"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 2**20, f"{peak / 2**20:.0f} MiB"


def test_duplicate_keys_of_a_long_line_are_found_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{" + '"k":0,' * 150_000 + '"k":1}\n')
    start = time.process_time()
    assert reasons(path) == ["json_duplicate_key"]
    assert time.process_time() - start < 5


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "folder"])
def test_pipes_and_devices_are_refused_as_record_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        os.mkfifo(path / "part.parquet")
    else:
        os.mkfifo(path)
    for place in (path, Path("/dev/zero")):
        with pytest.raises(UserError) as caught:
            open_records(DataFile(path=str(place)))
        assert caught.value.reason == "not_a_file"


@pytest.mark.parametrize(
    "content",
    [b"PAR1", b"PAR1" + bytes(64) + b"PAR1", b"\xff\xfe[\x00]\x00", b"\x1f\x8b\x08gzip", b"PK\x03"],
)
def test_damaged_and_foreign_files_are_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_a_damaged_datasets_folder_is_one_sentence(tmp_path: Path) -> None:
    for state in ("{}", "[]", "{", '{"_data_files": [{"filename": "../x.arrow"}]}'):
        (tmp_path / "state.json").write_text(state)
        with pytest.raises(UserError, match="datasets cannot load this folder"):
            read(tmp_path)


def test_an_image_file_of_too_many_bytes_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bmp"
    with path.open("wb") as file:
        file.write(b"BM")
        file.truncate(2 * images.MAX_BYTES)  # sparse: takes no room
    for use in (open_image, images.read_bytes, images.upright_size):
        with pytest.raises(ImageError, match="bytes; at most") as caught:
            use(path)
        assert caught.value.reason == "image_too_large"
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(ImageError, match="bytes; at most"):
        open_image(b"x" * 11)
