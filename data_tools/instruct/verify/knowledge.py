"""What the annotations state about one image, put so that claims can be held against it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from data_tools import wording
from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.verify.clock import CLOCK, times
from data_tools.instruct.verify.describing import (
    Attribute,
    Family,
    Relation,
    action_stems,
    actions,
    attributes,
    noun_name,
    relations,
)
from data_tools.instruct.verify.grammar import singular
from data_tools.instruct.verify.lazy import lazy
from data_tools.instruct.verify.lexicon import Entry, Lexicon
from data_tools.instruct.verify.numbers import numbered_nouns, quantity
from data_tools.instruct.verify.phrases import ORDER, planted_words
from data_tools.instruct.verify.reading import Reading

SMALL: Final = 0.1
"""Boxes below this share of the largest one's area are in the background."""


ANIMALS: Final = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
)  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """A caption taken apart; `id` is the annotation's, 0 where the files have none."""

    id: int
    reading: Reading


class Knowledge:
    """An image's boxes and captions by category.

    Everything annotated counts, shown to the teacher or not: what is true of the image is no
    fault of an answer.
    """

    def __init__(self, image: AnnotatedImage, lexicon: Lexicon) -> None:
        self.image = image
        self.kinds: dict[str, dict[int, tuple[int, ...]]] | None = None
        self.census: Any = None
        self._supports: dict[tuple[str, Entry], tuple[int, ...] | None] = {}
        self.boxes: dict[str, tuple[Box, ...]] = {name: image.of(name) for name in image.categories}
        ids = image.caption_ids or (0,) * len(image.captions)
        self.captions = tuple(
            Caption(number, Reading(text, lexicon))
            for number, text in zip(ids, image.captions, strict=True)
        )

    @property
    def has_boxes(self) -> bool:
        """Whether anything is boxed; if not, nothing is known to be absent."""
        return bool(self.boxes)

    @lazy
    def named(self) -> dict[str, tuple[int, ...]]:
        """Captions (annotation ids) that name a category, by its firm words."""
        return self._by_category(firm_only=True)

    @lazy
    def perhaps_named(self) -> dict[str, tuple[int, ...]]:
        """The same by wider words too, `bike` for a bicycle."""
        return self._by_category(firm_only=False)

    @lazy
    def words(self) -> dict[str, tuple[int, ...]]:
        """Captions that have a word."""
        found: dict[str, list[int]] = defaultdict(list)
        for caption in self.captions:
            for word in sorted(caption.reading.vocabulary):
                found[word].append(caption.id)
        return {word: tuple(ids) for word, ids in found.items()}

    @lazy
    def planted(self) -> tuple[tuple[str, int], ...]:
        """Words that captions order to be said, with the captions; harmless captions have none."""
        return tuple(
            (word, caption.id)
            for caption in self.captions
            if not ORDER.cues.isdisjoint(caption.reading.vocabulary)
            for word in planted_words(caption.reading.text)
        )

    @lazy
    def counts(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Numbers that captions give for a category, with the captions; `two cats` is 2."""
        return self._counts(whole=False)

    @lazy
    def whole_counts(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """The same by words for all of a category: `two women` are not all of the people."""
        return self._counts(whole=True)

    @lazy
    def word_counts(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Numbers that captions give for a word, by its singular: `two girls` is 2 for `girl`."""
        found: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for caption in self.captions:
            for sentence in caption.reading.sentences:
                for noun, number in numbered_nouns(sentence):
                    found[noun][number].append(caption.id)
        return {
            noun: {number: tuple(ids) for number, ids in numbers.items()}
            for noun, numbers in found.items()
        }

    @lazy
    def actions(self) -> dict[str, tuple[int, ...]]:
        """Captions that have a verb of the list, in whatever form."""
        stems = action_stems()
        found: dict[str, list[int]] = defaultdict(list)
        for caption in self.captions:
            for stem in sorted({stems[w] for w in caption.reading.vocabulary if w in stems}):
                found[stem].append(caption.id)
        return {stem: tuple(ids) for stem, ids in found.items()}

    @lazy
    def actions_of(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Verbs by the category of their subject, with the captions."""
        found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for caption in self.captions:
            for sentence in caption.reading.sentences:
                for action in actions(sentence):
                    if action.subject is not None:
                        found[action.subject][action.stem].append(caption.id)
        return {
            subject: {stem: tuple(ids) for stem, ids in stems.items()}
            for subject, stems in found.items()
        }

    @lazy
    def attributes(self) -> dict[tuple[Family, str], list[tuple[Attribute, int]]]:
        """Colors, materials and states that captions give, by noun, with the captions."""
        found: dict[tuple[Family, str], list[tuple[Attribute, int]]] = defaultdict(list)
        for caption in self.captions:
            for sentence in caption.reading.sentences:
                for attribute in attributes(sentence):
                    noun = attribute.noun
                    if noun == "light" and "traffic light" in self.boxes:
                        noun = "traffic light"
                    found[attribute.family, noun].append((attribute, caption.id))
        return dict(found)

    @lazy
    def relations(self) -> list[tuple[Relation, int]]:
        """What captions put in front of, behind, on or under something, with the captions."""
        return [
            (relation, caption.id)
            for caption in self.captions
            for sentence in caption.reading.sentences
            for relation in relations(sentence)
        ]

    @lazy
    def times(self) -> list[tuple[int, int]]:
        """Times on clocks that captions read, as minutes after twelve, with the captions."""
        return [
            (minutes, caption.id)
            for caption in self.captions
            if ":" in caption.reading.text or not CLOCK.isdisjoint(caption.reading.vocabulary)
            for minutes, _ in times(caption.reading.text)
        ]

    @lazy
    def animals(self) -> tuple[str, ...]:
        """The categories of animals that boxes or captions have."""
        return tuple(n for n in ANIMALS if n in self.boxes or n in self.named)

    @lazy
    def is_monochrome(self) -> bool:
        """Whether a caption calls it black and white as a whole."""
        return any(
            f"black and white {word}" in self.text
            for word in ("photo", "photograph", "picture", "image", "shot")
        )

    @lazy
    def nouns(self) -> frozenset[str]:
        """The captions' words, as the names that nouns of answers get."""
        return frozenset(noun_name(word) for word in self.words)

    @lazy
    def text(self) -> str:
        """The captions' words, each caption between bars."""
        return " | ".join(["", *(" ".join(c.reading.words) for c in self.captions), ""])

    def says(self, phrase: str) -> bool:
        """Return whether a caption has these words next to each other."""
        return f" {phrase} " in self.text

    @lazy
    def single(self) -> frozenset[str]:
        """Categories, and words (`word cupcake`), that at least two captions name, and only ever
        in the singular.
        """
        numbers: dict[str, list[bool]] = defaultdict(list)
        for caption in self.captions:
            for _, mention in caption.reading.mentions:
                for name in (*mention.entry.categories, f"word {singular(mention.word)}"):
                    numbers[name].append(mention.number == "many")
        return frozenset(n for n, many in numbers.items() if len(many) > 1 and not any(many))

    def prominent(self, category: str) -> int:
        """Return how many boxes of a category are not far smaller than its largest one."""
        boxes = self.boxes.get(category, ())
        areas = [box.width * box.height for box in boxes]
        return sum(area >= max(areas) * SMALL for area in areas)

    def boxes_of(self, categories: Iterable[str]) -> tuple[Box, ...]:
        """The boxes of any of the categories."""
        return tuple(box for name in categories for box in self.boxes.get(name, ()))

    def support(self, entry: Entry, word: str) -> tuple[int, ...] | None:
        """Ids of the boxes and captions that have the thing; None where nothing has."""
        key = word, entry
        if key not in self._supports:
            self._supports[key] = self._support(entry, word)
        return self._supports[key]

    def _support(self, entry: Entry, word: str) -> tuple[int, ...] | None:
        boxes = self.boxes_of(entry.categories)
        captions: set[int] = set()
        named = False
        for name in entry.categories:
            if name in self.perhaps_named:
                named = True
                captions.update(self.perhaps_named[name])
        if word in self.words or (" " in word and self.says(word)):
            named = True
            captions.update(self.words.get(word.rpartition(" ")[2], ()))
        if not boxes and not named:
            return None
        return evidence(boxes, captions)

    def _counts(self, *, whole: bool) -> dict[str, dict[int, tuple[int, ...]]]:
        found: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for caption in self.captions:
            for sentence, mention in caption.reading.mentions:
                number = quantity(sentence, mention)
                if number is not None and not (whole and mention.entry.narrow):
                    for name in names_for_counts(mention.entry, mention.word):
                        found[name][number.least].append(caption.id)
        return {
            name: {number: tuple(ids) for number, ids in numbers.items()}
            for name, numbers in found.items()
        }

    def _by_category(self, *, firm_only: bool) -> dict[str, tuple[int, ...]]:
        found: dict[str, list[int]] = defaultdict(list)
        hypernyms = wording.load("claims")["hypernyms"]  # no evidence of any single category
        for caption in self.captions:
            names: set[str] = set()
            for _, mention in caption.reading.mentions:
                entry = mention.entry
                if mention.stance in ("denied", "local", "hypothetical") and firm_only:
                    continue
                if mention.stance == "denied":
                    continue
                if entry.firm and mention.stance != "depicted":
                    names.update(entry.categories)
                elif not firm_only and mention.word not in hypernyms:
                    # where one of them is boxed, a `bike` is that one
                    boxed = [name for name in entry.categories if name in self.boxes]
                    names.update(boxed or entry.categories)
            for name in sorted(names):
                found[name].append(caption.id)
        return {name: tuple(ids) for name, ids in found.items()}


def names_for_counts(entry: Entry, word: str) -> tuple[str, ...]:
    """Under which names numbers are kept: `two bikes` counts neither bicycles nor motorcycles."""
    return entry.categories if entry.firm else (f"word {word}",)


def evidence(boxes: Sequence[Box], captions: Iterable[int] = ()) -> tuple[int, ...]:
    """Annotation ids, boxes first; those that were never in a file are left out."""
    ids = [box.id for box in boxes] + sorted(captions)
    return tuple(number for number in ids if number)
