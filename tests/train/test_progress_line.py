"""The progress line: values with units, one line per logged step without a terminal."""

import logging
from typing import Any

import pytest

from vlm_sft.train.progress_line import ProgressLine, describe_row, format_eta

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


def test_every_logged_step_is_a_line_on_rank_0_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for enabled in (True, False):
        with ProgressLine(75, 0, enabled=enabled) as progress:
            progress.show(ROW)
    (line,) = caplog.messages
    assert line.startswith("step 5/75  loss 4.013  lr 1.4e-3  ") and "  ETA 0:0" in line
