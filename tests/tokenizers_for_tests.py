"""Tokenizers that tests share: real vocabularies from packages, and stand-ins made of them.

| name | what |
|---|---|
| bytes | the project's own byte tokenizer |
| bpe | a small byte-level BPE trained on the spot |
| sentencepiece | the 32,000 pieces of Mistral v1, Llama's kind, dummy space at the start of a text |
| llama_2_file | the same pieces as a Llama-2 or Vicuna `tokenizer.json` holds them: a dummy space is put before every stretch of text (`Prepend`), also behind control tokens |
| phi_3 | stand-in: those pieces with Phi-3's control tokens, which swallow the space behind them |
| gemma | stand-in: those pieces without dummy space, with Gemma's control tokens and some of its added ordinary ones |
| llama_3 | Llama 3's own 128,256 tokens |
| qwen | Qwen's own vocabulary and control tokens, NFC |
| smollm2 | SmolLM2's own, from the quickstart's pieces (absent until they are made) |
"""  # noqa: E501

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

from tests import chat_templates_for_tests as published
from vlm_sft.data.hf_tokenizer import (
    BYTE_TOKENIZER_CHAT_TEMPLATE,
    BYTE_TOKENIZERS,
    byte_tokenizer,
)

ROOT = Path(__file__).parent.parent
SMOLLM2_FOLDER = ROOT / "demo" / "pieces" / "smollm2-135m-instruct"

LLAMA_3_CONTROL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(2, 246)),
]
PHI_3_CONTROL = [
    "<|endoftext|>",
    "<|assistant|>",
    "<|placeholder1|>",
    "<|placeholder2|>",
    "<|placeholder3|>",
    "<|placeholder4|>",
    "<|system|>",
    "<|end|>",
    "<|placeholder5|>",
    "<|placeholder6|>",
    "<|user|>",
]
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of that name; built once a process."""
    return LOADERS[name]()


def missing(name: str) -> str | None:
    """Why a tokenizer cannot be had here; None when it can."""
    if name == "smollm2" and not (SMOLLM2_FOLDER / "tokenizer.json").is_file():
        return "SmolLM2's tokenizer is made by scripts/demo_pieces.py demo/pieces"
    package = {"llama_3": "llama_models", "qwen": "dashscope"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"package {package} is not installed; run scripts/setup"
    return None


@functools.cache
def sentencepiece_tokenizer() -> LlamaTokenizer:
    """The 32,000-piece SentencePiece vocabulary of Mistral v1: Llama's and Vicuna's kind."""
    model = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(str(model), Path(folder) / "tokenizer.model")
        tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    tokenizer.chat_template = published.MISTRAL_1
    return tokenizer


@functools.cache
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges (GPT-2's pre-tokenization), ChatML tokens and template."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = Path(__file__).with_name("test_masking_text.txt").read_text()
    backend.train_from_iterator([text, BYTE_TOKENIZER_CHAT_TEMPLATE] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>", "<tool>"],
    )
    tokenizer.chat_template = BYTE_TOKENIZER_CHAT_TEMPLATE
    return tokenizer


@functools.cache
def llama_2_file_tokenizer() -> PreTrainedTokenizerFast:
    """The SentencePiece vocabulary as Llama 2's and Vicuna's `tokenizer.json` write it."""
    state = _sentencepiece_state()
    state["normalizer"] = _prepend_normalizer()
    state["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(state))
    _begin_with(backend, "<s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = published.LLAMA_2
    return tokenizer


@functools.cache
def phi_3_tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in for Phi-3: its control tokens, most with `rstrip`, on the SentencePiece pieces."""
    state = _sentencepiece_state()
    state["normalizer"] = _prepend_normalizer()
    state["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens(
        [
            AddedToken(text, normalized=False, special=True, rstrip=text != "<|endoftext|>")
            for text in PHI_3_CONTROL
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = published.PHI_3
    return tokenizer


@functools.cache
def gemma_tokenizer() -> PreTrainedTokenizerFast:
    """A stand-in for Gemma: its control tokens and added ordinary ones, and no dummy space.

    `<table>` and runs of newlines are added tokens that are not special, as in Gemma's own file.
    """
    state = _sentencepiece_state()
    state["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["pre_tokenizer"] = None
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    backend = Tokenizer.from_str(json.dumps(state))
    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    ordinary = ["\n\n", "\n\n\n", "<table>", "<h1>", "</h1>"]
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in ordinary])
    _begin_with(backend, "<bos>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = published.GEMMA
    return tokenizer


@functools.cache
def llama_3_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 3's tokenizer, converted from Meta's file, with its 256 control tokens in order."""
    source = _package_file("llama_models", "llama3/tokenizer.model")
    backend = _converted(source, lambda: TikTokenConverter(str(source)).converted())
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in LLAMA_3_CONTROL]
    )
    _begin_with(backend, "<|begin_of_text|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    tokenizer.chat_template = published.LLAMA_3
    return tokenizer


@functools.cache
def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen's tokenizer, converted from its makers' file: no BOS, NFC, ChatML."""
    source = _package_file("dashscope", "resources/qwen.tiktoken")
    backend = _converted(
        source, lambda: TikTokenConverter(str(source), pattern=QWEN_PATTERN).converted()
    )
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = published.QWEN_2
    return tokenizer


@functools.cache
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """SmolLM2's own tokenizer and chat template, out of its GGUF file."""
    return AutoTokenizer.from_pretrained(SMOLLM2_FOLDER)


LOADERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": functools.cache(byte_tokenizer),
    "bytes-img": functools.cache(lambda: byte_tokenizer(BYTE_TOKENIZERS["bytes-img"])),
    "bpe": bpe_tokenizer,
    "sentencepiece": sentencepiece_tokenizer,
    "llama_2_file": llama_2_file_tokenizer,
    "phi_3": phi_3_tokenizer,
    "gemma": gemma_tokenizer,
    "llama_3": llama_3_tokenizer,
    "qwen": qwen_tokenizer,
    "smollm2": smollm2_tokenizer,
}


def _sentencepiece_state() -> dict[str, Any]:
    state: dict[str, Any] = json.loads(sentencepiece_tokenizer().backend_tokenizer.to_str())
    return state


def _prepend_normalizer() -> dict[str, Any]:
    return {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }


def _begin_with(backend: Tokenizer, bos: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _package_file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, missing(package)
    return Path(spec.submodule_search_locations[0]) / name


def _converted(source: Path, convert: Callable[[], Tokenizer]) -> Tokenizer:
    """The conversion, which takes seconds, kept in the temporary folder by the file's content."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    kept = Path(tempfile.gettempdir()) / f"vlm_sft-tokenizer-{os.getuid()}-{digest}.json"
    if kept.is_file() and kept.stat().st_uid == os.getuid():
        return Tokenizer.from_file(str(kept))
    backend = convert()
    building = kept.with_suffix(f".{os.getpid()}.tmp")
    backend.save(str(building))
    building.replace(kept)
    return backend
