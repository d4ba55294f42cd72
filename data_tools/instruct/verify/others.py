"""Things outside the annotated categories: supported by captions, or unknown."""

from collections.abc import Iterator
from typing import Final

from data_tools.instruct.schema import Check
from data_tools.instruct.verify.case import Case
from data_tools.instruct.verify.describing import attribute_words, noun_name, parts
from data_tools.instruct.verify.flags import INTRODUCES
from data_tools.instruct.verify.grammar import (
    FUNCTION_WORDS,
    is_plural,
    last_of_phrase,
    word_set,
)

SHOWN: Final = 5
"""At most this many things are named in the finding."""


def check(case: Case) -> Iterator[Check]:
    """Yield one finding for what neither categories nor captions know; none if there is nothing.

    It never rejects: boxes cannot refute what nobody was asked to box.
    """
    known = case.knowledge.nouns
    unknown: dict[str, tuple[int, int]] = {}
    for sentence in case.answer_reading.sentences:
        hits = sentence.hits(INTRODUCES)
        if not hits:
            continue
        words, end = sentence.words, len(sentence.words)
        inside = {i for m in sentence.mentions for i in range(m.first, m.last + 1)}
        for index in hits:
            word = words[index]
            last = last_of_phrase(words, index + 1, end)
            if word in ("a", "an") and is_plural(words[last]):
                last -= 1  # `a candle burns`
            if last <= index or last in inside:
                continue
            noun = noun_name(words[last])
            if noun in known or noun in unknown or noun in _NOT_THINGS | parts():
                continue
            if words[last] in attribute_words() or words[last] in FUNCTION_WORDS:
                continue
            if sentence.asserts(index, last):
                unknown[noun] = sentence.span(index, last)
    if unknown:
        claim = f"outside the categories and captions: {', '.join(list(unknown)[:SHOWN])}"
        span = next(iter(unknown.values()))
        yield case.check("other_object", "unknown", None, "answer", span, claim)


_NOT_THINGS: Final = word_set(
    "image picture photo photograph scene shot view background foreground middle center centre "
    "left right corner distance camera viewer moment time day night way lot variety number group "
    "sense atmosphere mood feeling impression setting place area space position direction "
    "viewpoint air sky light ground color colour shape size style activity event situation reason "
    "fact "
    "possibility chance result effect contrast focus attention arrangement collection row pair "
    "series line expression pose look interest level amount thing object item detail one other"
)
