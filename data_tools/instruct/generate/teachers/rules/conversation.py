"""Several questions with definite answers: presence, number, place, and one caption."""

from collections.abc import Sequence
from typing import Any, Final

from data_tools import wording, words
from data_tools.instruct.generate.teachers.rules.facts import Facts
from data_tools.instruct.generate.teachers.rules.voice import Turn, Voice, turns

MOST_TURNS: Final = 5


def conversation(facts: Facts, voice: Voice) -> dict[str, Any] | None:
    """As many yes as no, numbers, places, and a caption as a description."""
    texts = wording.load("questions")
    present = voice.shuffled(facts.present)
    families: list[Sequence[Turn]] = [
        voice.shuffled(_counts(facts, voice, texts["counting"])),
        voice.shuffled([*_halves(facts, voice, texts), *_sides(facts, voice, texts["relation"])]),
    ]
    said = [turn for family in families for turn in family[:1]]
    said += _presence(facts, voice, texts["existence"], present[:1])
    said += [turn for family in families for turn in family[1:2]][: MOST_TURNS - len(said)]
    said = voice.shuffled(said)
    if facts.captions:
        label, caption = voice.one_of(facts.captions)
        said.insert(0, (voice.pick(texts["description"]), caption, "description", (label,)))
    return turns(*said) if said else None


def _presence(
    facts: Facts, voice: Voice, texts: dict[str, Any], names: Sequence[str]
) -> list[Turn]:
    """One question answered yes for each name, and one answered no."""
    said: list[Turn] = []
    for name in names:
        evidence = facts.labels(name)
        answer = voice.say(texts["yes"], name)
        said.append((voice.say(texts["questions"], name), answer, "existence", evidence))
        absent = _absent(facts, voice)
        if absent is not None:
            answer = voice.say(wording.load("rules")["existence_no"], absent)
            said.append((voice.say(texts["questions"], absent), answer, "existence", ()))
    return said


def _absent(facts: Facts, voice: Voice) -> str | None:
    """A category without box and unmentioned by every caption, drawn by how frequent it is.

    So a name is asked for with the answer no about as often as with the answer yes.
    """
    names = [
        name
        for name in sorted(voice.frequencies)
        if name not in facts.image.categories
        and not any(words.mentions(caption, name) for caption in facts.image.captions)
    ]
    if not names:
        return None
    weights = [float(voice.frequencies[name]) for name in names]
    return str(voice.rng.choice(names, p=[weight / sum(weights) for weight in weights]))


def _counts(facts: Facts, voice: Voice, texts: dict[str, Any]) -> list[Turn]:
    said: list[Turn] = []
    for name, count in facts.counts.items():
        sentences = texts["one"] if count == 1 else texts["several"]
        answer = voice.reply(words.number(count), sentences, name)
        said.append((voice.say(texts["questions"], name), answer, "count", facts.labels(name)))
    return said


def _halves(facts: Facts, voice: Voice, texts: dict[str, Any]) -> list[Turn]:
    said: list[Turn] = []
    for box, half in facts.halves:
        own = texts["horizontal_half" if half in ("left", "right") else "vertical_half"]
        answer = voice.reply(half, own["sentence"], box.category)
        question = voice.say(own["questions"], box.category)
        said.append((question, answer, "place", facts.labels(box.category)))
    return said


def _sides(facts: Facts, voice: Voice, texts: dict[str, Any]) -> list[Turn]:
    said: list[Turn] = []
    for left, right in facts.pairs:
        asked_left = bool(voice.rng.random() < 0.5)
        one, other = (left, right) if asked_left else (right, left)
        values = {"other": other.category}
        answer = voice.reply(
            "left" if asked_left else "right", texts["sentence"], one.category, **values
        )
        question = voice.say(texts["questions"], one.category, **values)
        said.append((question, answer, "place", facts.labels(one.category, other.category)))
    return said
