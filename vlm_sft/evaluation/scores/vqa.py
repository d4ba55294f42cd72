"""Score short answers against ten human answers, as VQAv2's evaluation code does.

The normalization, with its quirks, is that of VQA's `vqaEval.py` (github.com/GT-Vision-Lab/VQA).
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from vlm_sft.evaluation.intervals import cluster_bootstrap_interval
from vlm_sft.evaluation.scores.files import Answers, Row, match, unique_ids
from vlm_sft.evaluation.scores.results import Options, Results, image_of, question_row

_PUNCTUATION: Final = (
    ";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",",
    "?", "!",
)  # fmt: skip
_COMMA_IN_NUMBER: Final = re.compile(r"\d,\d")
_PERIOD: Final = re.compile(r"\.(?!\d)")
_MAX_PERIODS: Final = 32
"""VQA's code passes `re.UNICODE` (32) as the number of replacements."""

_ARTICLES: Final = ("a", "an", "the")
_DIGITS: Final = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}

_CONTRACTIONS: Final = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't",
    "don't", "hadn't", "hadn't've", "hasn't", "haven't", "he'd've", "he's", "how'd", "how'll",
    "how's", "isn't", "it'd", "it'd've", "it'll", "ma'am", "mightn't", "mightn't've",
    "might've", "mustn't", "must've", "needn't", "not've", "o'clock", "oughtn't", "shan't",
    "she'd've", "should've", "shouldn't", "shouldn't've", "somebody'd've",
    "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's",
    "something'd", "something'd've", "something'll", "that's", "there'd", "there'd've", "there're",
    "there's", "they'd", "they'd've", "they'll", "they're", "they've", "'twas", "'ow's'at", "he'd",
    "wasn't",
    "we'd've", "we've", "weren't", "what'll", "what're", "what's", "what've", "when's", "where'd",
    "where's", "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll", "why're",
    "why's", "won't", "would've", "wouldn't", "wouldn't've", "y'all", "y'all'll", "y'all'd've",
    "you'd", "you'd've", "you'll", "you're", "you've",
)  # fmt: skip


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_EXPANDED: Final = {
    text: word for word in _CONTRACTIONS for text in _without_one_apostrophe(word)
} | {"somebody'd": "somebodyd"}  # sic
"""Contractions that lack an apostrophe, e.g. `dont`, and what they become."""


def remove_punctuation(text: str) -> str:
    """Remove punctuation next to a space or in text with `1,000`; replace the rest by spaces."""
    result = text
    for mark in _PUNCTUATION:
        next_to_space = f"{mark} " in text or f" {mark}" in text
        removed = next_to_space or _COMMA_IN_NUMBER.search(text) is not None
        result = result.replace(mark, "" if removed else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def unify_words(text: str) -> str:
    """Lower the case, write number words as digits, drop articles, complete contractions."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_EXPANDED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, humans: Sequence[str]) -> float:
    """Return the mean over the annotators of min(1, equal answers of the others / 3).

    The answer and the human answers are normalized only if the human answers differ, as in VQA's
    code.

    Args:
        answer: The answer.
        humans: The human answers, usually ten.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    truths = [human.replace("\n", " ").replace("\t", " ").strip() for human in humans]
    if len(set(truths)) > 1:
        truths = [remove_punctuation(truth) for truth in truths]
        answer = unify_words(remove_punctuation(answer))
    equal = [truth == answer for truth in truths]
    return sum(min(1.0, (sum(equal) - own) / 3) for own in equal) / len(truths)


def score_vqa(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return VQA accuracy over all questions, and by type of answer and question.

    Args:
        answers: Answers by question id.
        truth: Rows of VQAv2's annotation files: `question_id`, `answers` (texts, or objects with
            `answer`), and optionally `image_id`, `answer_type` and `question_type`.
        options: Seed of the bootstrap.

    Raises:
        UserError: A row has no human answers, or no answer belongs to a question.
    """
    questions = unique_ids(truth, "question_id", "id")
    coverage = match(answers, list(questions))
    scores = {
        name: vqa_accuracy(answers.by_id.get(name, ""), _humans(row))
        if name in answers.by_id
        else 0.0
        for name, row in questions.items()
    }
    images = [image_of(name, row) for name, row in questions.items()]
    interval = cluster_bootstrap_interval(list(scores.values()), images, seed=options.seed)
    result: dict[str, Any] = {
        "kind": "vqa",
        **coverage.as_dict(),
        "accuracy": interval.estimate,
        "accuracy_interval": [interval.low, interval.high],
    }
    for key in ("answer_type", "question_type"):
        groups: dict[str, list[float]] = {}
        for name, row in questions.items():
            if (group := row.get(key)) is not None:
                groups.setdefault(str(group), []).append(scores[name])
        if groups:
            result[f"by_{key}"] = {
                group: {"questions": len(values), "accuracy": sum(values) / len(values)}
                for group, values in sorted(groups.items())
            }
    rows = [question_row(name, row, answers, scores[name]) for name, row in questions.items()]
    return Results(result, rows)


def _humans(row: Row) -> list[str]:
    values = row.require("answers")
    if not isinstance(values, list) or not values:
        raise row.refusal("'answers' is not a list of human answers")
    if len(values) < 2:
        raise row.refusal("one human answer is too few for VQA accuracy; use the kind gqa")
    return [
        Row(row.place, value if isinstance(value, dict) else {"answer": value}).text("answer")
        for value in values
    ]
