"""In front of, behind, on, under: contradicted where captions have it the other way round."""

from collections.abc import Iterator
from typing import Final

from data_tools.instruct.schema import Check
from data_tools.instruct.verify.attributes import asked_noun
from data_tools.instruct.verify.case import Case
from data_tools.instruct.verify.describing import PRONOUN, Relation, relations
from data_tools.instruct.verify.flags import RELATION


def check(case: Case) -> Iterator[Check]:
    """Yield a finding for each relation that captions have the other way round."""
    if not case.answer_reading.bits & RELATION or not case.knowledge.relations:
        return
    for number, sentence in enumerate(case.answer_reading.sentences):
        for relation in relations(sentence):
            one = relation.one
            if one == PRONOUN:
                one = asked_noun(case) if number == 0 else PRONOUN
            if one == PRONOUN or not sentence.asserts(relation.first, relation.last):
                continue
            ids = opposing(case, one, relation)
            if ids:
                claim = f"{one} {relation.how} {relation.other}"
                span = sentence.span(relation.first, relation.last)
                yield case.check(
                    "relation", "contradicted", "RELATION_REFUTED", "answer", span, claim, ids
                )


def opposing(case: Case, one: str, claim: Relation) -> tuple[int, ...]:
    """Return the captions with the opposite relation; none where any caption has this one."""
    same, opposite = {(one, claim.how, claim.other)}, {(one, _OPPOSITE[claim.how], claim.other)}
    if claim.how in ("front", "behind"):
        same.add((claim.other, _OPPOSITE[claim.how], one))
        opposite.add((claim.other, claim.how, one))
    else:
        opposite.add((claim.other, claim.how, one))
    found: set[int] = set()
    for relation, number in case.knowledge.relations:
        key = (relation.one, relation.how, relation.other)
        if key in same:
            return ()
        if key in opposite:
            found.add(number)
    return tuple(sorted(n for n in found if n))


_OPPOSITE: Final = {"front": "behind", "behind": "front", "on": "under", "under": "on"}
