"""Before the first step a run says where results go, what disk it needs, and soon how long."""

import logging
from pathlib import Path

import pytest

from tests.tiny_runs import run
from vlm_sft.config.schema import TrainConfig
from vlm_sft.train import run_cost
from vlm_sft.train.run_cost import DurationNote, checkpoints_at_once, log_disk

TRAIN = TrainConfig(
    epochs=1,
    global_batch_size=8,
    micro_batch_size=4,
    precision="fp32",
    save_every_steps=10,
    keep_last_checkpoints=2,
)


@pytest.mark.parametrize(
    ("steps", "changed", "count"),
    [(100, {}, 3), (10, {}, 1), (11, {}, 2), (100, {"keep_last_checkpoints": 5}, 6)],
)
def test_one_more_checkpoint_than_are_kept_exists_at_once(
    steps: int, changed: dict[str, int], count: int
) -> None:
    assert checkpoints_at_once(TRAIN.model_copy(update=changed), steps) == count


def test_a_best_checkpoint_is_one_more() -> None:
    assert checkpoints_at_once(TRAIN.model_copy(update={"keep_best": "eval_loss"}), 100) == 4


@pytest.mark.parametrize(("free", "warned"), [(31 * 10**9, False), (29 * 10**9, True)])
def test_a_disk_that_will_not_hold_the_checkpoints_is_a_warning(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    free: int,
    warned: bool,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(run_cost, "free_bytes", lambda place: free)
    log_disk(tmp_path, TRAIN, total_steps=100, num_bytes=10**10, there=0)
    first, *warnings = caplog.messages
    assert str(tmp_path) in first
    assert f"at most 3 of about 10.0 GB at once, 30.0 GB in all; {free / 1e9:.1f} GB free" in first
    assert bool(warnings) == warned
    if warned:
        assert "need 30.0 GB more, and 29.0 GB are free" in warnings[0]


def test_checkpoints_that_exist_need_no_more_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_cost, "free_bytes", lambda place: 11 * 10**9)
    log_disk(tmp_path, TRAIN, total_steps=100, num_bytes=10**10, there=2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_duration_is_told_once_from_the_steps_after_the_first(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr(run_cost.time, "monotonic", lambda: now[0])
    note = DurationNote(10, 100)
    for step in range(11, 101):
        now[0] += 60.0 if step == 11 else 2.0
        note.after_step(step)
    (message,) = caplog.messages
    assert "2 min 52 s for the 86 steps that are left, at 2 s per step" in message


def test_a_run_says_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("stage1", tmp_path / "run", "train.max_steps=6") == 0
    messages = capsys.readouterr().err.splitlines()
    disk = next(i for i, text in enumerate(messages) if text.startswith("results: "))
    first = next(i for i, text in enumerate(messages) if text.startswith("step 1/6"))
    assert disk < first and str(tmp_path / "run") in messages[disk]
    assert sum(text.startswith("expected duration: ") for text in messages) == 1
