"""Hold the linear layers of a frozen language model in 4 bits (QLoRA, arXiv 2305.14314).

bitsandbytes packs and unpacks them.
"""

import math
from collections.abc import Set
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from vlm_sft.errors import ConfigError
from vlm_sft.model.dtypes import cast_floating
from vlm_sft.model.hashing import sample_digest, stored_tensors
from vlm_sft.utils.libraries import require_extra

BLOCK_SIZE: Final = 64
"""Weights that share a scale (bitsandbytes' default for 4 bits)."""

SCALE_BLOCK_SIZE: Final = 256
"""Scales that share a scale of their own, with double quantization."""


def quantize(
    model: PreTrainedModel,
    dtype: torch.dtype,
    quant_type: Literal["nf4", "fp4"],
    *,
    double_quantization: bool,
) -> None:
    """Quantize every linear layer except the output head to 4 bits, in place.

    Everything else (embeddings, norms, biases, head) is cast to `dtype`. The 4-bit weights are
    computed from the given ones and do not depend on `dtype`.

    Args:
        model: On the CPU, in any floating-point dtype.
        dtype: The dtype that a layer is dequantized to when it is used.
        quant_type: The 4-bit data type.
        double_quantization: Whether the scales are quantized too.

    Raises:
        ConfigError: If the model has no linear layer.
        UserError: If bitsandbytes is not installed.
    """
    require_extra("bitsandbytes", "model.language_model.quantization")
    layers = linear_layers(model)
    if not layers:
        raise ConfigError(
            f"model.language_model.quantization: {type(model).__name__} has no nn.Linear layer to "
            "quantize; remove it"
        )
    # Identifies the base model in checkpoints; it cannot be computed from packed weights.
    digest = sample_digest(model.named_parameters())
    for name, layer in layers.items():
        model.set_submodule(name, _quantized(layer, dtype, quant_type, double_quantization))
    cast_floating(model, dtype)
    marked: Any = model
    marked.unquantized_digest = digest
    marked.is_loaded_in_4bit = True  # peft reads this


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace every 4-bit layer by a plain one with the dequantized weights in `dtype`, in place.

    These differ from the weights before quantization, and are those that adapters were trained on.
    """
    for name, layer in linear_layers(model).items():
        if is_quantized(layer.weight):
            model.set_submodule(name, _plain(layer, dtype))
    marked: Any = model
    marked.is_loaded_in_4bit = False


def require_quantization(quantization: str | None, trainable: Set[str]) -> None:
    """Check that the configured quantization is possible, before anything slow starts.

    Args:
        quantization: `model.language_model.quantization`.
        trainable: The trainable parts of the model.

    Raises:
        ConfigError: If the language model itself would be trained.
        UserError: If bitsandbytes is not installed.
    """
    if quantization is None:
        return
    if "language_model" in trainable:
        raise ConfigError(
            f"model.language_model.quantization: {quantization} weights cannot be trained, "
            "but stage 2 would train them; add a `lora` section, or set it to null"
        )
    require_extra("bitsandbytes", "model.language_model.quantization")


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Return every linear layer except the output head by its path, in the model's order."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def unquantized_digest(model: PreTrainedModel) -> str | None:
    """Return the digest of the weights before `quantize`; None if the model is not quantized."""
    return getattr(model, "unquantized_digest", None)


def is_quantized(parameter: torch.Tensor) -> bool:
    """Return whether a parameter holds packed 4-bit weights."""
    return getattr(parameter, "quant_state", None) is not None


def num_weights(parameter: torch.Tensor) -> int:
    """Return the number of weights of a parameter; a byte of a packed one holds two."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def num_bytes(parameter: torch.Tensor) -> int:
    """Return the bytes of a parameter, including the scales of a packed one."""
    return sum(t.numel() * t.element_size() for _, t in stored_tensors("", parameter))


def dtype_name(parameter: torch.Tensor) -> str:
    """Return `float32`, `bfloat16`, ..., or `nf4` or `fp4` for a packed parameter."""
    state: Any = getattr(parameter, "quant_state", None)
    return str(parameter.dtype).removeprefix("torch.") if state is None else str(state.quant_type)


def quantized_bytes(num_weights: int, *, double_quantization: bool) -> int:
    """Return the bytes of one linear layer in 4 bits, as bitsandbytes stores it.

    Half a byte per weight, a codebook of 16 float32 values and a float32 scale per block. With
    double quantization (QLoRA, section 3) a scale takes one byte; their float32 offset, codebook of
    256 float32 values and scales per block of scales come on top.
    """
    num_scales = math.ceil(num_weights / BLOCK_SIZE)
    packed = math.ceil(num_weights / 2) + 16 * 4
    if not double_quantization:
        return packed + 4 * num_scales
    return packed + num_scales + 4 + 256 * 4 + 4 * math.ceil(num_scales / SCALE_BLOCK_SIZE)


def _quantized(
    layer: nn.Linear, dtype: torch.dtype, quant_type: str, double_quantization: bool
) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        packed = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = Params4bit(
        layer.weight.data,
        compress_statistics=double_quantization,
        quant_type=quant_type,
    )
    # The first `.to` quantizes. One CPU core quantizes about 17 million weights per second.
    packed.weight = weight.to(device).to("cpu")
    packed.quant_state = packed.weight.quant_state
    packed.quant_state.dtype = dtype  # otherwise backward dequantizes to the source's dtype
    packed.bias = layer.bias
    # Otherwise some CPUs repack the weights in place in the first forward pass without gradient,
    # and round their scales to bfloat16: a frozen part would change.
    packed.support_avx512bf16_for_cpu = False
    return packed


def _plain(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit

    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    packed: Any = layer.weight
    weight = dequantize_4bit(packed.data, packed.quant_state).to(dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain
