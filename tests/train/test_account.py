"""The account of a run: what was left out stays so, and nothing unplanned is trained."""

import pytest

from tests.train.tiny import example
from vlm_sft.data.batch import LoadError, pad_examples
from vlm_sft.errors import UserError
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.run_log import Account

BROKEN = LoadError(1, "image_broken", "record 'b': cut off")


def account() -> Account:
    return Account(
        ["a", "b", "record-2"],
        make_accelerator("fp32"),
        None,
        max_quarantined=1,
        max_skipped=2,
        on_quarantine=lambda fault: None,
    )


def test_records_and_updates_left_out_before_a_resume_count_after_it() -> None:
    before = account()
    before.meet(BROKEN)
    before.settle(1)
    before.skip("the loss is not finite", step=3)
    after = account()
    after.restore(before.position())
    assert after.usable([0, 1, 2]) == [0, 2]
    after.skip("the loss is not finite", step=7)
    with pytest.raises(UserError, match="2 updates were left out before"):
        after.skip("the loss is not finite", step=8)


def test_a_step_that_was_loaded_otherwise_than_planned_is_not_trained() -> None:
    batch = pad_examples([example(2, length=6)], pad_token_id=0)
    account().require_planned([batch], [[2]])
    with pytest.raises(RuntimeError, match=r"gave the records \[\['record-2'\]\], but the step's"):
        account().require_planned([batch], [[1]])
