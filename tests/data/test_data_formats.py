"""Tables, imagefolders, caption folders and VQA files become the same conversations."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from vlm_sft.config.schema import ColumnNames, DataFile
from vlm_sft.data import columns
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.records import open_records, read_records
from vlm_sft.errors import RecordError, UserError


def read(path: Path, **more: object) -> list[Conversation | RecordError]:
    return list(read_records(DataFile(path=str(path), **more)))  # type: ignore[arg-type]


def good(path: Path, **more: object) -> list[Conversation]:
    found = read(path, **more)
    assert all(isinstance(record, Conversation) for record in found), found
    return found  # type: ignore[return-value]


def refusal(path: Path, **more: object) -> UserError:
    with pytest.raises(UserError) as caught:
        read(path, **more)
    assert "\n" not in str(caught.value)
    return caught.value


def reasons(found: list[Conversation | RecordError]) -> dict[str, str]:
    return {r.record_id: r.reason for r in found if isinstance(r, RecordError)}


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def asked(question: str, answer: str, *images: Path) -> tuple[tuple[Turn, ...], tuple[Path, ...]]:
    """The turns and images that every format must give for a question about images."""
    parts = [*map(ImagePart, range(len(images))), *([TextPart(question)] if question else [])]
    user = Turn("user", tuple(parts), image_separator=None if images else "")
    return (user, Turn("assistant", (TextPart(answer),))), images


def content(record: Conversation) -> tuple[tuple[Turn, ...], tuple[object, ...]]:
    return record.turns, record.images


# --- the same record from every format


def formats(root: Path) -> dict[str, DataFile]:
    """One question about `pic/a.png`, with the id 7, in every format."""
    row = {"id": 7, "image": "pic/a.png", "question": "What?", "answer": "A cat."}
    parts = [
        {"type": "image_url", "image_url": {"url": "pic/a.png"}},
        {"type": "text", "text": "What?"},
    ]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    question = {"question_id": 7, "image": "pic/a.png", "question": "What?"}
    entry = {"question_id": 7, "multiple_choice_answer": "A cat."}
    table = "question,image,id,answer\nWhat?,pic/a.png,7,A cat.\n"
    write(root / "questions.json", json.dumps({"questions": [question]}))
    write(root / "answers.json", json.dumps({"annotations": [entry]}))
    write(root / "folder" / "metadata.csv", table.replace("image", "file_name"))
    write(
        root / "lines" / "metadata.jsonl",
        json.dumps({"file_name": "pic/a.png", "id": 7, "question": "What?", "answer": "A cat."}),
    )
    names = {
        "openai": write(root / "openai.jsonl", json.dumps({"id": 7, "messages": turns})),
        "csv": write(root / "a.csv", table),
        "tsv": write(root / "a.tsv", table.replace(",", "\t")),
        "semicolons": write(root / "b.csv", "\ufeff" + table.replace(",", ";")),
        "json rows": write(root / "rows.json", json.dumps([row], indent=1)),
        "json lines": write(root / "rows.jsonl", json.dumps(row)),
        "vqa in one file": write(
            root / "vqa.json", json.dumps({"questions": [question], "annotations": [entry]})
        ),
        "imagefolder": root / "folder",
        "imagefolder in jsonl": root / "lines",
    }
    files = {name: DataFile(path=str(path), image_root=str(root)) for name, path in names.items()}
    files["vqa"] = DataFile(
        path=str(root / "questions.json"), annotations=str(root / "answers.json")
    )
    return files


def test_every_format_gives_the_same_record(tmp_path):
    expected = asked("What?", "A cat.", tmp_path / "pic" / "a.png")
    for name, file in formats(tmp_path).items():
        opened = open_records(file)
        records = list(opened.conversations)
        assert [content(record) for record in records] == [expected], name
        assert [record.id for record in records] == ["7"] and opened.total >= 1, name


def test_relative_names_start_from_the_folder_of_the_file_or_the_folder_itself(tmp_path):
    write(tmp_path / "set" / "metadata.csv", "file_name,text\na.png,A cat.\n")
    write(tmp_path / "set" / "a.txt", "A cat.\n")
    image(tmp_path / "set" / "a.png")
    expected = asked("", "A cat.", tmp_path / "set" / "a.png")
    for file in (
        DataFile(path=str(tmp_path / "set")),
        DataFile(path=str(tmp_path / "set" / "metadata.csv")),
        DataFile(path=str(tmp_path / "set"), format="captions"),
    ):
        assert [content(r) for r in read_records(file)] == [expected], file  # type: ignore[arg-type]
        assert file.images_start_in() == tmp_path / "set"


def test_captions_take_the_configured_prompt_as_their_question(tmp_path):
    path = write(tmp_path / "a.csv", "file_name,caption\na.png,A cat.\n")
    (record,) = good(path, caption_prompt="Describe it.")
    assert content(record) == asked("Describe it.", "A cat.", tmp_path / "a.png")


def test_records_of_any_format_without_a_question_take_the_configured_prompt(tmp_path):
    def llava(*turns):
        said = [{"from": who, "value": text} for who, text in turns]
        return {"id": "a", "image": "a.png", "conversations": said}

    parts = [{"type": "image", "image": "a.png"}]
    caption = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    records = [
        llava(("human", "<image>\n"), ("gpt", "A cat.")),
        {"id": "b", "messages": caption},
        llava(("human", "<image>\nWhat?"), ("gpt", "A cat.")),
    ]
    path = write(tmp_path / "a.json", json.dumps(records))
    found = good(path, caption_prompt="Describe it.")
    expected = [asked(q, "A cat.", tmp_path / "a.png") for q in ("Describe it.",) * 2]
    assert [content(record) for record in found[:2]] == expected
    assert found[2].turns[0].text == "\nWhat?"
    assert [record.turns[0].text for record in good(path)] == ["\n", "", "\nWhat?"]


# --- columns


def test_columns_are_recognized_or_named_and_logged_once(tmp_path, caplog):
    columns._LOGGED.clear()
    path = write(tmp_path / "a.csv", "File Name,Caption,label\na.png,A cat.,3\n")
    with caplog.at_level(logging.INFO):
        good(path), good(path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: columns image = 'File Name', text = 'Caption'; not used: 'label'"
    ]
    other = write(tmp_path / "b.csv", "pic,text,truth\na.png,What?,A cat.\n")
    names = ColumnNames(image="pic", question="text", answer="truth")
    assert content(good(other, columns=names)[0]) == asked("What?", "A cat.", tmp_path / "a.png")


def test_without_a_header_no_row_loses_a_part_that_the_first_row_does_not_have(tmp_path):
    rows: list[dict[str, object]] = [
        {"question": "2+2?", "answer": "4", "source": "x"},
        {"image": "a.png", "question": "What?", "answer": "A cat.", "id": 7},
        {"img": "b.png", "caption": "A dog."},
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"image": "c.png", "conversations": [
            {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "x"}]},
        {"image": "a.png", "images": ["b.png"], "text": "A cat."},
        {"question": "Who?", "answer": "x", "pic": "d.png"},
        {"text": "A cat without its image."},
    ]  # fmt: skip
    for order in (rows, [rows[4], *rows[:4], *rows[5:]]):
        text = "\n".join(map(json.dumps, order))
        found = read(write(tmp_path / "rows.jsonl", text))
        taken = {r.images: (r.id, r.turns) for r in found if isinstance(r, Conversation)}
        assert set(taken) == {(), *((tmp_path / name,) for name in ("a.png", "b.png", "c.png"))}
        cat = asked("What?", "A cat.", tmp_path / "a.png")
        assert taken[cat[1]] == ("7", cat[0])
        texts = [r.turns[0].text for r in found if isinstance(r, Conversation) and not r.images]
        assert texts == ["2+2?", "Add.\n1 2"]
        expected = {
            "line-6": "ambiguous_columns", "line-7": "missing_column", "line-8": "format",
        }  # fmt: skip
        assert reasons(found) == expected
        (both,) = (r for r in found if isinstance(r, RecordError) and r.record_id == "line-6")
        assert str(both).count("rows.jsonl") == 1 and "'image', 'images' could each" in str(both)


def test_cells_keep_line_breaks_quotes_and_marks_as_text(tmp_path):
    path = write(tmp_path / "a.csv", 'question,answer\n"A <image>,\n""b""?",x\nq,y\n')
    first, second = good(path)
    assert content(first) == asked('A <image>,\n"b"?', "x")
    assert [first.where, second.where] == [f"{path}:2", f"{path}:4"]
    assert [first.id, second.id] == ["line-2", "line-4"]


def test_turns_in_a_cell_are_json_and_alpaca_inputs_follow_the_instruction(tmp_path):
    turns = json.dumps(
        [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    )
    cell = turns.replace('"', '""')
    path = write(tmp_path / "metadata.csv", f'file_name,conversations\na.png,"{cell}"\n')
    (record,) = good(tmp_path)
    assert content(record)[1] == (tmp_path / "a.png",) and record.turns[0].text == "\nWhat?"
    write(path, 'file_name,conversations\na.png,"[{"\n')
    assert reasons(read(path)) == {"line-2": "json_syntax"}
    alpaca = write(tmp_path / "alpaca.csv", "instruction,input,output\nAdd.,1 2,3\n")
    assert content(good(alpaca)[0]) == asked("Add.\n1 2", "3")


@pytest.mark.parametrize(
    ("header", "names", "code", "words"),
    [
        ("image,question", {}, "missing_column", "no column for answer; its columns are 'image'"),
        ("image,label", {}, "missing_column", "no column for text (a caption) or question"),
        ("pic,question,answer", {}, "missing_column", "'pic' looks like it"),
        ("question,caption", {}, "ambiguous_columns", "texts of different kinds"),
        ("image,file_name,text", {}, "ambiguous_columns", "'image', 'file_name' could each"),
        ("image,text", {"text": "texts"}, "missing_column", "did you mean 'text'?"),
        ("image,image", {}, "missing_column", "'image' appears twice"),
        ("image,", {}, "missing_column", "a name is empty"),
    ],
)
def test_columns_that_cannot_be_found_are_one_error(tmp_path, header, names, code, words):
    row = ",".join("x.jpg" for _ in header.split(","))
    path = write(tmp_path / "a.csv", f"{header}\n{row}\n")
    error = refusal(path, columns=ColumnNames(**names))
    assert (error.reason, words in str(error)) == (code, True), error


# --- rows that cannot be used


def test_every_row_of_a_table_is_a_record_or_an_error(tmp_path):
    rows = [
        "a.png,fine",
        "b.png",
        ",no image",
        "c.png,  ",
        'd.png,"x"y',
        "",
        "e.png,fine",
        "f.png,\0",
    ]
    path = write(tmp_path / "a.csv", "image,text\n" + "\n".join(rows) + "\n")
    found = read(path)
    assert reasons(found) == {
        "line-3": "bad_row",
        "line-4": "empty_cell",
        "line-5": "empty_cell",
        "line-6": "bad_row",
        "line-9": "bad_row",
    }
    assert [r.id for r in found if isinstance(r, Conversation)] == ["line-2", "line-8"]
    assert "column 'image' is empty" in str(found[2]) and f"{path}:4" in str(found[2])


def test_a_quote_without_an_end_and_another_encoding_stop_the_file(tmp_path):
    error = refusal(write(tmp_path / "a.csv", 'question,answer\na,b\nc,"d\ne,f\n'))
    assert error.reason == "bad_row" and f"{tmp_path / 'a.csv'}:3: a quote begins" in str(error)
    error = refusal(write(tmp_path / "b.csv", "question,answer\na,b\nc,café\n".encode("latin-1")))
    assert error.reason == "not_utf8" and "b.csv:3: not UTF-8 (byte 0xe9" in str(error)
    error = refusal(write(tmp_path / "c.csv", "question,answer\n".encode("utf-16")))
    assert error.reason == "not_utf8"
    error = refusal(write(tmp_path / "d.csv", "question,answer\n".encode("utf-16-le")))
    assert error.reason == "not_utf8"


def test_a_forgotten_quote_never_swallows_a_row(tmp_path, capsys):
    head, end = "image,question,answer\na.png,q,a\n", "\ne.png,q,a\n"
    rows = 'b.png,"q?,yes\nc.png,q,a\nd.png,q,"no"'
    error = refusal(write(tmp_path / "a.csv", head + rows + end))
    assert error.reason == "bad_row" and "(lines 3 to 5 were read as one row)" in str(error)
    joined = [
        'b.png,q,"x\nc.png,q,a\nd.png,q,a"',  # the quotes pair up around whole rows
        'b.png,"x,yes\nc.png,q\nd.png,q",a',
        'b.png,"x,yes\nc.png,q,a\nd.png,q",a,a',  # another number of cells
    ]
    expected = dict.fromkeys(("line-3", "line-4", "line-5"), "bad_row")
    for rows in joined:
        found = read(write(tmp_path / "a.csv", head + rows + end))
        assert reasons(found) == expected, rows
        assert [r.id for r in found if isinstance(r, Conversation)] == ["line-2", "line-6"]
    assert "lines 3 to 5 were read as one row" in str(found[1])
    last = 'question,answer,image\nq,"a,b.png\nq,a",c.png\n'
    assert reasons(read(write(tmp_path / "b.csv", last))) == {
        "line-2": "bad_row",
        "line-3": "bad_row",
    }
    good(write(tmp_path / "b.csv", 'question,answer,image\n"x, y,\nz",a,c.png\n'))
    good(
        write(tmp_path / "b.csv", 'image,question,answer\n"c.png","x\ny","see, there, b.png\nz"\n')
    )
    both = "image,question,answer,images\n"
    names = ColumnNames(image="image")
    good(write(tmp_path / "b.csv", both + 'a.png,"q","x, y\nz",b.png\n'), columns=names)
    assert not capsys.readouterr().err
    good(write(tmp_path / "c.csv", 'question,answer\nq,"x\nf(1,2)\n"\n'))
    assert "1 rows have a cell with a line that could be a row" in capsys.readouterr().err


def test_other_line_ends_and_headers_of_other_programs(tmp_path):
    expected = [asked("What?", answer, tmp_path / "a.png") for answer in ("x\ry", "z")]
    rows = ["image,question,answer", 'a.png,What?,"x\ry"', "a.png,What?,z", ""]
    for text in (
        "\r".join(rows),
        rows[0] + "\r" + "\n".join(rows[1:]),
        "sep=;\r\n" + "\r\n".join(rows).replace(",", ";"),
        "\n".join(rows).replace(",", ", "),
    ):
        opened = open_records(DataFile(path=str(write(tmp_path / "a.csv", text))))
        records = list(opened.conversations)
        assert [content(r) for r in records if isinstance(r, Conversation)] == expected, text
        assert opened.total >= len(records) == 2
    for header in ('image,"question,answer\n', 'image,"question"s,answer\n'):
        error = refusal(write(tmp_path / "a.csv", header + "a.png,q,a\n"))
        assert error.reason == "bad_row" and "a.csv:1: a quote in the header" in str(error)


def test_an_imagefolder_refuses_repeated_rows_and_metadata_without_file_names(tmp_path):
    write(tmp_path / "metadata.csv", "file_name,text\na.png,A\na.png,B\na.png,A\n")
    assert reasons(read(tmp_path)) == {"line-4": "repeated_row"}
    write(tmp_path / "metadata.csv", "name,question,answer\nx,q,a\n")
    assert refusal(tmp_path).reason == "missing_column"
    write(tmp_path / "metadata.jsonl", "{}")
    assert "has metadata.csv and metadata.jsonl; give the one" in str(refusal(tmp_path))
    write(tmp_path / "splits" / "train" / "metadata.csv", "file_name,text\n")
    assert f"give one of them: {tmp_path / 'splits' / 'train'}" in str(refusal(tmp_path / "splits"))


def test_a_folder_of_captions_reports_whatever_has_no_partner(tmp_path):
    for name in ("b/1.JPG", "a.png", "twice.png", "twice.jpeg", "alone.png", "bad.png"):
        image(tmp_path / name)
    write(tmp_path / "b" / "1.txt", "\ufeffOne.\n")
    for name, text in (("a", b"A"), ("twice", b"2"), ("lone", b"?"), ("bad", b"\xff"), (".x", b"")):
        write(tmp_path / f"{name}.txt", text)
    found = read(tmp_path)
    expected = {"alone": "unpaired", "bad": "not_utf8", "lone": "unpaired", "twice": "unpaired"}
    assert reasons(found) == expected
    assert [r.id for r in found if isinstance(r, Conversation)] == ["a", "b/1"]
    assert [content(r) for r in found if isinstance(r, Conversation)][1] == asked(
        "", "One.", tmp_path / "b" / "1.JPG"
    )
    (lone,) = (r for r in found if isinstance(r, RecordError) and r.record_id == "lone")
    assert f"searched {tmp_path}/lone.jpg" in str(lone)
    assert "found 1 images and 0 captions" in str(refusal(image(tmp_path / "c" / "x.png").parent))


def test_linked_and_unreadable_subfolders_of_captions_are_accounted_for(
    tmp_path, monkeypatch, capsys
):
    for name in ("set/real/a", "other/b", "set/closed/c"):
        write(tmp_path / f"{name}.txt", name)
        image(tmp_path / f"{name}.png")
    folder = tmp_path / "set"
    for link, target in (("linked", "other"), ("again", "set/real"), ("up", "set")):
        (folder / link).symlink_to(tmp_path / target)
    assert [r.id for r in good(folder)] == ["closed/c", "real/a"]
    assert "3 linked subfolders are left out, e.g. 'again'; set `follow" in capsys.readouterr().err
    found = good(folder, follow_symlinks=True)
    assert [r.id for r in found] == ["closed/c", "linked/b", "real/a"]
    assert found[1].images == (folder / "linked" / "b.png",)
    assert "2 linked subfolders are left out, e.g. 'again'; their" in capsys.readouterr().err

    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert reasons(read(folder)) == {"closed": "data_file_unreadable"}
    assert "the folder '.' cannot be read" in str(refusal(folder / "closed", format="captions"))


def test_images_that_no_row_of_an_imagefolder_names_are_counted(tmp_path, capsys):
    for name in ("a.png", "more/b.png", "c.png", "d.png"):
        image(tmp_path / name)
    rows = "file_name,text\n./a.png,A\nmore/b.png,B\na.png,A\n"
    write(tmp_path / "metadata.csv", rows)
    assert reasons(read(tmp_path)) == {"line-4": "repeated_row"}
    assert "2 images are in no row of its metadata" in capsys.readouterr().err


def test_vqa_questions_and_annotations_are_joined_and_leftovers_reported(tmp_path):
    questions = [
        {"question_id": 1, "image_id": 9, "question": "Color?"},
        {"question_id": 2, "image_id": 9, "question": "None?"},
        {"question_id": 1, "image_id": 9, "question": "Again?"},
    ]
    answers = [{"answer": a, "answer_id": i} for i, a in enumerate(["red", "blue", "blue"])]
    entries = [{"question_id": 1, "answers": answers}, {"question_id": 5, "answers": answers}]
    vqa = {"data_subtype": "val2014", "questions": questions, "annotations": entries}
    path = write(tmp_path / "vqa.json", json.dumps(vqa))
    found = read(path)
    first = next(record for record in found if isinstance(record, Conversation))
    expected = asked("Color?", "blue", tmp_path / "COCO_val2014_000000000009.jpg")
    assert (content(first), first.id) == (expected, "1")
    errors = [(r.record_id, r.reason) for r in found if isinstance(r, RecordError)]
    assert errors == [("2", "unpaired"), ("1", "repeated_row"), ("5", "unpaired")]
    (named,) = (r for r in read(path, image_name="v/{image_id}.png") if isinstance(r, Conversation))
    assert named.images == (tmp_path / "v" / "9.png",)
    (failed, *_) = read(path, image_name="{other}.png")
    assert isinstance(failed, RecordError) and failed.reason == "image_field"
    alone = write(tmp_path / "v2_questions.json", json.dumps({"questions": questions}))
    write(tmp_path / "v2_annotations.json", json.dumps({"annotations": entries}))
    assert f"e.g. {tmp_path / 'v2_annotations.json'}" in str(refusal(alone))
    assert "annotations without questions" in str(refusal(tmp_path / "v2_annotations.json"))


def test_images_of_openai_records_are_local_or_embedded_and_never_fetched(tmp_path):
    def record(url: str) -> str:
        parts = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
        user = {"role": "user", "content": [{"type": "text", "text": "What?"}, *parts]}
        return json.dumps({"messages": [user, {"role": "assistant", "content": "x"}]})

    urls = ["data:image/png;base64,aGk=", "a.png", "https://x.org/a.png"]
    urls += [" DATA:IMAGE/PNG;BASE64,aGk=", "data:image/png;base64,", "data:image/png,aGk="]
    found = read(write(tmp_path / "a.jsonl", "\n".join(map(record, urls))))
    embedded, local, remote, upper, *broken = found
    for data_url in (embedded, upper):
        assert isinstance(data_url, Conversation) and data_url.images == (b"hi",)
    assert [str(error).count("not a base64 data URL with") for error in broken] == [1, 1]
    assert isinstance(local, Conversation) and local.images == (tmp_path / "a.png",)
    assert isinstance(remote, RecordError) and "images are not downloaded" in str(remote)
