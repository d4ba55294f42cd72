"""Score answers that are right or wrong: short text (GQA), multiple choice, counts, boxes."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from vlm_sft.evaluation.intervals import interval_of_shares
from vlm_sft.evaluation.scores.files import Answers, Row, match, unique_ids
from vlm_sft.evaluation.scores.results import (
    Options,
    Results,
    Verdict,
    image_of,
    mean,
    question_row,
)

_NUMBER_WORDS: Final = dict(
    zero=0, one=1, two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10,
    eleven=11, twelve=12, thirteen=13, fourteen=14, fifteen=15, sixteen=16, seventeen=17,
    eighteen=18, nineteen=19, twenty=20, no=0, none=0,
)  # fmt: skip

_LETTER: Final = re.compile(
    r"^\s*(?:the\s+)?(?:(?:correct|best|right)\s+)?(?:answer|option|choice)?\s*(?:is|:)?\s*"
    r"[(\[]?([A-Z])[)\].:,]?(?=\s|$)",
    re.IGNORECASE,
)
_BOX: Final = re.compile(
    r"[\[(]\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*[\])]"
)
_INTEGER: Final = re.compile(r"\d{1,9}")

_TENS: Final = {
    name: 10 * number
    for number, name in enumerate(
        ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], 2
    )
}
_MULTIPLES: Final = ("hundred", "hundreds", "thousand", "thousands", "million", "millions", "dozen")

Box = tuple[float, float, float, float]


def score_gqa(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return the share of answers that equal the true one, without case and final period (GQA)."""
    questions = unique_ids(truth, "question_id", "id")
    return _report(
        "gqa",
        answers,
        questions,
        lambda answer, row: plain(answer) == plain(row.text("answer", "label")),
        options,
    )


def score_multiple_choice(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return accuracy of letters or option texts, and how often each position was chosen.

    Truth rows have `answer` (a letter, an option's text, or its number from 0) and `choices`. If a
    model's answers shift toward a position while the true ones do not, it has a position bias.

    Raises:
        UserError: A row has no choices, or its answer is not one of them.
    """
    questions = unique_ids(truth, "question_id", "id")
    choices = {name: choices_of(row) for name, row in questions.items()}
    right = {name: true_choice(row, choices[name]) for name, row in questions.items()}
    chosen = {
        name: read_choice(answers.by_id[name], choices[name], options.verdict)
        for name in questions
        if name in answers.by_id
    }
    found = _report(
        "multiple_choice",
        answers,
        questions,
        lambda answer, row: (
            read_choice(answer, choices_of(row), options.verdict)
            == true_choice(row, choices_of(row))
        ),
        options,
    )
    for result in found.rows:
        result["chosen"] = _letter(chosen.get(result["id"]))
        result["true"] = _letter(right[result["id"]])
    longest = max(map(len, choices.values()))
    letters = [str(_letter(number)) for number in range(longest)]
    said, true = Counter(chosen.values()), Counter(right.values())
    positions = {
        "unclear": said[None],
        "chosen": {letter: said[number] for number, letter in enumerate(letters)},
        "true": {letter: true[number] for number, letter in enumerate(letters)},
    }
    return Results(found.scores | positions, found.rows)


def read_choice(answer: str, choices: Sequence[str], verdict: Verdict = "first") -> int | None:
    """Return the number of the option that an answer chooses, or None if it is unclear.

    A letter at the start decides (`B`, `(b)`, `The answer is B.`), then the option whose text is
    the answer, then the only option whose text occurs in it. With `last`, the option decides whose
    text occurs last, if there is one.
    """
    said = plain(answer)
    for number, choice in enumerate(choices):
        if said == plain(choice):
            return number
    if verdict == "last" and (last := _last_option(said, choices)) is not None:
        return last
    if (found := _LETTER.match(answer)) is not None:
        number = ord(found[1].upper()) - ord("A")
        # "A dog" begins with an article, not with a letter.
        is_article = found[1] in "Aa" and answer.strip()[1:2] == " "
        if number < len(choices) and not is_article:
            return number
    inside = [
        number
        for number, choice in enumerate(choices)
        if re.search(rf"\b{re.escape(plain(choice))}\b", said)
    ]
    return inside[0] if len(inside) == 1 else None


def _last_option(answer: str, choices: Sequence[str]) -> int | None:
    """Return the option whose text ends last in an answer; the longest of those that do."""
    ends: list[tuple[int, int, int]] = []
    for number, choice in enumerate(choices):
        text = plain(choice)
        for found in re.finditer(rf"\b{re.escape(text)}\b", answer):
            ends.append((found.end(), len(text), number))
    return max(ends)[2] if ends else None


def score_counting(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return the share of exact counts, and the mean absolute error of the answers with a number.

    Raises:
        UserError: A true answer is not a number.
    """
    questions = unique_ids(truth, "question_id", "id")
    counts: dict[str, int] = {}
    for name, row in questions.items():
        if (count := read_count(row.text("answer", "label", "count"))) is None:
            raise row.refusal("the true answer is not a count")
        counts[name] = count
    found = _report(
        "counting",
        answers,
        questions,
        lambda answer, row: (
            read_count(answer, options.verdict) == read_count(row.text("answer", "label", "count"))
        ),
        options,
    )
    said = {
        name: read_count(answers.by_id[name], options.verdict)
        for name in questions
        if name in answers.by_id
    }
    for result in found.rows:
        result["count"], result["true"] = said.get(result["id"]), counts[result["id"]]
    errors = [abs(count - counts[name]) for name, count in said.items() if count is not None]
    signed = [count - counts[name] for name, count in said.items() if count is not None]
    more = {
        "without_number": sum(count is None for count in said.values()),
        "mean_absolute_error": mean(errors),
        "mean_error": mean(signed),
        "within_one": sum(error <= 1 for error in errors) / len(questions),
    }
    return Results(found.scores | more, found.rows)


def read_count(answer: str, verdict: Verdict = "first") -> int | None:
    """Return the first or last number of an answer, in digits or as a word below one hundred.

    Numbers that are not counts (`3.5`, more than nine digits) are not read. The result is None if
    there is no number, or if the one that counts is a longer number word (`one hundred`).
    """
    words = re.findall(r"[a-z]+|[\d.]+", answer.lower().replace(",", ""))
    found: list[int | None] = []
    position = 0
    while position < len(words):
        word, following = words[position], "".join(words[position + 1 : position + 2])
        position += 1
        count = _TENS.get(word, _NUMBER_WORDS.get(word))
        if count is None and _INTEGER.fullmatch(word.rstrip(".")):
            count = int(word.rstrip("."))
        if count is None:
            continue
        if following in _MULTIPLES:
            found.append(None)
        elif word in _TENS and 0 < _NUMBER_WORDS.get(following, 0) < 10:
            found.append(count + _NUMBER_WORDS[following])
            position += 1
        else:
            found.append(count)
    if not found:
        return None
    return found[0 if verdict == "first" else -1]


def read_whole_count(text: str) -> int | None:
    """Return the count that a text consists of, in digits or as a word; None if it is other text.

    Times, dates, fractions, ordinals, negative numbers and decimals are no counts.
    """
    text = text.strip().rstrip(" .").lower()
    if re.fullmatch(r"\d{1,9}|\d{1,3}(,\d{3}){1,2}", text):
        return int(text.replace(",", ""))
    tens, *ones = re.split(r"[-\s]+", text)
    if not ones:
        return _TENS.get(text, _NUMBER_WORDS.get(text))
    if len(ones) == 1 and tens in _TENS and 0 < _NUMBER_WORDS.get(ones[0], 0) < 10:
        return _TENS[tens] + _NUMBER_WORDS[ones[0]]
    return None


def score_grounding(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return the share of boxes with an IoU of at least `options.iou`, and the mean IoU.

    Boxes are `[left, top, right, bottom]` in the units of the truth; `bbox` in a truth row is
    COCO's `[left, top, width, height]`. The first box in an answer counts.

    Raises:
        UserError: A truth row has no box.
    """
    questions = unique_ids(truth, "question_id", "id")
    boxes = {name: _true_box(row) for name, row in questions.items()}
    said = {name: read_box(answers.by_id[name]) for name in questions if name in answers.by_id}
    overlaps = {name: _iou(said.get(name), box) for name, box in boxes.items()}
    found = _report(
        "grounding",
        answers,
        questions,
        lambda answer, row: _iou(read_box(answer), _true_box(row)) >= options.iou,
        options,
    )
    for result in found.rows:
        result["iou"], result["true"] = overlaps[result["id"]], boxes[result["id"]]
    more = {
        "threshold": options.iou,
        "mean_iou": sum(overlaps.values()) / len(overlaps),
        "without_box": sum(box is None for box in said.values()),
    }
    return Results(found.scores | more, found.rows)


def read_box(answer: str) -> Box | None:
    """Return the first `[left, top, right, bottom]` in a text, or None."""
    for found in _BOX.finditer(answer):
        try:
            left, top, right, bottom = (float(number) for number in found.groups())
        except ValueError:
            continue
        return left, top, right, bottom
    return None


def _report(
    kind: str,
    answers: Answers,
    questions: dict[str, Row],
    is_right: Callable[[str, Row], bool],
    options: Options,
) -> Results:
    coverage = match(answers, list(questions))
    correct = [
        name in answers.by_id and is_right(answers.by_id[name], row)
        for name, row in questions.items()
    ]
    images = [image_of(name, row) for name, row in questions.items()]
    accuracy = interval_of_shares(correct, images, seed=options.seed)
    result: dict[str, Any] = {
        "kind": kind,
        **coverage.as_dict(),
        "accuracy": accuracy.estimate,
        "accuracy_interval": [accuracy.low, accuracy.high],
    }
    groups: dict[str, list[bool]] = {}
    for row, right in zip(questions.values(), correct, strict=True):
        if (group := row.get("category", "type")) is not None:
            groups.setdefault(str(group), []).append(right)
    if groups:
        result["by_category"] = {
            group: {"questions": len(values), "accuracy": sum(values) / len(values)}
            for group, values in sorted(groups.items())
        }
    rows = [
        question_row(name, row, answers, right)
        for (name, row), right in zip(questions.items(), correct, strict=True)
    ]
    return Results(result, rows)


def _letter(number: int | None) -> str | None:
    return None if number is None else chr(ord("A") + number)


def plain(text: str) -> str:
    """Return a short answer in lower case, without final period and doubled spaces."""
    return " ".join(text.lower().split()).rstrip(" .")


def choices_of(row: Row) -> list[str]:
    """Return the options of a question; refuse a row without any."""
    found = row.require("choices", "options")
    if isinstance(found, dict):
        found = [found[key] for key in sorted(found)]
    if not isinstance(found, list) or not found or len(found) > 26:
        raise row.refusal("'choices' is not a list of 1 to 26 options")
    return [str(choice) for choice in found]


def true_choice(row: Row, choices: Sequence[str]) -> int:
    """Return the number of the true option; refuse a row whose answer is none of them."""
    answer = row.text("answer", "label")
    if isinstance(row.require("answer", "label"), int):
        number = int(answer)
        if not 0 <= number < len(choices):
            raise row.refusal(f"the answer {number} is not one of the {len(choices)} choices")
        return number
    for number, choice in enumerate(choices):
        if plain(answer) == plain(choice):
            return number
    if len(answer.strip()) == 1 and answer.strip().isalpha():
        number = ord(answer.strip().upper()) - ord("A")
    else:
        number = int(answer) if answer.strip().isdigit() else -1
    if not 0 <= number < len(choices):
        raise row.refusal(f"the answer {answer!r} is not one of the {len(choices)} choices")
    return number


def _true_box(row: Row) -> Box:
    values: Any = row.require("box", "bbox", "answer")
    if isinstance(values, str):
        try:
            values = json.loads(values)
        except ValueError:
            raise row.refusal("the true answer is not a box [left, top, right, bottom]") from None
    numbers = values if isinstance(values, list) else []
    if len(numbers) != 4 or not all(isinstance(n, int | float) for n in numbers):
        raise row.refusal("the box does not have four numbers")
    left, top, right, bottom = map(float, numbers)
    if "box" not in row.values and "bbox" in row.values:
        right, bottom = left + right, top + bottom
    if not (left < right and top < bottom):
        raise row.refusal(f"the box {numbers} has no area; expected left < right and top < bottom")
    return left, top, right, bottom


def _iou(first: Box | None, second: Box) -> float:
    if first is None:
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1]) for b in (first, second)]
    union = sum(areas) - shared
    return shared / union if union > 0 else 0.0
