"""Is there a ...? As many yes as no in every image, negatives drawn in POPE's three ways."""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from data_tools import wording, words
from data_tools.backends.rules.phrases import Speaker, things
from data_tools.coco import AnnotatedImage, CocoIndex
from data_tools.records import Exchange

NEGATIVE_KINDS: Final = ("random", "popular", "adversarial")
"""POPE (Li et al. 2023, section 4): any absent category, a frequent one, or a usual companion."""


class ExistenceRules:
    """Balanced questions of presence, and the tallies that keep them balanced.

    Within each way of drawing negatives, the category is taken that has been asked for with the
    answer yes most often in excess of no, so that a name alone says nothing about the answer.
    """

    def __init__(self, index: CocoIndex) -> None:
        self._categories = index.categories
        self._frequencies = index.frequencies()
        self._together = index.together()
        self._excess: Counter[str] = Counter()
        self._next_kind = 0

    def ask(self, image: AnnotatedImage, pairs: int, speaker: Speaker) -> list[Exchange]:
        """Up to `pairs` questions answered yes and as many answered no.

        An image without any box gives none: nothing is known to be absent. Neither is a category
        that has no box but is spoken of in a caption.
        """
        if not image.boxes:
            return []
        present = self._ordered(image.categories, speaker, least=True)
        absent = [name for name in self._categories if self._is_absent(image, name)]
        exchanges: list[Exchange] = []
        for name in present[: min(pairs, len(absent))]:
            kind = NEGATIVE_KINDS[self._next_kind % len(NEGATIVE_KINDS)]
            self._next_kind += 1
            self._excess[name] += 1
            other = self._ordered(self._pool(kind, absent, image), speaker, least=False)[0]
            absent.remove(other)
            self._excess[other] -= 1
            exchanges.append(self._exchange(image, name, "yes", "positive", speaker))
            exchanges.append(self._exchange(image, other, "no", kind, speaker))
        return exchanges

    def _is_absent(self, image: AnnotatedImage, name: str) -> bool:
        return name not in image.categories and not any(
            words.mentions(caption, name) for caption in image.captions
        )

    def _pool(self, kind: str, absent: Sequence[str], image: AnnotatedImage) -> Sequence[str]:
        """The half of the absent categories that is most frequent, or most often in company."""
        if kind == "random":
            return absent
        score = Counter(self._frequencies)
        if kind == "adversarial":
            score = Counter()
            for name in image.categories:
                score.update(self._together[name])
        ranked = sorted(absent, key=lambda name: (-score[name], name))
        return ranked[: (len(ranked) + 1) // 2]

    def _ordered(self, names: Sequence[str], speaker: Speaker, *, least: bool) -> list[str]:
        """Names by the excess of yes over no, ties in random order."""
        sign = 1 if least else -1
        shuffled = [names[i] for i in speaker.rng.permutation(len(names))]
        return sorted(shuffled, key=lambda name: sign * self._excess[name])

    def _exchange(
        self, image: AnnotatedImage, name: str, answer: str, kind: str, speaker: Speaker
    ) -> Exchange:
        texts = wording.load("questions")["existence"]
        reply = speaker.reply(answer, texts[answer], name)
        if speaker.style == "evidence":
            seen = things(image, asked=name)
            reply = speaker.pick(texts["evidence"]).format(things=seen, answer=answer)
        return Exchange(
            family="existence",
            question=speaker.say(texts["questions"], name),
            reply=reply,
            answer=answer,
            category=name,
            kind=kind,
        )
