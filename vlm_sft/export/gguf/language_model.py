"""Describe a causal language model of transformers as llama.cpp loads it."""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm_sft.errors import UserError
from vlm_sft.export.gguf.files import GgufFile

ARCHITECTURES: Final = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture for each `model_type` of transformers (SmolLM2 is a llama)."""

_TOP: Final = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
}
_IN_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def language_model_file(
    language_model: PreTrainedModel, tokenizer_fields: Mapping[str, Any], name: str
) -> GgufFile:
    """Return the GGUF file of a language model.

    Args:
        language_model: With adapters merged.
        tokenizer_fields: The tokenizer's metadata (`tokenizer.tokenizer_fields`).
        name: `general.name`.

    Raises:
        UserError: llama.cpp has no architecture for it, or computes it differently.
    """
    config: Any = language_model.config.get_text_config()
    architecture = require_architecture(config)
    table = language_model.get_input_embeddings().weight
    head: Any = language_model.get_output_embeddings()
    tensors: dict[str, Tensor] = {}
    body = language_model.base_model.state_dict()
    heads = {"q_proj": config.num_attention_heads, "k_proj": _kv_heads(config)}
    for key, value in body.items():
        renamed = _renamed(key)
        projection = key.split(".")[-2] if key.count(".") > 1 else ""
        if architecture == "llama" and projection in heads:
            value = interleaved_rotary_rows(value, heads[projection])
        tensors[renamed] = value
    if head.weight.data_ptr() != table.data_ptr():
        tensors["output.weight"] = head.weight
    if (factors := rotary_factors(config)) is not None:
        tensors["rope_freqs.weight"] = factors
    fields = {
        "general.type": "model",
        "general.name": name,
        **{f"{architecture}.{key}": value for key, value in _hyperparameters(config).items()},
        **tokenizer_fields,
    }
    fields[f"{architecture}.vocab_size"] = int(table.shape[0])
    return GgufFile(architecture, fields, tensors)


def require_architecture(config: Any) -> str:
    """Return llama.cpp's architecture for a text configuration.

    Raises:
        UserError: There is none that computes the same.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"--to gguf writes the language models {', '.join(sorted(ARCHITECTURES))}, and this "
            f"one is {kind}; llama.cpp's own convert_hf_to_gguf.py may convert it"
        )
    if config.hidden_act != "silu":
        raise UserError(
            f"llama.cpp's {ARCHITECTURES[kind]} has SwiGLU layers with silu, and this model has "
            f"hidden_act = {config.hidden_act}"
        )
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UserError(
            f"--to gguf writes rotary embeddings of rope_type default, linear and llama3, and this "
            f"model has {rope['rope_type']}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"llama.cpp's {ARCHITECTURES[kind]} rotates whole heads, and this model has "
            f"partial_rotary_factor = {rope['partial_rotary_factor']}"
        )
    return ARCHITECTURES[kind]


def interleaved_rotary_rows(value: Tensor, heads: int) -> Tensor:
    """Return the rows of a query or key projection in the order that llama.cpp's llama rotates.

    transformers rotates dimension i of a head with i + d/2, llama.cpp's llama 2i with 2i + 1
    (Meta's original order).

    Args:
        value: `[heads * d, width]`, or a bias `[heads * d]`.
        heads: Number of heads of this projection.
    """
    halves = value.reshape(heads, 2, -1, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def rotary_factors(config: Any) -> Tensor | None:
    """Return the divisors of the rotary frequencies of Llama 3's scaling `[d / 2]`, or None.

    Source: transformers' `_compute_llama3_parameters`.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    size = _head_size(config)
    frequencies = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    wavelengths = 2 * math.pi / frequencies
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    divisors = torch.where(wavelengths > original / low, float(factor), between)
    return torch.where(wavelengths < original / high, 1.0, divisors).float()


def _renamed(key: str) -> str:
    if key in _TOP:
        return _TOP[key]
    parts = key.split(".")
    inner = ".".join(parts[2:-1])
    if parts[0] != "layers" or inner not in _IN_LAYER:
        raise UserError(f"llama.cpp has no place for the tensor {key} of the language model")
    return f"blk.{parts[1]}.{_IN_LAYER[inner]}.{parts[-1]}"


def _hyperparameters(config: Any) -> dict[str, Any]:
    rope = _rope(config)
    fields: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": context_length(config),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": _kv_heads(config),
        "attention.key_length": _head_size(config),
        "attention.value_length": _head_size(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": _head_size(config),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return fields


def context_length(config: Any) -> int:
    """Return the positions in which llama.cpp's attention is the model's.

    llama.cpp's llama and qwen2 attend to all earlier positions. With a sliding window that is the
    same up to the size of the window.
    """
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return int(config.max_position_embeddings)
    return min(int(window), int(config.max_position_embeddings))


def _rope(config: Any) -> dict[str, Any]:
    found = dict(config.rope_parameters)
    found.setdefault("rope_type", "default")
    return found


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)
