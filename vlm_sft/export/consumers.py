"""List which programs load an exported folder, according to its configuration.

"yes" is verified at every export; "expected" is known from the program's source (versions below)
and was not run; "no" names what the program lacks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from transformers import PretrainedConfig, __version__

Loads = Literal["yes", "expected", "no"]

_VLLM_TOWERS: Final = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Consumer:
    """A program that loads model folders, and whether it can load this one."""

    name: str
    loads: Loads
    reason: str


def consumers(config: PretrainedConfig) -> list[Consumer]:
    """Return for each program whether it loads a folder with this configuration."""
    found: Any = config
    return [
        Consumer("transformers", "yes", f"compared with {__version__}, reloaded from disk"),
        Consumer("transformers 5.0 to 5.5", "expected", "the tensors have the released names"),
        _served("vLLM 0.32", found, towers=_VLLM_TOWERS),
        _served("SGLang 0.5", found, towers=_VLLM_TOWERS[:1]),
        _served("mistral.rs 0.9", found, towers=_VLLM_TOWERS[:1]),
        Consumer("llama.cpp", "no", "its converter refuses the vision towers of LLaVA folders"),
    ]


def describe_consumers(found: Sequence[Consumer]) -> str:
    """Return a sentence on which programs load an exported folder and which do not, and why."""
    loading = [
        consumer.name if consumer.loads == "yes" else f"{consumer.name} ({consumer.reason})"
        for consumer in found
        if consumer.loads != "no"
    ]
    others = [f"{c.name} ({c.reason})" for c in found if c.loads == "no"]
    text = f"would load the exported folder: {', '.join(loading)}"
    return f"{text}; would not: {', '.join(others)}" if others else text


def _served(name: str, config: Any, *, towers: tuple[str, ...]) -> Consumer:
    """Return whether a server supports this tower and projector."""
    tower = config.vision_config.model_type
    if config.model_type != "llava":
        return Consumer(name, "no", f"it is not known to support {config.model_type} with {tower}")
    if tower not in towers:
        return Consumer(name, "no", f"it supports {_listed(towers)} towers, this one is {tower}")
    if not isinstance(config.vision_feature_layer, int):
        return Consumer(name, "no", "it supports one feature layer, this model has several")
    if config.projector_hidden_act == "linear":
        return Consumer(name, "no", "it has no linear projector (projector_hidden_act: linear)")
    kind = config.text_config.model_type
    return Consumer(name, "expected", f"if it supports the language model ({kind})")


def _listed(towers: tuple[str, ...]) -> str:
    return " and ".join(name.removesuffix("_vision_model").upper() for name in towers)
