"""POPE questions: balance, samplings by their definitions, images of the training data left out."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools.pope import main
from data_tools.rules import POPE_SAMPLINGS
from tests.data_tools.coco_files import write_coco
from vlm_sft.errors import UserError

BOX = [10, 10, 40, 30]


def scene(*names: str) -> list[tuple[str, list[float], int]]:
    return [(name, [*map(float, BOX)], 0) for name in names]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Five images: dog and cat often occur together, and cars in most of the other images."""
    return write_coco(
        tmp_path,
        {
            1: scene("dog", "cat"),
            2: scene("dog", "cat"),
            3: scene("dog", "car"),
            4: scene("car", "bus"),
            5: scene("car", "cup"),
        },
        {5: ["A cup next to an apple and a car."]},
    )


def build(files: dict[str, Path], *options: str) -> int:
    return main(
        ["--instances", str(files["instances"]), "--images", str(files["images"]),
         "--out", str(files["out"]), "--questions", "4", "--min-objects", "2", *options]
    )  # fmt: skip


def rows(files: dict[str, Path], sampling: str) -> list[dict[str, Any]]:
    text = (files["out"] / f"pope_{sampling}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def boxed(files: dict[str, Path]) -> dict[str, set[str]]:
    document = json.loads(files["instances"].read_text())
    names = {c["id"]: c["name"] for c in document["categories"]}
    found: dict[str, set[str]] = {i["file_name"]: set() for i in document["images"]}
    for box in document["annotations"]:
        found[f"{box['image_id']:012d}.jpg"].add(names[box["category_id"]])
    return found


@pytest.mark.parametrize("sampling", POPE_SAMPLINGS)
def test_labels_are_true_and_balanced_and_no_object_is_asked_twice(
    files: dict[str, Path], sampling: str
) -> None:
    assert build(files) == 0
    found, there = rows(files, sampling), boxed(files)
    assert len(found) == 5 * 4
    assert Counter(row["label"] for row in found) == {"yes": 10, "no": 10}
    assert [row["question_id"] for row in found] == list(range(1, 21))
    for row in found:
        assert (row["category"] in there[row["image"]]) == (row["label"] == "yes")
    asked = Counter((row["image"], row["category"]) for row in found)
    assert max(asked.values()) == 1


def test_popular_and_adversarial_objects_are_those_of_their_definition(
    files: dict[str, Path],
) -> None:
    assert build(files) == 0
    there = boxed(files)
    frequency = Counter(name for names in there.values() for name in names)
    for row in (row for row in rows(files, "popular") if row["label"] == "no"):
        others = set(frequency) - there[row["image"]]
        top_two = sorted((frequency[name] for name in others), reverse=True)[:2]
        assert frequency[row["category"]] in top_two
    # In an image of a dog and a car, the object that occurs most with dogs is the cat.
    no = [r["category"] for r in rows(files, "adversarial")
          if r["image"] == "000000000003.jpg" and r["label"] == "no"]  # fmt: skip
    assert "cat" in no


def test_what_a_caption_names_is_not_absent(files: dict[str, Path]) -> None:
    assert build(files, "--captions", str(files["captions"])) == 0
    for sampling in POPE_SAMPLINGS:
        asked = {r["category"] for r in rows(files, sampling) if r["image"] == "000000000005.jpg"}
        assert "apple" not in asked


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    files: dict[str, Path], tmp_path: Path
) -> None:
    contents = []
    for number, seed in enumerate(("0", "0", "1")):
        assert build(files | {"out": tmp_path / f"out{number}"}, "--seed", seed) == 0
        contents.append((tmp_path / f"out{number}" / "pope_random.jsonl").read_bytes())
    assert contents[0] == contents[1] != contents[2]


def noise(path: Path, seed: int, quality: int = 90) -> None:
    image = Image.effect_noise((20, 10), 100).convert("RGB") if seed else Image.new("RGB", (20, 10))
    image.resize((200, 100)).save(path, quality=quality)


def test_images_of_the_training_data_are_left_out_by_name_content_and_look(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(1, 6):
        noise(files["images"] / f"{number:012d}.jpg", number)
    training = tmp_path / "training"
    (training / "train2017").mkdir(parents=True)
    shutil.copy(files["images"] / "000000000002.jpg", training / "renamed.jpg")  # the same bytes
    with Image.open(files["images"] / "000000000003.jpg") as image:
        image.save(training / "again.png")  # the same look
    names = ["train2017/000000000001.jpg", "renamed.jpg", "again.png"]  # the first does not exist
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    records = [{"id": name, "image": name, "conversations": turns} for name in names]
    (training / "train.json").write_text(json.dumps(records))
    assert build(files, "--training", str(training / "train.json")) == 0
    summary = json.loads((files["out"] / "pope.json").read_text())
    assert summary["image_ids"] == [4, 5]
    assert summary["training"] == {
        "records": 3, "faulty_records": 0, "images_compared_by_content": 2, "images_not_found": 1,
        "found": {"same COCO id": 1, "same file": 1, "similar image": 1},
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "3 left out because the model was trained on them" in shown
    assert "1 training images were not found" in shown


def test_nothing_left_and_wrong_inputs_are_one_sentence(files: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="no image is left: 5 usable images, 0 with at least 3"):
        build(files, "--questions", "6")
    with pytest.raises(UserError, match="expected an even number"):
        build(files, "--questions", "5")
    with pytest.raises(UserError, match="no such file"):
        build(files, "--captions", "nowhere.json")
    with pytest.raises(UserError, match="--training-images nowhere: no such folder"):
        build(files, "--training-images", "nowhere")


def test_training_files_without_a_record_are_refused_and_faulty_records_are_counted(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions, empty = str(files["captions"]), tmp_path / "empty.json"
    empty.write_text("[]")
    for path in (captions, str(empty)):
        with pytest.raises(UserError, match=r"json: .*no record"):
            build(files, "--training", path)
    assert not (files["out"] / "pope.json").exists()
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    good = {"id": "a", "image": "000000000001.jpg", "conversations": turns}
    train = tmp_path / "train.json"
    train.write_text(json.dumps([good, {"id": "b", "image": "000000000002.jpg"}]))
    assert build(files, "--training", str(train)) == 0
    assert "1 of the 2 records in --training cannot be read" in capsys.readouterr().out
    assert json.loads((files["out"] / "pope.json").read_text())["training"]["faulty_records"] == 1


def test_fewer_images_than_wanted_are_reported(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert build(files, "--count", "9") == 0
    assert "only 5 of the 9 images of --count" in capsys.readouterr().out
    assert build(files, "--count", "5") == 0
    assert "of --count" not in capsys.readouterr().out


def test_an_edited_file_is_kept(files: dict[str, Path]) -> None:
    assert build(files) == 0
    path = files["out"] / "pope_random.jsonl"
    path.write_text("edited\n")
    with pytest.raises(UserError):
        build(files)
    assert path.read_text() == "edited\n"
    assert build(files, "--overwrite") == 0
    assert path.read_text() != "edited\n"
