"""Conversations by rules alone: every answer is read off the annotations, none is guessed."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np

from data_tools import wording, words
from data_tools.backends.rules import counting, places
from data_tools.backends.rules.balance import level
from data_tools.backends.rules.existence import ExistenceRules
from data_tools.backends.rules.phrases import Speaker, things
from data_tools.coco import AnnotatedImage, CocoIndex
from data_tools.records import CONVERSATION_FAMILIES, AnswerStyle, Exchange

__all__ = ["RulesBackend"]

_Item = TypeVar("_Item")

_CAPTIONS, _TURNS, _PROBES = 1, 2, 3  # so that one image's purposes draw different numbers


class RulesBackend:
    """Questions about presence, number and place, with captions as descriptions.

    Images are to be asked for in one fixed order: which absent category is asked for depends on
    what was asked before, so that no category's name gives the answer away.
    """

    def __init__(
        self,
        index: CocoIndex,
        seed: int,
        answers: AnswerStyle,
        families: Collection[str] = CONVERSATION_FAMILIES,
        captions_from: str = "captions",
    ) -> None:
        self._captions_from = captions_from
        self._seed = seed
        self._families = frozenset(families)
        self._answers: AnswerStyle = answers
        self._index = index
        self._existence = ExistenceRules(index)

    def captions(self, image: AnnotatedImage, limit: int | None) -> Sequence[Exchange]:
        rng = self._rng(image, _CAPTIONS)
        if self._captions_from == "boxes":
            if not image.boxes:
                return []
            question = Speaker(rng, self._answers).pick(wording.load("questions")["caption"])
            return [Exchange("caption", question, words.capital(things(image)) + ".")]
        order = rng.permutation(len(image.captions))[:limit]
        speaker = Speaker(rng, self._answers)
        return [
            Exchange("caption", speaker.pick(wording.load("questions")["caption"]), caption)
            for caption in (image.captions[i] for i in sorted(order))
        ]

    def conversation(self, image: AnnotatedImage, turns: int) -> Sequence[Exchange]:
        rng = self._rng(image, _TURNS)
        speaker = Speaker(rng, self._answers)
        wanted = self._families
        if turns < len(wanted):  # else the same families would always be left out
            wanted = frozenset(_shuffled(sorted(wanted), rng)[:turns])
        description = _description(image, speaker) if "description" in wanted else []
        room = turns - len(description)
        exchanges: list[Exchange] = []
        if "existence" in wanted and room > 0:
            alone = wanted <= {"existence", "description"}
            pairs = max(1, room // 2 if alone else (room + 1) // 4)
            exchanges = self._existence.ask(image, pairs, speaker)
        others: list[Sequence[Exchange]] = []
        if "counting" in wanted:
            others.append(counting.rarest_last(counting.ask(image, speaker), rng))
        if "halves" in wanted:
            others.append(_shuffled(places.halves(image, speaker), rng))
        if "relation" in wanted:
            others.append(_shuffled(places.relations(image, speaker), rng))
        exchanges += _in_turn(others, max(0, room - len(exchanges)))
        mixed = _shuffled(exchanges, rng)
        return [*description, *mixed] if rng.random() < 0.5 else [*mixed, *description]

    def probes(
        self, images: Sequence[AnnotatedImage], family: str, per_image: int
    ) -> Mapping[int, Sequence[Exchange]]:
        existence = ExistenceRules(self._index)
        ask: dict[str, Callable[[AnnotatedImage, Speaker], Sequence[Exchange]]] = {
            "existence": lambda image, speaker: existence.ask(
                image, max(1, per_image // 2), speaker
            ),
            "counting": counting.ask,
            "halves": places.halves,
        }
        found: dict[int, Sequence[Exchange]] = {}
        for image in images:
            speaker = Speaker(self._rng(image, _PROBES), self._answers)
            found[image.id] = ask[family](image, speaker)
        if family == "existence":
            return found
        rng = np.random.default_rng([self._seed, _PROBES])
        return level(found, per_image, rng)

    def _rng(self, image: AnnotatedImage, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, image.id, purpose])


def _description(image: AnnotatedImage, speaker: Speaker) -> list[Exchange]:
    if not image.captions:
        return []
    question = speaker.pick(wording.load("questions")["description"])
    return [Exchange("description", question, speaker.pick(image.captions))]


def _shuffled(items: Sequence[_Item], rng: np.random.Generator) -> list[_Item]:
    return [items[i] for i in rng.permutation(len(items))]


def _in_turn(families: Sequence[Sequence[Exchange]], room: int) -> list[Exchange]:
    """Up to `room` exchanges, taken from the end of each family in turn."""
    chosen: list[Exchange] = []
    queues = [list(family) for family in families]
    while len(chosen) < room and any(queues):
        for queue in queues:
            if queue and len(chosen) < room:
                chosen.append(queue.pop())
    return chosen
