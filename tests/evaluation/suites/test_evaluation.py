"""A suite is evaluated, killed and resumed, compared, and turned into a report."""

import argparse
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from vlm_sft import evaluate
from vlm_sft.commands import suites
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.evaluation.suites.answering import LocalAnswerer
from vlm_sft.evaluation.suites.config import load_suite
from vlm_sft.evaluation.suites.results import QuestionResult, TaskResult
from vlm_sft.inference.loaded_model import LoadedModel

one_model = pytest.mark.parametrize("run", ["no adapter"], indirect=True)


@pytest.fixture
def tiny(run: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suites, "_answerer", lambda _: LocalAnswerer(run))
    monkeypatch.setattr(suites, "_model", lambda _: ("tiny", {"name": "tiny"}))


def evaluate_suite(path: Path, out: Path, *, batch_size: int = 4) -> None:
    arguments = argparse.Namespace(suite=path, out=out, batch_size=batch_size)
    assert suites.run_suite(load_suite(path), arguments) == 0


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


@one_model
@pytest.mark.usefixtures("tiny")
def test_an_evaluation_killed_at_twenty_places_ends_with_the_same_results(
    suite_file: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    evaluate_suite(suite_file, whole)
    written = killed / "answers.jsonl"
    size = (whole / "answers.jsonl").stat().st_size
    places = sorted(random.Random(0).sample(range(size), 20))
    for place in places:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                evaluate_suite(suite_file, killed)
            finally:
                os._exit(0)
        while not written.exists() or written.stat().st_size < place:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended before it was killed"
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    evaluate_suite(suite_file, killed)
    keys = [(row["task"], row["condition"], row["id"]) for row in answers(killed)]
    assert len(keys) == len(set(keys)) == 64
    assert sorted(map(str, answers(killed))) == sorted(map(str, answers(whole)))
    for name in ("results.json", "necessity.jsonl"):
        assert (killed / name).read_text() == (whole / name).read_text()


@one_model
@pytest.mark.usefixtures("tiny")
def test_a_cut_line_is_asked_again_and_other_settings_are_refused(
    suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    evaluate_suite(suite_file, out)
    results, path = (out / "results.json").read_text(), out / "answers.jsonl"
    before = answers(out)
    path.write_bytes(path.read_bytes()[:-9])
    evaluate_suite(suite_file, out)
    assert "the last line was cut" in capsys.readouterr().err
    assert sorted(map(str, answers(out))) == sorted(map(str, before))
    assert (out / "results.json").read_text() == results

    with pytest.raises(ConfigError, match="started with batch_size = 4, and is now asked for 8"):
        evaluate_suite(suite_file, out, batch_size=8)
    suite_file.write_text(suite_file.read_text().replace("One word.", "Two words."))
    with pytest.raises(ConfigError, match=r"suite\.tasks\.0\.suffix = 'One word\.'"):
        evaluate_suite(suite_file, out)
    suite_file.write_text(suite_file.read_text().replace("Two words.", "One word."))
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=r"answers\.jsonl:65: a second answer to question"):
        evaluate_suite(suite_file, out)


@one_model
@pytest.mark.usefixtures("tiny")
def test_results_tell_whether_the_model_looks_and_a_page_shows_them(
    suite_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    evaluate_suite(suite_file, out, batch_size=32)
    found = json.loads((out / "results.json").read_text())
    assert list(found["tasks"]) == ["exists", "counting", "color", "captions"]
    exists = found["tasks"]["exists"]
    assert list(exists["conditions"]) == ["right", "blank", "shuffled"]
    assert {"accuracy", "precision", "recall", "f1"} <= exists["conditions"]["right"].keys()
    assert list(exists["by_category"]) == ["blue", "green", "red"]
    own, other = (exists["conditions"][name]["accuracy"] for name in ("right", "shuffled"))
    assert found["looks"]["difference"]["estimate"] == pytest.approx(own - other)
    assert "cider_d" in found["tasks"]["captions"]["conditions"]["right"]
    rows = [json.loads(line) for line in (out / "necessity.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {"exists"} and len(rows) == 12
    for row in rows:
        without = [row["scores"]["blank"], row["scores"]["shuffled"]]
        assert row["answered_without_image"] == (without == [1.0, 1.0])
    page = (out / "report.html").read_text()
    assert page.count("<img") > 8 and "accuracy with its own image minus with another one" in page
    lines = capsys.readouterr().out.splitlines()
    notes = [line for line in lines if line.startswith("note: ")]
    assert max(len(line) for line in lines[:-2] if line not in notes) <= 80
    looks = exists["looks"]["difference"]
    assert (looks["low"] <= 0) == any("note: exists: the score with its own" in n for n in notes)
    assert not any("counting" in note for note in notes)  # has no other images

    assert evaluate.main(["compare", str(out), str(out / "results.json"), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)["comparisons"]
    assert len(compared) == 3 + 3 + 1 + 3
    assert {row["difference"]["estimate"] for row in compared} == {0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{suite}", "--base-url", "http://127.0.0.1:1/v1"], "--base-url and --model: give both"),
        (["{suite}", "--out", "x"], "missing: CHECKPOINT before .*suite.yaml, or"),
        (["{dir}", "{suite}"], "missing: --out DIR"),
        (["{dir}", "{suite}", "--out", "x", "--seed", "1"], "--seed: is not for suites"),
        (["{dir}", "{suite}", "--out", "x", "--base-url", "u", "--model", "m"], "give either"),
        (["compare", "{dir}", "{dir}"], "no such file of results"),
        (["compare", "{suite}", "{suite}"], r"suite\.yaml:1:1: not valid JSON"),
    ],
)
def test_wrong_commands_are_refused(
    suite_file: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [word.format(suite=suite_file, dir=tmp_path) for word in arguments]
    if filled[0] != "compare" and "--out" not in filled and "missing" not in message:
        filled += ["--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=message):
        evaluate.main(filled)


def asked(kind: str, right: float, blank: float, images: int) -> TaskResult:
    scores = [{"right": right, "blank": blank + (1e-3, -1e-3)[n % 2]} for n in range(images)]
    questions = [QuestionResult(str(n), str(n), "", found) for n, found in enumerate(scores)]
    return TaskResult("t", kind, {"right": {"without_answer": 0}}, questions, {})


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (asked("vqa", 1.0, 0.5, 20), ""),
        (asked("vqa", 0.5, 0.5, 20), "not clearly higher than with a blank one"),
        (asked("caption", 1.5, 1.6, 20), "is lower than with a blank one"),
        (asked("vqa", 0.5, 0.5, 3), ""),  # too few images to tell
        (asked("chair", 0.5, 0.5, 20), ""),  # a blank image has no objects to invent
    ],
)
def test_a_task_that_needs_no_image_is_named(task: TaskResult, said: str) -> None:
    notes = list(suites._notes({"looks": None}, [task], 0))
    assert bool(notes) == bool(said) and all(said in note for note in notes)
