"""Questions in two steps: numbers compared or added, places put in order."""

from collections.abc import Iterator
from typing import Any

from data_tools import wording, words
from data_tools.instruct.generate.teachers.rules.facts import Facts
from data_tools.instruct.generate.teachers.rules.voice import Turn, Voice, be, several, turns


def reasoning(facts: Facts, voice: Voice) -> dict[str, Any] | None:
    """One such question; None where fewer than two kinds of things can be counted."""
    kinds = [
        found
        for family in (_more, _total, _outermost, _way)
        if (found := list(family(facts, voice, wording.load("rules"))))
    ]
    return turns(voice.one_of(voice.one_of(kinds))) if kinds else None


def _more(facts: Facts, voice: Voice, texts: dict[str, Any]) -> Iterator[Turn]:
    for many, larger in facts.counts.items():
        for few, smaller in facts.counts.items():
            if larger > smaller:
                values = {
                    "many": words.plural(many), "few": words.plural(few),
                    "be_many": be(larger), "be_few": be(smaller),
                    "num_many": several(many, larger), "num_few": several(few, smaller),
                }  # fmt: skip
                yield _turn(texts["more"], voice, facts.labels(many, few), values)


def _total(facts: Facts, voice: Voice, texts: dict[str, Any]) -> Iterator[Turn]:
    counts = list(facts.counts.items())
    for i, (first, one) in enumerate(counts):
        for second, other in counts[i + 1 :]:
            values = {
                "first": words.plural(first), "second": words.plural(second),
                "be_first": be(one), "be_second": be(other),
                "num_first": several(first, one), "num_second": several(second, other),
                "sum": words.number(one + other),
            }  # fmt: skip
            yield _turn(texts["total"], voice, facts.labels(first, second), values)


def _outermost(facts: Facts, voice: Voice, texts: dict[str, Any]) -> Iterator[Turn]:
    for chain in facts.chains:
        names = [box.category for box in chain]
        things = words.listed([f"the {name}" for name in voice.shuffled(names)])
        for side, (a, b, c) in (("left", names), ("right", names[::-1])):
            values = {"side": side, "things": things, "a": a, "b": b, "c": c}
            values |= {"be_a": words.be(a), "be_b": words.be(b)}
            yield _turn(texts["outermost"], voice, facts.labels(*names), values)


def _way(facts: Facts, voice: Voice, texts: dict[str, Any]) -> Iterator[Turn]:
    for left, right in facts.pairs:
        for here, there, one, other in (
            ("left", "right", left, right),
            ("right", "left", right, left),
        ):
            values = {"name": one.category, "other": other.category, "here": here, "there": there}
            values["be"] = words.be(one.category)
            yield _turn(texts["way"], voice, facts.labels(one.category, other.category), values)


def _turn(
    texts: dict[str, Any], voice: Voice, evidence: tuple[str, ...], values: dict[str, str]
) -> Turn:
    question = voice.fill(texts["questions"], **values)
    return question, voice.fill(texts["answers"], **values), "reasoning", evidence
