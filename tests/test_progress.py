import io
import sys
import threading
import time

import pytest

from vlm_sft.utils import progress
from vlm_sft.utils.progress import format_rate, format_seconds, track, waiting


class Clock:
    """One second later at every look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_short_loop_prints_nothing_and_yields_every_item(capsys):
    assert list(track([1, 2, 3], description="reading")) == [1, 2, 3]
    assert capsys.readouterr() == ("", "")


def test_a_long_loop_without_a_terminal_prints_a_line_every_ten_seconds_with_the_time_left(capsys):
    assert list(track(range(20), description="reading", clock=Clock(1.0))) == list(range(20))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "reading: 10 of 20 (50%), 10 s left",
        "reading: 20 of 20 (100%), 0 s left",
        "reading: 20 done in 21 s",
    ]


def test_a_loop_of_unknown_length_counts_without_an_estimate(capsys):
    list(track(iter(range(12)), description="reading", clock=Clock(1.0)))
    assert capsys.readouterr().err.splitlines()[0] == "reading: 10, 10 s so far"


def test_a_slow_first_item_makes_no_estimate(capsys):
    clock = Clock(0.0)

    def loop():
        for number in range(500):
            clock.now += 15 if number == 0 else 0.0625
            yield number

    list(track(loop(), 500, "comparing", clock=clock))
    assert capsys.readouterr().err.splitlines() == [
        "comparing: 1 of 500 (0%), 15 s so far",
        "comparing: 161 of 500 (32%), 21 s left",
        "comparing: 321 of 500 (64%), 11 s left",
        "comparing: 481 of 500 (96%), 1 s left",
        "comparing: 500 done in 46 s",
    ]


def test_a_terminal_gets_a_bar_only_after_two_seconds(monkeypatch):
    quick, slow = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", quick)
    assert list(track(range(5), description="[red]", clock=Clock(0.1))) == list(range(5))
    assert quick.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", slow)
    assert list(track(range(5), description="reading [x]", clock=Clock(1.0))) == list(range(5))
    assert "reading [x]" in slow.getvalue() and "5/5" in slow.getvalue()


def test_an_error_of_the_loop_comes_through(capsys):
    def broken():
        yield 1
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        list(track(broken()))


def test_seconds_are_written_for_people():
    assert [format_seconds(s) for s in (7, 125, 12000)] == ["7 s", "2 min 05 s", "3 h 20 min"]
    assert [format_rate(r) for r in (1234.56, 1, 0.0418, 0)] == ["1,234.6", "1.0", "0.042", "0"]


def test_a_call_that_does_not_say_how_far_it_is_says_that_it_still_runs(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    seen = threading.active_count()
    with waiting("loading a model"):
        deadline = time.monotonic() + 30
        while "loading a model: 0 s so far" not in (said := capsys.readouterr().err):
            assert time.monotonic() < deadline, said
            time.sleep(0.01)
    assert threading.active_count() == seen
    monkeypatch.undo()
    with waiting("a short one"):
        pass
    assert "short" not in capsys.readouterr().err


def test_waiting_ends_with_an_error_of_the_call():
    seen = threading.active_count()
    with pytest.raises(RuntimeError, match="inside"), waiting("loading a model"):
        raise RuntimeError("inside")
    assert threading.active_count() == seen
