"""The study of data quality: what it spoils, and that its runs differ in nothing else."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from study_data_quality import (
    CORRUPTIONS,
    KINDS,
    OBJECTS,
    Run,
    conversations,
    corrupt,
    right_answers,
    runs_of,
    spoil,
)

from vlm_sft.errors import UserError

NAMES = sorted(OBJECTS)
TRUTH = {f"{i:012d}.jpg": {NAMES[i % 10], NAMES[i // 10 % 10]} for i in range(100)}
TALKS = conversations(
    [
        {
            "image": image,
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": f"Two {' and a '.join(sorted(here))}."},
            ],
        }
        for image, here in TRUTH.items()
    ],
    TRUTH,
    seed=1,
)


def texts(record: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in record["conversations"]]


def test_a_conversation_asks_half_the_time_for_what_is_there() -> None:
    for record in TALKS:
        kind = texts(record)[2].removeprefix("Is there a ").removesuffix("?")
        assert (texts(record)[3] == "Yes.") == (kind in TRUTH[record["image"]])
    assert 35 <= sum(texts(record)[3] == "Yes." for record in TALKS) <= 65


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_is_spoilt_and_the_rest_is_as_it_was(kind: str) -> None:
    frequent = {f"9{i:011d}.jpg": {"cat", "boat"} for i in range(40)}
    others = [{**TALKS[0], "id": image[:-4], "image": image} for image in frequent]
    found = spoil(kind, TALKS, others, TRUTH | frequent, 0.4, seed=3)
    assert len(found.records) == 100 and len(found.bad) == 40
    changed = {
        i for i, (now, then) in enumerate(zip(found.records, TALKS, strict=True)) if now != then
    }
    if kind == "corrupted images":
        assert not changed and sorted(found.images.values()) == sorted(CORRUPTIONS * 10)
        assert found.images.keys() == {TALKS[place]["image"] for place in found.bad}
    else:
        assert changed == found.bad
    assert spoil(kind, TALKS, others, TRUTH | frequent, 0.4, seed=3) == found
    assert spoil(kind, TALKS, others, TRUTH | frequent, 0.4, seed=4).bad != found.bad


def test_every_fault_is_the_one_that_it_is_called() -> None:
    def spoilt(kind: str) -> list[dict[str, Any]]:
        found = spoil(kind, TALKS, [], TRUTH, 0.2, seed=1)
        return [found.records[place] for place in sorted(found.bad)]

    for record in spoilt("wrong answers"):
        answer, here = texts(record)[1].lower(), TRUTH[record["image"]]
        assert any(name in answer for name in OBJECTS.keys() - here)
    for record in spoilt("missing turns"):
        assert len(texts(record)) == 2 and texts(record)[1] in ("Yes.", "No.")
    for record in spoilt("inconsistent wording"):
        assert all(OBJECTS[name] in texts(record)[1] for name in TRUTH[record["image"]])
    assert len({str(record) for record in spoilt("duplicates")}) == 10


def test_too_few_frequent_objects_are_an_error() -> None:
    with pytest.raises(UserError, match=r"found 0 further conversations .* expected 40"):
        spoil("class imbalance", TALKS, [], TRUTH, 0.4, seed=1)


def test_corrupted_images_keep_their_size_or_cannot_be_read(tmp_path: Path) -> None:
    for folder in ("from", "to"):
        (tmp_path / folder).mkdir()
    for name, color in (("a.jpg", "red"), ("b.jpg", "blue")):
        noise = Image.effect_noise((60, 40), 80).convert("RGB")
        Image.blend(Image.new("RGB", (60, 40), color), noise, 0.3).save(tmp_path / "from" / name)
    for how in CORRUPTIONS:
        corrupt(tmp_path / "from/a.jpg", tmp_path / "to" / f"{how}.jpg", how)
    for how in ("black", "noise", "exchanged"):
        with Image.open(tmp_path / "to" / f"{how}.jpg") as image:
            assert image.size == (60, 40)
            red, _, blue = image.resize((1, 1)).getpixel((0, 0))  # type: ignore[misc]
            assert {"black": red + blue < 10, "noise": abs(red - blue) < 40}.get(how, blue > red)
    with pytest.raises(OSError), Image.open(tmp_path / "to/cut off.jpg") as image:
        image.load()


def test_a_description_answers_what_it_names() -> None:
    probes = [
        {"image": "000000000007.jpg", "category": "cat", "answer": "yes"},
        {"image": "000000000007.jpg", "category": "bed", "answer": "no"},
        {"image": "000000000007.jpg", "category": "bus", "answer": "yes"},
    ]
    values, images = right_answers({"7": "A Cat and two beds."}, probes)
    assert values == [1.0, 0.0, 0.0] and images == ["000000000007.jpg"] * 3


def test_every_level_is_trained_on_with_and_without_cleaning() -> None:
    runs = runs_of(KINDS, [40, 20, 10])
    assert len(runs) == 2 + 6 * 3 * 2 and len({run.name for run in runs}) == len(runs)
    assert Run("none", 0, False) in runs and Run("duplicates", 20, True) in runs
