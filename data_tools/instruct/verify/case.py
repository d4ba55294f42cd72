"""What a rule is given: one turn read, the image's knowledge, and how strict to be."""

from collections.abc import Iterable
from typing import Literal

from data_tools import wording
from data_tools.coco import AnnotatedImage
from data_tools.instruct.config import VerifyConfig
from data_tools.instruct.schema import Check, SampleType, Turn, Verdict
from data_tools.instruct.verify.describing import (
    PHRASED,
    RELATIONS,
    action_stems,
    attribute_words,
)
from data_tools.instruct.verify.flags import (
    ACTION,
    ATTRIBUTE,
    COUNTED,
    INTRODUCES,
    KIND,
    NUMBER,
    PERSON,
    PLACE,
    RELATION,
    SIGHT,
    STANCE,
    FlagTable,
)
from data_tools.instruct.verify.grammar import INTRODUCING
from data_tools.instruct.verify.knowledge import Knowledge
from data_tools.instruct.verify.lexicon import Lexicon, Mention
from data_tools.instruct.verify.numbers import AT_LEAST_TWO, NUMBERS, ORDINALS
from data_tools.instruct.verify.placings import CUES
from data_tools.instruct.verify.questions import Asked, Question
from data_tools.instruct.verify.reading import Reading
from data_tools.instruct.verify.stances import STANCE_CUES
from vlm_sft.utils.words import plural, spoken

Part = Literal["question", "answer"]
PRONOUNS = frozenset({"it", "its", "they", "their", "them", "he", "she", "his", "her", "him"})
REMEMBERED = 256
"""The knowledge of this many images is kept at a time."""
REMEMBERED_QUESTIONS = 4096
"""Number of questions that are cached as read."""


class Policy:
    """How strict the checks are, and the words they look for.

    Args:
        config: The run's `verify` section.
        categories: Names of all categories that are annotated, whether in this image or not.
    """

    def __init__(self, config: VerifyConfig, categories: Iterable[str]) -> None:
        self.config = config
        self.lexicon = Lexicon(categories)
        _fill(self.lexicon.flags)
        self.under_labelled = frozenset(map(spoken, config.under_labelled))
        self._known: dict[int, Knowledge] = {}
        self._questions: dict[str, Asked] = {}

    def knowledge(self, image: AnnotatedImage) -> Knowledge:
        """Return what the annotations state about an image; samples of one image share it."""
        known = self._known.get(image.id)
        if known is None or known.image is not image:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            known = self._known[image.id] = Knowledge(image, self.lexicon)
        return known

    def asked(self, text: str) -> Asked:
        """Return a question taken apart; many samples ask the same one."""
        asked = self._questions.get(text)
        if asked is None:
            if len(self._questions) >= REMEMBERED_QUESTIONS:
                self._questions.clear()
            asked = self._questions[text] = Asked(Reading(text, self.lexicon))
        return asked


class Case:
    """One turn of a sample under examination.

    Attributes:
        question_reading: The question taken apart.
        answer_reading: The answer taken apart.
        question: The question, and what its answer says to it.
        config: The run's `verify` section.
        before: The turn before.
    """

    def __init__(
        self,
        turn: Turn,
        index: int,
        sample_type: SampleType,
        knowledge: Knowledge,
        policy: Policy,
        before: "Case | None" = None,
    ) -> None:
        self.turn = turn
        self.before = before
        self.index = index
        self.sample_type = sample_type
        self.knowledge = knowledge
        self.policy = policy
        self.config = policy.config
        asked = policy.asked(turn.question)
        self.question_reading = asked.reading
        self.answer_reading = Reading(turn.answer, policy.lexicon)
        self.question = Question(asked, self.answer_reading)

    @property
    def asked(self) -> tuple[Mention, ...]:
        """Return what the question names; with only a pronoun, what the turn before is about."""
        named = self.question.mentions
        if named or self.before is None or PRONOUNS.isdisjoint(self.question_reading.vocabulary):
            return named
        earlier = self.before.asked
        if not earlier or not earlier[0].entry.firm:
            firm = [m for _, m in self.before.answer_reading.mentions if m.entry.firm]
            return tuple(firm[:1]) or earlier
        return earlier

    def check(
        self,
        rule: str,
        verdict: Verdict,
        code: str | None,
        part: Part,
        span: tuple[int, int] | None,
        claim: str,
        evidence: tuple[int, ...] = (),
    ) -> Check:
        """Return a finding about this turn."""
        return Check(rule, verdict, code, self.index, part, span, claim, evidence)


def _fill(table: FlagTable) -> None:
    """Enter the words of all rules."""
    facts = wording.load("facts")
    table.add(STANCE, STANCE_CUES)
    table.add(ATTRIBUTE, attribute_words())
    table.add(ACTION, action_stems())
    table.add(ACTION, PHRASED)
    table.add(RELATION, RELATIONS)
    kinds = [text for groups in facts["kinds"].values() for group in groups for text in group]
    table.add(KIND, (text.split()[0] for text in kinds))
    people = facts["people"]
    for name in ("male", "female", "infant", "adult", "grown", "small", "he", "she"):
        table.add(PERSON, people[name])
    table.add(PLACE, CUES)
    table.add(NUMBER, NUMBERS)
    table.add(NUMBER, AT_LEAST_TWO)
    table.add(NUMBER, ORDINALS)
    striking = [word for group in facts["striking"].values() for word in group]
    table.add(SIGHT, (form for word in striking for form in {word, plural(word)}))
    table.add(COUNTED, ("many", "number"))
    table.add(INTRODUCES, INTRODUCING)
