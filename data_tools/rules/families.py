"""The single questions: captions, description, existence, counting, halves, relation."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from data_tools import wording
from data_tools.geometry import Region
from data_tools.rules import Family
from data_tools.rules.facts import Facts
from data_tools.rules.phrases import Exchange, Speaker, spelled
from vlm_sft.utils import words

SIDES: Final[Mapping[str, tuple[Region, Region]]] = {
    "horizontal_half": ("left", "right"),
    "vertical_half": ("top", "bottom"),
}
"""The halves that a kind of question chooses between."""
MOST_NAMED: Final = 6
"""Categories named in a list of things, at most; more would be a catalog."""


def captions(facts: Facts, speaker: Speaker, limit: int | None) -> list[Exchange]:
    """Return a pair for each caption, at most `limit` of them, in the file's order."""
    chosen = sorted(speaker.rng.permutation(len(facts.captions))[:limit])
    return [_caption(facts.captions[i], speaker, "caption") for i in chosen]


def caption_of_boxes(facts: Facts, speaker: Speaker) -> list[Exchange]:
    """Return one pair that counts what is boxed, the largest first; none without boxes."""
    if not facts.present:
        return []
    question = speaker.pick(_texts("caption"))
    return [Exchange("caption", question, words.capital(things(facts)) + ".")]


def description(facts: Facts, speaker: Speaker) -> list[Exchange]:
    """Return one caption as a description, as a sentence; none without captions."""
    if not facts.captions:
        return []
    return [_caption(speaker.pick(facts.captions), speaker, "description")]


def existence(facts: Facts, speaker: Speaker, name: str, answer: str, kind: str) -> Exchange:
    """Ask whether the category is there; `answer` is yes or no."""
    texts = _texts("existence")
    several = answer == "yes" and len(facts.labels(name)) > 1
    reply = speaker.reply(answer, texts["yes_several" if several else answer], name)
    if speaker.style == "evidence":
        reply = _seen(things(facts, name), answer)
    question = speaker.say(texts["questions"], name)
    return Exchange("existence", question, reply, answer, name, kind, facts.labels(name))


def counting(facts: Facts, speaker: Speaker) -> list[Exchange]:
    """Ask for the number of each category that can be counted."""
    texts, found = _texts("counting"), []
    for name, count in facts.counts.items():
        number = words.number(count)
        reply = speaker.reply(number, texts["one" if count == 1 else "several"], name)
        if speaker.style == "evidence":
            reply = _seen(things(facts, name), number)
        question = speaker.say(texts["questions"], name)
        evidence = facts.labels(name)
        found.append(Exchange("counting", question, reply, number, name, "counting", evidence))
    return found


def halves(facts: Facts, speaker: Speaker) -> list[Exchange]:
    """Ask for the half of the image that each single object lies in."""
    found = []
    for box, half in facts.halves:
        kind = next(kind for kind, pair in SIDES.items() if half in pair)
        texts, name = _texts(kind), box.category
        reply = speaker.reply(half, texts["sentence"], name)
        if speaker.style == "evidence":
            reply = _seen(things(facts, name, sides=SIDES[kind]), half)
        question = speaker.say(texts["questions"], name)
        found.append(Exchange("halves", question, reply, half, name, kind, facts.labels(name)))
    return found


def relations(facts: Facts, speaker: Speaker) -> list[Exchange]:
    """Ask for left or right of each other; a pair is asked once, from a side drawn at random."""
    texts, found = _texts("relation"), []
    for left, right in facts.pairs:
        answer, one, other = ("left", left, right)
        if speaker.rng.random() < 0.5:
            answer, one, other = ("right", right, left)
        values = {"other": spelled(other.category)}
        reply = speaker.reply(answer, texts["sentence"], one.category, **values)
        question = speaker.say(texts["questions"], one.category, **values)
        evidence = facts.labels(one.category, other.category)
        found.append(
            Exchange("relation", question, reply, answer, one.category, "relation", evidence)
        )
    return found


def things(facts: Facts, asked: str = "", sides: Sequence[Region] = ()) -> str:
    """Return `two cats and a boat`: what is shown, the category with the largest area first.

    Several are counted where their number is certain, else `people` are named. `asked` is named
    whenever it is there. With `sides`, a single object that certainly lies in one of these halves
    is said to: `a cat on the left and a boat`.
    """
    named = facts.largest[:MOST_NAMED]
    if asked in facts.present and asked not in named:
        named[-1] = asked
    halves = {box.category: half for box, half in facts.halves if half in sides}
    listed = []
    for name in named:
        if name not in facts.counts and facts.is_several(name) and not words.is_mass(name):
            phrase = spelled(words.plural(name))
        else:
            phrase = spelled(words.counted(name, facts.counts.get(name, 1)))
        side = halves.get(name)
        listed.append(phrase if side is None else f"{phrase} {_texts('sides')[side]}")
    return words.listed(listed)


def sentence(caption: str) -> str:
    """Return a caption with a capital letter and an end."""
    text = words.capital(caption.strip())
    return text if text.endswith((".", "!", "?")) else text.rstrip(",;:") + "."


def _seen(listed: str, answer: str) -> str:
    return f"I see {listed}, so {answer}."


def _caption(caption: tuple[str, str], speaker: Speaker, family: Family) -> Exchange:
    label, text = caption
    reply = text if family == "caption" else sentence(text)
    return Exchange(family, speaker.pick(_texts(family)), reply, evidence=(label,))


def _texts(name: str) -> Any:
    return wording.load("questions")[name]
