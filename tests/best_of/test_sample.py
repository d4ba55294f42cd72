"""`vlm-sft sample`: what it writes, and what a kill changes: nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlm_sft import sample
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.records import read_records
from vlm_sft.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny" / "data"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two records with two questions each, one without an image file, and one of text."""
    records = json.loads((TINY / "instructions.json").read_text())[:2]
    lost = {**records[0], "id": "lost", "image": "images/missing.png"}
    text = {"id": "text", "conversations": [{"from": "human", "value": "Which colour?"},
                                            {"from": "gpt", "value": "red"}]}  # fmt: skip
    shutil.copytree(TINY / "images", tmp_path / "images")
    (tmp_path / "data.json").write_text(json.dumps([*records, lost, text]))
    return tmp_path / "data.json"


def test_a_killed_run_goes_on_to_the_same_files_and_every_question_is_accounted_for(
    data: Path, tmp_path: Path, full_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [str(full_run / "final"), str(data), "--out", str(out), "--n", "3", "--score",
                 "length", "--max-tokens", "12", "--batch-size", "6"]  # fmt: skip
    assert sample.main(arguments) == 0
    names = ("samples.jsonl", "train.jsonl", "preferences.jsonl", "receipts.jsonl", "results.json")
    first = {name: (out / name).read_bytes() for name in names}
    results = json.loads(first["results.json"])
    assert results["questions"] == 7 and results["outcomes"]["not_asked"] == 2
    assert sum(results["outcomes"].values()) == 7
    assert results["samples"] == 15 and results["why"]["image_missing"] == 6

    root = results["image_root"]
    trained = list(read_records(DataFile(path=str(out / "train.jsonl"), image_root=root)))
    assert len(trained) == results["outcomes"]["kept"] >= 3
    receipts = {row["id"]: row for row in lines(out / "receipts.jsonl")}
    texts = {(row["id"], row["sample"]): row["text"] for row in lines(out / "samples.jsonl")}
    for record in trained:
        assert isinstance(record, Conversation)
        assert record.turns[-1].text == texts[record.id, receipts[record.id]["sample"]]
        assert [turn.supervised for turn in record.turns if turn.role == "assistant"][:-1] in (
            [], [False],
        )  # fmt: skip
    for row in lines(out / "preferences.jsonl"):
        assert row["chosen"] != row["rejected"] and row["prompt"][-1]["role"] == "user"
        assert all(Path(image).is_file() for image in row["images"])

    whole = first["samples.jsonl"]
    (out / "samples.jsonl").write_bytes(whole[: len(whole) * 2 // 3])  # a kill in the last batches
    assert sample.main(arguments) == 0
    assert {name: (out / name).read_bytes() for name in names} == first
    assert "removed" in capsys.readouterr().err

    with pytest.raises(ConfigError, match="temperature"):
        sample.main([*arguments, "--temperature", "0.5"])

    shutil.copytree(tmp_path / "images", tmp_path / "other" / "images")
    for changed, key in (
        (["--images", str(tmp_path / "other")], "data.images = None"),
        (["--follow-symlinks"], "data.follow_symlinks = False"),
    ):
        with pytest.raises(ConfigError, match=key):
            sample.main([*arguments, *changed])
    records = data.read_bytes()
    data.write_bytes(records.replace(b'"red"', b'"crimson"'))
    with pytest.raises(ConfigError, match=r"data\.questions ="):
        sample.main(arguments)
    data.write_bytes(records)
    (tmp_path / "images" / "red-circle-0.png").write_bytes(
        (tmp_path / "images" / "blue-circle-0.png").read_bytes()
    )
    with pytest.raises(ConfigError, match=r"data\.images_digest ="):
        sample.main(arguments)
    assert (out / "samples.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--score", "verifier"], "--annotations"),
        (["--score", "judge"], "--judge-url"),
        (["--score", "exact", "--longest"], "--longest"),
        (["--score", "length", "--verdict", "last"], "--verdict"),
        (["--score", "exact", "--rounds", "2"], "--held-out"),
        (["--score", "exact", "--keep-train-data"], "--rounds"),
        (["--score", "best"], "expected one of"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sample.main(["runs/final", "data.json", "--out", "out", *options])


@pytest.mark.slow
def test_rounds_train_on_the_samples_and_measure_every_model(
    tmp_path: Path, full_run: Path, in_the_repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    probes = [
        {"id": n, "image": f"{color}-circle-2.png", "question": "Which colour?", "answer": color}
        for n, color in enumerate(("red", "green"))
    ]
    (tmp_path / "probes.json").write_text(json.dumps(probes))
    suite = {"tasks": [{"name": "color", "kind": "gqa", "files": [str(tmp_path / "probes.json")],
                        "images": str(TINY / "images"), "max_tokens": 8}]}  # fmt: skip
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    config = (ROOT / "configs" / "tiny" / "stage2.yaml").read_text()
    config = config.replace("runs/tiny/stage1/final", str(full_run / "final"))
    config = config.replace("epochs: 40", "max_steps: 2").replace("[tensorboard]", "[]")
    (tmp_path / "train.yaml").write_text(config)
    out = tmp_path / "out"
    arguments = [str(full_run / "final"), str(TINY / "instructions_eval.json"), "--out", str(out),
                 "--score", "length", "--n", "2", "--max-tokens", "12", "--rounds", "2",
                 "--train", str(tmp_path / "train.yaml"), "--held-out",
                 str(tmp_path / "suite.yaml")]  # fmt: skip
    assert sample.main(arguments) == 0
    rounds = json.loads((out / "rounds.json").read_text())["rounds"]
    assert [row["round"] for row in rounds] == [0, 1, 2]
    assert all(0 <= row["held_out"]["color"]["value"] <= 1 for row in rounds)
    assert rounds[2]["checkpoint"] == str(out / "round-2" / "run" / "final")
    before = (out / "rounds.json").read_bytes()
    assert sample.main(arguments) == 0  # everything is there already
    assert (out / "rounds.json").read_bytes() == before


def test_questions_with_separate_answers_are_sampled(
    data: Path, tmp_path: Path, lora_run: Path
) -> None:
    question = {"question_id": 3, "image": "images/red-circle-0.png", "question": "Which color?"}
    answer = {"question_id": 3, "multiple_choice_answer": "red"}
    (tmp_path / "q.json").write_text(json.dumps({"questions": [question]}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": [answer]}))
    out = tmp_path / "out"
    options = ["--out", str(out), "--n", "2", "--score", "length", "--max-tokens", "4"]
    command = [str(lora_run / "final"), str(tmp_path / "q.json"), *options]
    with pytest.raises(UserError, match="its questions have no answers"):
        sample.main(command)
    assert sample.main([*command, "--answers", str(tmp_path / "a.json")]) == 0
    assert [row["id"] for row in lines(out / "samples.jsonl")] == ["3", "3"]
