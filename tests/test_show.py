"""A record is shown as the model will see it, with what is trained in it marked."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vlm_sft import show
from vlm_sft.errors import run_command

pytestmark = pytest.mark.usefixtures("in_the_repository")

CONFIG = "configs/tiny/stage2.yaml"
RECORDS = "configs/tiny/data/instructions.json"
FILE = ["--records", RECORDS, "--tokenizer", "bytes", "--template", "chatml"]


def objects(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert show.main(argv) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def file_of(tmp_path: Path, *answers: str) -> str:
    path = tmp_path / "records.jsonl"
    rows = [
        {
            "id": f"r{number}",
            "conversations": [
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("source", [[CONFIG], FILE])
def test_json_holds_ids_labels_and_tokens_of_equal_length(
    source: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = objects([*source, "--json"], capsys)
    assert len(found) == 24
    for one in found:
        assert {"id", "input_ids", "labels", "tokens", "num_images"} <= one.keys()
        assert len(one["input_ids"]) == len(one["labels"]) == len(one["tokens"]) > 0
        assert one["num_images"] == one["input_ids"].count(one["image_token_id"]) == 1
        trained = [
            t for t, label in zip(one["tokens"], one["labels"], strict=True) if label != -100
        ]
        assert "".join(trained).count("<|im_end|>") == 2
        pairs = zip(one["input_ids"], one["labels"], strict=True)
        assert all(label in (-100, i) for i, label in pairs)


def test_both_sources_show_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert objects([CONFIG, "--json"], capsys) == objects([*FILE, "--json"], capsys)


def test_a_configurations_overrides_and_held_out_files_count(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (one,) = objects([CONFIG, "--eval", "--json", "--limit", "1"], capsys)
    assert one["id"] == "red-circle-2"
    vicuna = objects([CONFIG, "data.template=vicuna_v1", "--json", "--limit", "1"], capsys)
    assert "".join(vicuna[0]["tokens"]).startswith("<s>A")


@pytest.mark.parametrize("source", [[CONFIG], FILE])
def test_trained_text_stands_between_marks(
    source: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert show.main([*source, "--record", "red-circle-1"]) == 0
    out = capsys.readouterr().out
    assert "⟦red<|im_end|>⟧" in out and "⟦circle<|im_end|>⟧" in out
    assert out.count("⟦") == out.count("⟧") == 2
    assert "<|im_start|>user\n<image>\nWhich colour?<|im_end|>" in out
    assert "red-circle-1" in out and "1 picture)" in out and "red-circle-0" not in out


def test_five_records_are_shown_unless_more_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for options, count in ([], 5), (["--limit", "7"], 7):
        assert show.main([CONFIG, *options]) == 0
        assert capsys.readouterr().out.count("── ") == count


def test_long_answers_are_not_broken_into_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = " ".join(f"word{i}" for i in range(80))
    argv = ["--records", file_of(tmp_path, answer), *FILE[2:]]
    assert show.main(argv) == 0
    assert f"⟦{answer}<|im_end|>⟧" in capsys.readouterr().out


def test_what_a_terminal_would_obey_is_shown_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--records", file_of(tmp_path, "a\x1b[2Jb\rc\x07\td [bold]e"), *FILE[2:]]
    assert show.main(argv) == 0
    out = capsys.readouterr().out
    assert "⟦a␛[2Jb␍c␇␉d [bold]e<|im_end|>⟧" in out
    assert not {"\x1b", "\r", "\x07"} & set(out)


def test_control_tokens_that_data_spells_stay_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--records", file_of(tmp_path, "say <|im_end|>"), *FILE[2:], "--json"]
    (one,) = objects(argv, capsys)
    trained = [t for t, label in zip(one["tokens"], one["labels"], strict=True) if label != -100]
    assert trained == [*"sayĠ<|im_end|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([CONFIG, "--record", "gone"], ["--record gone: no record with this id", RECORDS]),
        (["--records", RECORDS], ["missing: --tokenizer"]),
        ([], ["give CONFIG.yaml"]),
        ([*FILE[:-1], "chatmll"], ["chatmll"]),
        (["--records", RECORDS, "--tokenizer", "./gone"], ["no such folder './gone'"]),
        (["--records", "gone.json", "--tokenizer", "bytes"], ["gone.json"]),
        ([CONFIG, "--limit", "0"], ["--limit 0: expected 1 or more"]),
        ([CONFIG, *FILE], ["--records: give CONFIG.yaml or --records, not both"]),
        ([CONFIG, "--template", "plain"], ["--template: give CONFIG.yaml or", "key.path=value"]),
        ([*FILE, "--eval"], ["--eval: belongs to CONFIG.yaml"]),
    ],
)
def test_wrong_arguments_end_with_one_sentence_and_2(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_command(show.main, argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and out == ""
    assert all(word in err for word in words)


def test_a_faulty_record_is_told_among_the_good_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--records", file_of(tmp_path, "good", " ", "good too"), *FILE[2:], "--json"]
    assert show.main(argv) == 2
    out, err = capsys.readouterr()
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["r0", "r2"]
    assert "records.jsonl:2: record 'r1': turn 1: the answer is empty" in err
