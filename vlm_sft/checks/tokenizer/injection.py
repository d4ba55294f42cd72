"""Check that data cannot inject special tokens, and that unusual text is encoded exactly."""

from collections.abc import Iterator
from typing import Final, Literal

from vlm_sft.checks.tokenizer.under_test import (
    Finding,
    TokenizerUnderTest,
    conversation_of,
    exchange,
    listing,
)
from vlm_sft.data.tokenize import TokenizedRecord
from vlm_sft.errors import RecordError, UserError

Encoding = Literal["exact", "refused", "normalized", "changed"]
"""How a text survives encoding and decoding."""


def check_injection(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Put every special token's text, its halves and nestings into a question and an answer."""
    what = "special tokens in data"
    harmless = tested.chat_tokenizer.tokenize(conversation_of("a", *exchange("a", "a")))
    expected = tested.special_ids_in(harmless.input_ids)
    leaked: list[str] = []
    changed: list[str] = []
    refused: list[str] = []
    for string in tested.encoder.special_tokens:
        text = "\n".join(_injection_variants(string))
        try:
            tokenized = tested.chat_tokenizer.tokenize(
                conversation_of("special", *exchange(text, text))
            )
        except RecordError:
            (leaked if _leaks(tested, text) else refused).append(string)
            continue
        # Only the template may write special tokens: as many as around a harmless text.
        if tested.special_ids_in(tokenized.input_ids) != expected:
            leaked.append(string)
        elif not _round_trips(tested, tokenized, text, text):
            changed.append(string)
    added = tested.tokenizer.added_tokens_decoder.values()
    num_special = sum(t.special for t in added if str(t) in tested.encoder.special_tokens)
    total = len(tested.encoder.special_tokens)
    tried = (
        f"{total} strings ({num_special} special, {total - num_special} added), each whole, halved "
        "and nested, as question and as answer"
    )
    if leaked:
        yield Finding(
            "control_from_data",
            "bad",
            what,
            f"{tried}: text became special tokens for {listing(leaked)}",
            "do not train on such data with this tokenizer",
        )
    if changed:
        text = f"{tried}: {listing(changed)} did not decode to the same text"
        yield Finding("control_text_changed", "bad", what, text)
    if refused:
        yield Finding(
            "control_unspellable",
            "warning",
            what,
            f"{tried}: the vocabulary cannot encode {listing(refused)} as text",
            "records that contain them are refused with an error",
        )
    if not leaked and not changed and not refused:
        text = f"{tried}: none became a special token, all decode to the same text"
        yield Finding("control", "good", what, text)


def _leaks(tested: TokenizerUnderTest, text: str) -> bool:
    """Return whether the encoder itself turns a text into special tokens."""
    ids = tested.encoder.encode_all([text])[text]
    return not isinstance(ids, UserError) and bool(tested.special_ids_in(ids))


def _injection_variants(string: str) -> list[str]:
    """Return a special token's text whole, halved, and nested in itself.

    A tokenizer that removes special tokens from text leaves `left + right` of a nested one.
    """
    half = max(1, len(string) // 2)
    left, right = string[:half], string[half:]
    return [string, left, right, left + string + right, string + string, f"{left} {right}"]


def _round_trips(
    tested: TokenizerUnderTest, tokenized: TokenizedRecord, question: str, answer: str
) -> bool:
    """Return whether question and answer can be decoded from the tokens unchanged."""
    span = tokenized.answer_spans[0]
    prompt_text = tested.plain_text(tokenized.input_ids[: span.start])
    answer_text = tested.plain_text(tokenized.input_ids[span.start : span.end])
    has_question = tested.encoder.normalized(question) in prompt_text
    # Templates of stage 1 write no text of the user.
    if not has_question and not tested.chat_tokenizer.template.images_only_users:
        return False
    return tested.encoder.normalized(answer) in answer_text


UNUSUAL: Final = {
    "Chinese, Japanese, Korean": "图中有两只狗。犬がいます。개가 있어요.",
    "emoji sequences": "👩‍👩‍👧 🏳️‍🌈 👍🏽 🇪🇺",
    "leading and trailing newlines": "\n\nYes.\n",
    "leading and trailing spaces": "   Yes.  ",
    "only white space": " \n\t ",
    "right-to-left marks": "\u200fשלום\u200e \u202bمرحبا\u202c",
    "combining characters": "e\u0301 n\u0303 \u0915\u094d\u0937 Z\u0351\u036b\u0343",
    "block characters": "▁▂▃▄▅",
    "rare characters": "𝔘𝔫𝔦 \u00a0\ufeff ½ ﬁ Å ∀x∈ℝ",
    "tabs and code": "def f():\n\treturn  1\r\n",
}
"""Texts that tokenizers often change, by kind."""


def check_unusual_text(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Check that unusual text decodes to the same characters."""
    what = "unusual text"
    kinds: dict[Encoding, list[str]] = {
        "exact": [],
        "refused": [],
        "normalized": [],
        "changed": [],
    }
    for name, text in UNUSUAL.items():
        kinds[_encoding_of(tested, name, text)].append(name)
    if kinds["changed"]:
        yield Finding(
            "text_changed",
            "bad",
            what,
            f"characters are lost silently: {', '.join(kinds['changed'])}",
            "use a tokenizer with byte fallback",
        )
    if kinds["refused"]:
        characters = dict.fromkeys("".join(UNUSUAL[name] for name in kinds["refused"]))
        lost = [f"{c!r} (U+{ord(c):04X})" for c in characters if _is_unencodable(tested, c)]
        text = f"the vocabulary cannot encode: {', '.join(kinds['refused'])}"
        if lost:
            text += f"; it lacks {listing(lost)}"
        advice = (
            "answers that contain them are refused with an error; a tokenizer with byte fallback "
            "encodes everything"
        )
        yield Finding("unspellable", "warning", what, text, advice)
    if kinds["normalized"]:
        text = f"the tokenizer's normalizer rewrites: {', '.join(kinds['normalized'])}"
        yield Finding("normalized", "note", what, text)
    if len(kinds["exact"]) == len(UNUSUAL):
        yield Finding("text", "good", what, f"{len(UNUSUAL)} kinds decode to the same text")


def _encoding_of(tested: TokenizerUnderTest, name: str, text: str) -> Encoding:
    """Return how a text survives as a question and as an answer; the worse of the two."""
    found: set[Encoding] = set()
    for question, answer in ((text, "a"), ("a", text)):
        try:
            tokenized = tested.chat_tokenizer.tokenize(
                conversation_of(name, *exchange(question, answer))
            )
        except RecordError:
            found.add("refused")
            continue
        found.add("exact" if _round_trips(tested, tokenized, question, answer) else "changed")
    if "changed" in found:
        return "changed"
    if "refused" in found:
        return "refused"
    return "exact" if tested.encoder.normalized(text) == text else "normalized"


def _is_unencodable(tested: TokenizerUnderTest, character: str) -> bool:
    try:
        tested.encoder.encode(character, "continuation")
    except UserError:
        return True
    return False
