"""Questions that an image cannot answer, and look-alikes that it can, made from annotations.

What cannot be answered follows from the annotations, not from the teacher: attributes of what is
not there, facts outside of any image, names of people, text on things of a few pixels. Each image
also gets questions of the same form that its boxes and captions do answer, so that a model learns
when to decline, not that it should.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from data_tools import wording
from data_tools.instruct.config import VerifyConfig
from data_tools.instruct.grow.checks import fault
from data_tools.instruct.grow.novelty import words_of
from data_tools.instruct.schema import Check, Kind, Task, Turn
from data_tools.mix.config import CANNOT_TELL
from data_tools.rules.existence import by_frequency
from data_tools.rules.facts import Facts
from data_tools.rules.families import counting, halves
from data_tools.rules.phrases import Exchange, Speaker
from vlm_sft.best_of.graders import is_right
from vlm_sft.utils import words

QUESTIONS: Final = 4
"""Questions of a request, unanswerable and answerable ones together."""
TINY_TEXT: Final = 0.05
"""Text is asked for on things whose box is at most this share of the image's height."""

UNANSWERABLE: Final[Mapping[str, tuple[str, ...]]] = {
    "absent": ("What color {be} the {name}?", "What {be} the {name} made of?"),
    "off_image": (
        "How much did the {name} cost?", "In which shop was the {name} bought?",
        "On which day was this photo of the {name} taken?",
    ),
    "identity": ("What is the name of the person in the image?", "Who is the person in the image?"),
    "tiny_text": ("What is written on the {name}?", "What does the text on the {name} say?"),
}  # fmt: skip
"""Why an image cannot answer, with patterns of questions."""

LOOK_ALIKES: Final[Mapping[str, str]] = {
    "color": "the color of a thing that captions give one",
    "existence": "whether something is there",
    "counting": "how many there are",
    "halves": "the side that a thing is on",
}
"""Questions of the same form that the annotations answer."""

_WITH_TEXT: Final = ("book", "bottle", "laptop", "cell phone", "tv", "bus", "truck", "car", "boat")
_NO_BUYING: Final = frozenset({"person"})
_KINDS: Final[Mapping[str, Kind]] = {
    "color": "attribute", "existence": "existence", "counting": "count", "halves": "place",
}  # fmt: skip


@dataclass
class Share:
    """Keeps the share of unanswerable questions over many images at what is wanted."""

    wanted: float
    unanswerable: int = 0
    total: int = 0

    def take(self, unanswerable: Sequence[Task], answerable: Sequence[Task]) -> list[Task]:
        """Return up to `QUESTIONS` of the tasks, and count them.

        Where one kind runs short, fewer of the other are taken, down to one, and later images
        make up for it.
        """
        number = min(QUESTIONS, len(unanswerable) + len(answerable))
        due = self.wanted * (self.total + number) - self.unanswerable
        refused = min(max(round(due), 0), len(unanswerable), number)
        answered = min(number - refused, len(answerable))
        if 0 < self.wanted < 1 and refused < round(due):  # not enough of them
            most = (self.unanswerable + refused) / self.wanted - self.total - refused
            answered = min(answered, max(round(most), 1))
        taken = [*unanswerable[:refused], *answerable[:answered]]
        self.unanswerable += refused
        self.total += len(taken)
        return taken


class TaskMaker:
    """Makes questions about images from what is certain of them.

    Args:
        categories: What annotators looked for in every image.
        frequencies: In how many images each category occurs; what look-alikes ask for is drawn
            by it.
    """

    def __init__(self, categories: Sequence[str], frequencies: Mapping[str, int]) -> None:
        self._categories, self._frequencies = categories, frequencies
        self._doubtful = frozenset(VerifyConfig().under_labelled)

    def unanswerable(self, facts: Facts, rng: np.random.Generator) -> list[Task]:
        """Return questions that the image cannot answer, of different kinds, in random order."""
        speaker = Speaker(rng)
        named: dict[str, list[str]] = {
            "absent": [
                name
                for name in self._categories
                if name not in self._doubtful and facts.is_absent(name)
            ],
            "off_image": [b.category for b in facts.single if b.category not in _NO_BUYING],
            "tiny_text": [name for name in _WITH_TEXT if _is_tiny(facts, name)],
            "identity": ["person"] if _has_one_stranger(facts) else [],
        }
        found = []
        for why in speaker.shuffled([*UNANSWERABLE, "absent"]):
            if not named[why]:
                continue
            name = speaker.pick(named[why])
            named[why].remove(name)
            several = why == "tiny_text" and len(facts.image.of(name)) > 1
            spoken = words.plural(name) if several else name
            question = speaker.say(UNANSWERABLE[why], spoken)
            found.append(
                Task(question=question, answerable=False, why=why, kind="cannot_tell", subject=name)
            )
        return found

    def answerable(self, facts: Facts, rng: np.random.Generator) -> list[Task]:
        """Return questions that the annotations answer, of different kinds, in random order."""
        speaker = Speaker(rng)
        exchanges: list[tuple[str, Exchange]] = []
        for why, made in (
            ("existence", speaker.shuffled(by_frequency(facts, speaker, 1, self._frequencies))),
            ("counting", speaker.shuffled(counting(facts, speaker))),
            ("halves", speaker.shuffled(halves(facts, speaker))),
        ):
            exchanges += [(why, exchange) for exchange in made[:1]]
        tasks = [
            Task(question=one.question, answerable=True, why=why, kind=_KINDS[why],
                 subject=one.category, answer=one.answer)
            for why, one in exchanges
        ]  # fmt: skip
        colors = speaker.shuffled(_colors(facts))
        for name, color in colors[:1]:
            question = speaker.say(UNANSWERABLE["absent"][:1], name)
            tasks.append(
                Task(question=question, answerable=True, why="color", kind="attribute",
                     subject=name, answer=color)
            )  # fmt: skip
        return speaker.shuffled(tasks)


def check_answers(
    tasks: Sequence[Task], turns: Sequence[Turn], claims: Sequence[Check]
) -> Iterator[Check]:
    """Yield what is wrong: another question, an invented answer, a needless refusal, no reason.

    Args:
        tasks: What was asked.
        turns: What the teacher wrote.
        claims: What the rules found about the turns: they know what is absent.
    """
    if len(turns) != len(tasks):
        yield fault("GROWN_OTHER_QUESTION", f"{len(turns)} turns of {len(tasks)}")
    for number, (task, turn) in enumerate(zip(tasks, turns, strict=False)):
        if words_of(task.question) != words_of(turn.question):
            yield fault("GROWN_OTHER_QUESTION", turn.question, number, "question")
        denied = any(
            check.rule == "absence" and check.verdict == "supported" and check.turn == number
            and check.part == "answer"
            for check in claims
        )  # fmt: skip
        declines = _DECLINES.search(turn.answer) is not None
        if task.answerable:
            if declines and not _answers(turn.answer, task):
                yield fault("REFUSED_ANSWERABLE", turn.answer, number, "answer")
            elif not _answers(turn.answer, task):
                claim = f"{turn.answer} (right: {task.answer})"
                yield fault("GROWN_OTHER_ANSWER", claim, number, "answer")
        elif _invents(turn.answer, task) or not (declines or (denied and task.why == "absent")):
            yield fault("ANSWERED_UNANSWERABLE", turn.answer, number, "answer")
        elif not (denied if task.why == "absent" else _REASON.search(turn.answer)):
            yield fault("REFUSAL_WITHOUT_REASON", turn.answer, number, "answer")


def _answers(text: str, task: Task) -> bool:
    """Return whether an answer gives the known one."""
    if task.kind in ("existence", "count"):
        return is_right(text, task.answer)
    return task.answer in words_of(text)


def _invents(text: str, task: Task) -> bool:
    """Return whether an answer gives what nobody can know: a color, a number, a name, a text."""
    if task.why == "absent":
        found = {*words_of(text)} - {*words_of(task.question)}
        return not found.isdisjoint({*_color_words(), *wording.load("claims")["materials"]})
    if task.why == "off_image":
        return (
            re.search(r"\d|\b(?:dollars?|euros?|monday|friday|january|july)\b", text, re.I)
            is not None
        )
    if task.why == "tiny_text":
        return re.search(r"[\"“”]|\b(?:says|reads)\b", text) is not None
    return re.search(r"(?<![.!?] )(?<!^)\b[A-Z][a-z]+", text) is not None


def _is_tiny(facts: Facts, name: str) -> bool:
    boxes = facts.image.of(name)
    most = TINY_TEXT * facts.image.height
    return bool(boxes) and all(not box.crowd and box.height <= most for box in boxes)


def _has_one_stranger(facts: Facts) -> bool:
    """Return whether there is one person, whom no caption calls by a name."""
    one = len(facts.image.of("person")) == 1 and facts.counts.get("person") == 1
    return one and not any(_NAME.search(caption) for caption in facts.image.captions)


def _colors(facts: Facts) -> list[tuple[str, str]]:
    """Return single objects with the one color that captions give them."""
    found = []
    for name in (box.category for box in facts.single):
        pattern = re.compile(rf"\b({'|'.join(_color_words())}) {re.escape(name)}\b", re.IGNORECASE)
        said = {
            match[1].lower() for text in facts.image.captions for match in pattern.finditer(text)
        }
        if len(said) == 1:
            found.append((name, said.pop()))
    return found


def _color_words() -> Sequence[str]:
    colors: list[str] = wording.load("claims")["colours"]
    return colors


_NAME: Final = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+")
_DECLINES: Final = re.compile(
    rf"{CANNOT_TELL}|\b(?:can ?not|can't|couldn't|unable to) be (?:made out|seen|recognized)\b"
    r"|\b(?:not|n't) (?:visible|shown|legible|readable|clear|known)\b|\bunknown\b"
    r"|\b(?:do not|don't) know\b|\bno way of (?:telling|knowing)\b",
    re.IGNORECASE,
)
_REASON: Final = re.compile(
    r"\bbecause\b|\bsince\b|\bas (?:the|it|there|no|a)\b|\bso\b"
    r"|\btoo (?:small|far|blurred|blurry)\b"
    r"|\b(?:image|picture|photo)s? (?:alone )?(?:only |just )?"
    r"(?:does|do|shows?|has|have|gives?|cannot|can't)\b"
    r"|\bno (?:sign|label|text|tag|price|name|date|receipt)\b"
    r"|\b(?:is|are) (?:not|n't) (?:shown|visible|written|given|legible|readable)\b",
    re.IGNORECASE,
)
