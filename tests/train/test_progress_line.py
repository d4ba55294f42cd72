"""The progress line: values with units, one line per logged step without a terminal."""

import io
import itertools
import logging
import sys
from typing import Any

import pytest

from vlm_sft.train import progress_line
from vlm_sft.train.progress_line import ProgressLine, describe_row, format_eta
from vlm_sft.utils.progress import track

ROW: dict[str, Any] = {
    "step": 5,
    "loss": 4.0132,
    "learning_rate": {"projector": 1.4e-3},
    "samples_per_second": 3.81,
    "target_tokens_per_second": 1234.4,
    "memory_bytes": 2.1 * 2**30,
}


def test_a_row_is_shown_with_units() -> None:
    assert describe_row(ROW) == (
        "loss 4.013  lr 1.4e-3  3.8 samples/s  1,234 supervised tok/s  2.1 GiB"
    )


def test_parts_with_different_learning_rates_are_named() -> None:
    rates = {"projector": 1e-3, "language_model": 2e-5}
    assert "lr projector 1.0e-3 language_model 2.0e-5  " in describe_row(
        {**ROW, "learning_rate": rates}
    )
    same = {"projector": 1e-3, "adapter": 1e-3}
    assert "lr 1.0e-3  " in describe_row({**ROW, "learning_rate": same})


def test_a_loss_that_is_not_finite_is_shown_as_such() -> None:
    assert describe_row({**ROW, "loss": None}).startswith("loss not finite  lr")


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (293, "4:53"), (3893, "1:04:53")]
)
def test_remaining_time_is_shown_in_minutes_and_hours(seconds: float, shown: str) -> None:
    assert format_eta(seconds) == shown


def test_steps_without_a_row_are_a_line_every_ten_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: now[0])
    with ProgressLine(100, 0, enabled=True) as progress:
        for step in range(1, 13):
            now[0] = 2.0 * step
            progress.show_step(step)
    assert caplog.messages == ["step 5/100  ETA 3:10", "step 10/100  ETA 3:00"]


def test_a_loop_during_training_is_a_line_below_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", screen)
    seconds = itertools.count()
    with ProgressLine(100, 0, enabled=True) as progress:
        assert progress._bar is not None
        seen = []
        for item in track(range(8), 8, "validation", clock=lambda: float(next(seconds))):
            lines = [(task.fields["name"], task.total) for task in progress._bar.tasks]
            seen.append((item, lines[1:]))
    assert seen[0] == (0, []) and seen[-1] == (7, [("validation", 8)])
    assert [task.fields["name"] for task in progress._bar.tasks] == ["step"]


def test_every_logged_step_is_a_line_on_rank_0_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for enabled in (True, False):
        with ProgressLine(75, 0, enabled=enabled) as progress:
            progress.show(ROW)
    (line,) = caplog.messages
    assert line.startswith("step 5/75  loss 4.013  lr 1.4e-3  ") and "  ETA 0:0" in line
