"""What the annotations state about one image, in a form for checking claims."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from data_tools import wording
from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.verify.describing import (
    ANIMALS,
    PHONES,
    Attribute,
    Family,
    Relation,
    action_stems,
    actions,
    attributes,
    noun_name,
    relations,
    switched,
)
from data_tools.instruct.verify.flags import STANCE
from data_tools.instruct.verify.grammar import singular
from data_tools.instruct.verify.lazy import lazy
from data_tools.instruct.verify.lexicon import Entry, Lexicon
from data_tools.instruct.verify.manner import ORDER, planted_words
from data_tools.instruct.verify.numbers import numbered_nouns, quantity
from data_tools.instruct.verify.reading import Reading
from data_tools.instruct.verify.times import CLOCK, times

SMALL: Final = 0.1
"""Boxes below this share of the largest one's area are in the background."""


SALIENT: Final = (
    ANIMALS,
    ("bus", "train", "airplane", "motorcycle", "bicycle"),
    ("pizza", "cake", "donut", "sandwich", "hot dog"),
    ("skateboard", "surfboard", "snowboard", "skis", "bicycle"),
    ("bed", "couch"),
)
"""Of things that fill an image, captions name the one that is there."""
STRIKING: Final = frozenset(
    {
        "cat", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "bus", "train",
        "airplane", "pizza", "cake", "hot dog", "surfboard", "snowboard", "kite", "teddy bear",
        "toilet", "bed",
    }
)  # fmt: skip
"""Things that one of four captions names where they are there."""


_TOYS: Final = frozenset(
    {"toy", "toys", "lego", "legos", "diorama", "miniature", "figurine", "figurines", "dolls"}
)


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
        """Return whether anything is boxed; if not, nothing is known to be absent."""
        return bool(self.boxes)

    @lazy
    def named(self) -> dict[str, tuple[int, ...]]:
        """Return captions (annotation ids) that name a category, by its firm words."""
        return self._by_category(firm_only=True)

    @lazy
    def perhaps_named(self) -> dict[str, tuple[int, ...]]:
        """Return the same by wider words too, `bike` for a bicycle."""
        return self._by_category(firm_only=False)

    @lazy
    def words(self) -> dict[str, tuple[int, ...]]:
        """Return captions that have a word."""
        found: dict[str, list[int]] = defaultdict(list)
        for caption in self.captions:
            for word in sorted(caption.reading.vocabulary):
                found[word].append(caption.id)
        return {word: tuple(ids) for word, ids in found.items()}

    @lazy
    def planted(self) -> tuple[tuple[str, int], ...]:
        """Return words that captions order to be said, with the captions."""
        return tuple(
            (word, caption.id)
            for caption in self.captions
            if not ORDER.cues.isdisjoint(caption.reading.vocabulary)
            for word in planted_words(caption.reading.text)
        )

    @lazy
    def counts(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Return numbers that captions give for a category, with the captions; `two cats` is 2."""
        return self._counts(whole=False)

    @lazy
    def whole_counts(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Return `counts` of words for all of a category: `two women` are not all people."""
        return self._counts(whole=True)

    @lazy
    def word_counts(self) -> dict[str, dict[int, tuple[int, ...]]]:
        """Return the numbers that captions give for a noun, by its name: `two girls` is 2."""
        found: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for caption in self.captions:
            for sentence in caption.reading.sentences:
                for noun, number, _, _ in numbered_nouns(sentence):
                    found[noun_name(noun)][number].append(caption.id)
        return {
            noun: {number: tuple(ids) for number, ids in numbers.items()}
            for noun, numbers in found.items()
        }

    @lazy
    def actions(self) -> dict[str, tuple[int, ...]]:
        """Return captions that have a verb of the list, in whatever form."""
        stems = action_stems()
        found: dict[str, list[int]] = defaultdict(list)
        for caption in self.captions:
            vocabulary = caption.reading.vocabulary
            for stem in sorted({stems[w] for w in vocabulary if w in stems}):
                found[stem].append(caption.id)
            if not PHONES.isdisjoint(vocabulary) and "on" in vocabulary:
                found["call"].append(caption.id)
        for stems_of in self.actions_of.values():
            for stem, ids in stems_of.items():
                found[stem] = sorted({*found[stem], *ids})
        return {stem: tuple(ids) for stem, ids in found.items()}

    @lazy
    def actions_of(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return verbs by the category, and by the word (`word woman`), of their subject."""
        found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for caption in self.captions:
            for sentence in caption.reading.sentences:
                for action in actions(sentence):
                    if action.subject is not None:
                        found[action.subject][action.stem].append(caption.id)
                    if action.mention is not None:
                        word = f"word {singular(action.mention.word)}"
                        found[word][action.stem].append(caption.id)
        return {
            subject: {stem: tuple(ids) for stem, ids in stems.items()}
            for subject, stems in found.items()
        }

    @lazy
    def solo(self) -> dict[str, set[int]]:
        """Return people and animals that are the only one, with three captions' actions."""
        found = {}
        for name in ("person", *ANIMALS):
            ids = {n for ids in self.actions_of.get(name, {}).values() for n in ids}
            if len(ids) > 2 and self.is_alone(name):
                found[name] = ids
        return found

    def is_alone(self, name: str) -> bool:
        """Return whether captions and boxes have only one of a category."""
        return max(self.counts.get(name, {}), default=1) == 1 and self.prominent(name) <= 1

    @lazy
    def attributes(self) -> dict[tuple[Family, str], list[tuple[Attribute, int]]]:
        """Return colors, materials and states that captions give, by noun, with the captions."""
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
        """Return what captions put in front of, behind, on or under something."""
        return [
            (relation, caption.id)
            for caption in self.captions
            for sentence in caption.reading.sentences
            for relation in relations(sentence)
        ]

    @lazy
    def switched(self) -> dict[tuple[str, bool], list[int]]:
        """Return the captions that say of a device that it is on (True) or off."""
        found: dict[tuple[str, bool], list[int]] = defaultdict(list)
        for caption in self.captions:
            for device in switched(" ".join(caption.reading.words)):
                found[device].append(caption.id)
        return dict(found)

    @lazy
    def times(self) -> list[tuple[int, int]]:
        """Return times on clocks that captions read, as minutes after twelve."""
        return [
            (minutes, caption.id)
            for caption in self.captions
            if ":" in caption.reading.text or not CLOCK.isdisjoint(caption.reading.vocabulary)
            for minutes, _ in times(caption.reading.text)
        ]

    @lazy
    def animals(self) -> tuple[str, ...]:
        """Return the categories of animals that boxes or captions have."""
        return tuple(n for n in ANIMALS if n in self.boxes or n in self.named)

    @lazy
    def is_monochrome(self) -> bool:
        """Return whether a caption calls it black and white as a whole."""
        return any(
            f"black and white {word}" in self.text
            for word in ("photo", "photograph", "picture", "image", "shot")
        )

    @lazy
    def shows_toys(self) -> bool:
        """Return whether two captions say that what the image shows is made of toys."""
        return sum(not _TOYS.isdisjoint(c.reading.vocabulary) for c in self.captions) > 1

    @lazy
    def depicted(self) -> dict[str, set[int]]:
        """Return the words of which three captions have an image only (`a statue of women`)."""
        found: dict[str, set[int]] = defaultdict(set)
        for caption in self.captions:
            for _, mention in caption.reading.mentions:
                if mention.stance == "depicted":
                    found[singular(mention.word)].add(caption.id)
        return {word: ids for word, ids in found.items() if len(ids) > 2}

    @lazy
    def nouns(self) -> frozenset[str]:
        """Return the captions' words, as the names that nouns of answers get."""
        return frozenset(noun_name(word) for word in self.words)

    def names(self, word: str) -> tuple[int, ...]:
        """Return the captions that name a noun, or a word made of it, and do not deny it.

        `clouds` is named by `cloudy`, `a beard` by `bearded`.
        """
        name = noun_name(word)
        derived = {f"{name}{end}" for end in ("y", "ed", "ny", "-covered", "-filled")}
        return tuple(
            caption.id
            for caption in self.captions
            if any(w in derived or noun_name(w) == name for w in caption.reading.vocabulary)
            and not caption.reading.bits & STANCE
        )

    @lazy
    def text(self) -> str:
        """Return the captions' words, each caption between bars."""
        return " | ".join(["", *(" ".join(c.reading.words) for c in self.captions), ""])

    def says(self, phrase: str) -> bool:
        """Return whether a caption has these words next to each other."""
        return f" {phrase} " in self.text

    def excludes(self, categories: tuple[str, ...], *, acts: bool) -> bool:
        """Return whether captions alone show that a thing is not there.

        They do where at least two name another animal, vehicle or dish, where many name nobody,
        and for things that are hardly overlooked; small things and those in the background go
        unmentioned.

        Args:
            categories: Of the thing, which no caption names.
            acts: Whether it is a person said to do something.
        """
        if len(categories) != 1 or len(self.captions) < 3:
            return False
        if acts:
            return len(self.captions) > 3 and "person" not in self.perhaps_named
        if categories[0] in STRIKING and len(self.captions) > 3:
            return True
        for group in SALIENT:
            if categories[0] in group:
                ids = {n for name in group for n in self.named.get(name, ())}
                return len(ids) > 1
        return False

    @lazy
    def single(self) -> frozenset[str]:
        """Return what two captions or more name, always in the singular.

        Categories, and words as `word cupcake`.
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
        """Return the boxes of any of the categories."""
        return tuple(box for name in categories for box in self.boxes.get(name, ()))

    def support(self, entry: Entry, word: str) -> tuple[int, ...] | None:
        """Return ids of the boxes and captions that have the thing; None where nothing has."""
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
        same = word in self.words and not self.says(f"{word} of")  # `a couple of benches`
        if same or (" " in word and self.says(word)):
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
    """Return the names that numbers are kept under: `two bikes` counts no category."""
    return entry.categories if entry.firm else (f"word {word}",)


def evidence(boxes: Sequence[Box], captions: Iterable[int] = ()) -> tuple[int, ...]:
    """Return annotation ids, boxes first; those that were never in a file are left out."""
    ids = [box.id for box in boxes] + sorted(captions)
    return tuple(number for number in ids if number)
