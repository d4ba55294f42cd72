"""Questions in two steps (numbers compared or added, places in order), and long descriptions."""

from collections.abc import Iterator
from typing import Any, Final

from data_tools import wording
from data_tools.coco import Box
from data_tools.rules.facts import Facts
from data_tools.rules.families import sentence
from data_tools.rules.phrases import Exchange, Speaker, several, spelled
from vlm_sft.utils import words

MOST_PLACES: Final = 4
"""Sentences about places in a description, at most; more would be a list of coordinates."""


def reasoning(facts: Facts, speaker: Speaker) -> Exchange | None:
    """Return one such question; None where fewer than two kinds of things can be counted."""
    texts = wording.load("questions")
    families = (_more, _total, _outermost, _way)
    kinds = [found for family in families if (found := list(family(facts, speaker, texts)))]
    return speaker.pick(speaker.pick(kinds)) if kinds else None


def detail(facts: Facts, speaker: Speaker) -> tuple[str, tuple[str, ...]] | None:
    """Return a description with its evidence: a caption, numbers, places; None without numbers."""
    if not facts.counts:
        return None
    texts = wording.load("questions")
    found: list[str] = []
    evidence: list[str] = []
    if facts.captions:
        label, caption = max(facts.captions, key=lambda item: (len(item[1]), item[0]))
        found.append(sentence(caption))
        evidence.append(label)
    things = words.listed([several(name, count) for name, count in facts.counts.items()])
    inventory = texts["detail"]["inventory"]
    found.append(speaker.fill(inventory, things=things, Things=words.capital(things)))
    evidence += facts.labels(*facts.counts)
    places = [_place(box, facts, speaker, texts["detail"]) for box in facts.single]
    places += [
        speaker.say(
            texts["relation"]["sentence"], a.category, other=spelled(b.category), answer="left"
        )
        for a, b in facts.pairs
    ]
    found += speaker.shuffled([place for place in places if place])[:MOST_PLACES]
    return " ".join(found), tuple(dict.fromkeys(evidence))


def _place(box: Box, facts: Facts, speaker: Speaker, texts: Any) -> str:
    """Return the half or corner of the image that a box lies in, as a sentence; or nothing."""
    halves = [side for placed, side in facts.halves if placed is box]
    if len(halves) == 2:
        across, down = halves
        return speaker.say(texts["corner"], box.category, half=down, other=across)
    return speaker.say(texts["half"], box.category, half=halves[0]) if halves else ""


def _more(facts: Facts, speaker: Speaker, texts: Any) -> Iterator[Exchange]:
    for many, larger in facts.counts.items():
        for few, smaller in facts.counts.items():
            if larger > smaller:
                values = {
                    "many": spelled(words.plural(many)), "few": spelled(words.plural(few)),
                    "num_many": several(many, larger), "num_few": several(few, smaller),
                }  # fmt: skip
                yield _exchange(texts["more"], speaker, facts.labels(many, few), values)


def _total(facts: Facts, speaker: Speaker, texts: Any) -> Iterator[Exchange]:
    counts = list(facts.counts.items())
    for i, (first, one) in enumerate(counts):
        for second, other in counts[i + 1 :]:
            values = {
                "first": spelled(words.plural(first)), "second": spelled(words.plural(second)),
                "be_first": "is" if one == 1 else "are", "num_first": several(first, one),
                "be_second": "is" if other == 1 else "are", "num_second": several(second, other),
                "sum": words.number(one + other),
            }  # fmt: skip
            yield _exchange(texts["total"], speaker, facts.labels(first, second), values)


def _outermost(facts: Facts, speaker: Speaker, texts: Any) -> Iterator[Exchange]:
    for chain in facts.chains:
        names = [box.category for box in chain]
        things = words.listed([f"the {spelled(name)}" for name in speaker.shuffled(names)], "or")
        for side, (a, b, c) in (("left", names), ("right", names[::-1])):
            values = {"side": side, "things": things, "be_a": words.be(a), "be_b": words.be(b)}
            values |= {"a": spelled(a), "b": spelled(b), "c": spelled(c)}
            yield _exchange(texts["outermost"], speaker, facts.labels(*names), values)


def _way(facts: Facts, speaker: Speaker, texts: Any) -> Iterator[Exchange]:
    for pair in facts.pairs:
        for here, there, (one, other) in (("left", "right", pair), ("right", "left", pair[::-1])):
            values = {"name": spelled(one.category), "other": spelled(other.category)}
            values |= {"be": words.be(one.category), "here": here, "there": there}
            evidence = facts.labels(one.category, other.category)
            yield _exchange(texts["way"], speaker, evidence, values)


def _exchange(
    texts: Any, speaker: Speaker, evidence: tuple[str, ...], values: dict[str, str]
) -> Exchange:
    question = speaker.fill(texts["questions"], **values)
    answer = speaker.fill(texts["answers"], **values)
    return Exchange("reasoning", question, answer, evidence=evidence)
