"""Text to token ids, with data kept apart from control tokens whatever it spells."""

import copy
import functools
import json
import re
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any, Final, Literal, cast

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vlm_sft.config.schema import LanguageModelConfig, means_folder
from vlm_sft.errors import UserError
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER
from vlm_sft.utils.hub import use_cache_if_hub_unreachable
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.model_folders import custom_code_refused, require_plain_folder

Context = Literal["start", "after_special_token", "continuation"]
"""Where a run of text begins: first in the sequence, right after a control token, or elsewhere
(after an image, or where an answer begins)."""

BYTE_TOKENIZER_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(
    config: LanguageModelConfig, where: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model: `config.tokenizer`, or the one beside `config.name`.

    Args:
        config: Names the tokenizer.
        where: What to call the name's origin in errors; None: its configuration key.

    Raises:
        UserError: The folder or hub name gives no tokenizer, or only one without a `tokenizers`
            backend.
    """
    name = config.tokenizer or config.name
    assert name is not None  # the config guarantees it
    if name == "bytes":
        return byte_tokenizer()
    key = where or f"model.language_model.{'tokenizer' if config.tokenizer else 'name'}"
    folder = Path(name).expanduser()
    if means_folder(name) and not folder.is_dir():
        raise UserError(
            f"{key}: no such folder {name!r} (looked for {folder.absolute()}); give a folder with "
            "tokenizer.json or a hub name"
        )
    action = f"load a tokenizer from {name!r}"
    if not folder.is_dir():
        use_cache_if_hub_unreachable()
        action = f"get the tokenizer of {name!r} from the hub, and there is no folder of that name"
    with library_call("transformers", key, action), custom_code_refused(key, name):
        if folder.is_dir():
            require_plain_folder(folder)
        tokenizer = AutoTokenizer.from_pretrained(
            folder if folder.is_dir() else name, trust_remote_code=False
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{key}: the tokenizer of {name!r} is {type(tokenizer).__name__}, which "
            "has no `tokenizers` backend; convert it to a tokenizer.json"
        )
    return tokenizer


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills up shorter sequences: the tokenizer's pad, else its EOS, else 0.

    Masked out by attention and never labeled, so that any id does.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def exported_tokenizer(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> PreTrainedTokenizerBase:
    """Return a copy of a run's tokenizer as an export carries it.

    `<image>` is a token of it, prompts of different length are padded on the left, as generation
    needs, and where a chat template writes BOS nothing else does: text that the template wrote
    gives the same ids with and without `add_special_tokens`.

    Args:
        tokenizer: Not changed.
        chat_template: Jinja text of the run's chat template, or None.
    """
    made: Any = copy.deepcopy(tokenizer)
    made.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)])
    made.padding_side = made.init_kwargs["padding_side"] = "left"  # the latter is what is saved
    if chat_template is not None:
        made.chat_template = chat_template
        if made("a")["input_ids"] != made("a", add_special_tokens=False)["input_ids"]:
            made.add_bos_token = made.add_eos_token = False
    return cast(PreTrainedTokenizerBase, made)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with ChatML and Llama control tokens; needs no file.

    256 byte tokens, then `<s>`, `</s>`, `<pad>`, `<|im_start|>`, `<|im_end|>`: 261 ids.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = BYTE_TOKENIZER_CHAT_TEMPLATE
    return tokenizer


class UnencodableText(UserError):
    """The vocabulary has no pieces for a text."""

    default_code = "unspellable"


class TextEncoder:
    """Encodes ordinary text so that no control token can come out of it.

    Works on a copy of the tokenizer's backend without its added tokens; whitespace-only added
    tokens stay, since they are spellings of ordinary text. What the tokenizer would prepend to a
    run of text (SentencePiece's dummy space) is added here, by context.

    Args:
        tokenizer: Any tokenizer with a `tokenizers` backend.

    Attributes:
        special_tokens: Every control token with its id, special or merely added.
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
        """Ids of `text` with no control id among them.

        Raises:
            UnencodableText: The vocabulary cannot spell the text (an unknown token came out).
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
            if self._needs_exact_encoding(text) or not self._special_ids.isdisjoint(ids):
                try:
                    found[text] = self._encode_uncached(text)
                except UnencodableText as error:
                    found[text] = error
            else:
                found[text] = ids
        return found

    def decode_all(self, rows: Sequence[list[int]]) -> list[str]:
        """As `decode`, for many."""
        return list(self._backend.decode_batch(list(rows), skip_special_tokens=False))

    @property
    def spaces_first_text_only(self) -> bool:
        """The dummy space comes before a text, but not before what follows a control token."""
        return self._prefix == ("metaspace", "first")

    def with_prefix_space(self, text: str, context: Context) -> str:
        """The text with the dummy space that this tokenizer puts before it in this context."""
        kind, scope = self._prefix
        wanted = context == "start" or (context == "after_special_token" and scope == "always")
        if kind is None or not wanted or (kind == "metaspace" and text.startswith((" ", "▁"))):
            return text
        return " " + text

    def decode(self, ids: list[int]) -> str:
        """The exact text of ordinary ids, control ids not among them."""
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def normalized(self, text: str) -> str:
        """The text as the tokenizer's own normalizer rewrites it (e.g. NFC); else unchanged."""
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def strip_around_special(self, before: str, after: str) -> tuple[str, str]:
        """Two neighboring template texts without what control tokens at their border swallow."""
        names = self._special_pattern.findall(before) if self._special_pattern else []
        if names and before.endswith(names[-1]) and names[-1] in self._strips_right:
            after = after.lstrip()
        match = self._special_pattern.match(after) if self._special_pattern else None
        if match is not None and match.group() in self._strips_left:
            before = before.rstrip()
        return before, after

    def split_special_tokens(self, text: str) -> list[str | int]:
        """Template text cut into ordinary text and ids of the control tokens that it names.

        White space of the template beside a token that swallows it (Phi 3's) is swallowed.
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
        """Control strings that ordinary text happens to spell, in order."""
        return self._special_pattern.findall(text) if self._special_pattern else []

    def _needs_exact_encoding(self, text: str) -> bool:
        """Whether the text has characters that the backend would lose or rewrite."""
        if self._space_mark_bytes is not None and SPACE_MARK in text:
            return True
        return self._lossy is not None and self._lossy.search(text) is not None

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        if self._lossy is not None and self._lossy.search(text):
            raise _unencodable(text)
        if self._space_mark_bytes is not None and SPACE_MARK in text:
            return self._encode_space_marks(text)
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if self._special_ids.isdisjoint(ids):
            return tuple(ids)
        ids = self._encode_character_by_character(text)
        if not self._special_ids.isdisjoint(ids):
            raise _unencodable(text)
        return tuple(ids)

    def _encode_space_marks(self, text: str) -> tuple[int, ...]:
        """Spell U+2581, which SentencePiece writes for a space, by its bytes."""
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
        """Spell control strings one character at a time, for vocabularies that hold them whole."""
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
"""SentencePiece's spelling of a space."""


def _unencodable(text: str) -> UnencodableText:
    return UnencodableText(
        f"the tokenizer cannot spell {text[:60]!r} without a control or unknown token; use a "
        "tokenizer with byte fallback or leave the record out"
    )


def _whitespace_tokens(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens that are white space, each made to keep its id; else left out.

    A backend renumbers added tokens that its model does not hold.
    """
    vocabulary = state["model"].get("vocab")
    white = [token for token in state["added_tokens"] if token["content"].isspace()]
    if isinstance(vocabulary, dict):
        for token in white:
            vocabulary.setdefault(token["content"], token["id"])
    ids = _vocabulary(state)
    return [token for token in white if ids.get(token["content"]) == token["id"]]


def _vocabulary(state: dict[str, Any]) -> dict[str, int]:
    """Ids by piece, of a Unigram model's list of (piece, score) too."""
    found = state["model"].get("vocab") or {}
    return found if isinstance(found, dict) else {p: i for i, (p, _) in enumerate(found)}


def _without_space_marks(state: dict[str, Any]) -> normalizers.Normalizer | None:
    """The normalizer apart from writing spaces as U+2581; None where nothing is left of it."""
    steps = [step for step in _steps(state["normalizer"]) if not _writes_space_marks(step)]
    if not steps:
        return None
    alone = {**state, "normalizer": _sequence("normalizer", steps)}
    return Tokenizer.from_str(json.dumps(alone)).normalizer


def _writes_space_marks(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and step.get("content") == SPACE_MARK


def _space_mark_bytes(state: dict[str, Any]) -> list[int] | None:
    """Byte tokens that spell U+2581 itself; [] where there are none, None where it is ordinary."""
    steps = [*_steps(state["normalizer"]), *_steps(state["pre_tokenizer"])]
    if not any(_writes_space_marks(step) or step["type"] == "Metaspace" for step in steps):
        return None
    vocabulary = _vocabulary(state)
    names = [f"<0x{byte:02X}>" for byte in SPACE_MARK.encode()]
    return [vocabulary[name] for name in names] if vocabulary.keys() >= set(names) else []


def _lossy_characters(state: dict[str, Any]) -> re.Pattern[str] | None:
    """Characters with a byte that a byte-level vocabulary has no letter for: lost silently."""
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
    """Of the 64 characters from `start` on, which differ in their last byte alone."""
    characters = [chr(code) for code in range(start, start + 64)]
    *leading, _ = characters[0].encode()
    if not missing.isdisjoint(leading):
        return characters
    return [c for c in characters if c.encode()[-1] in missing] if missing else []


def _ranges(characters: Sequence[str]) -> str:
    """Sorted characters as the inside of a regular expression's class."""
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
    """Take SentencePiece's dummy space out of a serialized tokenizer; say what the rule was."""
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
    """Byte-level tokenizers must not add a space of their own before a continued run."""
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
