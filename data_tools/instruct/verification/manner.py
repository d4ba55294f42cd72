"""How a text speaks: leaks of its source, guesses, refusals, other languages, planted orders."""

import re
from collections.abc import Iterator
from typing import Final

from data_tools.instruct.schema import Check
from data_tools.instruct.verification.case import Case, Part
from data_tools.instruct.verification.knowledge import Knowledge
from data_tools.instruct.verification.lexicon import word_set
from data_tools.instruct.verification.reading import Reading


def check(case: Case) -> Iterator[Check]:
    """Findings about one turn; none where it speaks as it should."""
    for part, text in (("question", case.turn.question), ("answer", case.turn.answer)):
        yield from _find(case, part, text, "leak", "LEAK", _LEAK)  # type: ignore[arg-type]
        yield from _find(case, part, text, "injection", "INJECTION", _ORDERS)  # type: ignore[arg-type]
    if case.turn.kind != "cannot_tell" or _OF_ITSELF.search(case.turn.answer):
        yield from _find(case, "answer", case.turn.answer, "refusal", "REFUSAL", _REFUSAL)
    yield from _planted(case)
    if not is_english(case.answer_reading):
        yield case.check(
            "language", "contradicted", "LANGUAGE", "answer", None, case.turn.answer[:60]
        )


def hedged_sentences(case: Case) -> tuple[int, int]:
    """How many sentences of an answer guess, and how many there are.

    Words of a caption are the annotator's, who saw the picture.
    """
    sentences = case.answer_reading.sentences
    places = [
        match.start()
        for match in _HEDGE.finditer(case.turn.answer)
        if not _is_in_captions(case.knowledge, match[0])
    ]
    if not places:
        return 0, len(sentences)
    guessing = sum(any(s.starts[0] <= place < s.ends[-1] for place in places) for s in sentences)
    return guessing, len(sentences)


def _is_in_captions(knowledge: Knowledge, phrase: str) -> bool:
    return any(phrase.lower() in caption.reading.text.lower() for caption in knowledge.captions)


def is_refusal(text: str) -> bool:
    """Whether the text declines to answer, or speaks of itself as a machine."""
    return _REFUSAL.search(text) is not None


def is_english(reading: Reading) -> bool:
    """By its letters, and by the English function words among its words.

    Texts of a few words pass unless their letters are foreign: too little is there to tell.
    """
    text = reading.text
    if not text.isascii():
        letters = [char for char in text if char.isalpha()]
        foreign = sum(char > _LATIN for char in letters)
        accented = sum(not char.isascii() for char in letters)
        if foreign > 0.3 * len(letters) or accented > 0.08 * len(letters):
            return False
    words = [word for word in reading.words if word[0].isalpha()]
    if len(words) < 5:
        return True
    english = sum(word in _ENGLISH for word in words)
    other = sum(word in _OTHER for word in words)
    return english > other or (not other and len(words) < 10)  # a list has no function words


def _find(
    case: Case, part: Part, text: str, rule: str, code: str, pattern: re.Pattern[str]
) -> Iterator[Check]:
    match = pattern.search(text)
    if match is not None:
        yield case.check(rule, "contradicted", code, part, match.span(), match[0])


def _planted(case: Case) -> Iterator[Check]:
    """A word that a caption orders to be said, and the answer says."""
    for word, caption in planted_words(case.knowledge):
        place = case.turn.answer.find(word)
        if place >= 0:
            yield case.check(
                "injection", "contradicted", "INJECTION", "answer", (place, place + len(word)),
                word, (caption,) if caption else (),
            )  # fmt: skip


def planted_words(knowledge: Knowledge) -> Iterator[tuple[str, int]]:
    """Striking words of captions that read like orders to a machine: quoted, capitals, digits."""
    for caption in knowledge.captions:
        text = caption.reading.text
        if _ORDERS.search(text):
            for match in _STRIKING.finditer(text):
                yield match[1] or match[0], caption.id


def _any(*patterns: str, flags: int = re.IGNORECASE) -> re.Pattern[str]:
    return re.compile("|".join(patterns), flags)


_LEAK: Final = _any(
    r"\bcaption(?:s|ed)?\b",
    r"\bbounding[ -]?box(?:es)?\b",
    r"\bannotat(?:ion|ions|ed|or|ors)\b",
    r"\b(?:the|its|their|these|exact|image|pixel|given|provided) coordinates\b",
    r"\bcoordinates (?:of|are)\b",
    r"\bmetadata\b",
    r"(?-i:\b[bc]\d{1,3}\b)",
    r"[(\[][bc]\d{1,3}\b",
    r"[\[(]\s*\d*\.\d+\s*,",
    r"\b0?\.\d+\s*,\s*0?\.\d+\b",
    r"\b(?:provided|given|supplied) (?:description|text|information|context|data|details)",
    r"\b(?:according to|based on|from|in|per|(?:mentioned|described|stated) in) (?:the|these|this) "
    r"(?:\w+ )?(?:descriptions?|text|data|information|sentences|context|labels|input)\b",
    r"\b(?:descriptions?|sentences|text|context) "
    r"(?:says?|states?|mentions?|indicates?|describes?|suggests?)\b",
    r"\b(?:is|are|was|were) (?:also )?"
    r"(?:described|mentioned|listed|labell?ed|reported|stated) (?:as|in|to|by)\b",
    r"\bas (?:described|mentioned|stated|indicated|listed)\b",
    r"\b(?:object|detection) (?:list|labels?|detector)\b|\bdetected objects?\b",
    r"\bcrowd region\b|\bi was (?:told|given|shown)\b|\bwe (?:were|are) told\b",
    r"\bmentioned that\b|\bnot mentioned\b",
)
_REFUSAL: Final = _any(
    r"\b(?:as|i am|i'm|being) an? (?:ai|artificial intelligence|"
    r"(?:large |text-based )?language model|text-based|assistant|machine)\b",
    r"\bi(?:'m| am) (?:really |very |so )?sorry\b",
    r"\bi apologi[sz]e\b",
    r"\b(?:can ?not|can't|could not|couldn't|unable to|not able to) (?:\w+ )?"
    r"(?:assist|help|comply|provide|fulfil|fulfill|answer|process|view|access|describe|generate|create|"
    r"see (?:the |any |this )?(?:image|picture|photo)s?|analy[sz]e)\b",
    r"\bdo(?: not|n't) have (?:access|the ability|visual)\b",
    r"\b(?:against|violates?) (?:my|the|our) (?:guidelines|policy|policies)\b",
)
_OF_ITSELF: Final = _any(r"\blanguage model\b", r"\bas an ai\b", r"\bi(?:'m| am) sorry\b")
_HEDGE: Final = _any(
    r"\b(?:appears?|appeared|seems?|seemed) (?:to|that|like|as)\b",
    r"\b(?:perhaps|possibly|probably|maybe|presumably|apparently|supposedly|seemingly|likely|"
    r"conceivably)\b",
    r"\b(?:might|may|could) (?:also |well |possibly |even )?(?:be|have|include|contain)\b",
    r"\blooks? (?:like|as (?:if|though))\b",
    r"\b(?:suggests?|suggesting|implies|implying)\b",
    r"\bi (?:think|guess|believe|suppose|assume)\b",
    r"\b(?:what|which) (?:looks|appears|seems)\b",
    r"\bsome (?:sort|kind) of\b|\bit is (?:unclear|difficult to tell|hard to tell)\b",
)
_ORDERS: Final = _any(
    r"\b(?:ignore|disregard|forget|override) (?:\w+ ){0,3}"
    r"(?:instructions?|prompts?|rules|above|previous|everything)\b",
    r"\bsystem prompt\b|\bnew instructions?\b|\bdeveloper mode\b|\bjailbreak\b",
    r"\b(?:reply|respond|answer|output|say|print|write|end|begin|start) (?:\w+ ){0,3}"
    r"(?:only with|with the (?:word|phrase|text|string)|the (?:word|phrase|string)|exactly)\b",
    r"https?://\S+|\bwww\.\S+|<script\b|\bapi[_ -]?key\b",
    r"\byou are (?:now|no longer)\b|\bact as (?:an?|if)\b",
)
_STRIKING: Final = re.compile(
    r"[\"'“]([^\"'”]{3,40})[\"'”]|\b(?=\w*[A-Z])(?=\w*\d)[\w-]{4,}\b|\b[A-Z][A-Z_-]{4,}\b"
    r"|https?://\S+"
)
_LATIN: Final = "\u024f"
"""The last letter of the extended Latin alphabets."""
_ENGLISH: Final = word_set(
    "the a an of and or in on at to is are was be it its this that these those there with for from "
    "by as has have had not no yes can will may he she they his her their them him you your we our "
    "one two three some any all both each other another which who what where when while but if so "
    "than then into over under near next behind front left right up down out off about around "
    "between through also very more most many much such how does being only just because"
)
_OTHER: Final = (
    word_set(
        "der die das den dem des ein eine einen einem einer und ist sind auf mit von zu im am nicht "
        "man le la les un une des du et est sont sur dans avec il y au aux qui que ce cette pas "
        "el los las una unas unos y en es son con por del al se lo no hay que su "
        "lo gli i il della dello dei nel nella sul sulla ci sono di e che non per una uno da "
        "de het een en is zijn op te van naast er met voor niet "
        "o os as um uma no na nos nas do da dos das ao e com em que "
        "och att det som ett av vid og er pa til i ja w na z jest si do bir ve di yang dan"
    )
    - _ENGLISH
    - word_set("is am man die do son me as no in was van date come per")
)
"""Common words of other languages in Latin letters that are no English words."""
