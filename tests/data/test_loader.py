"""Loading of the micro-batches of each step, and the error if a worker process dies."""

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from tests.train.tiny import Records
from vlm_sft.data import loader
from vlm_sft.data.batch import PaddedCollator
from vlm_sft.errors import UserError


class BrokenLoader:
    """A DataLoader whose worker's connection broke."""

    def __init__(self, *args: object, **options: object) -> None:
        pass

    def __iter__(self) -> Iterator[object]:
        raise ConnectionResetError(104, "Connection reset by peer")


def broken_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.setattr(loader, "DataLoader", BrokenLoader)
    collator = PaddedCollator(1, pad_token_id=0)
    return loader.load_steps(Records(), [[[0]]], collator=collator, num_workers=1)


def test_the_notice_of_its_death_comes_after_its_connection_broke(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def notice(number: int, frame: FrameType | None) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGALRM, notice)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        told = r"a data loader process died .*pid 7.*data\.num_workers"
        with pytest.raises(UserError, match=told), loader.lost_worker_errors():
            next(broken_steps(monkeypatch))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_notice_may_come_while_a_step_is_computed() -> None:
    with pytest.raises(UserError, match="pid 8"), loader.lost_worker_errors():
        raise RuntimeError("DataLoader worker (pid 8) is killed by signal: Killed. ")


def test_other_errors_of_a_step_keep_their_names() -> None:
    with pytest.raises(RuntimeError, match="shapes"), loader.lost_worker_errors():
        raise RuntimeError("shapes do not match")


def test_a_connection_that_breaks_for_another_reason_keeps_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "NOTICE_SECONDS", 0.01)
    with pytest.raises(ConnectionResetError), loader.lost_worker_errors():
        next(broken_steps(monkeypatch))
