"""Text to token ids, with data kept apart from control tokens whatever it spells."""

import functools
import json
import re
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vlm_sft.config import LanguageModelConfig, means_folder
from vlm_sft.errors import UserError

Context = Literal["start", "after_control", "continuation"]
"""Where a run of text begins: first in the sequence, right after a control token, or elsewhere
(after a picture, or where an answer begins)."""

BYTE_TOKENIZER_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(config: LanguageModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model: `config.tokenizer`, or the one beside `config.name`.

    Raises:
        UserError: The folder or hub name gives no tokenizer, or only one without a `tokenizers`
            backend.
    """
    name = config.tokenizer or config.name
    assert name is not None  # the config guarantees it
    if name == "bytes":
        return byte_tokenizer()
    key = f"model.language_model.{'tokenizer' if config.tokenizer else 'name'}"
    folder = Path(name).expanduser()
    if means_folder(name) and not folder.is_dir():
        raise UserError(
            f"{key}: no such folder {name!r} (looked for {folder.absolute()}); give a folder with "
            "tokenizer.json or a hub name"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder if folder.is_dir() else name)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{key}: no tokenizer could be loaded from {name!r}: {reason}") from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{key}: the tokenizer of {name!r} is {type(tokenizer).__name__}, which "
            "has no `tokenizers` backend; convert it to a tokenizer.json"
        )
    return tokenizer


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What fills up shorter sequences: the tokenizer's pad, else its EOS, else 0.

    Masked out by attention and never labelled, so that any id does.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes with ChatML and Llama control tokens; needs no file.

    256 byte tokens, then `<pad>`, `<s>`, `</s>`, `<|im_start|>`, `<|im_end|>`: 261 ids.
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


class TextEncoder:
    """Encodes ordinary text so that no control token can come out of it.

    Works on a copy of the tokenizer's backend without its added tokens; whitespace-only added
    tokens stay, since they are spellings of ordinary text. What the tokenizer would prepend to a
    run of text (SentencePiece's dummy space) is added here, by context.

    Args:
        tokenizer: Any tokenizer with a `tokenizers` backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.control_ids: dict[str, int] = {
            str(token): index
            for index, token in tokenizer.added_tokens_decoder.items()
            if str(token).strip() and not str(token).isspace()
        }
        self._control_set = frozenset(self.control_ids.values())
        self._control_pattern = _alternation(self.control_ids)
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"].isspace()]
        state["post_processor"] = state["truncation"] = state["padding"] = None
        self._prefix = _remove_dummy_prefix(state)
        if state["pre_tokenizer"] is not None:
            _keep_spaces(state["pre_tokenizer"])
        self._backend = Tokenizer.from_str(json.dumps(state))
        self._normalizer = self._backend.normalizer
        self._cached = functools.lru_cache(maxsize=4096)(self._encode_now)

    def encode(self, text: str, context: Context) -> list[int]:
        """Ids of `text` with no control id among them.

        Raises:
            UserError: The vocabulary cannot spell the text (an unknown token came out).
        """
        if not text:
            return []
        return list(self._cached(self.spelled(text, context)))

    def spelled(self, text: str, context: Context) -> str:
        """The text with the dummy space that this tokenizer puts before it in this context."""
        kind, scope = self._prefix
        wanted = context == "start" or (context == "after_control" and scope == "always")
        if kind is None or not wanted or (kind == "metaspace" and text.startswith((" ", "▁"))):
            return text
        return " " + text

    def decode(self, ids: list[int]) -> str:
        """The exact text of ordinary ids, control ids not among them."""
        return str(self._backend.decode(ids, skip_special_tokens=False))

    def normalized(self, text: str) -> str:
        """The text as the tokenizer's own normaliser rewrites it (e.g. NFC); else unchanged."""
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))

    def split_control(self, text: str) -> list[str | int]:
        """Template text cut into ordinary text and ids of the control tokens that it names."""
        if self._control_pattern is None:
            return [text] if text else []
        pieces: list[str | int] = []
        end = 0
        for match in self._control_pattern.finditer(text):
            if match.start() > end:
                pieces.append(text[end : match.start()])
            pieces.append(self.control_ids[match.group()])
            end = match.end()
        if end < len(text):
            pieces.append(text[end:])
        return pieces

    def find_control(self, text: str) -> list[str]:
        """Control strings that ordinary text happens to spell, in order."""
        return self._control_pattern.findall(text) if self._control_pattern else []

    def _encode_now(self, text: str) -> tuple[int, ...]:
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if self._control_set.isdisjoint(ids):
            return tuple(ids)
        ids = self._encode_letter_by_letter(text)
        if not self._control_set.isdisjoint(ids):
            raise UserError(
                f"the tokenizer cannot spell {text[:60]!r} without a control or unknown token; "
                "use a tokenizer with byte fallback or leave the record out"
            )
        return tuple(ids)

    def _encode_letter_by_letter(self, text: str) -> list[int]:
        """Spell control strings one character at a time, for vocabularies that hold them whole."""
        ids: list[int] = []
        end = 0
        for match in self._control_pattern.finditer(text) if self._control_pattern else ():
            for chunk in (text[end : match.start()], *match.group()):
                ids += self._backend.encode(chunk, add_special_tokens=False).ids
            end = match.end()
        return ids + self._backend.encode(text[end:], add_special_tokens=False).ids


def _alternation(strings: dict[str, int]) -> re.Pattern[str] | None:
    longest_first = sorted(strings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


PrefixRule = tuple[Literal["metaspace", "prepend"] | None, Literal["first", "always"]]


def _remove_dummy_prefix(state: dict[str, Any]) -> PrefixRule:
    """Take SentencePiece's dummy space out of a serialised tokenizer; say what the rule was."""
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
