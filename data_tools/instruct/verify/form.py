"""How a sample is built: turns, lengths, repetitions, marks, questions that answer themselves."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from data_tools import wording
from data_tools.instruct.schema import Check, SampleType, Shown, Turn, Verdict
from data_tools.instruct.verify.case import Case
from data_tools.instruct.verify.grammar import word_set
from data_tools.instruct.verify.manner import HEDGE, hedged_sentences
from data_tools.instruct.verify.numbers import number_of

TOLERANT: Final = 12
"""One sentence that guesses is accepted next to others, or where it has this many words, which
leave room for a reason."""
BARE: Final = 5
"""A verdict of no more words than this that guesses is a guess and nothing else."""
OPENING: Final = 16
"""A description that guesses within this many characters (`It looks like a ...`) guesses as a
whole."""
LONG_ANSWER: Final = 5
"""Answers of more words than this are not to be repeated."""


def check_sample(cases: Sequence[Case], sample_type: SampleType) -> Iterator[Check]:
    """Yield findings about the sample as a whole; `cases` are its turns."""
    config = cases[0].config if cases else None
    if config is not None:
        least, most = config.forms[sample_type].turns
        if not least <= len(cases) <= most:
            yield _whole("TURN_COUNT", f"{len(cases)} turns, {least} to {most} expected")
    yield from _repeated(cases)
    yield from _all_yes(cases, sample_type)
    yield from _hedged(cases, sample_type)


def check_turn(case: Case) -> Iterator[Check]:
    """Yield findings about the form of one turn."""
    config, turn = case.config, case.turn
    for part, reading in (("question", case.question_reading), ("answer", case.answer_reading)):
        if not reading.spoken:
            yield _fault(case, "TURN_EMPTY", part, f"the {part} has no words")
        if _MARKS.isdisjoint(reading.vocabulary):
            continue  # most texts
        for code, pattern in (("IMAGE_MARK", _IMAGE), ("ROLE_MARK", _ROLE)):
            match = pattern.search(reading.text)
            if match:
                yield _fault(case, code, part, match[0].strip(), match.span())
    least, most = config.forms[case.sample_type].answer_words
    asked, answered = len(case.question_reading.spoken), len(case.answer_reading.spoken)
    if 0 < answered < least:
        yield _fault(case, "TOO_SHORT", "answer", f"{answered} words, at least {least} expected")
    if answered > most:
        yield _fault(case, "TOO_LONG", "answer", f"{answered} words, at most {most} expected")
    if asked > config.max_question_words:
        limit = config.max_question_words
        yield _fault(case, "TOO_LONG", "question", f"{asked} words, at most {limit} expected")
    if asked and case.sample_type != "detail" and not case.question.asked.is_request:
        yield _fault(case, "NOT_A_QUESTION", "question", turn.question[:60])
    given = _given_away(case)
    if given:
        yield _fault(case, "GIVEN_AWAY", "question", given)
    if _is_of_another_question(case):
        yield _fault(case, "ANSWER_MISMATCH", "answer", turn.answer[:60])


def _is_of_another_question(case: Case) -> bool:
    """Return whether a bare yes or no follows a question that asks for more.

    This is what is left where an answer and the next question got lost.
    """
    answer, asked = case.answer_reading.spoken, case.question_reading.spoken
    return (
        len(answer) == 1
        and answer[0] in ("yes", "no")
        and case.question.kind in ("open", "how_many")
        and len(asked) > 1
        and asked[0] in _OPEN
        and asked[1] not in ("about", "if")
        and "," not in case.turn.question  # `What is it, a dog?`
    )


def _given_away(case: Case) -> str | None:
    """Return the answer where the question has it: a short one's words, the number or color."""
    question = case.question
    if question.kind != "open" and question.kind != "how_many":
        return None
    words = case.question_reading.words
    if "or" in words or question.sentence is None:
        return None
    if question.kind == "how_many":
        value = question.number
        counted = question.counted
        if value is None or counted is None or value < 2:
            return None
        return next((word for word in words if number_of(word) == value), None)
    content = case.answer_reading.spoken
    informative = [word for word in content if word not in _EMPTY_WORDS]
    if informative and len(content) <= 4 and all(word in words for word in informative):
        return " ".join(informative)
    if "colour" in words or "color" in words:
        colours = case.answer_reading.vocabulary & _colours() & case.question_reading.vocabulary
        return min(colours) if colours else None
    return None


def _colours() -> frozenset[str]:
    return frozenset(wording.load("claims")["colours"])


def _repeated(cases: Sequence[Case]) -> Iterator[Check]:
    questions: set[str] = set()
    answers: set[str] = set()
    for case in cases:
        question = " ".join(case.question_reading.spoken)
        answer = " ".join(case.answer_reading.spoken)
        if question and question in questions:
            yield _fault(case, "TURN_REPEATED", "question", case.turn.question[:60])
        elif answer in answers and answer.count(" ") >= LONG_ANSWER:
            yield _fault(case, "TURN_REPEATED", "answer", case.turn.answer[:60])
        questions.add(question)
        answers.add(answer)


def _all_yes(cases: Sequence[Case], sample_type: SampleType) -> Iterator[Check]:
    if sample_type != "conversation" or not cases:
        return
    polarities = [
        case.question.polarity for case in cases if case.question.kind in ("existence", "yes_no")
    ]
    answered = [polarity for polarity in polarities if polarity is not None]
    if len(answered) >= cases[0].config.all_yes_from and set(answered) == {"yes"}:
        yield _whole("ALL_YES", f"{len(answered)} yes/no questions, every answer is yes")


def _hedged(cases: Sequence[Case], sample_type: SampleType) -> Iterator[Check]:
    if sample_type == "reasoning" or not cases:
        return
    may_not_guess = [
        case
        for case in cases
        if case.turn.kind != "cannot_tell" and not _wants_guess(case.question_reading.words)
    ]
    counts = [hedged_sentences(case) for case in may_not_guess]
    guessing, total = sum(n for n, _ in counts), sum(n for _, n in counts)
    if not guessing:
        return
    most = cases[0].config.max_hedged * total
    opens = HEDGE.pattern.search(cases[0].turn.answer, 0, OPENING) is not None
    long = total > 1 or len(cases) > 1 or len(cases[0].answer_reading.spoken) >= TOLERANT
    if most > 0 and long and not (opens and sample_type == "detail"):
        most = max(most, 2 if len(cases) > 2 else 1)
    pairs = zip(may_not_guess, counts, strict=True)
    if guessing > most or any(number and _is_bare_verdict(case) for case, (number, _) in pairs):
        yield Check(
            rule="hedge", verdict="contradicted", code="HEDGED", turn=None, part=None, span=None,
            claim=f"{guessing} of {total} sentences guess", evidence=(),
        )  # fmt: skip


def _is_bare_verdict(case: Case) -> bool:
    """Return whether an answer is a verdict or number and nothing else: `Maybe yes.`"""
    return len(case.answer_reading.spoken) <= BARE and case.question.kind != "open"


def _wants_guess(question: Sequence[str]) -> bool:
    """Return whether a question invites a guess: `What might it be?`, `What are they for?`"""
    return not _INVITES.isdisjoint(question) or question[-2:] == ["for", "?"]


def _fault(
    case: Case, code: str, part: str, claim: str, span: tuple[int, int] | None = None
) -> Check:
    return case.check("form", "contradicted", code, part, span, claim)  # type: ignore[arg-type]


def _whole(code: str, claim: str) -> Check:
    return Check(
        rule="form", verdict="contradicted", code=code, turn=None, part=None, span=None,
        claim=claim, evidence=(),
    )  # fmt: skip


def check_citations(turn: Turn, index: int, shown: Shown) -> Iterator[Check]:
    """Yield a finding for the labels of a turn: all known, some unknown, or none given.

    Rules and people cite nothing, which is noted and rejects nothing.
    """
    if not turn.evidence:
        yield _citation("unknown", None, index, "cites nothing", ())
        return
    resolved = {label: resolve(label, shown) for label in turn.evidence}
    unknown = [label for label, number in resolved.items() if number is None]
    if unknown:
        known = f"c1 to c{len(shown.captions)}, b1 to b{len(shown.boxes)}"
        claim = f"cites {', '.join(unknown[:3])}; shown were {known}"
        yield _citation("contradicted", "LABEL_UNKNOWN", index, claim, ())
        return
    ids = tuple(number for number in resolved.values() if number)
    yield _citation("supported", None, index, ", ".join(turn.evidence), ids)


def resolve(label: str, shown: Shown) -> int | None:
    """Return the annotation id of `c2` or `b1`; None for a label that was not given."""
    of = {"c": shown.captions, "b": shown.boxes}.get(label[:1])
    digits = label[1:]
    if (
        of is None
        or not digits.isascii()
        or not digits.isdigit()
        or digits.startswith("0")
        or len(digits) > 9
    ):
        return None
    return of[int(digits) - 1] if int(digits) <= len(of) else None


def _citation(
    verdict: Verdict, code: str | None, index: int, claim: str, ids: tuple[int, ...]
) -> Check:
    return Check(
        rule="citation", verdict=verdict, code=code, turn=index, part="answer", span=None,
        claim=claim, evidence=ids,
    )  # fmt: skip


_INVITES: Final = word_set(
    "might may likely could would probably possibly suggest suggests indicate indicates infer "
    "inferred why think guess imagine possible seem appear"
)
"""Words of questions that want a guess."""
_MARKS: Final = frozenset("<[:#=`")
_IMAGE: Final = re.compile(r"<\s*/?\s*(?:image|img|picture|video)[^>]{0,20}>", re.IGNORECASE)
_ROLE: Final = re.compile(
    r"(?:^|\n)\s*(?:human|user|assistant|system|gpt|question|answer|q|a)\s*:|<\|[^|>]{1,30}\|>|</?s>|"
    r"\[/?INST\]|^#{2,}|\n===|```",
    re.IGNORECASE,
)
_OPEN: Final = word_set("what which who where when how describe name list explain")
_EMPTY_WORDS: Final = word_set("the a an is are it its this that there of in on at to and")
