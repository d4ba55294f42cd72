"""What a question asks, and whether its answer says yes, no, or a number."""

import itertools
import re
from collections.abc import Sequence
from typing import Final, Literal

from data_tools.instruct.verify.flags import COUNTED
from data_tools.instruct.verify.grammar import PREPOSITIONS, determiner, word_set
from data_tools.instruct.verify.lazy import lazy
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.numbers import number_of
from data_tools.instruct.verify.reading import Reading, Sentence

QuestionKind = Literal["existence", "how_many", "yes_no", "open"]
"""`existence`: whether a thing is in the image, without conditions; `yes_no`: any other question
that is answered so."""


class Asked:
    """A question by itself; many samples ask the same one."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    @lazy
    def sentence(self) -> Sentence | None:
        """Return the last sentence; those before it only prepare it."""
        return self.reading.sentences[-1] if self.reading.sentences else None

    @lazy
    def mentions(self) -> tuple[Mention, ...]:
        """Return what the question names."""
        return self.sentence.mentions if self.sentence else ()

    @lazy
    def alternatives(self) -> frozenset[Mention]:
        """Return the things that it offers for choice, as in `a car, a bus or a bike`."""
        if self.sentence is None or "or" not in self.sentence.words:
            return frozenset()
        words, offered = self.sentence.words, set()
        for one, other in itertools.pairwise(reversed(self.mentions)):
            between = words[other.last + 1 : one.first]
            if "or" in between or ("," in between and one in offered):
                offered |= {one, other}
        return frozenset(offered)

    @lazy
    def kind(self) -> QuestionKind:
        """Return what an answer to it would say."""
        if self.sentence is None:
            return "open"
        words = self.sentence.words
        if self.how_many is not None:
            return "how_many"
        start = 0
        while start < len(words) and words[start] in _POLITE:
            start += 1
        if start < len(words) and words[start] in _AUXILIARIES:
            return "existence" if self._asks_existence(start) else "yes_no"
        return "open"

    @lazy
    def is_request(self) -> bool:
        """Return whether it asks or instructs."""
        words = [word for word in self.reading.words if word not in _BEFORE_ORDERS]
        return (
            "?" in self.reading.text
            or bool(words and words[0] in _INSTRUCTIONS)
            or _REQUEST.search(self.reading.text) is not None
        )

    @lazy
    def counted(self) -> Mention | None:
        """Return the thing whose number is asked for; None for the sum of several."""
        if self.how_many is None:
            return None
        after = [m for m in self.mentions if m.first >= self.how_many]
        if not after or after[0].first > self.how_many + 3 or self.sentence is None:
            return None
        several = len(after) > 1 and self.sentence.words[after[0].last + 1] == "and"
        return None if several else after[0]

    @lazy
    def is_unrestricted(self) -> bool:
        """Return whether the thing is asked for in the whole image, and only named."""
        if self.sentence is None:
            return False
        words = self.sentence.words
        for i in range(3, len(words) - 1):
            if words[i] in (",", "and") and words[i + 1] in _ASKS_MORE:
                words = words[:i]  # `How many horses are there, and what are they doing?`
                break
        inside = {
            i
            for m in self.mentions
            if not _is_place(words, m.first)
            for i in range(m.first, m.last + 1)
        }
        while words[-1] in (",", "and"):
            words = words[:-1]
        return all(i in inside or word in _OF_EXISTENCE for i, word in enumerate(words))

    @lazy
    def how_many(self) -> int | None:
        """Return index of the word after `how many` or `number of`."""
        if self.sentence is None or not self.reading.bits & COUNTED:
            return None
        words = self.sentence.words
        for i in range(len(words) - 1):
            if words[i : i + 2] in (["how", "many"], ["number", "of"]):
                return i + 2
        return None

    def _asks_existence(self, start: int) -> bool:
        words = self.sentence.words if self.sentence else []
        existential = (
            words[start + 1 : start + 2] == ["there"]
            or "see" in words[start : start + 4]
            or bool(_SHOWING & set(words[start : start + 6]))
        )
        return existential and self.is_unrestricted and bool(self.mentions)


class Question:
    """A question together with the answer it got."""

    def __init__(self, asked: Asked, answer: Reading) -> None:
        self.asked = asked
        self.answer = answer
        self.reading = asked.reading
        self.sentence = asked.sentence
        self.mentions = asked.mentions

    @lazy
    def kind(self) -> QuestionKind:
        """Return what an answer to it would say."""
        kind = self.asked.kind
        if kind in ("existence", "yes_no") and self.sentence and "or" in self.sentence.words:
            return kind if self.is_answered_by_yes_or_no else "open"
        return kind

    @property
    def counted(self) -> Mention | None:
        """Return the thing whose number is asked for; None for the sum of several."""
        return self.asked.counted

    @property
    def is_unrestricted(self) -> bool:
        """Return whether the thing is asked for in the whole image, and only named."""
        return self.asked.is_unrestricted

    @lazy
    def polarity(self) -> Literal["yes", "no"] | None:
        """Return what the answer begins with."""
        words = self.answer.words
        if not words:
            return None
        if words[0] in _YES:
            return "yes"
        if words[0] in ("no", "nope") and (
            len(words) == 1 or words[1] in (",", ".", "!", ";", "-")
        ):
            return "no"
        # `I see a cat and a cup, so yes.`: reasons first, then the verdict
        if words[0] in ("unfortunately", "actually") and words[1:2] == [","]:
            words = words[2:]
            if words[:1] == ["no"]:
                return "no"
        if not self.answer.mentions and _denies(words):
            return "no"
        if words[-1] == "." and words[-3:-1] in (["so", "yes"], ["so", "no"]):
            return "yes" if words[-2] == "yes" else "no"
        return None

    @property
    def is_answered_by_yes_or_no(self) -> bool:
        """Return whether the answer begins, or ends, with one of the two."""
        return self.polarity is not None

    @lazy
    def number(self) -> int | None:
        """Return the number that the answer to `how many` gives; 0 for none."""
        words = self.answer.words
        # `I see two cats and a cup, so one.`: the verdict counts, not what was seen
        has_verdict = words[-1:] == ["."] and words[-3:-2] == ["so"]
        for word in words[-2:-1] if has_verdict else words[:12]:
            if word in ("no", "none", "zero"):
                return 0
            value = number_of(word)
            if value is not None:
                return value
        for _, mention in self.answer.mentions:
            if (
                mention.number == "one"
                and self.counted
                and self.counted.entry.categories == (mention.entry.categories)
            ):
                return 1
        return None


def _is_place(words: Sequence[str], first: int) -> bool:
    """Return whether the thing only says where another one is asked for: `in the bowl`."""
    _, begin = determiner(words, first)
    return begin > 0 and words[begin - 1] in PREPOSITIONS and words[begin - 1] != "of"


def _denies(words: Sequence[str]) -> bool:
    """Return whether an answer that names nothing denies: `I do not see any`, `None are there`."""
    text = " ".join(words[:9])
    return text.startswith(
        ("none ", "nothing ", "not that ", "there are none", "there is none")
    ) or (
        bool({"not", "don't", "can't", "cannot", "aren't", "isn't"} & set(words[:5]))
        and bool({"any", "one"} & set(words[:8]))
    )


_ASKS_MORE: Final = word_set("what who where how which")
_POLITE: Final = word_set("please so and now , tell me")
_AUXILIARIES: Final = word_set("is are does do can could was were has have did")
_YES: Final = word_set("yes yeah yep correct indeed absolutely definitely certainly sure exactly")
_SHOWING: Final = word_set("show contain include have feature visible present")
_OF_EXISTENCE: Final = word_set(
    "is are there a an any some the can could you we i one see do does did picture image photo "
    "photograph scene show contain include have feature in this here visible present be seen how "
    "many number of what s or at all shown pictured pair pairs piece pieces and , anywhere please "
    "total roughly about approximately me tell its kitchen room bathroom bedroom street"
)
_INSTRUCTIONS: Final = word_set(
    "describe tell list count name explain say give identify point find show write summarise "
    "summarize mention state provide discuss outline compare imagine walk look what which who "
    "where when why how is are does do can could analyze analyse suggest create help let help try "
    "recommend propose think consider predict guess estimate infer determine choose pick select "
    "compose draft elaborate characterize characterise interpret illustrate clarify share offer "
    "highlight examine evaluate assess explore justify generate based in given focus tell talk "
    "paint put depict portray"
)
_REQUEST: Final = re.compile(
    r"\b(?:i(?:'d| would)? (?:like|love|want|need|wish)|"
    r"i(?: am|'m) (?:curious|interested|wondering)|i wonder|let me know|help me|tell me|show me)\b",
    re.IGNORECASE,
)
_BEFORE_ORDERS: Final = word_set("please now then and also first finally , briefly")
