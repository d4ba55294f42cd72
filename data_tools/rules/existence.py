"""Which categories are asked for: as many present as absent ones in every image."""

from collections import Counter
from collections.abc import Mapping, Sequence

from data_tools.coco import CocoIndex
from data_tools.rules import POPE_SAMPLINGS
from data_tools.rules.facts import Facts
from data_tools.rules.families import existence
from data_tools.rules.phrases import Exchange, Speaker


def by_frequency(
    facts: Facts, speaker: Speaker, pairs: int, frequencies: Mapping[str, int]
) -> list[Exchange]:
    """Return up to `pairs` questions answered yes and as many answered no.

    An absent category is drawn by the number of images that have it, so that over many images a
    name is asked for with the answer no about as often as with the answer yes. Depends on this
    image alone.
    """
    found = []
    absent = [name for name in sorted(frequencies) if facts.is_absent(name)]
    for name in speaker.shuffled(facts.present)[: min(pairs, len(absent))]:
        weights = [float(frequencies[other]) for other in absent]
        shares = [weight / sum(weights) for weight in weights]
        other = absent.pop(int(speaker.rng.choice(len(absent), p=shares)))
        found.append(existence(facts, speaker, name, "yes", "positive"))
        found.append(existence(facts, speaker, other, "no", "random"))
    return found


class Balanced:
    """The same with a memory: the images before decide which category is asked for.

    Within each of POPE's ways of drawing negatives, the category is taken that has been asked for
    with the answer yes most often in excess of no, so that a name alone does not give the answer
    away.
    """

    def __init__(self, index: CocoIndex) -> None:
        self._categories = index.categories
        self._frequencies = index.frequencies()
        self._together = index.together()
        self._excess: Counter[str] = Counter()
        self._num_asked = 0

    def ask(self, facts: Facts, speaker: Speaker, pairs: int) -> list[Exchange]:
        """Return up to `pairs` questions answered yes and as many answered no."""
        present = self._ordered(facts.present, speaker, sign=1)
        absent = [name for name in self._categories if facts.is_absent(name)]
        found = []
        for name in present[: min(pairs, len(absent))]:
            kind = POPE_SAMPLINGS[self._num_asked % len(POPE_SAMPLINGS)]
            self._num_asked += 1
            self._excess[name] += 1
            other = self._ordered(self._pool(kind, absent, facts), speaker, sign=-1)[0]
            absent.remove(other)
            self._excess[other] -= 1
            found.append(existence(facts, speaker, name, "yes", "positive"))
            found.append(existence(facts, speaker, other, "no", kind))
        return found

    def _pool(self, kind: str, absent: Sequence[str], facts: Facts) -> Sequence[str]:
        """Return the half of the absent categories that is most frequent, or most often near."""
        if kind == "random":
            return absent
        score = self._frequencies
        if kind == "adversarial":
            score = Counter()
            for name in facts.image.categories:
                score.update(self._together[name])
        ranked = sorted(absent, key=lambda name: (-score[name], name))
        return ranked[: (len(ranked) + 1) // 2]

    def _ordered(self, names: Sequence[str], speaker: Speaker, *, sign: int) -> list[str]:
        """Return the names by the excess of yes over no, ties in random order."""
        return sorted(speaker.shuffled(names), key=lambda name: sign * self._excess[name])
