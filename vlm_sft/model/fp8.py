"""Linear layers of the decoder that multiply in fp8, by torchao (dynamic scales, one a row)."""

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

CAPABILITY: Final = (8, 9)
"""Compute capability from which NVIDIA's GPUs multiply in fp8: Ada, Hopper and later."""

SMALLEST: Final = 2048
"""Of a layer's width, in and out: scaling what is smaller takes longer than fp8 saves (torchao's
float8 README, its table for scales by row)."""

MULTIPLE: Final = 16
"""The hardware's fp8 products need both widths to be multiples of it."""


def require_fp8(device: torch.device, precision: str) -> None:
    """Refuse fp8 where it cannot run.

    Raises:
        ConfigError: No such GPU, another precision than bf16, or torchao is not installed.
    """
    found = device.type
    capability: tuple[int, int] = (0, 0)
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        found = f"{torch.cuda.get_device_name(device)} ({capability[0]}.{capability[1]})"
    if capability < CAPABILITY:
        raise ConfigError(
            "train.fp8: needs an NVIDIA GPU of compute capability 8.9 or more (Ada, Hopper and "
            f"later), found {found}; set it to false"
        )
    if precision != "bf16":
        raise ConfigError(f"train.fp8: goes with train.precision: bf16, found {precision}")
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "train.fp8: torchao is not installed; run `pip install 'vlm-sft[fp8]'`, or set it to "
            "false"
        )


def fp8_layers(model: VisionLanguageModel) -> list[str]:
    """Names, in the language model, of the linear layers that fp8 is for.

    Plain ones of the decoder, wide enough and of a width that the hardware takes; not the output
    head, not adapters, not what is quantized already.
    """
    language_model = causal_lm(model.language_model)
    head = language_model.get_output_embeddings()
    return [
        name
        for name, module in language_model.named_modules()
        if type(module) is nn.Linear and module is not head and _is_worth_it(module)
    ]


def use_fp8(model: VisionLanguageModel, *, emulate: bool = False) -> list[str]:
    """Have the layers that `fp8_layers` names multiply in fp8, in place; their names.

    Weights stay what they were, under the same names: they are rounded anew at every use, in
    forward and backward. Such a layer keeps its input for the backward pass even where it is
    frozen.

    Args:
        model: Changed in place.
        emulate: Round as fp8 does but multiply in full, on any device (torchao's, for tests).

    Raises:
        ConfigError: The model has no such layer.
    """
    names = fp8_layers(model)
    if not names:
        raise ConfigError(
            f"train.fp8: {type(causal_lm(model.language_model)).__name__} has no linear layer of "
            f"at least {SMALLEST} x {SMALLEST} with widths that {MULTIPLE} divides; set it to false"
        )
    float8 = _torchao()
    config = float8.Float8LinearConfig.from_recipe_name("rowwise")
    chosen = set(names)
    float8.convert_to_float8_training(
        causal_lm(model.language_model),
        config=dataclasses.replace(config, emulate=emulate),
        module_filter_fn=lambda module, name: name in chosen,
    )
    return names


def _is_worth_it(layer: nn.Linear) -> bool:
    widths = (layer.in_features, layer.out_features)
    return min(widths) >= SMALLEST and not any(width % MULTIPLE for width in widths)


def _torchao() -> Any:
    with warnings.catch_warnings():  # its sources hold escapes that Python 3.12 warns of
        warnings.simplefilter("ignore")
        return importlib.import_module("torchao.float8")
