"""Colours, materials and actions: captions alone can bear them out."""

from collections.abc import Iterator
from functools import cache

from data_tools import wording
from data_tools.instruct.schema import Check
from data_tools.instruct.verification.case import Case
from data_tools.instruct.verification.knowledge import action_stems


def check(case: Case) -> Iterator[Check]:
    """One finding for each word of the lists in the answer; never contradicted."""
    reading, knowledge = case.answer_reading, case.knowledge
    attributes, stems = _attributes(), action_stems()
    known = {word for word in reading.vocabulary if word in attributes or word in stems}
    if not known:
        return
    for sentence in reading.sentences:
        for index, word in enumerate(sentence.words):
            if word not in known:
                continue
            known.remove(word)  # once
            if word in attributes:
                rule, captions = "attribute", knowledge.words.get(word, ())
            else:
                rule, captions = "action", knowledge.actions.get(stems[word], ())
            span = sentence.span(index, index)
            if captions:
                ids = tuple(number for number in captions if number)
                yield case.check(rule, "supported", None, "answer", span, word, ids)
            else:
                refused = case.config.unknown_attributes == "reject"
                code = "ATTRIBUTE_UNKNOWN" if refused and case.sample_type != "reasoning" else None
                yield case.check(rule, "unknown", code, "answer", span, word)


@cache
def _attributes() -> frozenset[str]:
    claims = wording.load("claims")
    return frozenset(claims["colours"]) | frozenset(claims["materials"])
