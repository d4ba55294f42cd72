"""Split samples into what is kept and what is dropped, with the reason as a check."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from data_tools.instruct.clean.codes import KEPT
from data_tools.instruct.clean.table import Table
from data_tools.instruct.schema import Check, Cost, Grown, Judgment, Sample

RULE = "clean"


def split_samples(
    samples: Iterable[Sample], table: Table, id_of: Callable[[int], str]
) -> Iterator[tuple[Sample | None, list[Sample]]]:
    """Yield each sample as it is kept (None: not at all), and what of it is dropped.

    A sample that loses some turns is kept with the others; each lost turn is a sample of its own,
    `<id>-turn-<number>`, so that every turn is in exactly one of the two files.

    Args:
        samples: The accepted samples.
        table: Their rows, after all decisions.
        id_of: Return the id of the sample with this number.
    """
    columns = [table.samples[name].tolist() for name in ("code", "cause", "similarity")]
    turns = zip(*(table.turns[name].tolist() for name in ("code", "cause")), strict=True)
    for sample, code, cause, similarity in zip(samples, *columns, strict=True):
        decisions = [next(turns) for _ in sample.turns]
        if code != KEPT:
            claim = f"duplicate of {id_of(cause)}" if code.endswith("_DUPLICATE") else ""
            if code == "NEAR_DUPLICATE":
                claim += f" (Jaccard {similarity:.3f})"
            yield None, [_dropped(sample, [_check(code, claim)])]
            continue
        lost = {
            turn: _check(code, f"asked before in {id_of(cause)}" if cause >= 0 else "", turn)
            for turn, (code, cause) in enumerate(decisions)
            if code != KEPT
        }
        if not lost:
            yield sample, []
        elif len(lost) == len(decisions):
            yield None, [_dropped(sample, lost.values())]
        else:
            yield _without(sample, lost), [_turn(sample, *item) for item in lost.items()]


def _check(code: str, claim: str, turn: int | None = None) -> Check:
    return Check(rule=RULE, verdict="contradicted", code=code, claim=claim, turn=turn)


def _dropped(sample: Sample, checks: Iterable[Check]) -> Sample:
    checks = tuple(checks)
    reasons = dict.fromkeys(check.code for check in checks if check.code)
    return sample.model_copy(
        update={
            "checks": (*sample.checks, *checks),
            "status": "rejected",
            "reasons": (*sample.reasons, *reasons),
        }
    )


def _turn(sample: Sample, number: int, check: Check) -> Sample:
    """Return one turn as a dropped sample; the cost of the answer stays with the kept sample."""
    turn = sample.model_copy(
        update={
            "id": f"{sample.id}-turn-{number}",
            "turns": (sample.turns[number],),
            "checks": tuple(replace(c, turn=0) for c in sample.checks if c.turn == number),
            "judgment": _judgment(sample, [number]),
            "grown": _grown(sample, [number]),
            "cost": Cost(attempts=0),
        }
    )
    return _dropped(turn, [replace(check, turn=0)])


def _without(sample: Sample, lost: Mapping[int, Check]) -> Sample:
    """Return the sample without the lost turns; its checks are renumbered, and name the turns."""
    kept = [number for number in range(len(sample.turns)) if number not in lost]
    places = {number: place for place, number in enumerate(kept)}
    checks = [
        check if check.turn is None else replace(check, turn=places[check.turn])
        for check in sample.checks
        if check.turn is None or check.turn in places
    ]
    notes = [
        Check(rule=RULE, verdict="unknown", claim=f"turn {number} was dropped: {check.code}")
        for number, check in lost.items()
    ]
    return sample.model_copy(
        update={
            "turns": tuple(sample.turns[k] for k in kept),
            "checks": (*checks, *notes),
            "judgment": _judgment(sample, kept),
            "grown": _grown(sample, kept),
        }
    )


def _grown(sample: Sample, turns: Sequence[int]) -> Grown | None:
    """Return what the sample was grown from, with the tasks of these turns only."""
    if sample.grown is None or not sample.grown.tasks:
        return sample.grown
    tasks = tuple(sample.grown.tasks[number] for number in turns)
    return sample.grown.model_copy(update={"tasks": tasks})


def _judgment(sample: Sample, turns: Sequence[int]) -> Judgment | None:
    """Return the judge's verdicts of these turns."""
    return sample.judgment.of_turns(turns) if sample.judgment else None
