import json
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools import build_coco
from data_tools.coco import AnnotatedImage, Box
from data_tools.rules.facts import Facts
from data_tools.rules.families import MOST_NAMED, things
from tests.data_tools.coco_files import CATEGORIES, arguments, write_coco
from tests.documents import parse
from vlm_sft.errors import UserError
from vlm_sft.utils import words


def _read(files: dict[str, Path], name: str) -> Any:
    return json.loads((files["out"] / f"{name}.json").read_text())


def test_one_dog_left_and_two_cats_right_give_exactly_what_can_be_said_of_them(
    tmp_path: Path,
) -> None:
    files = write_coco(
        tmp_path,
        {
            7: [
                ("dog", [10, 10, 40, 30], 0),
                ("cat", [120, 60, 30, 30], 0),
                ("cat", [160, 60, 30, 30], 0),
            ]
        },
        {7: ["A dog and two cats."]},
    )
    assert build_coco.main(arguments(files, "--turns", "20")) == 0
    assert _read(files, "stage1")[0]["conversations"][1] == {
        "from": "gpt",
        "value": "A dog and two cats.",
    }
    [record] = _read(files, "stage2")
    assert record["id"] == "000000000007-conversation-0"
    assert record["image"] == "000000000007.jpg"
    values = [turn["value"] for turn in record["conversations"]]
    questions, answers = values[::2], values[1::2]
    assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * len(questions)
    assert questions[0].startswith("<image>\n")
    assert not any("<image>" in question for question in questions[1:])
    said = dict(
        zip((question.removeprefix("<image>\n") for question in questions), answers, strict=True)
    )
    counts = [said[q] for q in said if "cats" in q and ("many" in q or "number" in q)]
    assert counts == ["Two."]
    assert [said[q] for q in said if "left" in q and "dog" in q] == ["Left."]
    assert [said[q] for q in said if "top" in q and "dog" in q] == ["Top."]
    assert not any("left" in q and "cat" in q for q in said), "no one cat is meant"
    assert Counter(said.values())["Yes."] == Counter(said.values())["No."] == 2


def test_an_object_across_the_middle_is_not_asked_for_its_half(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [("dog", [60, 20, 80, 60], 0)]})
    build_coco.main(arguments(files, "--turns", "20"))
    text = json.dumps(_read(files, "stage2"))
    assert "half" not in text and "side" not in text


def test_crowds_are_not_counted_but_exist(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 90, 40], 1), ("dog", [120, 0, 30, 40], 0)]})
    build_coco.main(arguments(files, "--turns", "20"))
    kinds = _read(files, "build")["files"]["stage2.json"]["families"]
    assert kinds == {"description": 1, "existence": 2}


def test_an_image_without_boxes_gives_captions_and_never_a_no(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_coco(tmp_path, {1: [], 2: [("dog", [0, 0, 50, 50], 0)]}, {1: ["Fog."]})
    build_coco.main(arguments(files, "--probes", "6"))
    [first, _] = _read(files, "stage2")
    assert [turn["value"] for turn in first["conversations"]][1:] == ["Fog."]
    assert {record["image"] for record in _read(files, "existence")} == {"000000000002.jpg"}
    assert "1 images have no boxes" in capsys.readouterr().out


def test_images_of_which_nothing_is_certain_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_coco(
        tmp_path,
        {
            1: [],
            2: [("dog", [0, 0, 50, 50], 0)],
            3: [("dog", [9.0 * i, 9, 0.2, 0.2], 0) for i in range(6)],
        },
    )
    words = arguments(files, "--captions-from", "boxes")
    del words[words.index("--captions") : words.index("--captions") + 2]
    assert build_coco.main(words) == 0
    out = capsys.readouterr().out
    assert "1 images have no boxes" in out and "so they give captions at most" in out
    assert "1 images with boxes give no records" in out and ": 000000000003.jpg\n" in out
    images = _read(files, "build")["images"]
    assert images["boxed_without_records"] == 1
    assert build_coco.main([*words, "--only", "halves", "--overwrite"]) == 0
    assert "with boxes give no records" not in capsys.readouterr().out
    assert images["first_boxed_without_records"] == ["000000000003.jpg"]


def test_scores_of_a_detector_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 50, 50], 0)]})
    tree = json.loads(files["instances"].read_text())
    tree["annotations"][0]["score"] = 0.51
    files["instances"].write_text(json.dumps(tree))
    assert build_coco.main(arguments(files)) == 0
    assert "1  boxes with a detector's score, used whatever it is" in capsys.readouterr().out


@pytest.mark.parametrize("categories", [CATEGORIES, ["dog"]])  # of one, none is ever absent
def test_one_turn_is_asked_of_what_an_image_has(categories: list[str], tmp_path: Path) -> None:
    across = [("dog", [60, 20, 80, 60], 0)]  # no half, no relation
    images = range(1, 13)
    files = write_coco(tmp_path, dict.fromkeys(images, across), {image: [] for image in images})
    tree = json.loads(files["instances"].read_text())
    tree["categories"] = [entry for entry in tree["categories"] if entry["name"] in categories]
    files["instances"].write_text(json.dumps(tree))
    assert build_coco.main(arguments(files, "--turns", "1")) == 0
    assert len(_read(files, "stage2")) == 12


def test_what_a_caption_speaks_of_is_never_denied(tmp_path: Path) -> None:
    caption = "A puppy, a taxi, some apples, a kitten and a mug."
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 50, 50], 0)]}, {1: [caption]})
    build_coco.main(arguments(files, "--probes", "6"))
    asked = {record["category"]: record["answer"] for record in _read(files, "existence")}
    assert asked == {"dog": "yes", "bus": "no"}


def test_whole_sentences_are_answers_on_wish(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [("cup", [10, 10, 40, 30], 0)]})
    build_coco.main(arguments(files, "--answers", "sentence", "--turns", "20"))
    text = json.dumps(_read(files, "stage2"))
    assert "There is one cup in the image." in text
    assert "The cup is in the left half of the image." in text
    assert "Yes." not in text


def _many_scenes(count: int) -> dict[int, list[tuple[str, list[float], int]]]:
    return {
        i: [
            (CATEGORIES[(i * k) % 6 if k < 3 else i % 4], [10.0 * k + i % 50, 10.0 * k, 30, 20], 0)
            for k in range(1, 2 + i % 4)
        ]
        for i in range(1, count + 1)
    }


def test_answers_are_balanced_and_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    files = write_coco(tmp_path, _many_scenes(60))
    build_coco.main(arguments(files, "--eval-share", "0.3"))
    names = ("stage1", "stage2", "existence", "counting", "halves", "build")
    first = {name: (files["out"] / f"{name}.json").read_bytes() for name in names}
    build_coco.main(arguments(files, "--eval-share", "0.3"))
    assert first == {name: (files["out"] / f"{name}.json").read_bytes() for name in names}
    kinds = _read(files, "build")["files"]["existence.json"]["answers"]
    assert kinds["positive"]["yes"] == sum(
        kinds[kind]["no"] for kind in ("random", "popular", "adversarial")
    )
    numbers = [kinds[kind]["no"] for kind in ("random", "popular", "adversarial")]
    assert max(numbers) - min(numbers) <= 1
    for name in ("counting", "halves"):
        for counts in _read(files, "build")["files"][f"{name}.json"]["answers"].values():
            assert len(set(counts.values())) == 1
    ids = [record["id"] for name in names[:5] for record in _read(files, name)]
    assert len(ids) == len(set(ids))
    trained = {r["image"] for name in ("stage1", "stage2") for r in _read(files, name)}
    measured = {r["image"] for name in names[2:5] for r in _read(files, name)}
    assert trained and measured and not trained & measured


def test_only_writes_one_file_of_probes(tmp_path: Path) -> None:
    files = write_coco(tmp_path, _many_scenes(10))
    del files["out"]
    target = tmp_path / "probes.json"
    line = arguments(files, "--only", "existence", "--probes", "2", "--out-file", str(target))
    assert build_coco.main(line) == 0
    records = json.loads(target.read_text())
    assert set(records[0]) == {"id", "image", "question", "answer", "category", "kind"}
    assert Counter(record["answer"] for record in records) == {"yes": 10, "no": 10}
    assert not (tmp_path / "out").exists()


def _break(name: str, document: dict[str, Any]) -> None:
    entry = document["annotations"][0]
    match name:
        case "degenerate":
            entry["bbox"] = [0, 0, 0, 5]
        case "outside":
            entry["bbox"] = [190, 0, 50, 5]
        case "not numbers":
            entry["bbox"] = [1, 2, 3]
        case "unknown image":
            entry["image_id"] = 99
        case "unknown category":
            entry["category_id"] = 99
        case "twice":
            document["annotations"].append(entry)
        case "size":
            document["images"][0]["width"] = 300
        case "no list":
            document["categories"] = None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("degenerate", "annotation 1: bbox .* has no area"),
        ("outside", "annotation 1: bbox .* leaves its image of 200 x 100"),
        ("not numbers", "annotations\\[0\\]: bbox: expected `array` of length 4, found 3 in"),
        ("unknown image", "image_id 99 is not among"),
        ("unknown category", "category_id 99 is not among"),
        ("twice", "annotation id 1 appears twice"),
        ("size", "width is 300 here and 200 in the captions file"),
        ("no list", "a list 'categories'"),
    ],
)
def test_wrong_annotations_are_told_in_one_sentence(
    tmp_path: Path, name: str, message: str
) -> None:
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 50, 50], 0)]})
    document = json.loads(files["instances"].read_text())
    _break(name, document)
    files["instances"].write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        build_coco.main(arguments(files))
    assert not files["out"].exists()


def test_setting_aside_none_of_the_images_is_refused(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 50, 50], 0)]})
    with pytest.raises(UserError, match="of 1 images 0 would be held out"):
        build_coco.main(arguments(files, "--eval-share", "0.01"))


def test_a_family_with_one_answer_only_is_not_a_measure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 50, 30], 0)]})
    build_coco.main(arguments(files, "--probes", "4"))
    assert _read(files, "counting") == [] == _read(files, "halves")
    assert "empty: the annotations hold nothing" in capsys.readouterr().out


def test_missing_images_and_broken_json_are_named(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 50, 50], 0)]})
    (files["images"] / "000000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"^000000000001.jpg: no such file in .*--images"):
        build_coco.main(arguments(files))
    files["captions"].write_text("{")
    with pytest.raises(UserError, match=r"captions\.json: is not valid JSON"):
        build_coco.main(arguments(files))


def test_images_of_evaluation_splits_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_coco(tmp_path, {n: [("dog", [10, 10, 40, 30], 0)] for n in (1, 2, 3)})
    for name in ("instances", "captions"):
        document = json.loads(files[name].read_text())
        for image, split in zip(
            document["images"], ("val2017", "val2014", "train2017"), strict=True
        ):
            image["coco_url"] = f"http://x/{split}/{image['file_name']}"
        files[name].write_text(json.dumps(document))
    assert build_coco.main(arguments(files)) == 0
    said = capsys.readouterr().out
    assert "2 images are of COCO's evaluation splits (val2014 1, val2017 1)" in said
    assert "guard" in said
    assert _read(files, "build")["images"]["evaluation_splits"] == {"val2014": 1, "val2017": 1}
    (tmp_path / "b").mkdir()
    assert (
        build_coco.main(arguments(write_coco(tmp_path / "b", {1: [("dog", [1, 1, 40, 30], 0)]})))
        == 0
    )
    assert "evaluation splits" not in capsys.readouterr().out


def _rename(files: dict[str, Path], names: dict[str, str]) -> None:
    document = json.loads(files["instances"].read_text())
    for category in document["categories"]:
        category["name"] = names.get(category["name"], category["name"])
    files["instances"].write_text(json.dumps(document))


def test_an_empty_file_says_why_and_which_option_fills_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_coco(tmp_path, {1: [("dog", [10, 10, 40, 30], 0)]})
    boxes = {name: path for name, path in files.items() if name != "captions"}
    assert build_coco.main(arguments(boxes)) == 0
    said = capsys.readouterr().out
    assert "warning: stage1.json is empty: captions were not given (--captions FILE)" in said
    assert "--captions-from boxes writes them from the boxes" in said
    assert "stage 1 (on questions, for there are no captions)" in said
    assert build_coco.main(arguments(boxes, "--captions-from", "boxes")) == 0
    assert "warning" not in capsys.readouterr().out
    assert _read(files, "stage1")[0]["conversations"][1]["value"] == "A dog."
    files["out"] = tmp_path / "captions"
    captions = {name: path for name, path in files.items() if name != "instances"}
    assert build_coco.main(arguments(captions, "--only", "counting", "--probes", "2")) == 0
    assert "counting.json is empty: boxes were not given (--instances)" in capsys.readouterr().out


def test_own_names_of_categories_are_spoken_as_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skis: list[tuple[str, list[float], int]] = [("dog", [x, 10, 20, 30], 0) for x in (5, 40)]
    other: list[tuple[str, list[float], int]] = [("cat", [130, 50, 30, 40], 0)]
    files = write_coco(tmp_path, {n: [*skis, *other] if n % 2 else other for n in range(1, 9)})
    _rename(files, {"dog": "my_ski", "cat": "Traffic-Cone", "car": "SUV"})
    assert build_coco.main(arguments(files, "--captions-from", "boxes", "--turns", "20")) == 0
    said = capsys.readouterr().out
    assert "2  category names that sentences spell otherwise: renamed, e.g. 'my_ski'" in said
    assert "left out, for the verifier rejects them" not in said
    text = "".join((files["out"] / f"stage{n}.json").read_text() for n in (1, 2))
    assert "Two my skis and a traffic cone." in text
    assert "traffic cone" in text and "How many my skis" in text
    assert [name for name in ("my_ski", "raffic-", "Traffic", "Cone") if name in text] == []
    _rename(files, {"car": "traffic_cone"})
    _rename(files, {"SUV": "traffic_cone"})
    with pytest.raises(UserError, match=r"'traffic_cone' \(in sentences 'traffic cone'\) appears"):
        build_coco.main(arguments(files))


@pytest.mark.skipif("VLM_SFT_COCO_DIR" not in os.environ, reason="VLM_SFT_COCO_DIR is not set")
def test_real_coco_files_are_built(tmp_path: Path) -> None:
    root = Path(os.environ["VLM_SFT_COCO_DIR"])
    [instances] = sorted((root / "annotations").glob("instances_*.json"))[:1]
    [captions] = sorted((root / "annotations").glob("captions_*.json"))[:1]
    files = {
        "instances": instances,
        "captions": captions,
        "images": root / "images",
        "out": tmp_path / "out",
    }
    assert build_coco.main(arguments(files, "--eval-share", "0.2")) == 0
    assert len(_read(files, "stage2")) > 10


def test_with_room_for_one_question_every_family_is_asked_of_some_image(tmp_path: Path) -> None:
    boxes = {i: [("dog", [5, 30, 20, 20], 0), ("cat", [70, 30, 20, 20], 0)] for i in range(1, 41)}
    files = write_coco(tmp_path, boxes)
    families_asked = ("description", "counting", "halves", "relation")
    assert build_coco.main(arguments(files, "--families", *families_asked, "--turns", "1")) == 0
    asked = [record["conversations"] for record in _read(files, "stage2")]
    assert {len(turns) for turns in asked} == {2}
    made = json.loads((files["out"] / "build.json").read_text())
    families = made["files"]["stage2.json"]["families"]
    assert set(families) == set(families_asked)
    assert min(families.values()) >= 3


def test_evidence_names_what_is_there_and_then_gives_the_verdict(tmp_path: Path) -> None:
    boxes = {1: [("dog", [0, 0, 20, 20], 0), ("cat", [50, 0, 90, 90], 0)]}
    files = write_coco(tmp_path, boxes)
    options = ("--answers", "evidence", "--families", "existence", "--turns", "4")
    assert build_coco.main(arguments(files, *options)) == 0
    records = _read(files, "stage2")
    said = []
    for record in records:
        human, gpt = record["conversations"]  # one question each: evidence would answer a second
        asked = human["value"].removeprefix("<image>\n")
        truth = any(words.mentions(asked, name) for name in ("dog", "cat"))
        assert gpt["value"] == f"I see a cat and a dog, so {'yes' if truth else 'no'}."
        said.append(truth)
    assert sorted(said) == [False, False, True, True]
    assert len({record["id"] for record in records}) == len(records)


def test_evidence_counts_what_is_there_and_says_in_which_half_single_objects_are(
    tmp_path: Path,
) -> None:
    two = [("dog", [0, 0, 30, 30], 0), ("dog", [0, 60, 30, 30], 0)]
    files = write_coco(
        tmp_path, {1: [*two, ("cat", [150, 0, 20, 20], 0), ("car", [96, 46, 9, 9], 0)]}
    )
    options = ("--answers", "evidence", "--families", "counting", "halves", "--turns", "9")
    assert build_coco.main(arguments(files, *options)) == 0
    said = {record["conversations"][1]["value"] for record in _read(files, "stage2")}
    counted = "I see two dogs, a cat and a car, so"
    assert said == {
        f"{counted} two.",
        f"{counted} one.",
        "I see two dogs, a cat on the right and a car, so right.",
        "I see two dogs, a cat at the top and a car, so top.",
    }


@given(
    sizes=st.lists(st.integers(5, 60), min_size=1, max_size=len(CATEGORIES) - 1),
    asked=st.integers(0, 100),
)
def test_things_names_the_largest_and_always_what_is_asked(sizes: list[int], asked: int) -> None:
    boxes = tuple(
        Box(name, 0.0, 0.0, size, size, crowd=False, id=number)
        for number, (name, size) in enumerate(zip(CATEGORIES, sizes, strict=False), 1)
    )
    image = AnnotatedImage(1, "a.jpg", 100, 100, (), boxes)
    name = image.categories[asked % len(boxes)]
    text = things(Facts(image), asked=name)
    named = [box for box in boxes if words.mentions(text, box.category)]
    assert words.mentions(text, name)
    assert len(named) == min(len(boxes), MOST_NAMED)
    others = [box.width for box in boxes if box not in named]
    assert all(box.width >= max(others, default=0) for box in named if box.category != name)


def test_captions_from_boxes_need_no_captions(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 20, 20], 0)], 2: []})
    assert build_coco.main(arguments(files, "--captions-from", "boxes")) == 0
    pairs = [record["conversations"][1]["value"] for record in _read(files, "stage1")]
    assert pairs == ["A dog."], "an image without boxes has unknown content"


def test_several_of_an_uncertain_number_are_named_in_the_plural(tmp_path: Path) -> None:
    crowd = [("dog", [20.0 * n, 0, 18, 18], 0) for n in range(9)]
    files = write_coco(tmp_path, {1: [*crowd, ("cat", [0, 40, 60, 60], 1)]})
    options = ("--captions-from", "boxes", "--answers", "evidence", "--families", "existence")
    assert build_coco.main(arguments(files, *options)) == 0
    pairs = [record["conversations"][1]["value"] for record in _read(files, "stage1")]
    assert pairs == ["Cats and dogs."]
    said = {record["conversations"][1]["value"] for record in _read(files, "stage2")}
    assert {text.partition(", so")[0] for text in said} == {"I see cats and dogs"}


def _turned(files: dict[str, Path], name: str, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", size).save(files["images"] / name, exif=exif)


def test_an_image_that_exif_turns_unlike_its_boxes_is_set_aside_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dog, cat = ("dog", [0.0, 0.0, 40.0, 80.0], 0), ("cat", [150.0, 5.0, 40.0, 60.0], 0)
    files = write_coco(tmp_path, {1: [dog], 2: [cat]})
    _turned(files, "000000000001.jpg", (200, 100))
    with pytest.raises(UserError, match=r"EXIF orientation turns it to 100 x 200.*--max-faulty"):
        build_coco.main(arguments(files))
    assert build_coco.main(arguments(files, "--max-faulty", "1")) == 0
    for name in ("stage1", "stage2"):
        assert {record["image"] for record in _read(files, name)} == {"000000000002.jpg"}
    receipt = json.loads((files["out"] / "build.json").read_text())
    assert receipt["findings"]["image_turned"]["count"] == 1
    assert "1 of 2 annotated images" in capsys.readouterr().out


def test_an_image_that_exif_turns_as_its_boxes_say_is_used(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 40, 80], 0)]})
    _turned(files, "000000000001.jpg", (100, 200))
    assert build_coco.main(arguments(files)) == 0
    assert _read(files, "stage2")


def test_a_faulty_box_of_a_small_set_can_be_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 40, 80], 0), ("cat", [9, 9, 0, 5], 0)]})
    with pytest.raises(UserError, match=r"has no area.*; --max-faulty 1 \(100%\) drops"):
        build_coco.main(arguments(files))
    assert build_coco.main(arguments(files, "--max-faulty", "0.5")) == 0
    assert "1  boxes without area: annotation dropped" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--max-faulty 2: expected 0 or more and at most 1"):
        build_coco.main(arguments(files, "--max-faulty", "2"))


def test_a_missing_image_is_reported_with_the_name_that_is_near(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 40, 80], 0)]})
    (files["images"] / "000000000001.jpg").rename(files["images"] / "000000000001.JPG")
    with pytest.raises(UserError, match=r"'000000000001.JPG' exists, which differs in upper and"):
        build_coco.main(arguments(files))


def test_no_image_leads_outside_of_the_folder_unless_the_user_allows_it(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [("dog", [0, 0, 40, 80], 0)]})
    image = files["images"] / "000000000001.jpg"
    image.rename(tmp_path / "elsewhere.jpg")
    image.symlink_to(tmp_path / "elsewhere.jpg")
    with pytest.raises(UserError, match=r"symbolic link.*--follow-symlinks"):
        build_coco.main(arguments(files))
    assert build_coco.main(arguments(files, "--follow-symlinks")) == 0


def test_names_with_an_unusual_plural_give_correct_questions(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {n: [("dog", [5, 5, 30, 30], 0)] for n in range(1, 30)})
    document = json.loads(files["instances"].read_text())
    document["categories"][0]["name"] = "skis"
    files["instances"].write_text(json.dumps(document))
    assert build_coco.main(arguments(files, "--turns", "20", "--answers", "sentence")) == 0
    text = (files["out"] / "stage2.json").read_text()
    assert "the skis" in text and "skis are" in text
    assert "Is the skis" not in text and "skis is" not in text


@pytest.mark.parametrize("answers", ["short", "sentence", "evidence"])
def test_what_the_verifier_rejects_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answers: str
) -> None:
    leaks = "The bounding box [0.12, 0.30, 0.50, 0.61] has a dog."
    files = write_coco(
        tmp_path, {1: [("dog", [0, 0, 50, 50], 0)]}, {1: [leaks, "A dog in a yard."]}
    )
    assert build_coco.main(arguments(files, "--answers", answers)) == 0
    said = [record["conversations"][1]["value"] for record in _read(files, "stage1")]
    assert said == ["A dog in a yard."]
    assert _read(files, "build")["files"]["stage1.json"]["rejected"] == {"LEAK": 1}
    assert "left out, for the verifier rejects them: LEAK 1" in capsys.readouterr().out


def test_the_commands_that_train_and_evaluate_on_the_files_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = [("dog", [10, 10, 40, 30], 0), ("cat", [120, 60, 30, 30], 0)]
    files = write_coco(tmp_path, dict.fromkeys(range(1, 7), boxes), {1: ["A dog."], 2: ["A cat."]})
    assert build_coco.main(arguments(files, "--eval-share", "0.5")) == 0
    *said, last = capsys.readouterr().out.partition("next:\n")[2].splitlines()
    assert "python scripts/demo_pieces.py demo/pieces" in last
    out, images = files["out"], files["images"]
    assert said[0].split("   #")[0] == (
        f"  vlm-sft init --data {out}/stage2.json --images {images} --captions {out}/stage1.json "
        f"--eval {out}/eval_stage2.json"
    )
    assert f"--probes {out}/existence.json --images {images}" in said[1]
    for line in said:
        parse(shlex.split(line.partition(" #")[0])[1:])
