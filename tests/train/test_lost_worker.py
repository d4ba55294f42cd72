"""A loader process that dies while its tensors are fetched is told as one that died."""

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from vlm_sft.data import loader as batches
from vlm_sft.errors import UserError


class Broken(Iterator[batches._Item | UserError]):
    """A loader whose worker's connection broke."""

    def __next__(self) -> batches._Item | UserError:
        raise ConnectionResetError(104, "Connection reset by peer")


def test_the_notice_of_its_death_comes_after_its_connection_broke() -> None:
    def notice(number: int, frame: FrameType | None) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGALRM, notice)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        told = r"a loader process died .*pid 7.*data\.num_workers"
        with pytest.raises(UserError, match=told), batches.lost_workers_told():
            batches._next_items(Broken(), [[0]])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_the_notice_may_come_while_a_step_is_computed() -> None:
    with pytest.raises(UserError, match="pid 8"), batches.lost_workers_told():
        raise RuntimeError("DataLoader worker (pid 8) is killed by signal: Killed. ")


def test_other_errors_of_a_step_keep_their_names() -> None:
    with pytest.raises(RuntimeError, match="shapes"), batches.lost_workers_told():
        raise RuntimeError("shapes do not match")


def test_a_connection_that_breaks_for_another_reason_keeps_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "NOTICE_SECONDS", 0.01)
    with pytest.raises(ConnectionResetError), batches.lost_workers_told():
        batches._next_items(Broken(), [[0]])
