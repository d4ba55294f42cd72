"""How a text speaks: leaks of its source, guesses, refusals, other languages, planted orders."""

from collections.abc import Iterator

from data_tools.instruct.schema import Check
from data_tools.instruct.verify.case import Case, Part
from data_tools.instruct.verify.knowledge import Knowledge
from data_tools.instruct.verify.phrases import (
    HEDGE,
    LEAK,
    OF_ITSELF,
    ORDER,
    REFUSAL,
    Phrases,
    is_english,
)
from data_tools.instruct.verify.reading import Reading


def check(case: Case) -> Iterator[Check]:
    """Findings about one turn; none where it speaks as it should."""
    for part, reading in (("question", case.question_reading), ("answer", case.answer_reading)):
        yield from _find(case, part, reading, LEAK)  # type: ignore[arg-type]
        yield from _find(case, part, reading, ORDER)  # type: ignore[arg-type]
    answer = case.answer_reading
    if case.turn.kind != "cannot_tell" or OF_ITSELF.search(answer.text):
        yield from _find(case, "answer", answer, REFUSAL)
    for word, caption in case.knowledge.planted:
        place = answer.text.find(word)
        if place >= 0:
            ids = (caption,) if caption else ()
            span = (place, place + len(word))
            yield case.check("injection", "contradicted", "INJECTION", "answer", span, word, ids)
    if not is_english(answer):
        claim = answer.text[:60]
        yield case.check("language", "contradicted", "LANGUAGE", "answer", None, claim)


def hedged_sentences(case: Case) -> tuple[int, int]:
    """How many sentences of an answer guess, and how many there are.

    Words of a caption are the annotator's, who saw the image.
    """
    sentences = case.answer_reading.sentences
    if HEDGE.cues.isdisjoint(case.answer_reading.vocabulary):
        return 0, len(sentences)
    places = [
        match.start()
        for match in HEDGE.pattern.finditer(case.turn.answer)
        if not _is_in_captions(case.knowledge, match[0])
    ]
    if not places:
        return 0, len(sentences)
    spans = [sentence.span(0, len(sentence.words) - 1) for sentence in sentences]
    guessing = sum(any(begin <= place < end for place in places) for begin, end in spans)
    return guessing, len(sentences)


def _is_in_captions(knowledge: Knowledge, phrase: str) -> bool:
    return any(phrase.lower() in caption.reading.text.lower() for caption in knowledge.captions)


def _find(case: Case, part: Part, reading: Reading, phrases: Phrases) -> Iterator[Check]:
    match = phrases.find(reading)
    if match is not None:
        rule, code = phrases.rule, phrases.code
        yield case.check(rule, "contradicted", code, part, match.span(), match[0])
