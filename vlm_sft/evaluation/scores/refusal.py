"""Score whether a model refuses the questions that it cannot answer, and only those."""

import re
from collections.abc import Sequence
from typing import Any, Final, Literal

from vlm_sft.evaluation.intervals import interval_of_shares
from vlm_sft.evaluation.scores.files import Answers, Row, match, unique_ids
from vlm_sft.evaluation.scores.results import Options, Results, image_of, question_row

Stance = Literal["refuses", "denies", "answers", "empty"]

_CANNOT: Final = (
    r"(?:can(?:no|')t|cannot|can not|could(?: not|n't)|unable to|not able to|not possible to)"
)
_VERBS: Final = (
    "(?:tell|see|say|know|answer|determine|identify|view|assist|help|provide|make out|infer|"
    "confirm|verify)"
)
_REFUSAL: Final = re.compile(
    rf"(?:^|[.,;] |\b(?:i|we|you|one|sorry|it's|it is|that|but|i'm|i am|is|am|are) )"
    rf"{_CANNOT}(?: \w+)? {_VERBS}\b"
    rf"|\b{_CANNOT}(?: \w+)? be (?:determined|seen|answered|told|known|identified)\b"
    r"|\b(?:i|we) (?:do not|don't) (?:know|see (?:an?|any|the) image|have (?:enough|access))\b"
    r"|\b(?:not|isn't|is not) (?:enough|sufficient) information\b|\binsufficient information\b"
    r"|\b(?:i am|i'm) (?:sorry|not sure|unable|not certain)\b|\bunanswerable\b"
    r"|\bno way to (?:tell|know)\b|\bimpossible to (?:tell|say|know|determine|answer)\b"
    r"|\b(?:it is|it's|is) (?:unclear|unknown|not (?:clear|known|visible|shown|specified|stated))\b"
    r"|\bnot (?:visible|shown) in the (?:image|picture|photo)\b|\bas an ai\b",
    re.IGNORECASE,
)
_DENIAL: Final = re.compile(
    r"\bthere (?:is|are|was|were) (?:no|not|none)\b|\bthere (?:isn't|aren't)\b"
    r"|\bdoes(?: not|n't) (?:show|contain|have|include|appear)\b|\bno such\b"
    r"|\b(?:image|picture|photo) (?:has|shows|contains) no\b",
    re.IGNORECASE,
)


def stance_of(answer: str) -> Stance:
    """Return whether an answer refuses, denies what the question presumes, or answers.

    `refuses`: it says that it cannot tell. `denies`: it says that something is not there.
    """
    text = " ".join(answer.replace("’", "'").split())
    if not text:
        return "empty"
    if _REFUSAL.search(text):
        return "refuses"
    return "denies" if _DENIAL.search(text) else "answers"


def score_refusal(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return over-refusal, wrong confidence and accuracy, in all and by image condition.

    `over_refusal` is the share of answerable questions that are refused or get an empty answer,
    `wrong_confidence` the share of unanswerable ones that are answered as if they had an answer.
    A denial ("There is no dog.") is right for an unanswerable question and no refusal of an
    answerable one. Whether the answer to an answerable question is right is not judged here.

    Args:
        answers: Texts by question id.
        truth: Rows with `answerable` (true or false) and optionally `image` and `condition` (what
            was done to the image: `own`, `blank`, `shuffled`, ...).
        options: Seed of the bootstrap.

    Raises:
        UserError: A row does not say whether it is answerable.
    """
    questions = unique_ids(truth, "question_id", "id")
    answerable = {name: _is_answerable(row) for name, row in questions.items()}
    coverage = match(answers, list(questions))
    rows = []
    for name, row in questions.items():
        stance = stance_of(answers.by_id.get(name, ""))
        right = stance in (("answers", "denies") if answerable[name] else ("refuses", "denies"))
        condition = row.get("condition")
        rows.append(
            question_row(
                name, row, answers, right, stance=stance, answerable=answerable[name],
                condition="own" if condition is None else str(condition),
            )
        )  # fmt: skip
    images = [image_of(name, row) for name, row in questions.items()]
    scores: dict[str, Any] = {"kind": "refusal", **coverage.as_dict()}
    scores |= _figures(rows, images, options.seed)
    conditions = list(dict.fromkeys(row["condition"] for row in rows))
    if len(conditions) > 1:
        scores["by_condition"] = {}
        for condition in conditions:
            kept = [n for n, row in enumerate(rows) if row["condition"] == condition]
            found = _figures([rows[n] for n in kept], [images[n] for n in kept], options.seed)
            scores["by_condition"][condition] = {
                key: value for key, value in found.items() if not key.endswith("_interval")
            }
    return Results(scores, rows)


def _figures(rows: Sequence[dict[str, Any]], images: Sequence[str], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "answerable": sum(row["answerable"] for row in rows),
        "unanswerable": sum(not row["answerable"] for row in rows),
    }
    for name, group in (("over_refusal", True), ("wrong_confidence", False)):
        wrong = [row["score"] == 0.0 for row in rows if row["answerable"] is group]
        clusters = [i for row, i in zip(rows, images, strict=True) if row["answerable"] is group]
        if not wrong:
            found[name] = None
            continue
        share = interval_of_shares(wrong, clusters, seed=seed)
        found[name], found[f"{name}_interval"] = share.estimate, [share.low, share.high]
    for stance in ("refuses", "denies", "empty"):
        found[stance] = sum(row["stance"] == stance for row in rows)
    return found


def _is_answerable(row: Row) -> bool:
    value = row.get("answerable")
    if not isinstance(value, bool):
        raise row.refusal(f"'answerable' is {value!r}, expected true or false")
    return value
