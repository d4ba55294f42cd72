"""`python -m data_tools.verify`: records of others, checked against COCO files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_tools import verify, wording
from data_tools.__main__ import main as data_commands
from data_tools.coco import AnnotatedImage
from data_tools.instruct.plan.prompts import description_requests
from data_tools.instruct.verify.lexicon import Lexicon
from data_tools.instruct.verify.llava_records import ImageFinder, turns_of, type_of
from data_tools.instruct.verify.questions import Asked
from data_tools.instruct.verify.reading import Reading
from tests.data_tools.coco_files import write_coco
from vlm_sft.errors import UserError

DOG: tuple[str, list[float], int] = ("dog", [10, 10, 40, 30], 0)
CAT: tuple[str, list[float], int] = ("cat", [120, 60, 30, 30], 0)


def record(number: Any, image: str | None, *turns: str, **more: Any) -> dict[str, Any]:
    roles = ("human", "gpt")
    said = [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)]
    made = {"id": number, "conversations": said, **more}
    return made if image is None else {**made, "image": image}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return write_coco(tmp_path, {1: [DOG, CAT]})


def line(files: dict[str, Path], records: Path, out: Path) -> list[str]:
    given = {
        "instances": files["instances"], "captions": files["captions"], "images": files["images"],
        "records": records, "out": out,
    }  # fmt: skip
    return [word for name, path in given.items() for word in (f"--{name}", str(path))]


def checked(files: dict[str, Path], tmp_path: Path, records: list[Any]) -> list[dict[str, Any]]:
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    assert verify.main(line(files, path, tmp_path / "out")) == 0
    text = (tmp_path / "out" / "verdicts.jsonl").read_text()
    return [json.loads(row) for row in text.splitlines()]


def name_of(files: dict[str, Path]) -> str:
    return next(files["images"].iterdir()).name


def test_every_record_gets_a_line_with_its_own_id(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = name_of(files)
    found = checked(files, tmp_path, [
        record(7, image, "<image>\nIs there a dog?", "Yes, there is a dog."),
        record("b", f"train2017/{image}", "Is there a dog?", "No, there is no dog."),
        record("c", image, "What is there?", "A bus and a dog."),
    ])  # fmt: skip
    assert [row["id"] for row in found] == [7, "b", "c"]
    assert [row["verdict"] for row in found] == ["accepted", "rejected", "rejected"]
    assert [row["codes"] for row in found] == [[], ["OBJECT_DENIED"], ["OBJECT_NOT_FOUND"]]
    bus, dog = (c for c in found[2]["claims"] if c["rule"] == "object")
    assert (bus["claim"], bus["verdict"], bus["code"]) == (
        "bus", "contradicted", "OBJECT_NOT_FOUND",
    )  # fmt: skip
    assert dog["verdict"] == "supported" and dog["evidence"]
    table = capsys.readouterr().out
    assert "conversation" in table and "OBJECT_DENIED" in table


def test_without_captions_the_boxes_decide_and_the_summary_says_so(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, image = tmp_path / "records.json", name_of(files)
    path.write_text(json.dumps([
        record(1, image, "Is there a dog?", "No, there is no dog."),
        record(2, image, "Is there a cat?", "Yes, there is a black cat."),
    ]))  # fmt: skip
    words = line(files, path, tmp_path / "out")
    at = words.index("--captions")
    assert verify.main([*words[:at], *words[at + 2 :]]) == 0
    found = [json.loads(row) for row in (tmp_path / "out/verdicts.jsonl").read_text().splitlines()]
    assert [row["codes"] for row in found] == [["OBJECT_DENIED"], []]
    assert "captions were not given (--captions)" in capsys.readouterr().out
    assert verify.main([*words, "--overwrite"]) == 0
    assert "not given" not in capsys.readouterr().out


def test_own_names_of_categories_are_understood_in_words_and_as_in_the_file(
    files: dict[str, Path], tmp_path: Path
) -> None:
    document = json.loads(files["instances"].read_text())
    for old, new in (("dog", "my_ski"), ("cat", "Traffic-Cone"), ("car", "Road_Sign")):
        next(c for c in document["categories"] if c["name"] == old)["name"] = new
    files["instances"].write_text(json.dumps(document))
    image = name_of(files)
    found = checked(files, tmp_path, [
        record(1, image, "How many my skis are there?", "There is one my ski."),
        record(2, image, "How many traffic cones are there?", "There are two traffic cones."),
        record(3, image, "What is there?", "A my_ski and a traffic-cone."),
        record(4, image, "What is there?", "A road-sign."),
        record(5, image, "Is there a traffic cone?", "No, there is no traffic cone."),
    ])  # fmt: skip
    assert [row["codes"] for row in found] == [
        [], ["COUNT_WRONG"], [], ["OBJECT_NOT_FOUND"], ["OBJECT_DENIED"],
    ]  # fmt: skip


def test_a_record_that_cannot_be_checked_is_rejected_with_the_reason(
    files: dict[str, Path], tmp_path: Path
) -> None:
    image = name_of(files)
    found = checked(files, tmp_path, [
        record(1, None, "Hello?", "Hello."),
        record(2, "000000009999.jpg", "Is there a dog?", "Yes."),
        {"id": 3, "image": image, "messages": []},
        "not a record",
    ])  # fmt: skip
    assert [row["codes"] for row in found] == [
        ["NO_IMAGE"], ["IMAGE_NOT_ANNOTATED"], ["RECORD_FORM"], ["RECORD_FORM"],
    ]  # fmt: skip
    assert {row["verdict"] for row in found} == {"rejected"}
    next(files["images"].iterdir()).unlink()
    [missing] = checked(files, tmp_path, [record(4, image, "Is there a dog?", "Yes.")])
    assert missing["codes"] == ["IMAGE_MISSING"]


def test_a_record_with_half_a_surrogate_pair_is_rejected_and_the_file_stays_unicode(
    files: dict[str, Path], tmp_path: Path
) -> None:
    image = name_of(files)
    found = checked(files, tmp_path, [
        record("\ud800", image, "Is there a dog?", "Yes, there is a dog."),
        record("b", image, "Is there a dog?", "Yes, there is a dog \udfff."),
        record(["\ud800"], image, "Is there a dog?", "Yes, there is a dog."),
        record("d", f"\ud800{image}", "Is there a dog?", "Yes, there is a dog."),
        record("\U0001f436", image, "Is there a dog?", "Yes, there is a dog."),
    ])  # fmt: skip
    assert [row["codes"] for row in found] == [["RECORD_FORM"]] * 4 + [[]]
    assert found[0]["id"] == "\\ud800", "the escape, as text"
    assert (found[1]["id"], found[4]["id"]) == ("b", "\U0001f436")
    text = (tmp_path / "out" / "verdicts.jsonl").read_bytes().decode()
    for row in text.splitlines():
        json.dumps(json.loads(row), ensure_ascii=False).encode()


def test_a_file_without_a_record_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text("[]")
    with pytest.raises(UserError, match=r"records\.json: has no records"):
        verify.main(line(files, path, tmp_path / "out"))
    assert not (tmp_path / "out" / "verdicts.jsonl").exists()


@pytest.mark.parametrize("question", description_requests(None))
def test_the_requests_for_descriptions_of_this_toolkit_are_known_as_such(question: str) -> None:
    [turn] = turns_of(record(1, None, f"<image>\n{question}", "A dog and a cat.")) or ()
    assert (turn.kind, type_of((turn,))) == ("description", "detail")


def test_what_this_toolkit_asks_counts_as_a_question() -> None:
    of_rules = wording.load("questions")
    asked = [*description_requests(None), *of_rules["caption"], *of_rules["description"]]
    lexicon = Lexicon(["dog", "cat"])
    assert [q for q in asked if not Asked(Reading(q, lexicon)).is_request] == []


def test_a_type_that_is_given_decides_what_an_answer_may_guess(
    files: dict[str, Path], tmp_path: Path
) -> None:
    talk = ("What happens?", "The owner of the dog seems to be near. It probably waits for a bus.")
    found = checked(files, tmp_path, [
        record(1, name_of(files), *talk, type="reasoning"),
        record(2, name_of(files), *talk),
    ])  # fmt: skip
    assert [row["verdict"] for row in found] == ["accepted", "rejected"]
    assert found[1]["codes"] == ["HEDGED"]


def test_lines_are_read_too_and_an_edited_result_is_kept(
    files: dict[str, Path], tmp_path: Path
) -> None:
    path, out = tmp_path / "records.jsonl", tmp_path / "out"
    path.write_text(json.dumps(record(1, name_of(files), "Is there a cat?", "Yes.")) + "\n")
    assert verify.main(line(files, path, out)) == 0
    first = (out / "verdicts.jsonl").read_bytes()
    assert verify.main(line(files, path, out)) == 0, "its own unchanged file is replaced"
    assert (out / "verdicts.jsonl").read_bytes() == first
    (out / "verdicts.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"verdicts\.jsonl: the file was changed after"):
        verify.main(line(files, path, out))
    assert verify.main([*line(files, path, out), "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--records", "nowhere.json", "nowhere.json: no such file"),
        ("--instances", "nowhere.json", "nowhere.json: no such file"),
        ("--images", "nowhere", "--images nowhere: no such folder"),
        ("--records", "broken.json", "broken.json:1:10: not valid JSON"),
        ("--records", "object.json", "object.json: holds one JSON object over several lines"),
    ],
)
def test_wrong_inputs_end_with_one_sentence(
    files: dict[str, Path], tmp_path: Path, option: str, value: str, message: str
) -> None:
    (tmp_path / "records.json").write_text("[]")
    (tmp_path / "broken.json").write_text('[{"id": 1')
    (tmp_path / "object.json").write_text('{\n"id": 1\n}')
    words = line(files, tmp_path / "records.json", tmp_path / "out")
    words[words.index(option) + 1] = value
    done = subprocess.run(
        [sys.executable, "-m", "data_tools.verify", *words],
        capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_the_output_folder_is_not_an_input(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "records.json").write_text("[]")
    with pytest.raises(UserError):
        verify.main(line(files, tmp_path / "records.json", files["images"]))


def test_a_line_that_is_not_json_is_rejected_and_the_others_are_checked(
    files: dict[str, Path], tmp_path: Path
) -> None:
    path, out = tmp_path / "records.jsonl", tmp_path / "out"
    good = json.dumps(record(1, name_of(files), "Is there a cat?", "Yes."))
    path.write_text(f'{{"id": 0\n{good}\n')
    assert verify.main(line(files, path, out)) == 0
    found = [json.loads(row) for row in (out / "verdicts.jsonl").read_text().splitlines()]
    assert [row["codes"] for row in found] == [["RECORD_FORM"], []]


def annotated(number: int, file_name: str) -> AnnotatedImage:
    return AnnotatedImage(number, file_name, 64, 48, ("A dog.",), (), (1,))


def test_an_image_is_found_by_its_name_and_by_digits_only_if_they_are_its_id() -> None:
    finder = ImageFinder(
        [
            annotated(9, "000000000009.jpg"),
            annotated(553664, "frame_53664.jpg"),
            annotated(53665, "frame_00009.jpg"),
            annotated(1, "left/view.jpg"),
            annotated(2, "right/view.jpg"),
        ]
    )
    found = {
        name: image.id if (image := finder.find(name)) else None
        for name in (
            "000000000009.jpg", "COCO_train2014_000000000009.jpg", "train2017/000000000009.jpg",
            "frame_53664.jpg", "frames/frame_53664.jpg", "frame_00009.jpg",
            "frame_53665.jpg", "frame_553664.jpg",  # digits are ids, and the names are others
            "left/view.jpg", "right/view.jpg", "view.jpg",  # of two images
            "unknown.jpg",
        )
    }  # fmt: skip
    assert found == {
        "000000000009.jpg": 9, "COCO_train2014_000000000009.jpg": 9,
        "train2017/000000000009.jpg": 9, "frame_53664.jpg": 553664,
        "frames/frame_53664.jpg": 553664, "frame_00009.jpg": 53665, "frame_53665.jpg": None,
        "frame_553664.jpg": None, "left/view.jpg": 1, "right/view.jpg": 2, "view.jpg": None,
        "unknown.jpg": None,
    }  # fmt: skip


def test_the_help_of_the_command_for_records_says_which_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for words, expected in (
        (["verify", "--help"], "(LLaVA's form, in .json, .jsonl or .parquet;"),
        (["verify", "--help", "--records"], "records of LLaVA's form (`image`, `conversations`"),
    ):
        with pytest.raises(SystemExit):
            data_commands(words)
        assert expected in " ".join(capsys.readouterr().out.split())
