"""Text to token ids, so that no text of a record can become a special token."""

import functools
import json
import re
from collections.abc import Iterable, Sequence, Set
from typing import Any, Final, Literal

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vlm_sft.errors import UserError
from vlm_sft.utils.libraries import library_call

Context = Literal["start", "after_special_token", "continuation"]
"""Where a text is: first in the sequence, right after a special token, or after other text or at
the beginning of an answer."""


class UnencodableText(UserError):
    """The vocabulary cannot encode a text."""

    default_code = "unspellable"


class TextEncoder:
    """Encodes ordinary text without ever producing a special token.

    The encoder works on a copy of the tokenizer's backend without its added tokens, so that
    "<|im_end|>" in a record is ordinary text. Added tokens of white space stay, since they encode
    ordinary text. The dummy space that SentencePiece tokenizers put before a text is switched off
    in the copy and added by `with_prefix_space`, because it depends on what precedes the text.

    Args:
        tokenizer: Any tokenizer with a `tokenizers` backend.

    Attributes:
        special_tokens: The id of every added token that is not white space, special or not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.special_tokens: dict[str, int] = {
            str(token): index
            for index, token in tokenizer.added_tokens_decoder.items()
            if str(token).strip() and not str(token).isspace()
        }
        added = tokenizer.added_tokens_decoder.values()
        self._strips_left = {str(token) for token in added if token.lstrip}
        self._strips_right = {str(token) for token in added if token.rstrip}
        self._special_ids = frozenset(self.special_tokens.values())
        self._special_pattern = _alternation(self.special_tokens)
        state["added_tokens"] = _whitespace_tokens(state)
        state["post_processor"] = state["truncation"] = state["padding"] = None
        self._prefix = _remove_dummy_prefix(state)
        if state["pre_tokenizer"] is not None:
            _keep_spaces(state["pre_tokenizer"])
        with library_call("tokenizers", "model.language_model.tokenizer", "rebuild this tokenizer"):
            self._backend = Tokenizer.from_str(json.dumps(state))
        self._normalizer = _without_space_marks(state)
        self._space_mark_bytes = _space_mark_bytes(state)
        self._lossy = _lossy_characters(state)
        self._cached = functools.lru_cache(maxsize=4096)(self._encode_uncached)

    def encode(self, text: str, context: Context) -> list[int]:
        """Return the ids of a text; none of them is a special token.

        Raises:
            UnencodableText: The vocabulary cannot encode the text without an unknown or special
                token.
        """
        if not text:
            return []
        return list(self._cached(self.with_prefix_space(text, context)))

    def encode_all(self, texts: Iterable[str]) -> dict[str, Sequence[int] | UnencodableText]:
        """Return the ids of each different text (see `with_prefix_space`), or why it has none."""
        unique = list(dict.fromkeys(texts))
        found: dict[str, Sequence[int] | UnencodableText] = {}
        encodings = self._backend.encode_batch_fast(unique, add_special_tokens=False)
        for text, encoding in zip(unique, encodings, strict=True):
            ids = encoding.ids
            # Almost no text is difficult, so that only few are encoded a second time.
            if self._is_difficult(text) or not self._special_ids.isdisjoint(ids):
                try:
                    found[text] = self._encode_uncached(text)
                except UnencodableText as error:
                    found[text] = error
            else:
                found[text] = ids
        return found

    def decode_all(self, rows: Sequence[list[int]]) -> list[str]:
        """Return the text of each row of ids; see `decode`."""
        return list(self._backend.decode_batch(list(rows), skip_special_tokens=False))

    @property
    def spaces_first_text_only(self) -> bool:
        """Whether the dummy space comes before the sequence, but not after a special token."""
        return self._prefix == ("metaspace", "first")

    def with_prefix_space(self, text: str, context: Context) -> str:
        """Return the text with the dummy space that the tokenizer puts before it in a context."""
        kind, scope = self._prefix
        wanted = context == "start" or (context == "after_special_token" and scope == "always")
        if kind is None or not wanted or (kind == "metaspace" and text.startswith((" ", "▁"))):
            return text
        return " " + text

    def decode(self, ids: list[int]) -> str:
        """Return the exact text of ids without special tokens."""
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def normalized(self, text: str) -> str:
        """Return the text after the tokenizer's normalizer (e.g. NFC), if it has one."""
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def strip_around_special(self, before: str, after: str) -> tuple[str, str]:
        """Strip two adjacent template texts as the special tokens at their border do.

        A token with `lstrip` or `rstrip` (those of Phi 3) removes the white space next to it.
        """
        names = self._special_pattern.findall(before) if self._special_pattern else []
        if names and before.endswith(names[-1]) and names[-1] in self._strips_right:
            after = after.lstrip()
        match = self._special_pattern.match(after) if self._special_pattern else None
        if match is not None and match.group() in self._strips_left:
            before = before.rstrip()
        return before, after

    def split_special_tokens(self, text: str) -> list[str | int]:
        """Split template text into ordinary text and the ids of the special tokens in it.

        White space next to a token that strips it is removed, as in `strip_around_special`.
        """
        if self._special_pattern is None:
            return [text] if text else []
        pieces: list[str | int] = []
        end = 0
        for match in self._special_pattern.finditer(text):
            token = match.group()
            between = text[end : match.start()]
            pieces.append(between.rstrip() if token in self._strips_left else between)
            pieces.append(self.special_tokens[token])
            end = match.end()
            if token in self._strips_right:
                end += len(text[end:]) - len(text[end:].lstrip())
        pieces.append(text[end:])
        return [piece for piece in pieces if piece != ""]

    def find_special_tokens(self, text: str) -> list[str]:
        """Return the texts of special tokens that occur in ordinary text, in order."""
        return self._special_pattern.findall(text) if self._special_pattern else []

    def _is_difficult(self, text: str) -> bool:
        """Whether the text has characters that the backend would drop or rewrite."""
        if self._space_mark_bytes is not None and SPACE_MARK in text:
            return True
        return self._lossy is not None and self._lossy.search(text) is not None

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        """Encode a text that may be difficult."""
        if self._lossy is not None and self._lossy.search(text):
            raise _unencodable(text)
        if self._space_mark_bytes is not None and SPACE_MARK in text:
            return self._encode_space_marks(text)
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if self._special_ids.isdisjoint(ids):
            return tuple(ids)
        # The model's own vocabulary has a special token as a whole piece (Gemma's do).
        ids = self._encode_character_by_character(text)
        if not self._special_ids.isdisjoint(ids):
            raise _unencodable(text)
        return tuple(ids)

    def _encode_space_marks(self, text: str) -> tuple[int, ...]:
        """Encode U+2581 by its bytes: SentencePiece would decode its own piece as a space."""
        if not self._space_mark_bytes:
            raise _unencodable(text)
        ids: list[int] = []
        for index, piece in enumerate(text.split(SPACE_MARK)):
            if index:
                ids += self._space_mark_bytes
            if piece:
                ids += self._encode_uncached(piece)
        return tuple(ids)

    def _encode_character_by_character(self, text: str) -> list[int]:
        """Encode the texts of special tokens one character at a time, and the rest as usual."""
        ids: list[int] = []
        end = 0
        for match in self._special_pattern.finditer(text) if self._special_pattern else ():
            for chunk in (text[end : match.start()], *match.group()):
                ids += self._backend.encode(chunk, add_special_tokens=False).ids
            end = match.end()
        return ids + self._backend.encode(text[end:], add_special_tokens=False).ids


UTF8_BYTES: Final = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
"""Bytes that occur in UTF-8."""

SPACE_MARK: Final = "\u2581"
"""The character that stands for a space in SentencePiece's pieces."""


def _unencodable(text: str) -> UnencodableText:
    return UnencodableText(
        f"the tokenizer cannot encode {text[:60]!r} without a special or unknown token; use a "
        "tokenizer with byte fallback or leave the record out"
    )


def _whitespace_tokens(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the added tokens of white space that keep their id.

    The backend renumbers added tokens that are not in its model's vocabulary, so they are put
    there first.
    """
    vocabulary = state["model"].get("vocab")
    white = [token for token in state["added_tokens"] if token["content"].isspace()]
    if isinstance(vocabulary, dict):
        for token in white:
            vocabulary.setdefault(token["content"], token["id"])
    ids = _vocabulary(state)
    return [token for token in white if ids.get(token["content"]) == token["id"]]


def _vocabulary(state: dict[str, Any]) -> dict[str, int]:
    """Return the id of each piece; a Unigram model has a list of (piece, score)."""
    found = state["model"].get("vocab") or {}
    return found if isinstance(found, dict) else {p: i for i, (p, _) in enumerate(found)}


def _without_space_marks(state: dict[str, Any]) -> normalizers.Normalizer | None:
    """Return the normalizer without its step that writes spaces as U+2581; None if it is empty."""
    steps = [step for step in _steps(state["normalizer"]) if not _writes_space_marks(step)]
    if not steps:
        return None
    alone = {**state, "normalizer": _sequence("normalizer", steps)}
    return Tokenizer.from_str(json.dumps(alone)).normalizer


def _writes_space_marks(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and step.get("content") == SPACE_MARK


def _space_mark_bytes(state: dict[str, Any]) -> list[int] | None:
    """Return the byte tokens of U+2581; [] if there are none, None if it is an ordinary letter."""
    steps = [*_steps(state["normalizer"]), *_steps(state["pre_tokenizer"])]
    if not any(_writes_space_marks(step) or step["type"] == "Metaspace" for step in steps):
        return None
    vocabulary = _vocabulary(state)
    names = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
    return [vocabulary[name] for name in names] if vocabulary.keys() >= set(names) else []


def _lossy_characters(state: dict[str, Any]) -> re.Pattern[str] | None:
    """Return a pattern of the characters that a byte-level vocabulary drops silently.

    They have a byte for which the vocabulary has no letter.
    """
    if not any(step["type"] == "ByteLevel" for step in _steps(state["pre_tokenizer"])):
        return None
    vocabulary, letters = _vocabulary(state), bytes_to_unicode()
    missing = {byte for byte in UTF8_BYTES if letters[byte] not in vocabulary}
    if not missing:
        return None
    last = 0x110000 if max(missing) >= 0x80 else 0x80
    blocks = (start for start in range(0, last, 64) if not 0xD800 <= start < 0xE000)
    lost = [character for start in blocks for character in _lossy_in_block(start, missing)]
    return re.compile(f"[{_ranges(lost)}]")


def _lossy_in_block(start: int, missing: Set[int]) -> list[str]:
    """Return those of 64 characters from `start`, which differ in their last UTF-8 byte only."""
    characters = [chr(code) for code in range(start, start + 64)]
    *leading, _ = characters[0].encode()
    if not missing.isdisjoint(leading):
        return characters
    return [c for c in characters if c.encode()[-1] in missing] if missing else []


def _ranges(characters: Sequence[str]) -> str:
    """Return sorted characters as ranges of a regular expression's character class."""
    spans: list[list[str]] = []
    for character in characters:
        if spans and ord(character) == ord(spans[-1][1]) + 1:
            spans[-1][1] = character
        else:
            spans.append([character, character])
    return "".join(f"{re.escape(first)}-{re.escape(last)}" for first, last in spans)


def _alternation(strings: dict[str, int]) -> re.Pattern[str] | None:
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


PrefixRule = tuple[Literal["metaspace", "prepend"] | None, Literal["first", "always"]]


def _remove_dummy_prefix(state: dict[str, Any]) -> PrefixRule:
    """Remove SentencePiece's dummy space from a serialized tokenizer; return its rule."""
    rule: PrefixRule = (None, "first")
    for section in ("normalizer", "pre_tokenizer"):
        kept = []
        for step in _steps(state[section]):
            if step["type"] == "Prepend":
                rule = ("prepend", "always")
                continue
            if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                scope = step.get("prepend_scheme", "always")
                rule = ("metaspace", "first" if scope == "first" else "always")
                step = {**step, "prepend_scheme": "never"}
            kept.append(step)
        state[section] = _sequence(section, kept)
    if rule[0] is not None:
        state["decoder"] = _decoder_that_keeps_spaces(state["decoder"])
    return rule


def _decoder_that_keeps_spaces(decoder: dict[str, Any] | None) -> dict[str, Any] | None:
    kept = [step for step in _steps(decoder) if step["type"] != "Strip"]
    kept = [
        {**step, "prepend_scheme": "never"} if step["type"] == "Metaspace" else step
        for step in kept
    ]
    return _sequence("decoder", kept)


def _keep_spaces(pre_tokenizer: dict[str, Any]) -> None:
    """Stop byte-level tokenizers from adding a space before a text that continues another."""
    for step in _steps(pre_tokenizer):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False


def _steps(section: dict[str, Any] | None) -> list[dict[str, Any]]:
    if section is None:
        return []
    if section["type"] != "Sequence":
        return [section]
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in section:
            return list(section[key])
    return []


def _sequence(section: str, steps: list[dict[str, Any]]) -> dict[str, Any] | None:
    if len(steps) <= 1:
        return steps[0] if steps else None
    key = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
    return {"type": "Sequence", key[section]: steps}
