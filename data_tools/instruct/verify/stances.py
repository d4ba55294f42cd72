"""How a sentence speaks of a thing: as there, as absent, as possible, or of its kind in general."""

from typing import TYPE_CHECKING, Final, Literal

from data_tools.instruct.verify.grammar import (
    DEFINITE,
    INDEFINITE,
    MODALS,
    QUANTITIES,
    determiner,
    is_finite,
    is_plural,
    last_of_phrase,
    word_set,
)

if TYPE_CHECKING:
    from data_tools.instruct.verify.reading import Sentence

Stance = Literal["asserted", "denied", "local", "hypothetical", "generic", "depicted"]
"""A thing is named as there; as not in the image; as not here or not done (`not on the table`); as
possible; in a remark about its kind; as an image of one (`statue of a dog`)."""


class Stances:
    """The stances of everything that one sentence names.

    Args:
        sentence: The sentence.
        inside: Indices of words that belong to things the sentence names.
    """

    def __init__(self, sentence: "Sentence", inside: frozenset[int]) -> None:
        self._sentence = sentence
        self._words = sentence.words
        self._inside = inside
        vocabulary = sentence.vocabulary
        self._negations = vocabulary & _NEGATIONS
        self._modals = vocabulary & _HYPOTHETICAL
        self._generic = vocabulary & _GENERIC
        self._compares = vocabulary & _COMPARISONS
        self._depicts = vocabulary & sentence.lexicon.depictions

    def of(self, first: int, last: int) -> Stance:
        """Return the stance of the words from `first` to `last`."""
        if self._negations:
            stance = self._negated(first, last)
            if stance is not None:
                return stance
        if self._modals and self._is_hypothetical(first, last):
            return "hypothetical"
        if self._generic and self._is_generic(first):
            return "generic"
        if self._compares and self._is_compared(first):
            return "generic"
        if self._depicts and self._is_depicted(first):
            return "depicted"
        return "asserted"

    def _negated(self, first: int, last: int) -> Stance | None:
        words = self._words
        begin, end = self._sentence.clause(first)
        for cue in range(first - 1, begin - 1, -1):
            word = words[cue]
            if word not in _NEGATIONS or (word == "no" and words[cue + 1] == ","):
                continue
            if word == "not" and words[cue + 1] in ("only", "just"):
                continue
            if word == "no" and words[cue + 1] in ("longer", "doubt"):
                continue
            if word in ("can't", "cannot") and words[cue + 1 : cue + 2] == ["help"]:
                continue
            plain = self._denies_existence(cue, first) and self._is_unrestricted(last, end)
            return "denied" if plain else "local"
        return self._denied_after(last, end)

    def _denies_existence(self, cue: int, first: int) -> bool:
        """Return whether a negation before the thing denies that it is in the image."""
        words = self._words
        between = [words[i] for i in range(cue + 1, first) if i not in self._inside]
        if not _MORE.isdisjoint(between):
            return False  # `no other person`
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
        """Return whether nothing after the thing narrows where or which (`on the table`)."""
        rest = range(last + 1, end)
        return all(self._words[i] in FRAME_WORDS or i in self._inside for i in rest)

    def _denied_after(self, last: int, end: int) -> Stance | None:
        """Read `The dog is not visible.`; return None where something else is denied."""
        words = self._words
        after = words[last + 1 : end]
        for i, word in enumerate(after[:3]):
            if word in _NEGATIONS:
                if i > 1 or (i == 1 and after[0] not in _BE):
                    return None
                rest = after[i + 1 :]
                if rest and _VISIBLE & set(rest) and all(w in FRAME_WORDS for w in rest):
                    return "denied"
                return None
            if word not in _BE:
                return None
        return None

    def _is_hypothetical(self, first: int, last: int) -> bool:
        words = self._words
        after = words[last + 1 : last + 2]
        if after and after[0] in _GUESSES and is_plural(words[last]) | (words[last] == "people"):
            return determiner(words, first)[0] == "none"  # `People probably fill them.`
        if after and after[0] in MODALS and not self._sentence.is_seen_after(last):
            kind, begin = determiner(words, first)
            if kind == "indefinite" or (kind == "none" and is_plural(words[last])):
                return True  # `A dog might chase the ball.`
            if kind == "definite" and words[begin] in _POSSESSIVES:
                return False  # `His bicycle might fall.` says that he has one
        limit = self._scope_begins(first, last)
        if after == ["that"] or after == ["which"]:
            kind, _ = determiner(words, first)
            if kind == "definite" and is_finite("".join(words[last + 2 : last + 3])):
                return False  # `They can watch the television that stands there.`
        for i in range(first - 1, limit - 1, -1):
            if words[i] in _HYPOTHETICAL and self._reaches(i, first):
                return True
        return False

    def _reaches(self, cue: int, first: int) -> bool:
        """Return whether what this word makes possible includes the thing."""
        words = self._words
        word = words[cue]
        if word in ("can", "could"):
            nearby = words[cue + 1 : cue + 3]
            return not (
                "see" in nearby or ("be" in nearby and "seen" in words[cue + 2 : cue + 5])
                or "visible" in words[cue + 1 : cue + 4]
            )  # fmt: skip
        if word in _LIKE:
            if cue < self._sentence.clause(first)[0]:
                return False
            if word == "like":
                # `items like a bottle` are there, `shaped like a bottle` is not one
                if 0 < cue <= 3 and words[cue - 1] in ("look", "looks") and words[cue - 2] in _IT:
                    return False  # `They look like grown men.`
                return cue > 0 and words[cue - 1] in _LIKENED
            if word == "for":
                return first - cue <= 3 and words[cue + 1] not in _DEFINITE
            return words[cue + 1] in ("if", "though")  # `as if`
        if word == "waiting" and words[cue + 1] not in ("for", "to"):
            return False  # `waiting on the platform`
        if word in _WEAK:
            return first - cue <= 12
        return True

    def _scope_begins(self, first: int, last: int) -> int:
        """Return the first word that may still make the thing hypothetical.

        A new clause with a verb of its own is out of reach of what was said before it: `It may
        rain, and two dogs sit there`.
        """
        words = self._words
        for i in range(first - 1, 0, -1):
            word = words[i]
            if word in _NEW_CLAUSE:
                return i
            if word in (",", "and", "so", "then", "as", "where") and (
                self._is_subject(i, first, last) or self._opens_clause(i, first)
            ):
                return i
        return 0

    def _opens_clause(self, opener: int, first: int) -> bool:
        """Return whether a clause with a subject and a verb begins here: `, and a woman holds`."""
        words = self._words
        start = opener + 1
        while start < first and words[start] in ("and", "then", "so"):
            start += 1
        if start >= first or words[start] not in _SUBJECT_STARTS:
            return False
        if words[start] in _SUBJECT_PRONOUNS:
            verb = start + 1
        else:
            verb = last_of_phrase(words, start + 1, first) + 1
        return verb < first and is_finite(words[verb]) and words[verb] not in MODALS

    def _is_subject(self, opener: int, first: int, last: int) -> bool:
        """Return whether the thing is the subject of the clause that opens here."""
        words = self._words
        after = words[last + 1] if last + 1 < len(words) else ""
        if not is_finite(after) or after in MODALS:
            return False
        _, begin = determiner(words, first)
        return begin == opener + 1

    def _is_generic(self, first: int) -> bool:
        kind, begin = determiner(self._words, first)
        if kind == "number" or (kind == "definite" and begin == 0):
            return False
        start, end = self._sentence.clause(first)
        return any(self._words[i] in _GENERIC for i in range(start, end))

    def _is_compared(self, first: int) -> bool:
        words = self._words
        kind, begin = determiner(words, first)
        if kind in ("definite", "number") or begin == 0:
            return False
        before = words[begin - 1]
        if before == "as":
            return "as" in words[max(0, begin - 5) : begin - 1]
        if before in ("to", "with"):
            return "compared" in words[max(0, begin - 3) : begin]
        return before in ("unlike", "than", "versus")

    def _is_depicted(self, first: int) -> bool:
        before = self._words[max(0, first - 4) : first]
        return any(word in self._depicts for word in before)


_SUBJECT_PRONOUNS: Final = word_set("he she it they someone somebody everyone")
_SUBJECT_STARTS: Final = DEFINITE | INDEFINITE | QUANTITIES | _SUBJECT_PRONOUNS
_NEW_CLAUSE: Final = word_set("; : while whereas but although though because since when")
_NEGATIONS: Final = word_set(
    "no not without neither nor never none nobody isn't aren't wasn't weren't don't doesn't didn't "
    "can't cannot couldn't won't lack lacks lacking absence absent"
)
_MORE: Final = word_set("other others else more further additional another")
_HAVING: Final = word_set("has have had having with of by")
_FRAME_NOUNS: Final = word_set("picture image photo photograph scene view frame shot")
_PLACES: Final = word_set(
    "kitchen bathroom bedroom room street road beach park field house office sight view around"
)
_EXISTENTIAL_SUBJECTS: Final = _FRAME_NOUNS | word_set(
    "there is are in the this a an , i we you one it does do can be also and or visible actually"
)
_EXISTENTIAL_VERBS: Final = word_set(
    "any some a an the see show contain include have feature depict be seen find single visible "
    "spot also , or and nor"
)
_BE: Final = word_set("is are was were can does do to be isn't aren't cannot can't doesn't don't")
_VISIBLE: Final = word_set("visible present seen shown there pictured depicted appear here") | (
    _FRAME_NOUNS
)
FRAME_WORDS: Final = (
    _VISIBLE
    | _PLACES
    | word_set(
        "in the this at all anywhere is are can be to or and nor , of within part entire whole "
        "either on itself"
    )
)
_STOPS: Final = word_set(
    "of in on at to with by from near behind is are was were be been has have had the a an and or "
    "that which who it its his her their , wearing holding"
)
_POSSESSIVES: Final = word_set("his her its")
_LIKE: Final = word_set("like as for")
_WEAK: Final = word_set(
    "help helps allow allows allowing able designed intended want wants need needs hope hoping "
    "expect expecting instead rather avoid prevent protect ready prepare waiting future either "
    "evokes reminiscent"
)
_HYPOTHETICAL: Final = (
    _LIKE
    | _WEAK
    | word_set(
        "can could might may will would should must perhaps possibly probably likely maybe "
        "presumably "
        "if unless suggest suggests suggesting indicate indicates indicating imply implies "
        "implying potential potentially whether imagine"
    )
)
_LIKENED: Final = word_set(
    "look looks looking seems seem feel feels is are shaped dressed just much"
)
_GUESSES: Final = word_set("probably perhaps possibly likely presumably maybe")
_IT: Final = word_set("it they this these he she")
_DEFINITE: Final = word_set("the this these that those")
_GENERIC: Final = word_set(
    "often usually typically generally commonly sometimes normally traditionally always generally "
    "tend tends everyday rarely everybody everyone whoever nowadays"
)
_COMPARISONS: Final = word_set("unlike than versus as compared")
STANCE_CUES: Final = _NEGATIONS | _HYPOTHETICAL | _GENERIC | _COMPARISONS
