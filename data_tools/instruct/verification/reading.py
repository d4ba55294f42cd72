"""A text as sentences of words, with the things it names and how it speaks of them."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from data_tools.instruct.verification.lazy import lazy
from data_tools.instruct.verification.lexicon import (
    Entry,
    GrammaticalNumber,
    Lexicon,
    Match,
    word_set,
)

Stance = Literal["asserted", "denied", "local", "hypothetical", "generic", "depicted"]
"""How a thing is named: as there; as not in the picture; as not here or not done (`not on the
table`); as possible; as a remark about its kind; as an image of one (`statue of a dog`)."""


@dataclass(slots=True, eq=False)
class Mention:
    """A thing named in a text; `first` and `last` are words of its sentence."""

    entry: Entry
    word: str
    first: int
    last: int
    stance: Stance

    @property
    def number(self) -> GrammaticalNumber:
        """Whether the word stands for one or for many."""
        return self.entry.number


@dataclass(eq=False)
class Sentence:
    """Lower-case words, punctuation among them; the first is word `begin` of its text."""

    words: Sequence[str]
    begin: int
    text: "Reading"

    @property
    def lexicon(self) -> Lexicon:
        """Which words name what."""
        return self.text.lexicon

    def span(self, first: int, last: int) -> tuple[int, int]:
        """Characters of the text from word `first` to word `last`."""
        spans = self.text.spans
        return spans[self.begin + first][0], spans[self.begin + last][1]

    @lazy
    def mentions(self) -> tuple[Mention, ...]:
        """The things named, in order."""
        found = self.lexicon.matches(self.words)
        if not found:
            return ()
        words = self.words
        plain = self.lexicon.depictions.isdisjoint(words) and _STANCE_CUES.isdisjoint(words)
        stances = None if plain else _Stances(self, found)
        return tuple(
            Mention(
                m.entry,
                words[m.first] if m.first == m.last else " ".join(words[m.first : m.last + 1]),
                m.first,
                m.last,
                stances.of(m) if stances else "asserted",
            )
            for m in found
        )

    @lazy
    def vocabulary(self) -> frozenset[str]:
        """The words, each once."""
        return frozenset(self.words)

    def clause(self, index: int) -> tuple[int, int]:
        """First and one-past-last word of the clause around a word."""
        bounds = self._bounds
        place = bisect_right(bounds, index)
        return bounds[place - 1], bounds[place] if place < len(bounds) else len(self.words)

    @lazy
    def _bounds(self) -> list[int]:
        words = self.words
        bounds = [0]
        for i in range(1, len(words)):
            word = words[i]
            ends = word in _CLAUSE_WORDS or (
                word in (",", "and", "or") and i + 1 < len(words) and words[i + 1] in _STARTERS
            )
            if ends and not (word == "or" and words[i + 1] in _OR_GOES_ON):
                bounds.append(i)
        return bounds


class Reading:
    """A text taken apart once, for all rules."""

    def __init__(self, text: str, lexicon: Lexicon) -> None:
        self.text = text
        self.lexicon = lexicon
        self.words: list[str] = [word.lower() for word in _TOKEN.findall(text)]
        if "'" in text or "’" in text:
            self.words = [_without_owner(word) for word in self.words]

    @lazy
    def spans(self) -> list[tuple[int, int]]:
        """Characters of the text that each word takes."""
        return [match.span() for match in _TOKEN.finditer(self.text)]

    @lazy
    def spoken(self) -> list[str]:
        """The words and numbers, without punctuation."""
        return [word for word in self.words if word[0].isalnum()]

    @lazy
    def sentences(self) -> tuple[Sentence, ...]:
        """Its sentences; the final mark belongs to none."""
        words = self.words
        ends = [index for index, word in enumerate(words) if word in _SENTENCE_ENDS]
        begins = [0, *(end + 1 for end in ends)]
        return tuple(
            Sentence(words[begin:end], begin, self)
            for begin, end in zip(begins, [*ends, len(words)], strict=True)
            if end > begin
        )

    @lazy
    def vocabulary(self) -> frozenset[str]:
        """The words, each once."""
        return frozenset(self.words)

    @lazy
    def mentions(self) -> list[tuple[Sentence, Mention]]:
        """Every thing named, with its sentence."""
        return [(sentence, found) for sentence in self.sentences for found in sentence.mentions]


def _without_owner(word: str) -> str:
    """The owner is named, not the letter: `dog's` names a dog."""
    word = word.replace("’", "'")
    return word[:-2] if word.endswith("'s") and len(word) > 2 else word


class _Stances:
    """How a sentence speaks of the things it names."""

    def __init__(self, sentence: Sentence, matches: Sequence[Match]) -> None:
        self._sentence = sentence
        self._words = sentence.words
        self._inside = {i for m in matches for i in range(m.first, m.last + 1)}
        vocabulary = sentence.vocabulary
        self._negations = vocabulary & _NEGATIONS
        self._modals = vocabulary & _HYPOTHETICAL
        self._generic = vocabulary & _GENERIC
        self._depicts = vocabulary & sentence.lexicon.depictions

    def of(self, match: Match) -> Stance:
        if self._negations:
            stance = self._negated(match)
            if stance is not None:
                return stance
        if self._modals and self._is_hypothetical(match):
            return "hypothetical"
        if self._generic and self._in_clause(match, _GENERIC):
            return "generic"
        if self._depicts and self._is_depicted(match):
            return "depicted"
        return "asserted"

    def _negated(self, match: Match) -> Stance | None:
        words = self._words
        begin, end = self._sentence.clause(match.first)
        for cue in range(match.first - 1, begin - 1, -1):
            word = words[cue]
            if word not in _NEGATIONS or (word == "no" and words[cue + 1] == ","):
                continue
            if word == "not" and words[cue + 1] in ("only", "just"):
                continue
            if word == "no" and words[cue + 1] in ("longer", "doubt"):
                continue
            plain = self._denies_existence(cue, match) and self._is_unrestricted(match.last, end)
            return "denied" if plain else "local"
        return self._denied_after(match, end)

    def _denies_existence(self, cue: int, match: Match) -> bool:
        """Whether a negation before the thing is one of its being in the picture."""
        words = self._words
        between = [words[i] for i in range(cue + 1, match.first) if i not in self._inside]
        begin, _ = self._sentence.clause(cue)
        before = words[begin:cue]
        if words[cue] in ("without", "never", "nobody", "none", "lack", "lacks", "lacking"):
            return False
        if words[cue] in ("no", "neither", "nor"):
            if len(between) > 4 or any(word in _STOPS for word in between):
                return False
            return not before or before[-1] not in _HAVING or bool(_FRAME_NOUNS & set(before))
        frames = not before or not {*before} - _EXISTENTIAL_SUBJECTS
        return frames and all(word in _EXISTENTIAL_VERBS for word in between)

    def _is_unrestricted(self, last: int, end: int) -> bool:
        """Whether nothing after the thing narrows down where or which (`on the table`)."""
        return all(
            word in _FRAME_WORDS or i in self._inside
            for i, word in enumerate(self._words[last + 1 : end], last + 1)
        )

    def _denied_after(self, match: Match, end: int) -> Stance | None:
        """`The dog is not visible.`; nothing said where the negation is of something else."""
        words = self._words
        after = words[match.last + 1 : end]
        for i, word in enumerate(after[:3]):
            if word in _NEGATIONS:
                if i > 1 or (i == 1 and after[0] not in _BE):
                    return None
                rest = after[i + 1 :]
                if rest and _VISIBLE & set(rest) and all(w in _FRAME_WORDS for w in rest):
                    return "denied"
                return None
            if word not in _BE:
                return None
        return None

    def _is_hypothetical(self, match: Match) -> bool:
        words = self._words
        for i in range(match.first - 1, -1, -1):
            word = words[i]
            if word not in _HYPOTHETICAL:
                continue
            if word in ("can", "could") and i + 1 < len(words):
                nearby = words[i + 1 : i + 3]
                if "see" in nearby or ("be" in nearby and "seen" in words[i + 2 : i + 4]):
                    continue
            if word == "like" and (i == 0 or words[i - 1] not in _LIKENED):
                continue  # `items like a bottle` are there, `shaped like a bottle` is not one
            if word == "for" and (match.first - i > 3 or words[i + 1] in _DEFINITE):
                continue
            if word in ("for", "like", "as") and i < self._sentence.clause(match.first)[0]:
                continue
            if word == "as" and words[i + 1] not in ("if", "though"):
                continue
            return True
        return False

    def _in_clause(self, match: Match, cues: frozenset[str]) -> bool:
        begin, end = self._sentence.clause(match.first)
        return any(self._words[i] in cues for i in range(begin, end))

    def _is_depicted(self, match: Match) -> bool:
        before = self._words[max(0, match.first - 4) : match.first]
        return any(word in self._depicts for word in before)


_TOKEN: Final = re.compile(
    r"[^\W\d_][^\W_]*(?:[-'’][^\W_]+)*|\d+(?:[.:,]\d+)*(?:st|nd|rd|th)?|\n|[^\w\s]"
)
_SENTENCE_ENDS: Final = frozenset(".!?\n")
_CLAUSE_WORDS: Final = word_set("; : ( ) but while although though whereas however because since")
_STARTERS: Final = word_set(
    "a an the there it he she they this that these those but while and with which who whose where "
    "only just one two three four five six several some its his her their however instead so "
    "because although i we you another many both each as in on to at near next behind"
)
_OR_GOES_ON: Final = word_set("a an any the other")
_NEGATIONS: Final = word_set(
    "no not without neither nor never none nobody isn't aren't wasn't weren't don't doesn't didn't "
    "can't cannot couldn't won't lack lacks lacking absence absent"
)
_HAVING: Final = word_set("has have had having with of by")
_FRAME_NOUNS: Final = word_set("picture image photo photograph scene view frame shot")
_EXISTENTIAL_SUBJECTS: Final = _FRAME_NOUNS | word_set(
    "there is are in the this a an , i we you one it does do can be also and or visible"
)
_EXISTENTIAL_VERBS: Final = word_set(
    "any some a an the see show contain include have feature depict be seen find single visible "
    "spot also , or and nor other"
)
_BE: Final = word_set("is are was were can does do to be isn't aren't cannot can't doesn't don't")
_VISIBLE: Final = word_set("visible present seen shown there pictured depicted appear here") | (
    _FRAME_NOUNS
)
_FRAME_WORDS: Final = _VISIBLE | word_set(
    "in the this at all anywhere is are can be to or and nor , of within part entire whole either"
)
_STOPS: Final = word_set(
    "of in on at to with by from near behind is are was were be been has have had the a an and or "
    "that which who it its his her their , wearing holding"
)
_HYPOTHETICAL: Final = word_set(
    "can could might may would should must perhaps possibly probably likely maybe presumably "
    "if unless suggest suggests suggesting indicate indicates indicating imply implies implying "
    "potential potentially whether like as for help helps allow allows allowing able designed "
    "intended want wants need needs hope hoping expect expecting imagine instead rather avoid "
    "prevent protect ready prepare waiting future either evokes reminiscent enjoy enjoying"
)
_LIKENED: Final = word_set(
    "look looks looking seems seem feel feels is are shaped dressed just much"
)
_DEFINITE: Final = word_set("the this these that those")
_GENERIC: Final = word_set(
    "often usually typically generally commonly sometimes normally traditionally known popular "
    "always generally tend tends everyday rarely"
)
_STANCE_CUES: Final = _NEGATIONS | _HYPOTHETICAL | _GENERIC
