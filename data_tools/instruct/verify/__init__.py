"""Check every sample against the annotations of its image, without any model.

A turn is read as sentences of words (`reading`); the things it names are found by word lists
(`lexicon`), how it speaks of them by closed word classes (`grammar`, `stances`), and what it says
of them by the words around them (`describing`). Captions are read in the same way (`knowledge`).
Rules then compare:

    objects      the things named are there, those denied are not
    others       things outside the annotated categories: in captions, or unknown
    counts       numbers
    places       sides, halves, corners, order, nearness, by boxes
    relations    in front of, behind, on, under, by captions
    attributes   colors, materials, states
    actions      verbs, by their subject
    kinds        people, animals, sports, rooms, times of day that exclude each other
    sights       striking things outside the categories, statues, sleepers
    times        clocks
    manner       leaks, guesses, refusals, language, planted orders
    form         turns, lengths, repetitions, questions that answer themselves

A claim that no rule reads is not checked; `docs/instruction-data/verification.md` has the recall by
kind of error.
"""

from collections.abc import Iterator, Sequence

from data_tools.coco import AnnotatedImage
from data_tools.instruct.schema import Check, SampleType, Shown, Turn
from data_tools.instruct.verify import (
    actions,
    attributes,
    counts,
    form,
    kinds,
    manner,
    objects,
    others,
    places,
    relations,
    sights,
    times,
)
from data_tools.instruct.verify.case import Case, Policy
from data_tools.instruct.verify.flags import (
    ACTION,
    ATTRIBUTE,
    COUNTED,
    KIND,
    NUMBER,
    PERSON,
    PLACE,
    RELATION,
    SIGHT,
    THING,
)

__all__ = ["Policy", "check_sample", "check_several", "reasons"]


def check_sample(
    turns: Sequence[Turn],
    sample_type: SampleType,
    image: AnnotatedImage,
    shown: Shown,
    policy: Policy,
) -> tuple[Check, ...]:
    """Return everything found about a sample, turn by turn; a check with a code rejects it.

    Args:
        turns: Questions with answers, without image placeholders.
        sample_type: Descriptions and conversations may only state what the image shows;
            reasoning may infer.
        image: With all of its annotations. Without any box nothing counts as absent.
        shown: What the labels that turns cite stand for.
        policy: How strict; the annotated categories.
    """
    cases = _cases(turns, sample_type, image, policy)
    found: list[Check] = list(form.check_sample(cases, sample_type))
    for case in cases:
        found += form.check_citations(case.turn, case.index, shown)
        found += _check_form(case)
        found += _check_claims(case)
    return tuple(found)


def check_several(
    turns: Sequence[Turn],
    parts: Sequence[Sequence[Turn | None]],
    images: Sequence[AnnotatedImage],
    shown: Shown,
    policy: Policy,
) -> tuple[Check, ...]:
    """Return everything found about a conversation about several images.

    Args:
        turns: Questions with answers.
        parts: For each image what the turns say of it, other text blank; None: nothing.
        images: With all of their annotations.
        shown: What the labels that turns cite stand for, over all images.
        policy: How strict; the annotated categories.
    """
    cases = _cases(turns, "conversation", images[0], policy)
    found: list[Check] = list(form.check_sample(cases, "conversation"))
    for case in cases:
        found += form.check_citations(case.turn, case.index, shown)
        found += _check_form(case)
    for image, said in zip(images, parts, strict=True):
        before: Case | None = None
        for index, turn in enumerate(said):
            if turn is not None:
                before = Case(turn, index, "conversation", policy.knowledge(image), policy, before)
                found += _check_claims(before)
    return tuple(found)


def _cases(
    turns: Sequence[Turn], sample_type: SampleType, image: AnnotatedImage, policy: Policy
) -> list[Case]:
    knowledge = policy.knowledge(image)
    cases: list[Case] = []
    for index, turn in enumerate(turns):
        before = cases[-1] if cases else None
        cases.append(Case(turn, index, sample_type, knowledge, policy, before))
    return cases


def reasons(checks: Sequence[Check]) -> tuple[str, ...]:
    """Return the codes that reject, in the order found, each once."""
    return tuple(dict.fromkeys(check.code for check in checks if check.code is not None))


def _check_form(case: Case) -> Iterator[Check]:
    """Yield what is found about form and manner of a turn."""
    yield from form.check_turn(case)
    yield from manner.check(case)


def _check_claims(case: Case) -> Iterator[Check]:
    """Yield what every rule finds whose words the turn has."""
    answer, question = case.answer_reading.bits, case.question_reading.bits
    both = answer | question
    if both & THING:
        yield from objects.check(case)
    if both & NUMBER or question & COUNTED:
        yield from counts.check(case)
    if both & PLACE:
        yield from places.check(case)
    if answer & ATTRIBUTE or case.knowledge.switched:
        yield from attributes.check(case)
    if answer & ACTION:
        yield from actions.check(case)
    if question & ATTRIBUTE:
        yield from attributes.check_yes_no(case)
    if question & ACTION:
        yield from actions.check_yes_no(case)
    if case.knowledge.solo or case.question_reading.words[:1] == ["what"]:
        yield from actions.check_unlisted(case)
    if both & (KIND | PERSON):
        yield from kinds.check(case)
    if answer & RELATION:
        yield from relations.check(case)
    if answer & PLACE and not relations.RESTING.isdisjoint(case.answer_reading.vocabulary):
        yield from relations.check_surface(case)
    if question & RELATION:
        yield from relations.check_yes_no(case)
    if case.question_reading.words[:1] == ["where"]:
        yield from relations.check_where(case)
    yield from sights.check(case)
    if question & SIGHT:
        yield from sights.check_yes_no(case)
    yield from times.check(case)
    yield from others.check(case)
