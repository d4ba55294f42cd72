import base64
import json
import warnings
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_sft.config.schema import DataFile
from vlm_sft.data import records
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.record_formats import RawRecord, parse_record
from vlm_sft.data.records import open_records, read_records
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils import json_items


def parse(record: object, root: str | Path = "/root", form=None) -> Conversation:
    return parse_record(RawRecord(record, "file.jsonl:1", "line-1"), form, Path(root))


def error_of(record: object, root: str | Path = "/root", form=None) -> RecordError:
    with pytest.raises(RecordError) as caught:
        parse(record, root, form)
    assert "\n" not in str(caught.value)
    return caught.value


def llava(*turns: tuple[str, object], **more: object) -> dict[str, object]:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


def messages(*turns: tuple[str, object], **more: object) -> dict[str, object]:
    return {"messages": [{"role": role, "content": text} for role, text in turns], **more}


def image_column(color: str = "red") -> dict[str, object]:
    buffer = BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "a.png"}


def read(path: Path, **more: object) -> list[Conversation | RecordError]:
    return list(read_records(DataFile(path=str(path), **more)))  # type: ignore[arg-type]


QUESTION, ANSWER = ("human", "What?"), ("gpt", "A cat.")
PLAIN = (Turn("user", (TextPart("What?"),)), Turn("assistant", (TextPart("A cat."),)))


# --- forms


def test_a_llava_record_becomes_turns_with_images_at_their_placeholders():
    record = llava(
        ("system", "Be brief."),
        ("human", "<image>\nAnd <image>?"),
        ("gpt", "Two cats."),
        ("human", "And this?<image>"),
        ("gpt", "A <image> tag."),
        id=7,
        image=["a.png", "sub/b.png", "c.png"],
    )
    assert parse(record) == Conversation(
        id="7",
        turns=(
            Turn("system", (TextPart("Be brief."),)),
            Turn("user", (ImagePart(0), TextPart("\nAnd "), ImagePart(1), TextPart("?"))),
            Turn("assistant", (TextPart("Two cats."),)),
            Turn("user", (TextPart("And this?"), ImagePart(2))),
            Turn("assistant", (TextPart("A <image> tag."),)),
        ),
        images=(Path("/root/a.png"), Path("/root/sub/b.png"), Path("/root/c.png")),
        where="file.jsonl:1",
    )


@pytest.mark.parametrize(
    "record",
    [
        llava(QUESTION, ANSWER),
        llava(("user", "What?"), ("assistant", "A cat."), image=None),
        llava(QUESTION, ANSWER, image=[]),
        messages(("user", "What?"), ("assistant", "A cat.")),
        messages(("human", "What?"), ("gpt", "A cat.")),
        messages(
            ("user", [{"type": "text", "text": "What?"}]),
            ("assistant", [{"type": "text", "text": "A cat."}]),
        ),
        {"instruction": "What?", "output": "A cat."},
        {"instruction": "What?", "input": "", "output": "A cat.", "system": None},
    ],
)
def test_every_form_of_one_text_conversation_reads_the_same(record):
    assert parse(record).turns == PLAIN
    assert parse(record).images == ()


def test_alpaca_input_follows_the_instruction_and_images_are_placed_in_either():
    record = {
        "instruction": "Name it: <image>",
        "input": "and <image>",
        "output": "A cat.",
        "system": "Be brief.",
        "image": ["a.png", "b.png"],
    }
    system, user, answer = parse(record).turns
    assert system == Turn("system", (TextPart("Be brief."),))
    assert user.parts == (
        TextPart("Name it: "),
        ImagePart(0),
        TextPart("\nand "),
        ImagePart(1),
    )
    assert answer == PLAIN[1]
    assert error_of({**record, "history": [["a", "b"]]}).reason == "format"


def test_image_parts_take_their_own_image_or_the_next_of_the_list_in_reading_order():
    data = "data:image/png;base64," + base64.b64encode(b"PNG bytes").decode()
    content = [
        {"type": "image", "image": "own.png"},
        {"type": "text", "text": "a literal <image>"},
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "sub/url.png"}},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "image", "image": None, "text": None},
    ]
    record = messages(("user", content), ("assistant", "Five."), images=["one.png", "two.png"])
    conversation = parse(record)
    assert conversation.images == (
        Path("/root/own.png"),
        Path("/root/one.png"),
        Path("/root/sub/url.png"),
        b"PNG bytes",
        Path("/root/two.png"),
    )
    assert [part.index for part in conversation.image_parts()] == [0, 1, 2, 3, 4]
    assert conversation.turns[0].text == "a literal <image>"


def test_placeholders_in_plain_user_messages_count_only_when_images_are_listed():
    turns = (("user", "What is <image>?"), ("assistant", "A tag."))
    assert parse(messages(*turns)).turns[0].parts == (TextPart("What is <image>?"),)
    assert parse(messages(*turns, images=["a.png"])).turns[0].parts[1] == ImagePart(0)


def test_the_file_s_format_setting_overrides_keys_that_could_mean_two_forms():
    both = {**llava(QUESTION, ANSWER), **messages(("user", "Other?"), ("assistant", "Dog."))}
    assert error_of(both).reason == "format"
    assert parse(both, form="llava").turns == PLAIN
    assert parse(both, form="messages").turns[1].text == "Dog."
    assert "list of turns" in str(error_of({"instruction": "x", "output": "y"}, form="llava"))


def test_a_record_of_no_known_form_names_its_keys_and_the_known_ones():
    error = error_of({"prompt": "x", "completion": "y"})
    assert error.reason == "format"
    assert "prompt, completion" in str(error) and "`conversations` (llava)" in str(error)
    assert error_of([1]).reason == error_of("text").reason == error_of({}).reason == "format"


def test_ids_are_text_or_integers_and_made_up_from_the_place_when_missing():
    assert parse(llava(QUESTION, ANSWER, id=0)).id == "0"
    assert parse(llava(QUESTION, ANSWER, id="x")).id == "x"
    assert parse(llava(QUESTION, ANSWER)).id == "line-1"
    for value in (1.5, True, [1]):
        assert error_of(llava(QUESTION, ANSWER, id=value)).reason == "bad_id"


# --- counts of images


@pytest.mark.parametrize("marks", range(4))
@pytest.mark.parametrize("listed", range(4))
def test_placeholders_and_images_must_agree_and_the_error_names_both_counts(marks, listed):
    images = [f"{i}.png" for i in range(listed)]
    text, answer = "x" + "<image>" * marks, "A cat."
    parts = [{"type": "image"}] * marks
    records = [
        llava(("human", text), ("gpt", answer), image=images),
        messages(("user", parts), ("assistant", answer), images=images),
        {"instruction": text, "output": answer, "image": images},
    ]
    if listed:
        records.append(messages(("user", text), ("assistant", answer), images=images))
    for record in records:
        if marks == listed:
            assert len(parse(record).images) == marks
        else:
            error = error_of(record)
            assert error.reason == "image_count"
            assert f"places for {marks} " in str(error) and f"lists {listed};" in str(error)


# --- roles and answers


def expected_fault(roles: list[str]) -> str | None:
    """The rule, restated as an automaton."""
    if "assistant" not in roles:
        return "no_answer"
    rest = roles[1:] if roles[0] == "system" else roles
    if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(rest)):
        return "role_order"
    return "role_order" if rest[-1] == "user" else None


@given(st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=7))
def test_turns_are_a_system_then_user_and_assistant_in_alternation(roles):
    record = messages(*((role, "text") for role in roles))
    if expected_fault(roles) is None:
        assert [turn.role for turn in parse(record).turns] == roles
    else:
        assert error_of(record).reason == expected_fault(roles)


@pytest.mark.parametrize(
    ("role", "hint"),
    [("asistant", "did you mean 'assistant'"), ("Human", "did you mean 'human'"), ("zz", "known")],
)
def test_an_unknown_role_names_the_nearest_known_one(role, hint):
    error = error_of(llava(QUESTION, (role, "A cat.")))
    assert error.reason == "unknown_role"
    assert repr(role) in str(error) and "turn 1" in str(error) and hint in str(error)
    assert error_of({"messages": [{"content": "x"}]}).reason == "unknown_role"
    assert error_of({"messages": [{"role": ["user"], "content": "x"}]}).reason == "unknown_role"


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u2003"])
def test_an_empty_or_blank_answer_is_refused(text):
    assert error_of(llava(QUESTION, ("gpt", text))).reason == "empty_answer"
    assert error_of({"instruction": "What?", "output": text}).reason == "empty_answer"
    assert error_of(messages(("user", "x"), ("assistant", []))).reason == "empty_answer"


def test_what_is_no_text_is_refused_and_nothing_is_lost_silently():
    assert error_of(llava(QUESTION, ("gpt", None))).reason == "bad_turn"
    assert error_of(llava(QUESTION, ("gpt", 3))).reason == "bad_turn"
    assert error_of({"conversations": ["hello"]}).reason == "bad_turn"
    assert error_of({"conversations": "hello"}).reason == "format"
    assert error_of({"instruction": "x"}).reason == "bad_turn"
    video = messages(("user", [{"type": "video", "video": "a.mp4"}]), ("assistant", "x"))
    assert "type 'video'" in str(error_of(video))
    call = {"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}
    assert error_of({"messages": [{"role": "user", "content": "x"}, call]}).reason == "tool_calls"
    shown = messages(("user", "x"), ("assistant", [{"type": "image", "image": "a.png"}]))
    assert error_of(shown).reason == "image_in_answer"
    assert error_of(llava(("human", "\ud800"), ANSWER)).reason == "bad_text"


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"weight": 0.0}])
def test_a_turn_can_be_left_without_loss(mark):
    record = llava(QUESTION, ANSWER, QUESTION, ANSWER)
    record["conversations"][1] |= mark  # type: ignore[index]
    assert [t.supervised for t in parse(record).turns if t.role == "assistant"] == [False, True]


@pytest.mark.parametrize("mark", [{"loss": "no"}, {"loss": 0}, {"weight": 0.5}, {"weight": True}])
def test_a_loss_mark_that_is_not_understood_is_refused(mark):
    record = llava(QUESTION, ANSWER)
    record["conversations"][1] |= mark  # type: ignore[index]
    assert error_of(record).reason == "bad_loss"


def test_loss_on_a_user_turn_is_refused_and_no_loss_there_is_fine():
    record = llava(QUESTION, ANSWER)
    record["conversations"][0]["weight"] = 1  # type: ignore[index]
    assert error_of(record).reason == "bad_loss"
    record["conversations"][0]["weight"] = 0  # type: ignore[index]
    assert parse(record).turns[1].supervised


# --- image names


@pytest.mark.parametrize(
    "name", ["a.png", "sub/a.png", "sub/../a.png", "./a.png", "ü b.png", "~/a"]
)
def test_names_inside_the_root_are_taken_from_it(name, tmp_path):
    record = llava(("human", "<image>"), ANSWER, image=name)
    (image,) = parse(record, tmp_path).images
    assert isinstance(image, Path) and image.is_relative_to(tmp_path) and ".." not in image.parts


@pytest.mark.parametrize(
    "name",
    ["../a.png", "sub/../../a.png", "/etc/passwd", "a\0.png", "..", ".", "file:///etc/passwd"],
)
def test_names_that_leave_the_root_are_refused(name, tmp_path):
    error = error_of(llava(("human", "<image>"), ANSWER, image=name), tmp_path)
    assert error.reason == "image_path" and repr(name) in str(error)


def test_absolute_names_inside_the_root_are_accepted_and_urls_are_not_fetched(tmp_path):
    inside = llava(("human", "<image>"), ANSWER, image=str(tmp_path / "sub" / "a.png"))
    assert parse(inside, tmp_path).images == (tmp_path / "sub" / "a.png",)
    remote = llava(("human", "<image>"), ANSWER, image="https://example.org/a.png")
    assert "images are not downloaded" in str(error_of(remote, tmp_path))
    sibling = llava(("human", "<image>"), ANSWER, image=f"{tmp_path}-other/a.png")
    assert error_of(sibling, tmp_path).reason == "image_path"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["..", ".", "", "a", "b c", "/", "~", "\\"]), max_size=8))
def test_no_name_made_of_path_pieces_leaves_the_root(pieces):
    record = llava(("human", "<image>"), ANSWER, image="/".join(pieces))
    try:
        (image,) = parse(record, "/data/root").images
    except RecordError as error:
        assert error.reason in ("image_path", "image_field", "image_count")
    else:
        assert str(image).startswith("/data/root/") and ".." not in image.parts


@pytest.mark.parametrize("value", ["", 3, [None], [["a.png"]], {"bytes": None, "path": None}])
def test_what_is_no_image_name_is_refused(value):
    error = error_of(llava(("human", "<image>"), ANSWER, image=value))
    assert error.reason == "image_field"
    both = llava(("human", "<image>"), ANSWER, image="a.png", images=["a.png"])
    assert error_of(both).reason == "image_field"
    broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%"}}]
    assert error_of(messages(("user", broken), ("assistant", "x"))).reason == "image_field"


# --- JSONL


def test_every_bad_line_is_one_error_with_its_number_and_the_rest_is_read(tmp_path):
    good = json.dumps(llava(QUESTION, ANSWER)).encode()
    lines = {
        1: b"\xef\xbb\xbf" + good,
        2: good + b"\r",
        3: b'{"id": 1, "id": 2}',
        4: b'{"id": NaN}',
        5: good[:-5],
        6: b'{"id": "\xff"}',
        7: b"[" * 100_000,
        8: b'{"a": [1, 2,]}',
        9: b'{"a": 1} {"b": 2}',
        10: b"   ",
        11: b'{"id": ' + b"9" * 5000 + b"}",
        12: good + b"," + good,
        13: b"null",
        14: good,
    }
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(lines.values()))
    found = {int(item.where.rpartition(":")[2]): item for item in read(path)}
    reasons = {n: e.reason for n, e in found.items() if isinstance(e, RecordError)}
    assert reasons == {
        3: "json_duplicate_key",
        4: "json_nan",
        5: "json_syntax",
        6: "not_utf8",
        7: "json_depth",
        8: "json_syntax",
        9: "json_syntax",
        11: "json_syntax",
        12: "json_syntax",
        13: "format",
    }
    assert sorted(set(found) - set(reasons)) == [1, 2, 14]
    assert all(found[n].turns == PLAIN for n in (1, 2, 14))  # type: ignore[union-attr]
    assert "'id' appears twice" in str(found[3]) and f"{path}:3: record 'line-3'" in str(found[3])
    assert "comma" in str(found[8])
    assert found[14].id == "line-14"  # type: ignore[union-attr]
    assert open_records(DataFile(path=str(path))).total == 14


def test_a_line_beyond_the_limit_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 200)
    good = json.dumps(llava(QUESTION, ANSWER))
    path = tmp_path / "data.jsonl"
    path.write_text(f"{good}\n{'x' * 5000}\n{good}\n{'y' * 200}")
    kinds = [getattr(item, "reason", "good") for item in read(path)]
    assert kinds == ["good", "line_too_long", "good", "line_too_long"]


@given(data=st.binary(max_size=200))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arbitrary_bytes_never_end_the_reading_of_lines(tmp_path, data):
    good = json.dumps(llava(QUESTION, ANSWER)).encode()
    path = tmp_path / "data.jsonl"
    path.write_bytes(data + b"\n" + good)
    *before, last = read(path)
    assert all(isinstance(item, RecordError) for item in before)
    assert isinstance(last, Conversation)


def test_lines_are_read_in_flat_memory(tmp_path):
    import tracemalloc

    line = json.dumps(llava(QUESTION, ("gpt", "word " * 200))).encode() + b"\n"
    path = tmp_path / "data.jsonl"
    path.write_bytes(line * 10_000)
    tracemalloc.start()
    assert sum(1 for _ in read_records(DataFile(path=str(path)))) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20 < path.stat().st_size


# --- one JSON list, and files as a whole


def test_a_json_list_is_read_with_indices_and_bad_records_are_their_own_errors(tmp_path):
    path = tmp_path / "data.json"
    good = json.dumps(llava(QUESTION, ANSWER), indent=1)
    path.write_text(f'\ufeff[\n{good},\n{{"id": 1, "id": 2}},\n{{"id": NaN}}, 3,\n{good}\n]\n')
    first, twice, nan, three, last = read(path)
    assert isinstance(first, Conversation) and first.turns == PLAIN
    assert isinstance(last, Conversation)
    assert (first.id, first.where) == ("index-0", f"{path}[0]")
    assert (last.id, last.where) == ("index-4", f"{path}[4]")
    reasons = [error.reason for error in (twice, nan, three)]  # type: ignore[union-attr]
    assert reasons == ["json_duplicate_key", "json_nan", "format"]
    assert open_records(DataFile(path=str(path))).total == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"id": 1},\n]', ":3:1: not valid JSON: Expecting value (remove the comma"),
        ('[\n{"id": 1}\n{"id": 2}]', ":3:1: not valid JSON: expected ',' or ']'"),
        ('[\n{"id": 1,}]', ":2:10: not valid JSON:"),
        ('[{"id": 1}', ":1:11: not valid JSON: expected ',' or ']'"),
        ("[] []", ":1:4: not valid JSON: expected nothing after"),
        ("[" * 100_000, "nested too deeply"),
        ('{\n "a": 1\n}', "holds one JSON object over several lines"),
        ("hello", "expected a JSON list of records"),
    ],
)
def test_a_broken_list_is_one_error_with_line_and_column(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    assert not isinstance(caught.value, RecordError)


def test_a_list_that_is_not_utf8_names_line_and_byte(tmp_path):
    (tmp_path / "data.json").write_bytes(b'[\n"\xff"]')
    with pytest.raises(UserError, match=r"data\.json:2: not UTF-8 \(byte 3\)"):
        read(tmp_path / "data.json")


def test_empty_files_have_no_records_and_missing_ones_are_named(tmp_path):
    for name in ("data.json", "data.jsonl"):
        (tmp_path / name).write_text(" \n")
        assert read(tmp_path / name) == []
    with pytest.raises(UserError, match=r"none\.json: no such data file"):
        read(tmp_path / "none.json")
    with pytest.raises(UserError, match="expected a data file"):
        read(tmp_path)


def test_lines_are_recognised_under_another_name_and_the_image_root_is_set(tmp_path):
    path = tmp_path / "data.json"
    record = json.dumps(llava(("human", "<image>"), ANSWER, image="a.png"))
    path.write_text(f"{record}\n{record}\n")
    assert [item.images for item in read(path)] == [(tmp_path / "a.png",)] * 2  # type: ignore
    (item, _) = read(path, image_root="/images")
    assert item.images == (Path("/images/a.png"),)  # type: ignore[union-attr]


# --- tables


def table_rows() -> list[dict[str, object]]:
    shown = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]
    named: dict[str, object] = {"bytes": None, "path": "b.png"}
    return [
        {"id": "a", "image": image_column(), "conversations": shown},
        {"id": "b", "image": named, "conversations": shown},
    ]


def test_parquet_rows_carry_their_images_as_bytes_or_names(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = table_rows()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for place in (tmp_path / "x.parquet", tmp_path):
        first, second = read(place)
        assert first.images == (rows[0]["image"]["bytes"],)  # type: ignore
        assert second.images == (tmp_path / "b.png",)  # type: ignore
        assert first.where == f"{tmp_path / 'x.parquet'}[0]"
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(UserError, match="pyarrow cannot read this Parquet file"):
        read(tmp_path / "x.parquet")


def test_parquet_rows_in_messages_form_read_their_image_parts(tmp_path):
    import pyarrow
    from pyarrow import parquet

    content = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": "A cat."}]
    row = {
        "images": [image_column(), image_column("blue")],
        "messages": [
            {"role": "user", "content": [content[0], *content], "weight": None},
            {"role": "assistant", "content": answer, "weight": 1},
        ],
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.parquet")
    (item,) = read(tmp_path / "x.parquet")
    assert isinstance(item, Conversation)
    assert item.turns[0].parts == (ImagePart(0), ImagePart(1), TextPart("What?"))
    assert item.images == tuple(image["bytes"] for image in row["images"])


def test_a_datasets_folder_is_read_without_decoding_its_images(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import datasets
    rows = table_rows()[:1]
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.save_to_disk(str(tmp_path / "saved"))
        datasets.DatasetDict(train=made).save_to_disk(str(tmp_path / "splits"))
    (item,) = read(tmp_path / "saved")
    assert isinstance(item, Conversation)
    assert item.images == (rows[0]["image"]["bytes"],)  # type: ignore[index]
    assert [c.id for c in read(tmp_path / "splits" / "train")] == ["a"]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="splits \\(train\\); name one of them"):
        read(tmp_path / "splits")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def read_list(path: Path) -> list[object] | str:
    """The values of a JSON list and the errors in their places, or the error of the file."""
    try:
        opened = records.open_raw_records(path)
        rows = [r.value if isinstance(r, RawRecord) else str(r) for r in opened.records]
    except UserError as error:
        return str(error)
    assert len(rows) == opened.total
    return rows


def read_list_by_the_standard_library(path: Path) -> list[object] | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "split_list", split_by_the_standard_library)
        return read_list(path)


def split_by_the_standard_library(path: Path, data: bytes) -> list[bytes]:
    return [item.encode() for item in json_items._items_of_text(path, bytes(data))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(JSON, max_size=6),
    indent=st.sampled_from((None, 0, 2)),
    ascii_only=st.booleans(),
    block=st.integers(1, 40),
    data=st.data(),
)
def test_a_list_is_read_as_the_standard_library_reads_it_damaged_or_not(
    tmp_path: Path,
    values: list[object],
    indent: int | None,
    ascii_only: bool,
    block: int,
    data: st.DataObject,
) -> None:
    path = tmp_path / "list.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path.write_text(data.draw(st.sampled_from(("", "\ufeff", " \n"))) + text + "\n", "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_items, "_BLOCK", block)
        assert read_list(path) == values == read_list_by_the_standard_library(path)
        broken = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(broken) - 1))
        if data.draw(st.booleans()):
            del broken[place:]
        else:
            broken[place] = data.draw(st.integers(0, 255))
        path.write_bytes(broken)
        assert read_list(path) == read_list_by_the_standard_library(path)


def test_nan_and_half_a_surrogate_pair_quarantine_their_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    good = json.dumps(llava(QUESTION, ANSWER))
    path.write_text(f'[{good}, {{"id": NaN}}, {good.replace("cat", chr(92) + "ud83d")}, {good}]')
    assert [getattr(row, "reason", "good") for row in read(path)] == [
        "good",
        "json_nan",
        "bad_text",
        "good",
    ]
