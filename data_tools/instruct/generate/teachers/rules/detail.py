"""A description that lists what is there, how many, and where."""

from typing import Any, Final

from data_tools import wording, words
from data_tools.instruct.generate.teachers.rules.facts import Facts
from data_tools.instruct.generate.teachers.rules.voice import Voice, be, several

MOST_PLACES: Final = 4
"""Sentences about places, at most; more would be a list of coordinates."""


def detail(facts: Facts, voice: Voice) -> dict[str, Any] | None:
    """One caption, then numbers, then places; None without a box to speak of."""
    texts = wording.load("rules")["detail"]
    sentences, evidence = [], []
    counted = facts.counts
    if not counted:
        return None
    if facts.captions:
        label, caption = max(facts.captions, key=lambda item: (len(item[1]), item[0]))
        sentences.append(_sentence(caption))
        evidence.append(label)
    things = words.listed([several(name, count) for name, count in counted.items()])
    first = next(iter(counted.values()))
    sentences.append(voice.fill(texts["inventory"], be=be(first), things=things))
    evidence += facts.labels(*counted)
    places = [voice.say(texts["half"], box.category, answer=half) for box, half in facts.halves]
    places += [
        voice.say(texts["relation"], a.category, other=b.category, answer="left")
        for a, b in facts.pairs
    ]
    sentences += voice.shuffled(places)[:MOST_PLACES]
    return {"answer": " ".join(sentences), "evidence": list(dict.fromkeys(evidence))}


def _sentence(caption: str) -> str:
    """The caption with a large first letter and an end."""
    text = words.capital(caption.strip())
    return text if text.endswith((".", "!", "?")) else text + "."
