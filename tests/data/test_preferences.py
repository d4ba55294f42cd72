"""Preference pairs are records with two answers, and TRL gets the same turns and images."""

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_sft.data.preferences import PreferencePair, read_pairs, trl_row
from vlm_sft.errors import RecordError

RECORD: dict[str, Any] = {
    "id": 7,
    "image": "dog.jpg",
    "conversations": [{"from": "human", "value": "<image>\nIs there a dog?"}],
    "chosen": "Yes.",
    "rejected": "No.",
}


def read(tmp_path: Path, *records: Any) -> list[PreferencePair | RecordError]:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_pairs(file))


def test_a_llava_record_with_two_answers_becomes_a_row_of_trl(tmp_path: Path) -> None:
    (pair,) = read(tmp_path, RECORD)
    assert isinstance(pair, PreferencePair)
    assert trl_row(pair) == {
        "id": "7",
        "images": [str(tmp_path / "dog.jpg")],
        "prompt": [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "\nIs there a dog?"}],
            }
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "No."}]}],
    }


def test_earlier_turns_and_several_images_stay_in_their_order(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image><image>Same?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why?"},
    ]
    record = {"images": ["a.png", "b.png"], "messages": turns, "chosen": "Color.", "rejected": "?"}
    (pair,) = read(tmp_path, record)
    assert isinstance(pair, PreferencePair)
    row = trl_row(pair)
    assert [Path(name).name for name in row["images"]] == ["a.png", "b.png"]
    assert [turn["role"] for turn in row["prompt"]] == ["system", "user", "assistant", "user"]
    assert [part["type"] for part in row["prompt"][1]["content"]] == ["image", "image", "text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chosen": None}, "expected two answers as text, `chosen` and `rejected`"),
        ({"rejected": "  "}, "expected two answers as text, `chosen` and `rejected`"),
        ({"rejected": "Yes."}, "are the same answer"),
        ({"conversations": []}, "expected a list of turns"),
        ({"image": "../up.jpg"}, "up.jpg"),
        (
            {"conversations": [*RECORD["conversations"], {"from": "gpt", "value": "Yes."}]},
            "assistant",
        ),
    ],
)
def test_a_record_that_is_no_pair_is_an_error_and_the_next_one_is_read(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    error, pair = read(tmp_path, {**RECORD, **changes}, RECORD)
    assert isinstance(error, RecordError) and message in str(error), error
    assert isinstance(pair, PreferencePair)
