"""What becomes of people's words: control strings that they spell, and unusual writing."""

from collections.abc import Iterator

from vlm_sft.checks.tokenizer.case import Case, Finding, conversation_of, exchange, listing
from vlm_sft.data.tokenize import TokenizedRecord
from vlm_sft.errors import RecordError, UserError


def control_strings(case: Case) -> Iterator[Finding]:
    """Every control string, its halves and nestings, as a user's words and as an answer."""
    what = "control strings in data"
    harmless = case.chat_tokenizer.tokenize(conversation_of("a", *exchange("a", "a")))
    expected = case.control_of(harmless.input_ids)
    leaked: list[str] = []
    changed: list[str] = []
    refused: list[str] = []
    for string in case.encoder.special_tokens:
        text = "\n".join(_disguises(string))
        try:
            tokenized = case.chat_tokenizer.tokenize(
                conversation_of("control", *exchange(text, text))
            )
        except RecordError:
            (leaked if _leaks(case, text) else refused).append(string)
            continue
        if case.control_of(tokenized.input_ids) != expected:
            leaked.append(string)
        elif not _round_trips(case, tokenized, text, text):
            changed.append(string)
    tokens = case.tokenizer.added_tokens_decoder.values()
    special = sum(token.special for token in tokens if str(token) in case.encoder.special_tokens)
    total = len(case.encoder.special_tokens)
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
            f"{tried}: the vocabulary cannot hold {listing(refused)} as text",
            "records that quote them are refused by name",
        )
    if not leaked and not changed and not refused:
        yield Finding(
            "control",
            "good",
            what,
            f"{tried}: none became a control token, all read back exactly",
        )


def _leaks(case: Case, text: str) -> bool:
    """Whether the encoder itself makes control tokens of a text."""
    ids = case.encoder.encode_all([text])[text]
    return not isinstance(ids, UserError) and bool(case.control_of(ids))


def _disguises(string: str) -> list[str]:
    half = max(1, len(string) // 2)
    left, right = string[:half], string[half:]
    return [string, left, right, left + string + right, string + string, f"{left} {right}"]


def _round_trips(case: Case, tokenized: TokenizedRecord, question: str, answer: str) -> bool:
    """Whether the words of both turns read back as they were written."""
    span = tokenized.answer_spans[0]
    asked = case.words(tokenized.input_ids[: span.start])
    answered = case.words(tokenized.input_ids[span.start : span.end])
    heard = (
        case.chat_tokenizer.template.images_only_users or case.encoder.normalized(question) in asked
    )
    return heard and case.encoder.normalized(answer) in answered


UNUSUAL = {
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


def unusual_writing(case: Case) -> Iterator[Finding]:
    """Whether unusual writing reads back character by character."""
    what = "unusual writing"
    kinds: dict[str, list[str]] = {
        "kept": [],
        "refused": [],
        "rewritten": [],
        "changed": [],
    }
    for name, text in UNUSUAL.items():
        kinds[_fate(case, name, text)].append(name)
    if kinds["changed"]:
        yield Finding(
            "text_changed",
            "bad",
            what,
            f"a question loses it without a word: {', '.join(kinds['changed'])}",
            "use a tokenizer with byte fallback",
        )
    if kinds["refused"]:
        letters = dict.fromkeys("".join(UNUSUAL[name] for name in kinds["refused"]))
        lost = [letter for letter in letters if _is_unspellable(case, letter)]
        words = f"the vocabulary cannot hold: {', '.join(kinds['refused'])}"
        if lost:
            words += f"; it cannot spell {listing([_letter(c) for c in lost])}"
        advice = "answers with them are refused by name; a tokenizer with byte fallback spells all"
        yield Finding("unspellable", "warning", what, words, advice)
    if kinds["rewritten"]:
        words = f"the tokenizer's own normalizer rewrites it: {', '.join(kinds['rewritten'])}"
        yield Finding("normalized", "note", what, words)
    if len(kinds["kept"]) == len(UNUSUAL):
        yield Finding("text", "good", what, f"{len(UNUSUAL)} kinds read back exactly")


def _fate(case: Case, name: str, text: str) -> str:
    """What becomes of a text: changed, refused, rewritten by the normalizer, or kept."""
    pairs = ((text, "a"), ("a", text))
    fates = {_fate_of(case, name, question, answer) for question, answer in pairs}
    for fate in ("changed", "refused"):
        if fate in fates:
            return fate
    return "kept" if case.encoder.normalized(text) == text else "rewritten"


def _fate_of(case: Case, name: str, question: str, answer: str) -> str:
    try:
        tokenized = case.chat_tokenizer.tokenize(conversation_of(name, *exchange(question, answer)))
    except RecordError:
        return "refused"
    return "kept" if _round_trips(case, tokenized, question, answer) else "changed"


def _is_unspellable(case: Case, letter: str) -> bool:
    try:
        case.encoder.encode(letter, "continuation")
    except UserError:
        return True
    return False


def _letter(letter: str) -> str:
    return f"{letter!r} (U+{ord(letter):04X})"
