"""The single questions: captions, description, existence, counting, halves, relation."""

from typing import Any, Final

from data_tools import wording
from data_tools.rules import Family
from data_tools.rules.facts import Facts
from data_tools.rules.phrases import Exchange, Speaker, spelled
from vlm_sft.utils import words

MOST_NAMED: Final = 6
"""Categories named in a list of things, at most; more would be a catalog."""


def captions(facts: Facts, speaker: Speaker, limit: int | None) -> list[Exchange]:
    """Return a pair for each caption, at most `limit` of them, in the file's order."""
    chosen = sorted(speaker.rng.permutation(len(facts.captions))[:limit])
    return [_caption(facts.captions[i], speaker, "caption") for i in chosen]


def caption_of_boxes(facts: Facts, speaker: Speaker) -> list[Exchange]:
    """Return one pair that names what is boxed, the largest first; none without boxes."""
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
        reply = speaker.pick(texts["evidence"]).format(things=things(facts, name), answer=answer)
    question = speaker.say(texts["questions"], name)
    return Exchange("existence", question, reply, answer, name, kind, facts.labels(name))


def counting(facts: Facts, speaker: Speaker) -> list[Exchange]:
    """Ask for the number of each category that can be counted."""
    texts, found = _texts("counting"), []
    for name, count in facts.counts.items():
        number = words.number(count)
        reply = speaker.reply(number, texts["one" if count == 1 else "several"], name)
        question = speaker.say(texts["questions"], name)
        evidence = facts.labels(name)
        found.append(Exchange("counting", question, reply, number, name, "counting", evidence))
    return found


def halves(facts: Facts, speaker: Speaker) -> list[Exchange]:
    """Ask for the half of the image that each single object lies in."""
    found = []
    for box, half in facts.halves:
        kind = "horizontal_half" if half in ("left", "right") else "vertical_half"
        texts, name = _texts(kind), box.category
        reply = speaker.reply(half, texts["sentence"], name)
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


def things(facts: Facts, asked: str = "") -> str:
    """Return `a cat and a boat`: what is shown, the category with the largest area first.

    Numbers are left to the counting questions. `asked` is named whenever it is there.
    """
    named = facts.largest[:MOST_NAMED]
    if asked in facts.present and asked not in named:
        named[-1] = asked
    return words.listed([spelled(words.counted(name, 1)) for name in named])


def sentence(caption: str) -> str:
    """Return a caption with a capital letter and an end."""
    text = words.capital(caption.strip())
    return text if text.endswith((".", "!", "?")) else text.rstrip(",;:") + "."


def _caption(caption: tuple[str, str], speaker: Speaker, family: Family) -> Exchange:
    label, text = caption
    reply = text if family == "caption" else sentence(text)
    return Exchange(family, speaker.pick(_texts(family)), reply, evidence=(label,))


def _texts(name: str) -> Any:
    return wording.load("questions")[name]
