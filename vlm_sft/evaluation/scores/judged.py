"""Score answers by a judge model: grades (MT-Bench), wins against a baseline, ratings of models.

MT-Bench and the arena: arXiv 2306.05685; AlpacaEval: arXiv 2404.04475.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from vlm_sft.errors import UserError
from vlm_sft.evaluation.intervals import cluster_bootstrap_interval
from vlm_sft.evaluation.judges.asking import (
    Asked,
    JudgeOptions,
    JudgeRequest,
    ask,
    fill,
    load_prompt,
    request_for,
)
from vlm_sft.evaluation.judges.ratings import (
    CENTER,
    Battle,
    bootstrap_ratings,
    bradley_terry,
    elo,
    length_controlled_win_rate,
    unbounded,
    win_matrix,
)
from vlm_sft.evaluation.scores.files import Answers, Row, match, unique_ids
from vlm_sft.evaluation.scores.refusal import stance_of
from vlm_sft.evaluation.scores.results import Options, Results, image_of, mean, question_row

_RATING: Final = re.compile(r"\[\[\s*(\d{1,2}(?:\.\d+)?)\s*\]\]")
_VERDICT: Final = re.compile(r"\[\[\s*([ABC])\s*\]\]")
_LOWEST_GRADE: Final = 1.0
_RESULT: Final[Mapping[str, float]] = {"A": 1.0, "B": 0.0, "C": 0.5}


def read_grade(reply: str) -> float | None:
    """Return the last grade from 1 to 10 in `[[ ]]`, or None."""
    found = _RATING.findall(reply)
    grade = float(found[-1]) if found else 0.0
    return grade if 1 <= grade <= 10 else None


def read_verdict(reply: str) -> str | None:
    """Return the last of `[[A]]`, `[[B]]` and `[[C]]` (a tie), or None."""
    found = _VERDICT.findall(reply)
    return found[-1] if found else None


def score_mt_bench(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return the mean grade, from 1 to 10, of the answers of conversations, turn by turn.

    A missing answer has the lowest grade. Replies without a grade are counted as `unparsed` and
    are in no mean.

    Args:
        answers: Texts by `QUESTION-TURN`, as `read_answers` gives those of conversations.
        truth: Rows with `turns` (the questions), and optionally `category` and `reference` (the
            right answers, used in the prompt).
        options: The judge, and the seed of the bootstrap.

    Raises:
        UserError: There is no judge, or it refuses every request.
    """
    judge = _require_judge(options)
    questions = unique_ids(truth, "question_id", "id")
    turns = {name: _texts(row, "turns") for name, row in questions.items()}
    coverage = match(
        answers, [f"{name}-{n}" for name, asked in turns.items() for n in range(1, len(asked) + 1)]
    )
    requests: dict[str, JudgeRequest] = {}
    for name, row in questions.items():
        for number in range(1, len(turns[name]) + 1):
            if f"{name}-{number}" in answers.by_id:
                prompt = _grading_prompt(judge, row, turns[name], answers, name, number)
                requests[f"{name}-{number}"] = request_for(prompt, judge)
    asked = ask(list(requests.values()), judge)
    rows = []
    for name, row in questions.items():
        for number in range(1, len(turns[name]) + 1):
            turn = f"{name}-{number}"
            reply = asked.replies.get(requests[turn].id) if turn in requests else None
            grade = read_grade(reply.text) if reply else None
            grade = _LOWEST_GRADE if turn not in requests else grade
            rows.append(
                question_row(
                    turn, row, answers, 0.0 if grade is None else (grade - 1) / 9,
                    turn=number, grade=grade, reply=reply.text if reply else None,
                )
                | {"image": image_of(name, row)}
            )  # fmt: skip
    return Results(
        {"kind": "mt-bench", **coverage.as_dict(), **_grades(rows, asked, options)}, rows
    )


def score_alpaca(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return the win rate against a baseline, plain and with the influence of length removed.

    Each pair of answers is judged in both orders; the mean of the two verdicts is the preference.

    Args:
        answers: The model's texts by question id.
        truth: Rows with `instruction` (or `question`, `prompt`, `text`).
        options: The judge, the seed, and in `others` the answers of one baseline.

    Raises:
        UserError: There is no judge or no single baseline, or the judge refuses every request.
    """
    judge = _require_judge(options)
    if len(options.others) != 1:
        raise UserError("alpaca needs the answers of one baseline: --others NAME=FILE")
    baseline = next(iter(options.others.values()))
    questions = unique_ids(truth, "question_id", "id")
    coverage = match(answers, list(questions))
    match(baseline, list(questions))
    both = [n for n in questions if n in answers.by_id and n in baseline.by_id]
    pairs = [_pair(judge, questions[n], answers.by_id[n], baseline.by_id[n]) for n in both]
    asked = ask([request for pair in pairs for request in pair], judge)
    duels = {name: _duel(pair, asked) for name, pair in zip(both, pairs, strict=True)}
    rows = [
        question_row(
            name, row, answers, _score_of(name, answers, baseline, duels),
            verdicts=list(duels[name].verdicts) if name in duels else None,
            preference=duels[name].result if name in duels else None,
        )
        for name, row in questions.items()
    ]  # fmt: skip
    # A missing answer has lost; a pair without two verdicts is left out, and counted.
    lost = [n for n in questions if n not in answers.by_id and n in baseline.by_id]
    judged = [n for n in questions if n in lost or (n in duels and duels[n].result is not None)]
    preferences = [0.0 if n in lost else float(duels[n].result or 0.0) for n in judged]
    scores: dict[str, Any] = {
        "kind": "alpaca",
        **coverage.as_dict(),
        "baseline": next(iter(options.others)),
        "baseline_unanswered": sum(name not in baseline.by_id for name in questions),
        "judged": len(judged),
        "win_rate": mean(preferences),
    }
    if judged:
        images = [image_of(name, questions[name]) for name in judged]
        interval = cluster_bootstrap_interval(preferences, images, seed=options.seed)
        scores["win_rate_interval"] = [interval.low, interval.high]
    lengths = [[len(a.by_id.get(name, "")) for name in judged] for a in (answers, baseline)]
    scores["length_controlled_win_rate"] = length_controlled_win_rate(preferences, *lengths)
    scores["mean_characters"], scores["baseline_mean_characters"] = map(mean, lengths)
    return Results({**scores, **_bias(list(duels.values()), asked, judge)}, rows)


def score_arena(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return Bradley-Terry and Elo ratings of several models, each pair judged in both orders.

    Args:
        answers: The texts of the model `options.name` by question id.
        truth: Rows with `instruction` (or `question`, `prompt`, `text`).
        options: The judge, the seed, and in `others` the answers of the other models.

    Raises:
        UserError: There is no judge or no other model, or the judge refuses every request.
    """
    judge = _require_judge(options)
    if not options.others or options.name in options.others:
        raise UserError("arena needs answers of other models with other names: --others NAME=FILE")
    models = {options.name: answers, **options.others}
    names = list(models)
    questions = unique_ids(truth, "question_id", "id")
    coverage = match(answers, list(questions))
    meetings = [
        (question, i, j)
        for question in questions
        for i, j in itertools.combinations(range(len(names)), 2)
        if all(question in models[names[n]].by_id for n in (i, j))
    ]
    pairs = [
        _pair(judge, questions[q], models[names[i]].by_id[q], models[names[j]].by_id[q])
        for q, i, j in meetings
    ]
    asked = ask([request for pair in pairs for request in pair], judge)
    duels = [_duel(pair, asked) for pair in pairs]
    battles = [
        Battle(i, j, duel.result, image_of(question, questions[question]))
        for (question, i, j), duel in zip(meetings, duels, strict=True)
        if duel.result is not None
    ]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in questions}
    for (question, i, j), duel in zip(meetings, duels, strict=True):
        found[question].append(
            {"first": names[i], "second": names[j], "result": duel.result,
             "verdicts": list(duel.verdicts)}
        )  # fmt: skip
    rows = [
        question_row(
            name, row, answers, _mean_of_first(found[name], options.name), battles=found[name]
        )
        for name, row in questions.items()
    ]
    scores = {"kind": "arena", **coverage.as_dict(), "battles": len(battles)}
    ratings = _ratings(battles, names, options.seed) if battles else {}
    return Results({**scores, **ratings, **_bias(duels, asked, judge)}, rows)


@dataclass(frozen=True)
class _Duel:
    """Two answers judged in both orders.

    Attributes:
        verdicts: `A` (the one shown first is better), `B`, `C` (a tie), None (no verdict), for
            each order.
        result: Share of the win of the first answer; None unless both orders have a verdict.
    """

    verdicts: tuple[str | None, str | None]
    result: float | None


def _duel(pair: tuple[JudgeRequest, JudgeRequest], asked: Asked) -> _Duel:
    replies = [asked.replies.get(request.id) for request in pair]
    first, second = (read_verdict(reply.text) if reply else None for reply in replies)
    if first is None or second is None:
        return _Duel((first, second), None)
    return _Duel((first, second), (_RESULT[first] + 1 - _RESULT[second]) / 2)


def _pair(
    judge: JudgeOptions, row: Row, first: str, second: str
) -> tuple[JudgeRequest, JudgeRequest]:
    """Return the requests for the two orders of a pair."""
    question = row.text("instruction", "question", "prompt", "text")
    prompt = load_prompt("pair", judge)
    orders = ((first, second), (second, first))
    one, two = (
        request_for(fill(prompt, {"question": question, "answer_a": a, "answer_b": b}), judge)
        for a, b in orders
    )
    return one, two


def _score_of(name: str, answers: Answers, baseline: Answers, duels: Mapping[str, _Duel]) -> float:
    if name in duels:
        return duels[name].result or 0.0
    return float(name in answers.by_id and name not in baseline.by_id)


def _mean_of_first(battles: Sequence[Mapping[str, Any]], name: str) -> float:
    results = [b["result"] for b in battles if b["first"] == name and b["result"] is not None]
    return mean(results) or 0.0


def _bias(duels: Sequence[_Duel], asked: Asked, judge: JudgeOptions) -> dict[str, Any]:
    """Return how often the position decided, and what did not bring a verdict."""
    verdicts = Counter(v for duel in duels for v in duel.verdicts if v is not None)
    total = sum(verdicts.values())
    complete = [duel.verdicts for duel in duels if duel.result is not None]
    swapped = {"A": "B", "B": "A", "C": "C"}
    agree = sum(second == swapped[str(first)] for first, second in complete)
    return {
        "first_position_share": verdicts["A"] / total if total else None,
        "second_position_share": verdicts["B"] / total if total else None,
        "tie_share": verdicts["C"] / total if total else None,
        "orders_agree_share": agree / len(complete) if complete else None,
        "always_first": sum(pair == ("A", "A") for pair in complete),
        "always_second": sum(pair == ("B", "B") for pair in complete),
        "not_judged": len(duels) - len(complete),
        **_unread(asked, read_verdict),
        **asked.as_dict(judge),
    }


def _unread(asked: Asked, read: Any) -> dict[str, int]:
    """Return the numbers of replies without a verdict, and of those that are refusals."""
    unread = [reply for reply in asked.replies.values() if read(reply.text) is None]
    refusals = [r for r in unread if r.finish == "content_filter" or stance_of(r.text) == "refuses"]
    return {"unparsed": len(unread), "unparsed_refusals": len(refusals)}


def _grades(rows: Sequence[dict[str, Any]], asked: Asked, options: Options) -> dict[str, Any]:
    graded = [row for row in rows if row["grade"] is not None]
    scores: dict[str, Any] = {"score": mean([row["grade"] for row in graded])}
    if graded:
        interval = cluster_bootstrap_interval(
            [row["grade"] for row in graded], [row["image"] for row in graded], seed=options.seed
        )
        scores["score_interval"] = [interval.low, interval.high]
    for turn in sorted({row["turn"] for row in rows}):
        scores[f"turn_{turn}"] = mean([r["grade"] for r in graded if r["turn"] == turn])
    scores["not_judged"] = len(rows) - len(graded)
    categories = sorted({row["category"] for row in graded if "category" in row})
    if categories:
        scores["by_category"] = {
            category: {
                "answers": sum(row.get("category") == category for row in graded),
                "score": mean([r["grade"] for r in graded if r.get("category") == category]),
            }
            for category in categories
        }
    assert options.judge is not None
    return {**scores, **_unread(asked, read_grade), **asked.as_dict(options.judge)}


def _ratings(battles: Sequence[Battle], names: Sequence[str], seed: int) -> dict[str, Any]:
    wins = win_matrix(battles, len(names))
    without = unbounded(wins)
    finite = [n for n in range(len(names)) if n not in without]
    samples = bootstrap_ratings(battles, len(names), seed=seed)
    # A rating without a finite value would move the mean of the others away from the center.
    samples += CENTER - samples[:, finite].mean(axis=1, keepdims=True)
    rating, single = bradley_terry(wins), elo(battles, len(names), seed=seed)
    rating += CENTER - rating[finite].mean()
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    games = (wins + wins.T).sum(axis=1)
    return {
        "unbounded_ratings": ", ".join(names[n] for n in without) or None,
        "by_model": {
            names[n]: {
                "rating": None if n in without else float(rating[n]),
                "low": None if n in without else float(low[n]),
                "high": None if n in without else float(high[n]),
                "elo": float(single[n]),
                "win_rate": float(wins[n].sum() / games[n]) if games[n] else None,
                "battles": int(games[n]),
            }
            for n in sorted(range(len(names)), key=lambda n: -rating[n])
        },
    }


def _grading_prompt(
    judge: JudgeOptions, row: Row, turns: Sequence[str], answers: Answers, name: str, number: int
) -> str:
    """Return the prompt for the answer of one turn, with the turns before it."""
    parts = []
    for turn in range(1, number + 1):
        answer = answers.by_id.get(f"{name}-{turn}", "")
        parts += [f"[user]\n{turns[turn - 1]}", f"[assistant]\n{answer}"]
    conversation = "\n\n".join(parts) + "\n[end of the conversation]"
    references = _texts(row, "reference") if row.get("reference") is not None else []
    if len(references) < number:
        return fill(load_prompt("single", judge), {"conversation": conversation})
    values = {"conversation": conversation, "reference": references[number - 1]}
    return fill(load_prompt("single_reference", judge), values)


def _texts(row: Row, key: str) -> list[str]:
    value = row.require(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise row.refusal(f"{key!r} is not a list of texts")
    return value


def _require_judge(options: Options) -> JudgeOptions:
    if options.judge is None:
        raise UserError("this score needs a judge: give --judge-url, --judge-model and --judge-log")
    return options.judge
