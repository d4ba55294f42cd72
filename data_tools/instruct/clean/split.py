"""Samples as they are written: kept in full or in part, and set aside with the reason."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from data_tools.instruct.clean.codes import CODES
from data_tools.instruct.clean.table import Table
from data_tools.instruct.schema import Check, Cost, Judgment, Sample

RULE = "clean"


def outcome(
    sample: Sample, number: int, table: Table, name_of: Callable[[int], str]
) -> tuple[Sample | None, list[Sample]]:
    """The sample as it is kept (None: not at all), and what of it is set aside.

    A sample that loses some turns is kept with the others; each lost turn is a line of its own,
    `<id>-turn-<number>`, so that no turn is in both files and none is in neither.

    Args:
        sample: As it was accepted.
        number: Its row of the table.
        table: With all decisions made.
        name_of: The id of the sample of a row.
    """
    code = int(table.sample_codes[number])
    if code:
        return None, [_aside(sample, [_sample_check(table, number, code, name_of)])]
    start, end = int(table.first_turns[number]), int(table.first_turns[number + 1])
    found = [
        _turn_check(int(table.turn_codes[turn]), int(table.turn_causes[turn]), name_of)
        for turn in range(start, end)
    ]
    lost = {place: check for place, check in enumerate(found) if check is not None}
    if not lost:
        return sample, []
    if len(lost) == len(found):
        checks = [replace(check, turn=place) for place, check in lost.items()]
        return None, [_aside(sample, checks)]
    return _without(sample, lost), [_turn_aside(sample, *item) for item in lost.items()]


def _sample_check(table: Table, number: int, code: int, name_of: Callable[[int], str]) -> Check:
    claim, cause = "", int(table.causes[number])
    if CODES[code].endswith("_DUPLICATE"):
        claim = f"duplicate of {name_of(cause)}"
        if CODES[code] == "NEAR_DUPLICATE":
            claim += f" (Jaccard {table.likeness[number]:.3f})"
    return Check(rule=RULE, verdict="contradicted", code=CODES[code], claim=claim)


def _turn_check(code: int, cause: int, name_of: Callable[[int], str]) -> Check | None:
    if not code:
        return None
    claim = f"asked before in {name_of(cause)}" if cause >= 0 else ""
    return Check(rule=RULE, verdict="contradicted", code=CODES[code], claim=claim)


def _aside(sample: Sample, checks: list[Check]) -> Sample:
    reasons = tuple(dict.fromkeys(check.code for check in checks if check.code))
    return sample.model_copy(
        update={
            "checks": (*sample.checks, *checks),
            "status": "rejected",
            "reasons": (*sample.reasons, *reasons),
        }
    )


def _turn_aside(sample: Sample, number: int, check: Check) -> Sample:
    """One turn as a line of its own; its answer's cost stays with the sample."""
    own = [replace(c, turn=0) for c in sample.checks if c.turn == number]
    turn = sample.model_copy(
        update={
            "id": f"{sample.id}-turn-{number}",
            "turns": (sample.turns[number],),
            "checks": tuple(own),
            "judgment": _judgment_of(sample, [number]),
            "cost": Cost(attempts=0),
        }
    )
    return _aside(turn, [replace(check, turn=0)])


def _without(sample: Sample, lost: Mapping[int, Check]) -> Sample:
    """The sample without the lost turns; its checks follow the turns, and say which went."""
    kept = [number for number in range(len(sample.turns)) if number not in lost]
    places = {number: place for place, number in enumerate(kept)}
    checks = [
        check if check.turn is None else replace(check, turn=places[check.turn])
        for check in sample.checks
        if check.turn is None or check.turn in places
    ]
    notes = [
        Check(rule=RULE, verdict="unknown", claim=f"turn {number} was set aside: {check.code}")
        for number, check in lost.items()
    ]
    return sample.model_copy(
        update={
            "turns": tuple(sample.turns[k] for k in kept),
            "checks": (*checks, *notes),
            "judgment": _judgment_of(sample, kept),
        }
    )


def _judgment_of(sample: Sample, turns: Sequence[int]) -> Judgment | None:
    return sample.judgment.of_turns(turns) if sample.judgment else None
