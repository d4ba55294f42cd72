"""Describe a tokenizer of transformers as llama.cpp reads it from a GGUF file."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from vlm_sft.errors import UserError

_WORDS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASES: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: Final = {
    _WORDS + r"\p{N}" + _REST: "qwen2",
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CASES: "tekken",
}
"""llama.cpp's name of a pre-tokenizer, by the expression of `tokenizer.json`."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Values of llama.cpp's `enum llama_token_type`."""

_NO_MERGE: Final = "<no> <merge>"
"""Never applies: no token begins as `<no>`. llama.cpp refuses a vocabulary without merges."""


def tokenizer_fields(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    *,
    chat_template: str | None,
    stop_token_ids: Sequence[int],
    begins_with_bos: bool,
) -> dict[str, Any]:
    """Return the metadata `tokenizer.*` of a GGUF file.

    Args:
        tokenizer: With a `tokenizers` backend of byte-level BPE, or BPE made from SentencePiece.
        rows: Rows of the embedding table; those after the last token become unused tokens.
        chat_template: Jinja text.
        stop_token_ids: Tokens that end an answer, at most three.
        begins_with_bos: Whether prompts begin with BOS. llama.cpp adds it then, once.

    Raises:
        UserError: llama.cpp has no such tokenizer, or the table has too few rows.
    """
    found: Any = tokenizer
    state = json.loads(found.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise UserError(
            "--to gguf writes tokenizers of byte-level BPE and of SentencePiece's BPE, and this "
            f"one is {state['model']['type']}"
        )
    tokens, types = _tokens_and_types(found, state, rows)
    kind = _sentencepiece(state, tokens) if state["model"]["byte_fallback"] else _bytes(state)
    fields: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        **kind,
        "tokenizer.ggml.add_bos_token": begins_with_bos,
        "tokenizer.ggml.add_eos_token": False,
    }
    fields |= _special_tokens(found, stop_token_ids)
    if chat_template is not None:
        fields["tokenizer.chat_template"] = chat_template
    return fields


def _tokens_and_types(
    tokenizer: Any, state: Mapping[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise UserError(
            f"the tokenizer has ids up to {max(vocabulary.values())} and the embedding table "
            f"{rows} rows; llama.cpp needs a row for each token"
        )
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [_UNUSED] * rows
    for token, row in vocabulary.items():
        tokens[row], types[row] = token, _NORMAL
    model = state["model"]
    if model["byte_fallback"]:
        for byte in range(256):
            types[vocabulary[f"<0x{byte:02X}>"]] = _BYTE
    if model["unk_token"] is not None:
        types[vocabulary[model["unk_token"]]] = _UNKNOWN
    for added in state["added_tokens"]:
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
        if model["byte_fallback"] and added["content"] == tokenizer.unk_token:
            types[added["id"]] = _UNKNOWN
    return tokens, types


def _bytes(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of byte-level BPE."""
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer(state),
        "tokenizer.ggml.merges": merges or [_NO_MERGE],
    }


def pre_tokenizer(state: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level BPE.

    Args:
        state: The content of `tokenizer.json`.

    Raises:
        UserError: llama.cpp has no pre-tokenizer with these rules, or none is known here.
    """
    found = state["pre_tokenizer"] or {"type": "none"}
    *before, last = found["pretokenizers"] if found["type"] == "Sequence" else [found]
    byte_level = last["type"] == "ByteLevel" and not last["add_prefix_space"]
    if byte_level and last["use_regex"]:
        if not before:
            return "gpt-2"
        if before == [{"type": "Digits", "individual_digits": True}]:
            return "smollm"
    elif byte_level and not before and not state["model"]["merges"]:
        return "gpt-2"  # single bytes: splitting changes nothing
    elif byte_level and len(before) == 1 and before[0]["type"] == "Split":
        name = PRE_TOKENIZERS.get(before[0]["pattern"].get("Regex", ""))
        if name is not None and before[0]["behavior"] == "Isolated":
            return name
    raise UserError(
        "--to gguf writes the pre-tokenizers of GPT-2, SmolLM2, Llama 3, Qwen2 and Mistral's "
        f"Tekken, and this tokenizer has {json.dumps(found)[:200]}"
    )


def _sentencepiece(state: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    """Return the fields of SentencePiece's BPE.

    llama.cpp merges the neighbors whose piece has the highest score. Merges are in the order of
    these scores, so minus the number of the first merge that makes a piece gives the same order.
    """
    ranks: dict[str, int] = {}
    for number, (left, right) in enumerate(state["model"]["merges"]):
        ranks.setdefault(left + right, number)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks.get(token, len(ranks))) for token in tokens],
        "tokenizer.ggml.add_space_prefix": _spaces_every_text(state),
    }


def _spaces_every_text(state: Mapping[str, Any]) -> bool:
    """Return whether a dummy space precedes every text after a special token, not only the first.

    If it precedes only the first text of a sequence, the chat template writes it itself.

    Raises:
        UserError: The normalization is another one than SentencePiece's.
    """
    normalizer, metaspace = state["normalizer"], state["pre_tokenizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if metaspace is None and normalizer is not None:
        steps = normalizer.get("normalizers", [normalizer])
        if steps == [replace]:
            return False
        if steps == [{"type": "Prepend", "prepend": "▁"}, replace]:
            return True
    elif normalizer is None and metaspace is not None and metaspace["type"] == "Metaspace":
        return metaspace["prepend_scheme"] == "always"
    raise UserError(
        "--to gguf writes SentencePiece tokenizers that replace spaces by ▁ and do nothing else; "
        f"this one has the normalizer {json.dumps(normalizer)[:200]}"
    )


def _special_tokens(tokenizer: Any, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    """Return the ids of special tokens; the first stop token is EOS."""
    stops = list(stop_token_ids) or [tokenizer.eos_token_id]
    if len(stops) > 3:
        raise UserError(
            f"a GGUF file names at most three tokens that end an answer, and this model has {stops}"
        )
    ids = {
        "bos": tokenizer.bos_token_id,
        **dict(zip(("eos", "eot", "eom"), stops, strict=False)),
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    return {f"tokenizer.ggml.{k}_token_id": int(v) for k, v in ids.items() if v is not None}
