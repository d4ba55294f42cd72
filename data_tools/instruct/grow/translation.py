"""Compare a translation with its parent, as far as that needs no knowledge of the language.

The rules of `verify` read English. So the claims of a translation are not compared with boxes and
captions; those of its parent are, again, and the checks say so. A translation back into English is
checked like any other sample.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from data_tools.instruct.grow.checks import fault, note
from data_tools.instruct.grow.novelty import words_of
from data_tools.instruct.schema import Check, Turn
from vlm_sft.evaluation.scores.constraint_checks import language_of
from vlm_sft.evaluation.scores.exact import read_count

ENGLISH: Final = "english"
LONGER: Final = 4.0
"""A translated text has at most this many times as many characters as the original, or as few."""
LEAST_TEXT: Final = 20
"""Shorter texts are not compared in length."""
LEAST_LETTERS: Final = 40
"""The language of shorter samples is not judged."""

LANGUAGES: Final[Mapping[str, tuple[str, str, str]]] = {
    "arabic": ("ar", "نعم", "لا"), "chinese": ("zh", "是", "不|否|没"),
    "czech": ("cs", "ano", "ne"), "danish": ("da", "ja|jo", "nej"), "dutch": ("nl", "ja", "nee"),
    "english": ("en", "yes", "no"), "finnish": ("fi", "kyllä", "ei"), 
    "french": ("fr", "oui|si", "non"),
    "german": ("de", "ja|doch", "nein"), "greek": ("el", "ναι", "όχι"),
    "hindi": ("hi", "हाँ|हां", "नहीं"), "hungarian": ("hu", "igen", "nem"),
    "indonesian": ("id", "ya", "tidak"), "italian": ("it", "sì|si", "no"),
    "japanese": ("ja", "はい", "いいえ"), "korean": ("ko", "네|예", "아니"),
    "norwegian": ("no", "ja|jo", "nei"), "polish": ("pl", "tak", "nie"),
    "portuguese": ("pt", "sim", "não"), "romanian": ("ro", "da", "nu"),
    "russian": ("ru", "да", "нет"), "spanish": ("es", "sí|si", "no"), 
    "swedish": ("sv", "ja|jo", "nej"),
    "turkish": ("tr", "evet", "hayır"), "ukrainian": ("uk", "так", "ні"),
    "vietnamese": ("vi", "có|vâng", "không"),
}  # fmt: skip
"""langdetect's code, and what an answer of yes and of no begins with."""


def check_translation(
    before: Sequence[Turn], after: Sequence[Turn], language: str
) -> Iterator[Check]:
    """Yield what is wrong with the turns of a translation.

    Args:
        before: The parent's turns.
        after: Their translation.
        language: A key of `LANGUAGES`.
    """
    if len(before) != len(after):
        yield fault("GROWN_OTHER_QUESTION", f"{len(after)} turns of {len(before)}")
        return
    text = " ".join(part for turn in after for part in (turn.question, turn.answer))
    code = LANGUAGES[language][0]
    found = language_of(text) if len(text) >= LEAST_LETTERS else code
    if found != code:
        yield fault("TRANSLATION_LANGUAGE", f"{found or 'no language'}, {code} expected")
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        for part in ("question", "answer"):
            source, target = getattr(old, part), getattr(new, part)
            if not words_of(target):
                yield fault("TURN_EMPTY", f"the {part} has no words", number, part)
            elif len(source) >= LEAST_TEXT and not (
                1 / LONGER <= len(target) / len(source) <= LONGER
            ):
                claim = f"{len(target)} characters for {len(source)}"
                yield fault("TRANSLATION_LENGTH", claim, number, part)
        yield from _other_answer(old, new, language, number)


def claims_of_parent(checks: Sequence[Check], language: str) -> Iterator[Check]:
    """Yield the findings about the parent's claims, which stand for those of the translation."""
    yield note(f"claims are not checked in {language}: those of the English parent are")
    for check in checks:
        yield Check(
            rule=check.rule, verdict=check.verdict, code=check.code, turn=check.turn,
            claim=f"parent: {check.claim}", evidence=check.evidence,
        )  # fmt: skip


def _other_answer(old: Turn, new: Turn, language: str, number: int) -> Iterator[Check]:
    """Yield a finding where yes became no, or a count another one."""
    first = words_of(old.answer)[:1]
    if first in (["yes"], ["no"]):
        kept = LANGUAGES[language][1 if first == ["yes"] else 2]
        if not re.match(rf"\W*(?:{kept})", new.answer, re.IGNORECASE):
            yield fault(
                "GROWN_OTHER_ANSWER", f"{new.answer} (parent: {first[0]})", number, "answer"
            )
    count = read_count(old.answer) if old.kind == "count" else None
    digits: set[int | None] = {int(text) for text in re.findall(r"\d{1,9}", new.answer)}
    if language == ENGLISH:
        digits |= {read_count(new.answer)}
    if count is not None and count > 1 and count not in digits:
        claim = f"{new.answer} (parent: {count}, expected in digits)"
        yield fault("GROWN_OTHER_ANSWER", claim, number, "answer")
