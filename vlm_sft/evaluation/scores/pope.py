"""Score yes/no answers about the existence of objects, as POPE does (arXiv 2305.10355)."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from vlm_sft.errors import UserError
from vlm_sft.evaluation.intervals import interval_of_shares
from vlm_sft.evaluation.scores.files import Answers, Row, match, unique_ids
from vlm_sft.evaluation.scores.results import Options, Results, image_of, question_row
from vlm_sft.evaluation.scores.vqa import remove_punctuation

Verdict = Literal["yes", "no", "unclear"]

_WORD: Final = re.compile(r"[a-z]+")


def strict(answer: str) -> Verdict:
    """Read an answer that is exactly `yes` or `no`, without regard to case (as lmms-eval does)."""
    text = answer.strip().lower()
    return "yes" if text == "yes" else "no" if text == "no" else "unclear"


def first_word(answer: str) -> Verdict:
    """Read the first word."""
    return _verdict(_WORD.findall(answer.lower())[:1])


def verdict_last(answer: str) -> Verdict:
    """Read the last `yes` or `no`, for answers that name evidence before the verdict."""
    return _verdict([word for word in _WORD.findall(answer.lower()) if word in ("yes", "no")][-1:])


def one_verdict(answer: str) -> Verdict:
    """Read an answer that has exactly one of the words `yes` and `no`, as VLMEvalKit does."""
    words = set(remove_punctuation(answer.lower()).split()) & {"yes", "no"}
    return _verdict(sorted(words))


def pope_official(answer: str) -> Verdict:
    """Read an answer as POPE's own code does: `no` or `not` in the first sentence, otherwise yes.

    Every answer that is unclear becomes a yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


READINGS: Final[Mapping[str, Callable[[str], Verdict]]] = {
    "strict": strict,
    "first_word": first_word,
    "verdict_last": verdict_last,
    "one_verdict": one_verdict,
    "pope_official": pope_official,
}
"""Ways to read a verdict; results differ, so all of them are reported."""


def score_pope(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return accuracy, precision, recall, F1 and the share of yes under each reading.

    `yes` is the positive class. An unclear or missing answer is wrong and not a yes; with
    `pope_official`, an unclear answer is a yes.

    Args:
        answers: Texts by question id.
        truth: Rows with `label` (or `answer`), and optionally `image` and `category`.
        options: Seed of the bootstrap, and the reading that decides the rows.

    Raises:
        UserError: A label is neither yes nor no, or no answer belongs to a question.
    """
    questions = unique_ids(truth, "question_id", "id")
    labels = {name: _label(row) for name, row in questions.items()}
    coverage = match(answers, list(questions))
    images = [image_of(name, row) for name, row in questions.items()]
    verdicts: dict[str, list[Verdict]] = {
        reading: [
            read(answers.by_id[name]) if name in answers.by_id else "unclear" for name in questions
        ]
        for reading, read in READINGS.items()
    }
    readings = {
        reading: binary_scores(said, list(labels.values()), images, seed=options.seed)
        for reading, said in verdicts.items()
    }
    rows = [
        question_row(
            name, row, answers, verdict == labels[name], verdict=verdict, label=labels[name]
        )
        for (name, row), verdict in zip(questions.items(), verdicts[options.reading], strict=True)
    ]
    return Results({"kind": "pope", **coverage.as_dict(), "readings": readings}, rows)


def binary_scores(
    verdicts: Sequence[str], labels: Sequence[str], images: Sequence[str], *, seed: int
) -> dict[str, Any]:
    """Return the scores of verdicts against labels, `yes` being the positive class."""
    pairs = list(zip(verdicts, labels, strict=True))
    hits = sum(pair == ("yes", "yes") for pair in pairs)
    said_yes, are_yes = verdicts.count("yes"), labels.count("yes")
    precision = hits / said_yes if said_yes else 0.0
    recall = hits / are_yes if are_yes else 0.0
    correct = [verdict == label for verdict, label in pairs]
    accuracy = interval_of_shares(correct, images, seed=seed)
    return {
        "accuracy": accuracy.estimate,
        "accuracy_interval": [accuracy.low, accuracy.high],
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_share": said_yes / len(pairs),
        "label_yes_share": are_yes / len(pairs),
        "unclear": verdicts.count("unclear"),
    }


def _label(row: Row) -> str:
    label = row.text("label", "answer").strip().lower()
    if label not in ("yes", "no"):
        raise UserError(
            f"{row.place}: the label is {label!r}, expected 'yes' or 'no'",
            code="data_file_unreadable",
        )
    return label


def _verdict(words: Sequence[str]) -> Verdict:
    return "yes" if words == ["yes"] else "no" if words == ["no"] else "unclear"
