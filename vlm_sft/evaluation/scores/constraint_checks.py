"""Checks of instructions whose fulfillment a program can see, with IFEval's names (2311.07911)."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from vlm_sft.evaluation.scores.files import Row
from vlm_sft.utils.libraries import import_extra

_CHOICES: Final = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCES: Final = ("```json", "```Json", "```JSON", "```")
_ABBREVIATION: Final = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|st|vs|etc|no|fig|e\.g|i\.e|[a-z])\.$", re.I
)
_SENTENCE_END: Final = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+[”’）]*")


@dataclass(frozen=True)
class Arguments:
    """The arguments of one instruction; a missing or wrong one is named with its row."""

    kind: str
    values: Mapping[str, Any]
    row: Row

    def number(self, name: str) -> int:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number")
        return value

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self._wrong(name, "a text")
        return value

    def texts(self, name: str) -> list[str]:
        value = self.values.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise self._wrong(name, "a list of texts")
        return value

    def compare(self, found: int, number: str, relation: str = "relation") -> bool:
        """Return whether a count is as asked: `at least 3`, `less than 3`, ..."""
        asked, how = self.number(number), self.values.get(relation)
        results = {
            "less than": found < asked, "at least": found >= asked, "at most": found <= asked,
            "more than": found > asked, "exactly": found == asked,
        }  # fmt: skip
        if how not in results:
            raise self._wrong(relation, f"one of {', '.join(results)}")
        return results[how]

    def _wrong(self, name: str, expected: str) -> Exception:
        return self.row.refusal(
            f"{self.kind}: {name!r} is {self.values.get(name)!r}, expected {expected}"
        )


Check = Callable[[str, Arguments], bool]


def count_words(text: str) -> int:
    """Return the number of runs of letters, digits and underscores, as IFEval counts them."""
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Return the number of sentences; a last one without a period counts, abbreviations do not.

    IFEval uses NLTK's Punkt model, whose data is not in its package.
    """
    count = begin = 0
    for end in _SENTENCE_END.finditer(text):
        if _ABBREVIATION.search(text[begin : end.end()].strip()) and text[end.end() :].strip():
            continue
        count += 1
        begin = end.end()
    return count + bool(re.search(r"\w", text[begin:]))


def language_of(text: str) -> str:
    """Return the code of a text's language (package langdetect, as in IFEval), or `""` if unclear.

    Without a fixed seed, langdetect's results differ from call to call.

    Raises:
        UserError: The package is not installed.
    """
    exceptions = import_extra("langdetect.lang_detect_exception", "scores")
    detector = _language_detectors().create()
    detector.append(text)
    try:
        return str(detector.detect()).split("-")[0]
    except exceptions.LangDetectException:
        return ""


@cache
def _language_detectors() -> Any:
    library = import_extra("langdetect", "scores")
    factory = library.DetectorFactory()
    factory.load_profile(library.PROFILES_DIRECTORY)
    factory.seed = 0
    return factory


def _paragraphs_by_stars(text: str, arguments: Arguments) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    inner = parts[1:-1]
    return all(inner) and sum(map(bool, parts)) == arguments.number("num_paragraphs")


def _nth_paragraph_first_word(text: str, arguments: Arguments) -> bool:
    parts = text.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    number = arguments.number("nth_paragraph")
    wanted = arguments.text("first_word").lower()
    if count != arguments.number("num_paragraphs") or not 1 <= number <= count:
        return False
    words = parts[number - 1].split()
    first = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0] if words else ""
    return first.lower() == wanted


def _bullets(text: str) -> int:
    return len(re.findall(r"^\s*(?:\*[^*].*|-.*)$", text, re.MULTILINE))


def _highlights(text: str) -> int:
    single = re.findall(r"\*([^\n*]*)\*", text)
    double = re.findall(r"\*\*([^\n*]*)\*\*", text)
    return sum(bool(part.strip()) for part in (*single, *double))


def _sections(text: str, arguments: Arguments) -> bool:
    splitter = re.escape(arguments.text("section_spliter").strip())
    count = len(re.findall(rf"\s?{splitter}\s?\d+\s?", text))
    return count >= arguments.number("num_sections")


def _is_json(text: str) -> bool:
    text = text.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _postscript(text: str, marker: str) -> bool:
    patterns = {"p.p.s": r"p\.\s?p\.\s?s", "p.s.": r"p\.\s?s\."}
    return (
        re.search(patterns.get(marker.lower(), re.escape(marker.lower())), text.lower()) is not None
    )


def _two_answers(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return all(parts[1:-1]) and len(set(filter(None, parts))) == sum(map(bool, parts)) == 2


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def _occurrences(text: str, keyword: str) -> int:
    return len(re.findall(re.escape(keyword), text, re.IGNORECASE))


def _ends_with(text: str, phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(phrase.strip().lower())


def _starts_with(text: str, phrase: str) -> bool:
    return text.strip().lower().startswith(phrase.strip().lower())


def _capital_words(text: str) -> int:
    return sum(word.isupper() for word in re.split(r"[\s,;:!?()\[\]{}\"*<>]+", text))


CHECKS: Final[Mapping[str, Check]] = {
    "keywords:existence": lambda t, a: all(_occurrences(t, k) for k in a.texts("keywords")),
    "keywords:frequency": lambda t, a: a.compare(_occurrences(t, a.text("keyword")), "frequency"),
    "keywords:forbidden_words": lambda t, a: (
        not any(_has_word(t, word) for word in a.texts("forbidden_words"))
    ),
    "keywords:letter_frequency": lambda t, a: a.compare(
        t.lower().count(a.text("letter").lower()), "let_frequency", "let_relation"
    ),
    "language:response_language": lambda t, a: (
        language_of(t) == a.text("language").lower().split("-")[0]
    ),
    "length_constraints:number_words": lambda t, a: a.compare(count_words(t), "num_words"),
    "length_constraints:number_sentences": lambda t, a: a.compare(
        count_sentences(t), "num_sentences"
    ),
    "length_constraints:number_paragraphs": _paragraphs_by_stars,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": lambda t, a: (
        len(re.findall(r"\[.*?\]", t)) >= a.number("num_placeholders")
    ),
    "detectable_content:postscript": lambda t, a: _postscript(t, a.text("postscript_marker")),
    "detectable_format:number_bullet_lists": lambda t, a: _bullets(t) == a.number("num_bullets"),
    "detectable_format:constrained_response": lambda t, a: any(c in t for c in _CHOICES),
    "detectable_format:number_highlighted_sections": lambda t, a: (
        _highlights(t) >= a.number("num_highlights")
    ),
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": lambda t, a: _is_json(t),
    "detectable_format:title": lambda t, a: any(
        title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", t)
    ),
    "combination:two_responses": lambda t, a: _two_answers(t),
    "combination:repeat_prompt": lambda t, a: _starts_with(t, a.text("prompt_to_repeat")),
    "startend:start_checker": lambda t, a: _starts_with(t, a.text("start_phrase")),
    "startend:end_checker": lambda t, a: _ends_with(t, a.text("end_phrase")),
    "startend:quotation": lambda t, a: re.fullmatch(r'\s*".*"\s*', t, re.DOTALL) is not None,
    "change_case:capital_word_frequency": lambda t, a: a.compare(
        _capital_words(t), "capital_frequency", "capital_relation"
    ),
    "change_case:english_capital": lambda t, a: t.isupper() and language_of(t.lower()) == "en",
    "change_case:english_lowercase": lambda t, a: t.islower() and language_of(t) == "en",
    "punctuation:no_comma": lambda t, a: "," not in t,
}
"""What each instruction asks of an answer. `startend:start_checker` is ours."""
