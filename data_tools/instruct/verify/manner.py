"""How a text speaks: leaks of its source, guesses, refusals, other languages, planted orders.

Every pattern has cues, words of which one must be there for it to match: a look at a text's words
is cheaper than a search.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from data_tools.instruct.schema import Check
from data_tools.instruct.verify.grammar import word_set
from data_tools.instruct.verify.reading import Reading

if TYPE_CHECKING:
    from data_tools.instruct.verify.case import Case, Part
    from data_tools.instruct.verify.knowledge import Knowledge


def check(case: "Case") -> Iterator[Check]:
    """Yield findings about one turn; none where it speaks as it should."""
    for part, reading in (("question", case.question_reading), ("answer", case.answer_reading)):
        yield from _find(case, part, reading, LEAK)  # type: ignore[arg-type]
        yield from _find(case, part, reading, ORDER)  # type: ignore[arg-type]
    answer = case.answer_reading
    if case.turn.kind != "cannot_tell" or OF_ITSELF.search(answer.text):
        yield from _find(case, "answer", answer, REFUSAL)
    for word, caption in case.knowledge.planted:
        place = answer.text.find(word)
        if place >= 0:
            ids = (caption,) if caption else ()
            span = (place, place + len(word))
            yield case.check("injection", "contradicted", "INJECTION", "answer", span, word, ids)
    if not is_english(answer):
        claim = answer.text[:60]
        yield case.check("language", "contradicted", "LANGUAGE", "answer", None, claim)


def hedged_sentences(case: "Case") -> tuple[int, int]:
    """Return how many sentences of an answer guess, and how many there are.

    Words of a caption are the annotator's, who saw the image.
    """
    sentences = case.answer_reading.sentences
    if HEDGE.cues.isdisjoint(case.answer_reading.vocabulary):
        return 0, len(sentences)
    places = [
        match.start()
        for match in HEDGE.pattern.finditer(case.turn.answer)
        if not _is_in_captions(case.knowledge, match[0])
    ]
    if not places:
        return 0, len(sentences)
    spans = [sentence.span(0, len(sentence.words) - 1) for sentence in sentences]
    guessing = sum(any(begin <= place < end for place in places) for begin, end in spans)
    return guessing, len(sentences)


def _is_in_captions(knowledge: "Knowledge", phrase: str) -> bool:
    return any(phrase.lower() in caption.reading.text.lower() for caption in knowledge.captions)


def _find(case: "Case", part: "Part", reading: Reading, phrases: "Phrases") -> Iterator[Check]:
    match = phrases.find(reading)
    if match is not None:
        rule, code = phrases.rule, phrases.code
        yield case.check(rule, "contradicted", code, part, match.span(), match[0])


@dataclass(frozen=True)
class Phrases:
    """A way of speaking that rejects; looked for where one of its `cues`, or its `sign`, stands."""

    rule: str
    code: str
    cues: frozenset[str]
    pattern: re.Pattern[str]
    sign: str | None = None

    def find(self, reading: Reading) -> re.Match[str] | None:
        """Return the first such phrase of a text."""
        signed = self.sign is not None and self.sign in reading.text
        if self.cues.isdisjoint(reading.vocabulary) and not signed:
            return None
        return self.pattern.search(reading.text)


def is_refusal(text: str) -> bool:
    """Return whether the text declines to answer, or speaks of itself as a machine."""
    return REFUSAL.pattern.search(text) is not None


def is_english(reading: Reading) -> bool:
    """Judge by its letters, and by the English function words among its words.

    Texts of a few words pass unless their letters are foreign: too little is there to judge.
    """
    text = reading.text
    if not text.isascii():
        letters = [char for char in text if char.isalpha()]
        foreign = sum(char > _LATIN for char in letters)
        common = [c for word in text.split() if not word[0].isupper() for c in word if c.isalpha()]
        accented = sum(not char.isascii() for char in common)  # `Potsdamer Straße` is a name
        if foreign > 0.3 * len(letters) or accented > 0.08 * len(letters):
            return False
    words = reading.spoken
    if len(words) < 5:
        return True
    if _OTHER.isdisjoint(reading.vocabulary):
        # a list has no function words
        return len(words) < 10 or not _ENGLISH.isdisjoint(reading.vocabulary)
    english = len([word for word in words if word in _ENGLISH])
    return english > len([word for word in words if word in _OTHER])


def planted_words(caption: str) -> list[str]:
    """Return striking words of a caption that gives orders: quoted ones, capitals."""
    if not ORDER.pattern.search(caption):
        return []
    return [match[1] or match[0] for match in _STRIKING.finditer(caption)]


def _any(*patterns: str, flags: int = re.IGNORECASE) -> re.Pattern[str]:
    return re.compile("|".join(patterns), flags)


LEAK: Final = Phrases(
    "leak",
    "LEAK",
    word_set(
        "caption captions captioned bounding annotation annotations annotated annotator annotators "
        "coordinates metadata [ ( provided given supplied according based description descriptions "
        "text data information sentences context labels input described mentioned listed labeled "
        "labelled reported stated indicated detected crowd told shown says 0"
    )
    | {f"{letter}{number}" for letter in "bc" for number in range(1, 100)},
    _any(
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
        r"\b(?:according to|based on|from|in|per|(?:mentioned|described|stated) in) "
        r"(?:the|these|this) (?:\w+ )?"
        r"(?:descriptions?|text|data|information|sentences|context|labels|input)\b",
        r"\b(?:descriptions?|sentences|context) "
        r"(?:says?|states?|mentions?|indicates?|describes?|suggests?)\b",
        r"\btext (?:states?|mentions?|describes?) (?:that|a|an|the)\b",
        r"\b(?:is|are|was|were) (?:also )?"
        r"(?:described|mentioned|listed|labell?ed|reported|stated) (?:as|in|to|by)\b",
        r"\bas (?:described|mentioned|stated|indicated|listed)\b",
        r"\b(?:object|detection) (?:list|labels?|detector)\b|\bdetected objects?\b",
        r"\bcrowd region\b|\bi was (?:told|given|shown)\b|\bwe (?:were|are) told\b",
        r"\bmentioned that\b|\bnot mentioned\b",
    ),
    sign="0.",
)
REFUSAL: Final = Phrases(
    "refusal",
    "REFUSAL",
    word_set(
        "ai artificial language assistant machine text-based sorry apologize apologise cannot "
        "can't not couldn't unable able access ability visual guidelines policy policies"
    ),
    _any(
        r"\b(?:as|i am|i'm|being) an? (?:ai|artificial intelligence|"
        r"(?:large |text-based )?language model|text-based|assistant|machine)\b",
        r"\bi(?:'m| am) (?:really |very |so )?sorry\b",
        r"\bi apologi[sz]e\b",
        r"\b(?:can ?not|can't|could not|couldn't|unable to|not able to) (?:\w+ )?"
        r"(?:assist|help(?! (?:but|\w+ing)\b)|comply|provide|fulfill?|answer|process|"
        r"view|access|describe|generate|create|"
        r"see (?:the |any |this )?(?:image|picture|photo)s?|analy[sz]e)\b",
        r"\bdo(?: not|n't) have (?:access|the ability|visual)\b",
        r"\b(?:against|violates?) (?:my|the|our) (?:guidelines|policy|policies)\b",
    ),
)
OF_ITSELF: Final = _any(r"\blanguage model\b", r"\bas an ai\b", r"\bi(?:'m| am) sorry\b")
_HEDGE_CUES: Final = word_set(
    "appear appears appeared seem seems seemed perhaps possibly probably maybe presumably "
    "apparently supposedly seemingly likely conceivably might may could look looks suggest "
    "suggests suggesting implies implying imply think guess believe suppose assume sort "
    "kind unclear difficult hard"
)
HEDGE: Final = Phrases(
    "hedge",
    "HEDGED",
    _HEDGE_CUES,
    _any(
        r"\b(?:appears?|appeared|seems?|seemed) (?:to|that|like|as)\b",
        r"\b(?:perhaps|possibly|probably|maybe|presumably|apparently|supposedly|seemingly|likely|"
        r"conceivably)\b",
        r"\b(?:might|may|could) (?:also |well |possibly |even )?(?:be|have|include|contain)\b",
        r"\blooks? (?:like|as (?:if|though))\b",
        r"\b(?:suggests?|suggesting|implies|implying)\b",
        r"\bi (?:think|guess|believe|suppose|assume)\b",
        r"\b(?:what|which) (?:looks|appears|seems)\b",
        r"\bsome (?:sort|kind) of\b|\bit is (?:unclear|difficult to tell|hard to tell)\b",
    ),
)
ORDER: Final = Phrases(
    "injection",
    "INJECTION",
    word_set(
        "ignore disregard forget override system new developer jailbreak reply respond answer "
        "output say print write end begin start http https www script api api-key key longer now "
        "act"
    ),
    _any(
        r"\b(?:ignore|disregard|forget|override) (?:\w+ ){0,3}"
        r"(?:instructions?|prompts?|rules|above|previous|everything)\b",
        r"\bsystem prompt\b|\bnew instructions?\b|\bdeveloper mode\b|\bjailbreak\b",
        r"\b(?:reply|respond|answer|output|end|begin|start) (?:\w+ ){0,3}"
        r"(?:only with|with the (?:word|phrase|text|string)|the (?:word|phrase|string)|exactly)\b",
        r"(?<!they )(?<!it )(?<!to )(?<!that )(?<!which )(?<!letters )(?<!can )"
        r"\b(?:say|print|write) "
        r"(?:\w+ ){0,3}(?:only with|with the (?:word|phrase|text|string)|"
        r"the (?:word|phrase|string)|exactly)\b",
        r"https?://\S+|\bwww\.\S+|<script\b|\bapi[_ -]?key\b",
        r"\byou are (?:now|no longer) (?:an?|in|my|the)\b|(?:^|[.!?;\n] *)act as (?:an?|if)\b",
    ),
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
        "der die das den dem des ein eine einen einem einer und ist sind auf mit von zu im am "
        "nicht man le la les un une des du et est sont sur dans avec il y au aux qui que ce cette "
        "pas el los las una unas unos y en es son con por del al se lo no hay que su "
        "lo gli i il della dello dei nel nella sul sulla ci sono di e che non per una uno da "
        "de het een en is zijn op te van naast er met voor niet "
        "o os as um uma no na nos nas do da dos das ao e com em que "
        "och att det som ett av vid og er pa til i ja w na z jest si do bir ve di yang dan"
    )
    - _ENGLISH
    - word_set("is am man die do son me as no in was van date come per")
)
"""Common words of other languages in Latin letters that are not English words."""
