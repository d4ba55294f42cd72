"""Excluded records stay excluded, and nothing unplanned is trained."""

import pytest

from tests.train.tiny import example
from vlm_sft.data.batch import LoadError, pad_examples
from vlm_sft.errors import UserError
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.run_log import RunLog

BROKEN = LoadError(1, "image_broken", "record 'b': cut off")


def run_log() -> RunLog:
    return RunLog(
        ["a", "b", "record-2"],
        make_accelerator("fp32"),
        None,
        max_quarantined=1,
        max_skipped=2,
        on_quarantine=lambda fault: None,
    )


def test_excluded_records_and_skipped_updates_before_a_resume_count_after_it() -> None:
    before = run_log()
    before.add_error(BROKEN)
    before.sync_errors(1)
    before.log_step(3, [0, 2], "the loss is not finite")
    after = run_log()
    after.restore(before.state())
    assert after.usable([0, 1, 2]) == [0, 2]
    after.log_step(7, [0, 2], "the loss is not finite")
    with pytest.raises(UserError, match="2 updates were skipped before"):
        after.log_step(8, [0, 2], "the loss is not finite")


def test_a_step_that_was_loaded_otherwise_than_planned_is_not_trained() -> None:
    batch = pad_examples([example(2, length=6)], pad_token_id=0)
    run_log().require_planned([batch], [[2]])
    with pytest.raises(
        RuntimeError, match=r"returned the records \[\['record-2'\]\], but the step's"
    ):
        run_log().require_planned([batch], [[1]])
