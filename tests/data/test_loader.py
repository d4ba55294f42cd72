"""Loading of the micro-batches of each step, and the error if a worker process dies."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from tests.train.tiny import Records, example
from vlm_sft.data import loader
from vlm_sft.data.batch import LoadError, PaddedCollator
from vlm_sft.data.dataset import Example
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils import filesystem


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


class Broken(Records):
    """Records of which the second and the third cannot be loaded."""

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if index in (1, 2):
            raise RecordError("image_broken", "cut off", record_id=f"r{index}", where="a.json")
        return super().__getitem__(index)


def six_records() -> list[Example]:
    return [example(number, length=5) for number in range(6)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_steps_come_in_order_whatever_their_number_of_micro_batches(num_workers: int) -> None:
    steps = [[[0, 3]], [[5], [], [1]], [[4], [2]]]
    collator = PaddedCollator(2, pad_token_id=0)
    loaded = loader.load_steps(
        Records(six_records()), iter(steps), collator=collator, num_workers=num_workers
    )
    found = [[list(batch.record_ids) for batch in batches] for batches in loaded]
    assert found == [[[f"record-{i}" for i in indices] for indices in step] for step in steps]


def test_a_worker_goes_on_loading_after_sigterm() -> None:
    steps = [[[number % 6]] for number in range(40)]
    collator = PaddedCollator(1, pad_token_id=0)
    loaded = loader.load_steps(
        Records(six_records()), iter(steps), collator=collator, num_workers=1
    )
    next(loaded)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    assert len(list(loaded)) == 39


def test_steps_are_read_only_as_they_are_needed() -> None:
    read: list[int] = []

    def steps() -> Iterator[list[list[int]]]:
        for index in range(6):
            read.append(index)
            yield [[index]]

    collator = PaddedCollator(1, pad_token_id=0)
    loaded = loader.load_steps(Records(six_records()), steps(), collator=collator, num_workers=0)
    next(loaded)
    assert read == [0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_record_that_cannot_be_loaded_is_reported_before_the_step_without_it(
    num_workers: int,
) -> None:
    errors: list[LoadError] = []
    loaded = loader.load_steps(
        Broken(six_records()),
        [[[0], [1, 3]], [[2]]],
        collator=PaddedCollator(2, pad_token_id=0),
        num_workers=num_workers,
        on_error=errors.append,
    )
    first = next(loaded)
    assert [batch.record_ids for batch in first] == [("record-0",), ("record-3",)]
    assert first[1].load_errors == (LoadError(1, "image_broken", "a.json: record 'r1': cut off"),)
    (empty,) = next(loaded)
    assert empty.record_ids == () and empty.num_targets == 0
    assert [error.index for error in errors] == [1, 2]


def test_there_are_not_more_workers_than_cores_and_the_log_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(filesystem, "_warned", set())
    started = []

    class Loader(BrokenLoader):
        def __init__(self, *args: object, **options: object) -> None:
            started.append(options["num_workers"])

        def __iter__(self) -> Iterator[object]:
            return iter(())

    monkeypatch.setattr(loader, "DataLoader", Loader)
    collator = PaddedCollator(1, pad_token_id=0)
    for wanted in (4, 4, 2, 0):
        list(loader.load_steps(Records(), [[[0]]], collator=collator, num_workers=wanted))
    assert started == [2, 2, 2, 0]
    assert capsys.readouterr().err.splitlines() == [
        "warning: data.num_workers: 4 processes would share 2 CPU cores; starting 2"
    ]
