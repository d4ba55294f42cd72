"""What becomes of people's words: control strings that they spell, and unusual writing."""

from collections.abc import Iterator

from vlm_sft.data.masking import Rendered
from vlm_sft.diagnosis.case import Case, Finding, conversation_of, exchange, listing
from vlm_sft.errors import RecordError, UserError


def control_strings(case: Case) -> Iterator[Finding]:
    """Every control string, its halves and nestings, as a user's words and as an answer."""
    what = "control strings in data"
    harmless = case.renderer.render(conversation_of("a", *exchange("a", "a")))
    expected = case.control_of(harmless.input_ids)
    leaked: list[str] = []
    changed: list[str] = []
    refused: list[str] = []
    for string in case.encoder.control_ids:
        text = "\n".join(_disguises(string))
        try:
            rendered = case.renderer.render(conversation_of("control", *exchange(text, text)))
        except RecordError as error:
            (leaked if error.reason == "mask_proof" else refused).append(string)
            continue
        if case.control_of(rendered.input_ids) != expected:
            leaked.append(string)
        elif not _round_trips(case, rendered, text):
            changed.append(string)
    tokens = case.tokenizer.added_tokens_decoder.values()
    special = sum(token.special for token in tokens if str(token) in case.encoder.control_ids)
    total = len(case.encoder.control_ids)
    tried = (
        f"{total} strings ({special} special, {total - special} merely added), each whole, halved "
        "and nested, as question and as answer"
    )
    if leaked:
        yield Finding(
            "control_from_data",
            "bad",
            what,
            f"{tried}: words became control tokens for {listing(leaked)}",
            "do not train on such data with this tokenizer",
        )
    if changed:
        yield Finding(
            "control_text_changed", "bad", what, f"{tried}: {listing(changed)} did not read back"
        )
    if refused:
        yield Finding(
            "control_unspellable",
            "warning",
            what,
            f"{tried}: the vocabulary cannot spell {listing(refused)} as text",
            "records that quote them are refused by name",
        )
    if not leaked and not changed and not refused:
        yield Finding(
            "control",
            "good",
            what,
            f"{tried}: none became a control token, all read back exactly",
        )


def _disguises(string: str) -> list[str]:
    half = max(1, len(string) // 2)
    left, right = string[:half], string[half:]
    return [string, left, right, left + string + right, string + string, f"{left} {right}"]


def _round_trips(case: Case, rendered: Rendered, text: str) -> bool:
    wanted = case.encoder.normalized(text)
    span = rendered.answers[0]
    asked = case.renderer.template.images_only_users or wanted in case.words(
        rendered.input_ids[: span.start]
    )
    return asked and wanted in case.words(rendered.input_ids[span.start : span.end])


UNUSUAL = {
    "Chinese, Japanese, Korean": "图中有两只狗。犬がいます。개가 있어요.",
    "emoji sequences": "👩‍👩‍👧 🏳️‍🌈 👍🏽 🇪🇺",
    "leading and trailing newlines": "\n\nYes.\n",
    "leading and trailing spaces": "   Yes.  ",
    "only white space": " \n\t ",
    "right-to-left marks": "\u200fשלום\u200e \u202bمرحبا\u202c",
    "combining characters": "e\u0301 n\u0303 \u0915\u094d\u0937 Z\u0351\u036b\u0343",
    "rare characters": "𝔘𝔫𝔦 \u00a0\ufeff ½ ﬁ Å ∀x∈ℝ",
    "tabs and code": "def f():\n\treturn  1\r\n",
}


def unusual_writing(case: Case) -> Iterator[Finding]:
    """Whether unusual writing reads back character by character."""
    what = "unusual writing"
    rewritten: list[str] = []
    changed: list[str] = []
    refused: dict[str, list[str]] = {}
    for name, text in UNUSUAL.items():
        try:
            rendered = case.renderer.render(conversation_of(name, *exchange(text, text)))
        except RecordError as error:
            if error.reason == "mask_proof":
                changed.append(name)
            else:
                refused[name] = _unspellable(case, text)
            continue
        if case.encoder.normalized(text) != text:
            rewritten.append(name)
        if not _round_trips(case, rendered, text):
            changed.append(name)
    if changed:
        yield Finding(
            "text_changed",
            "bad",
            what,
            f"does not read back as it was written: {', '.join(changed)}",
            "use a tokenizer with byte fallback",
        )
    if refused:
        letters = list(dict.fromkeys(c for found in refused.values() for c in found))
        yield Finding(
            "unspellable",
            "warning",
            what,
            f"the vocabulary cannot spell {listing([_letter(c) for c in letters])} "
            f"({', '.join(refused)})",
            "records with them are refused by name; a tokenizer with byte fallback spells all",
        )
    if rewritten:
        yield Finding(
            "normalised",
            "note",
            what,
            f"the tokenizer's own normaliser rewrites it: {', '.join(rewritten)}",
        )
    if not (changed or refused or rewritten):
        yield Finding("text", "good", what, f"{len(UNUSUAL)} kinds read back exactly")


def _unspellable(case: Case, text: str) -> list[str]:
    found = []
    for letter in dict.fromkeys(text):
        try:
            case.encoder.encode(letter, "continuation")
        except UserError:
            found.append(letter)
    return found


def _letter(letter: str) -> str:
    return f"{letter!r} (U+{ord(letter):04X})"
