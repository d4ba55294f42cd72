"""Train the decoder's linear layers with fp8 matrix products, through torchao.

Its rowwise recipe: dynamic scales, one per row.
"""

import dataclasses
import importlib
import importlib.util
import warnings
from typing import Any, Final

import torch
from torch import nn

from vlm_sft.errors import ConfigError
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.libraries import install_command

MIN_CAPABILITY: Final = (8, 9)
"""Compute capability of the first NVIDIA GPUs with fp8 matrix products: Ada, Hopper and later."""

MIN_WIDTH: Final = 2048
"""Minimum input and output width of a layer. For smaller ones, scaling takes longer than fp8 saves
(README of torchao.float8, table of rowwise scaling)."""

WIDTH_MULTIPLE: Final = 16
"""The fp8 products of the hardware need both widths to be multiples of this."""


def require_fp8(device: torch.device, precision: str) -> None:
    """Check that fp8 can be used.

    Raises:
        ConfigError: If the device has no fp8 products, the precision is not bf16, or torchao is not
            installed.
    """
    found = device.type
    capability: tuple[int, int] = (0, 0)
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)} ({capability[0]}.{capability[1]})"
    if capability < MIN_CAPABILITY:
        raise ConfigError(
            "train.fp8: needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper and "
            f"later), found {found}; set it to false"
        )
    if precision != "bf16":
        raise ConfigError(f"train.fp8: needs train.precision: bf16, found {precision}")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            f"train.fp8: torchao is not installed; run `{install_command('fp8')}`, or set it to "
            "false"
        )


def fp8_layers(model: VisionLanguageModel) -> list[str]:
    """Return the names, in the language model, of the linear layers that can use fp8.

    They are plain `nn.Linear` layers of sufficient width: neither the output head, nor adapters,
    nor quantized layers (these are subclasses).
    """
    language_model = causal_lm(model.language_model)
    head = language_model.get_output_embeddings()
    return [
        name
        for name, module in language_model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and min(module.in_features, module.out_features) >= MIN_WIDTH
        and module.in_features % WIDTH_MULTIPLE == module.out_features % WIDTH_MULTIPLE == 0
    ]


def use_fp8(model: VisionLanguageModel, *, emulate: bool = False) -> list[str]:
    """Switch the layers of `fp8_layers` to fp8 matrix products, in place; return their names.

    Weights keep their names and their precision: they are rounded to fp8 at every use, forward and
    backward. Such a layer saves its input for the backward pass even if it is frozen.

    Args:
        model: Changed in place.
        emulate: Round to fp8 but multiply in the original precision, on any device (for tests).

    Raises:
        ConfigError: If the model has no such layer.
    """
    names = fp8_layers(model)
    if not names:
        raise ConfigError(
            f"train.fp8: {type(causal_lm(model.language_model)).__name__} has no linear layer of "
            f"at least {MIN_WIDTH} x {MIN_WIDTH} with widths that are multiples of "
            f"{WIDTH_MULTIPLE}; set it to false"
        )
    with warnings.catch_warnings():  # its source has escapes that Python 3.12 warns about
        warnings.simplefilter("ignore")
        float8: Any = importlib.import_module("torchao.float8")
    config = float8.Float8LinearConfig.from_recipe_name("rowwise")
    chosen = set(names)
    float8.convert_to_float8_training(
        causal_lm(model.language_model),
        config=dataclasses.replace(config, emulate=emulate),
        module_filter_fn=lambda module, name: name in chosen,
    )
    return names
