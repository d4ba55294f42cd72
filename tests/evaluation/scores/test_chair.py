"""CHAIR on a set of captions whose objects were marked by hand, and against CHAIR's algorithm."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from vlm_sft.errors import UserError
from vlm_sft.evaluation.scores.chair import score_chair
from vlm_sft.evaluation.scores.files import Answers, Row
from vlm_sft.evaluation.scores.object_words import Mention, find_objects
from vlm_sft.evaluation.scores.registry import read_truth, score
from vlm_sft.evaluation.scores.results import Options
from vlm_sft.utils import words


class Marked(NamedTuple):
    image: str
    boxes: list[str]
    reference: str
    caption: str
    mentions: list[str]


def marked_captions() -> list[Marked]:
    found: list[Marked] = []
    image, boxes, reference = "", [""], ""
    for line in Path(__file__).with_name("chair_captions.txt").read_text().splitlines():
        if line.startswith("image"):
            image, rest = line.split(": ", 1)
            boxes, reference = rest.split(" | ")[0].split(", "), rest.split(" | ")[1]
        elif "=>" in line:
            caption, mentions = line.split("=>")
            names = sorted(words.table("synonyms"), key=len, reverse=True)
            listed = re.findall(rf"[-!]?(?:{'|'.join(names)})", mentions)
            found.append(Marked(image, boxes, reference, caption.strip(), listed))
    return found


def test_the_set_has_a_hundred_captions() -> None:
    assert len(marked_captions()) == 100


def test_mentions_are_those_that_a_reader_finds() -> None:
    wrong = {}
    for marked in marked_captions():
        there = _there(marked)
        found = [
            ("-" if m.denied else "" if m.category in there else "!") + m.category
            for m in find_objects(marked.caption)
        ]
        if found != marked.mentions:
            wrong[marked.caption] = found
    assert wrong == {}


def test_scores_are_the_counts_by_hand() -> None:
    captions = marked_captions()
    answers = Answers(Path("a.json"), {str(n): m.caption for n, m in enumerate(captions)})
    rows = [
        Row(f"truth:{n}", {"id": n, "image": m.image, "objects": _there(m)})
        for n, m in enumerate(captions)
    ]
    found = score_chair(answers, rows, Options())
    said = [[name for name in m.mentions if name[0] != "-"] for m in captions]
    wrong = [[name for name in names if name[0] == "!"] for names in said]
    objects = sum(len(_there(m)) for m in captions)
    recalled = sum(len({n for n in names if n[0] != "!"}) for names in said)
    assert found.scores["chair_i"] == pytest.approx(sum(map(len, wrong)) / sum(map(len, said)))
    assert found.scores["chair_s"] == pytest.approx(sum(map(bool, wrong)) / 100)
    assert found.scores["recall"] == pytest.approx(recalled / objects)
    assert found.scores["denied"] == sum(n[0] == "-" for m in captions for n in m.mentions)
    assert [row["score"] for row in found.rows] == [float(not names) for names in wrong]
    low, high = found.scores["chair_i_interval"]
    assert low < found.scores["chair_i"] < high


def _there(marked: Marked) -> list[str]:
    return sorted({*marked.boxes, *(m.category for m in find_objects(marked.reference))})


def original_chair(caption: str) -> list[str]:
    """Return the objects of a caption as CHAIR's code finds them, with our words."""
    nodes = {
        word: category
        for category, others in words.table("synonyms").items()
        for word in (category, *others)
    }
    doubles = {word: word for word in nodes if len(word.split()) == 2}
    animals = (
        "bird",
        "cat",
        "dog",
        "horse",
        "sheep",
        "cow",
        "elephant",
        "bear",
        "zebra",
        "giraffe",
    )
    doubles |= {f"{age} {name}": name for age in ("baby", "adult") for name in animals}
    doubles |= {"passenger jet": "jet", "passenger train": "train"}
    singulars = {words.plural(word): word for word in nodes if " of " not in words.plural(word)}
    singulars |= {form: word for word in nodes for form in (f"{word}s",) if form not in nodes}
    doubles_of = {form: word for form, word in singulars.items() if word in doubles}
    tokens = [singulars.get(t, t) for t in re.findall(r"[a-z]+(?:-[a-z]+)*|'s", caption.lower())]
    merged, index = [], 0
    while index < len(tokens):
        pair = " ".join(tokens[index : index + 2])
        pair = doubles_of.get(pair, pair)
        merged.append(doubles.get(pair, tokens[index]))
        index += 2 if pair in doubles else 1
    if "toilet" in merged:
        merged = [word for word in merged if word != "seat"]
    return [nodes[word] for word in merged if word in nodes]


def test_chairs_own_algorithm_finds_the_same_but_for_its_known_holes() -> None:
    """It counts what is denied or part of a compound, and knows no names of three words."""
    ours_only = (
        "bus driver",
        "glass of wine",
        "stove top oven",
        "dining room table",
        "catcher's mitt",
    )
    equal = 0
    for marked in marked_captions():
        ours = Counter(name.lstrip("!-") for name in marked.mentions if name[0] != "-")
        theirs = Counter(original_chair(marked.caption))
        if any(name in marked.caption.lower() for name in ours_only):
            assert theirs != ours
        else:
            assert theirs >= ours, marked.caption
            equal += theirs == ours
    assert equal == 64
    assert original_chair("No dog, but a tv stand.") == ["dog", "tv"]
    assert find_objects("No dog, but a tv stand.") == [Mention("dog", "dog", denied=True)]


def test_boxes_and_captions_of_cocos_files_count_as_there(tmp_path: Path) -> None:
    instances = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "categories": [{"id": 3, "name": "car"}, {"id": 18, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 18, "bbox": [0, 0, 1, 1]},
                        {"id": 2, "image_id": 8, "category_id": 3, "bbox": [0, 0, 1, 1]}],
    }  # fmt: skip
    captions = {"annotations": [{"id": 9, "image_id": 7, "caption": "A dog and a kitten."}]}
    files = tmp_path / "instances.json", tmp_path / "captions.json"
    files[0].write_text(json.dumps(instances))
    files[1].write_text(json.dumps(captions))
    truth = read_truth("chair", files)
    assert {row.text("id"): row.get("objects") for row in truth} == {
        "7": ["cat", "dog"], "8": ["car"],
    }  # fmt: skip
    found = score("chair", Answers(tmp_path, {"7": "A cat, a puppy and two birds."}), truth)
    assert found.scores["chair_i"] == pytest.approx(1 / 3)
    assert (found.scores["chair_s"], found.scores["recall"]) == (1.0, 1.0)
    assert (found.scores["questions"], found.scores["unanswered"]) == (2, 1)
    assert found.rows[0]["hallucinated"] == [["birds", "bird"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_id": 1}, "has none of the keys category_id, caption, objects, captions"),
        ({"image_id": 1, "objects": "dog"}, "'objects' is not a list of texts"),
        ({"image_id": 1, "objects": ["unicorn"]}, "'unicorn' is not one of COCO's 80 categories"),
        ({"image_id": 1, "category_id": 5}, "none of the keys annotations|is not in 'categories'"),
    ],
)
def test_rows_that_say_nothing_are_refused(tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(UserError, match=message):
        read_truth("chair", [path])


def test_descriptions_without_objects_have_no_share_of_mentions() -> None:
    rows = [Row("truth:1", {"id": 1, "objects": ["dog"]})]
    found = score_chair(Answers(Path("a"), {"1": ""}), rows, Options()).scores
    assert (found["chair_i"], found["chair_s"], found["recall"]) == (None, 0.0, 0.0)
    assert (found["empty"], found["mentions"]) == (1, 0)
