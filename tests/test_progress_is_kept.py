"""Nothing that happens in an evaluation, a tracker or a log file costs training steps."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.tiny_runs import ROOT, rows, run
from vlm_sft.checkpoint.jsonl import read_rows
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.errors import RecordError
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train import validation
from vlm_sft.train.metrics import MetricsFile

DATA = ROOT / "configs" / "tiny" / "data"
OFTEN = ["train.eval_every_steps=2", "train.eval_samples=2"]
MEASURE_NOTHING = ["train.activation_checkpointing=none"]


def held_out(folder: Path, count: int, *, broken: int) -> list[str]:
    """Settings of `count` held-out records of which one has a cut image."""
    shutil.copytree(DATA / "images", folder / "images")
    records = json.loads((DATA / "captions_eval.json").read_text())
    many = [{**records[i % len(records)], "id": f"r{i}"} for i in range(count)]
    image = folder / many[broken]["image"]
    (folder / "images" / "cut.png").write_bytes(image.read_bytes()[:60])
    many[broken]["image"] = "images/cut.png"
    (folder / "eval.json").write_text(json.dumps(many))
    return [f"data.eval=[{{path: {folder / 'eval.json'}, image_root: {folder}}}]", *OFTEN]


def steps_with(folder: Path, key: str) -> list[int]:
    return [row["step"] for row in rows(folder / "metrics.jsonl") if key in row]


def at_call(number: int, act: Callable[[], None], method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method so that its call of that number (from 1) does something first."""
    calls = 0

    def wrapped(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return method(*args, **more)

    return wrapped


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_broken_held_out_image_is_left_out_of_loss_and_answers(tmp_path: Path) -> None:
    settings = held_out(tmp_path, 6, broken=0)  # record 0 is among those that are answered
    out = tmp_path / "run"
    assert run("stage1", out, *settings, "data.on_error=quarantine") == 0
    assert steps_with(out, "eval_loss") == [2, 4]
    assert [row["id"] for row in rows(out / "samples.jsonl")] == ["r3", "r3"]
    (left_out,) = [row for row in rows(out / "ledger_eval.jsonl")[1:] if "reason" in row]
    assert left_out["id"] == "r0" and left_out["bucket"] == "quarantined"


def test_a_broken_held_out_image_that_stops_the_run_stops_it_after_a_save(tmp_path: Path) -> None:
    settings = held_out(tmp_path, 18, broken=17)  # beyond the records that are opened at the start
    with pytest.raises(RecordError, match=r"cut\.png"):
        run("stage1", tmp_path / "run", *settings, "train.save_every_steps=100")
    newest = CheckpointStore(tmp_path / "run", {}).newest()
    assert newest is not None and newest.step == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), KeyError("pad"), OSError(5)])
def test_a_failed_evaluation_is_reported_and_training_ends_as_without_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(VisionLanguageModel, "generate", fail)
    assert run("stage1", tmp_path, *OFTEN) == 0
    assert "step 2: the evaluation failed" in capsys.readouterr().err
    assert steps_with(tmp_path, "eval_error") == [2, 4]
    assert steps_with(tmp_path, "loss") == [1, 2, 3, 4]
    assert (tmp_path / "final" / "manifest.json").exists()


def test_failing_trackers_and_a_failing_report_are_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the tracker")

    monkeypatch.setattr(Accelerator, "log", fail)
    monkeypatch.setattr(Accelerator, "end_training", fail)
    monkeypatch.setattr("vlm_sft.commands.train.write_run_report", fail)
    assert run("stage1", tmp_path, "data.eval=[]") == 0
    printed = capsys.readouterr().err
    assert printed.count("a tracker failed (no route to the tracker)") == 1
    assert "closing the trackers failed" in printed and "report.html failed" in printed
    assert steps_with(tmp_path, "loss") == [1, 2, 3, 4]


def test_a_run_killed_in_an_evaluation_resumes_from_its_step_and_evaluates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed() -> None:
        raise KeyboardInterrupt

    evaluate = validation.validation_loss
    monkeypatch.setattr(validation, "validation_loss", at_call(1, killed, evaluate))
    with pytest.raises(KeyboardInterrupt):
        run("stage1", tmp_path, *OFTEN, "train.async_checkpointing=false")
    assert steps_with(tmp_path, "loss") == [1, 2] and steps_with(tmp_path, "eval_loss") == []
    monkeypatch.setattr(validation, "validation_loss", evaluate)
    assert run("stage1", tmp_path, *OFTEN, "train.async_checkpointing=false") == 0
    assert steps_with(tmp_path, "loss") == [1, 2, 3, 4]
    assert steps_with(tmp_path, "eval_loss") == [2, 4]


def test_the_step_that_runs_when_a_signal_comes_is_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = VisionLanguageModel.forward  # 2 micro-batches a step
    for call, out in ((5, tmp_path / "first"), (6, tmp_path / "last")):
        monkeypatch.setattr(VisionLanguageModel, "forward", at_call(call, ask_to_stop, forward))
        assert run("stage1", out, "data.eval=[]", *MEASURE_NOTHING) == 143
        assert [row["step"] for row in rows(out / "trained.jsonl")] == [1, 2, 3]
        newest = CheckpointStore(out, {}).newest()
        assert newest is not None and newest.step == 3
        assert (out / "report.html").exists()


def test_a_signal_in_an_evaluation_starts_no_further_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        validation, "validation_loss", at_call(1, ask_to_stop, validation.validation_loss)
    )
    assert run("stage1", tmp_path, *OFTEN) == 143
    assert [row["step"] for row in rows(tmp_path / "trained.jsonl")] == [1, 2]
    assert steps_with(tmp_path, "eval_loss") == [2]


def test_damaged_lines_of_a_runs_files_are_counted_and_skipped_when_it_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("stage1", tmp_path, "data.eval=[]", "train.max_steps=2") == 0
    for name in ("metrics.jsonl", "trained.jsonl"):
        path = tmp_path / name
        damaged = '{"step": "two"}\n{"loss": 1.0}\n{"step": 1, "lo\n[1]\n{}\n\xff\n'
        path.write_text(damaged + path.read_text(), encoding="latin-1")
    longer = ["data.eval=[]", "train.max_steps=3", "--allow-change", "train.max_steps"]
    assert run("stage1", tmp_path, *longer) == 0
    printed = capsys.readouterr().err
    assert f"{tmp_path / 'metrics.jsonl'}: 6 damaged lines are skipped" in printed
    assert f"{tmp_path / 'trained.jsonl'}: 6 damaged lines are skipped" in printed
    for name in ("metrics.jsonl", "trained.jsonl"):
        assert [row["step"] for row in rows(tmp_path / name)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "num_rows", "num_damaged"),
    [
        ("", 0, 0),
        ('{"step": 1}\n\n{"step": 2}', 1, 0),  # a last line without an end was cut by a kill
        ('{"step": 1, "text": "a\u2028b"}\n', 1, 0),
        ('{"step": -1}\n{"step": true}\n{"step": 1.5}\nnull\n"x"\n', 0, 5),
        ('{"step": ' + "9" * 5000 + "}\n" + "[" * 100_000 + "\n", 0, 2),
        ('\0\0\0\n{"step": 3}\r\n', 1, 1),
    ],
)
def test_lines_that_no_run_wrote_whole_are_counted(
    tmp_path: Path, text: str, num_rows: int, num_damaged: int
) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    found = read_rows(tmp_path / "rows.jsonl")
    assert (len(found.rows), found.num_damaged) == (num_rows, num_damaged)


def test_training_time_is_read_from_usable_rows_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 3.5}\n{"step": 2, "seconds": "x"}\n{"step": 2}\n')
    assert MetricsFile(path, last_step=2).last_seconds == 3.5
