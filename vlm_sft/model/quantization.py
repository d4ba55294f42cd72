"""A frozen language model's linear layers in 4 bits (QLoRA, arXiv 2305.14314), by bitsandbytes."""

import importlib.util
from collections.abc import Set
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vlm_sft.config.schema import LanguageModelConfig
from vlm_sft.errors import ConfigError
from vlm_sft.model.dtypes import cast_floating
from vlm_sft.model.hashing import held_tensors, sample_digest


def quantize(model: PreTrainedModel, config: LanguageModelConfig, dtype: torch.dtype) -> None:
    """Hold every linear layer but the output head in blocks of 64 weights of 4 bits, in place.

    Everything else (embeddings, norms, biases, head) is held in `dtype`, which layers compute in
    too. The result depends on the weights as they are given, and not on `dtype`.

    Args:
        model: On the CPU, in any floating dtype.
        config: `quantization` is not None.
        dtype: What a layer is unpacked to when it is used.

    Raises:
        ConfigError: bitsandbytes is not installed, or the model has no linear layer.
    """
    require_bitsandbytes()
    layers = linear_layers(model)
    if not layers:
        raise ConfigError(
            f"model.language_model.quantization: {type(model).__name__} has no nn.Linear layer to "
            "quantize; remove it"
        )
    origin = sample_digest(model.named_parameters())
    for name, layer in layers.items():
        model.set_submodule(name, _quantized(layer, config, dtype))
    cast_floating(model, dtype)
    marked: Any = model
    marked.unquantized_digest = origin
    marked.is_loaded_in_4bit = True  # where peft looks


def dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give every 4-bit layer the weights in `dtype` that it stands for, in place.

    They are not those from before quantization, but those that a run was trained on.
    """
    for name, layer in linear_layers(model).items():
        if is_quantized(layer.weight):
            model.set_submodule(name, _plain(layer, dtype))
    marked: Any = model
    marked.is_loaded_in_4bit = False


def require_quantization(config: LanguageModelConfig, trainable: Set[str]) -> None:
    """Refuse what could not be carried out, before anything long starts.

    Raises:
        ConfigError: The language model would be trained in full, or bitsandbytes is missing.
    """
    if config.quantization is None:
        return
    if "language_model" in trainable:
        raise ConfigError(
            f"model.language_model.quantization: {config.quantization} weights stay as they are, "
            "but stage 2 would train them in full; add a `lora` section, or set it to null"
        )
    require_bitsandbytes()


def require_bitsandbytes() -> None:
    """Refuse to go on without bitsandbytes.

    Raises:
        ConfigError: With the line that installs it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.language_model.quantization: bitsandbytes is not installed; run "
            "`pip install 'vlm-sft[qlora]'` (or `pip install 'bitsandbytes>=0.50'`), or set it to "
            "null"
        )


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """Every linear layer by its path, in the model's order, but for the output head."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def unquantized_digest(model: PreTrainedModel) -> str | None:
    """Sampled digest of the parameters that `quantize` was given; None where it was not called."""
    return getattr(model, "unquantized_digest", None)


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether several weights are packed into each number of it."""
    return getattr(parameter, "quant_state", None) is not None


def num_weights(parameter: torch.Tensor) -> int:
    """How many weights it stands for; packed numbers hold two."""
    state: Any = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def num_bytes(parameter: torch.Tensor) -> int:
    """Bytes in memory, a packed one's scales included."""
    return sum(t.numel() * t.element_size() for _, t in held_tensors("", parameter))


def number_format(parameter: torch.Tensor) -> str:
    """`float32`, `bfloat16`, ..., or of a packed one `nf4` or `fp4`."""
    state: Any = getattr(parameter, "quant_state", None)
    return str(parameter.dtype).removeprefix("torch.") if state is None else str(state.quant_type)


def _quantized(layer: nn.Linear, config: LanguageModelConfig, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        packed = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = Params4bit(
        layer.weight.data,
        compress_statistics=config.double_quantization,
        quant_type=config.quantization,
    )
    # The first move packs it. One CPU core packs some 17 million weights a second.
    packed.weight = weight.to(device).to("cpu")
    packed.quant_state = packed.weight.quant_state
    packed.quant_state.dtype = dtype  # else the backward pass unpacks to the dtype of the source
    packed.bias = layer.bias
    # Else some CPUs repack the weights in place at the first forward pass without gradient and
    # round their scales to bfloat16: a frozen part would move.
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
