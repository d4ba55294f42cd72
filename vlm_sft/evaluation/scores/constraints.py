"""Score how well answers follow instructions that a program can check (IFEval, 2311.07911)."""

from collections.abc import Sequence
from typing import Any

from vlm_sft.evaluation.intervals import cluster_bootstrap_ratio, interval_of_shares
from vlm_sft.evaluation.scores.constraint_checks import CHECKS, Arguments
from vlm_sft.evaluation.scores.files import Answers, Row, match, unique_ids
from vlm_sft.evaluation.scores.results import Options, Results, image_of, question_row


def score_constraints(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return the shares of prompts and of instructions that were followed, strictly and loosely.

    A prompt is followed if all of its instructions are. The loose reading accepts an answer that
    follows without its first or last line or without asterisks.

    Args:
        answers: Texts by question id.
        truth: Rows of IFEval's files: `key` or another id, `instruction_id_list` (names of
            `CHECKS`) and `kwargs` (an object of arguments for each).
        options: Seed of the bootstrap.

    Raises:
        UserError: An instruction is unknown, or its arguments are wrong.
    """
    questions = unique_ids(truth, "key", "question_id", "id")
    asked = {name: _instructions(row) for name, row in questions.items()}
    coverage = match(answers, list(questions))
    rows = []
    for name, row in questions.items():
        answer = answers.by_id.get(name, "")
        strict = [_follows([answer], instruction) for instruction in asked[name]]
        loose = [_follows(loose_readings(answer), instruction) for instruction in asked[name]]
        rows.append(
            question_row(
                name, row, answers, all(strict),
                instructions=[instruction.kind for instruction in asked[name]],
                strict=strict, loose=loose,
            )
        )  # fmt: skip
    images = [image_of(name, row) for name, row in questions.items()]
    scores: dict[str, Any] = {"kind": "constraints", **coverage.as_dict()}
    scores["instructions"] = sum(len(row["instructions"]) for row in rows)
    for reading in ("strict", "loose"):
        prompts = interval_of_shares([all(r[reading]) for r in rows], images, seed=options.seed)
        single = cluster_bootstrap_ratio(
            [sum(r[reading]) for r in rows], [len(r[reading]) for r in rows], images,
            seed=options.seed,
        )  # fmt: skip
        for level, interval in (("prompt", prompts), ("instruction", single)):
            scores[f"{level}_{reading}"] = interval.estimate
            scores[f"{level}_{reading}_interval"] = [interval.low, interval.high]
    scores["by_instruction"] = _by_instruction(rows)
    scores["by_number_of_instructions"] = _by_number(rows)
    return Results(scores, rows)


def loose_readings(answer: str) -> list[str]:
    """Return the answer as it is, without its first and last lines, and without asterisks."""
    lines = answer.split("\n")
    parts = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [text for part in parts for text in (part, part.replace("*", ""))]


def _follows(readings: Sequence[str], instruction: Arguments) -> bool:
    check = CHECKS[instruction.kind]
    return any(bool(text.strip()) and check(text, instruction) for text in readings)


def _instructions(row: Row) -> list[Arguments]:
    """Return the instructions of a row, each of which can be checked."""
    names, arguments = row.require("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not names:
        raise row.refusal("'instruction_id_list' is not a list of names")
    arguments = [{}] * len(names) if arguments is None else arguments
    if not isinstance(arguments, list) or [type(a) for a in arguments] != [dict] * len(names):
        raise row.refusal("'kwargs' is not a list of one object for each instruction")
    found = []
    for name, values in zip(names, arguments, strict=True):
        if name not in CHECKS:
            raise row.refusal(f"unknown instruction {name!r}; expected one of {', '.join(CHECKS)}")
        found.append(Arguments(name, values, row))
        CHECKS[name]("a text", found[-1])  # raises if an argument is missing
    return found


def _by_instruction(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    groups: dict[str, list[tuple[bool, bool]]] = {}
    for row in rows:
        for name, *followed in zip(row["instructions"], row["strict"], row["loose"], strict=True):
            groups.setdefault(name, []).append((followed[0], followed[1]))
    return {name: _shares(pairs) for name, pairs in sorted(groups.items())}


def _by_number(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    groups: dict[int, list[tuple[bool, bool]]] = {}
    for row in rows:
        groups.setdefault(len(row["strict"]), []).append((all(row["strict"]), all(row["loose"])))
    return {str(number): _shares(pairs) for number, pairs in sorted(groups.items())}


def _shares(pairs: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    strict, loose = zip(*pairs, strict=True)
    return {
        "number": len(pairs),
        "strict": sum(strict) / len(pairs),
        "loose": sum(loose) / len(pairs),
    }
