"""Which programs load an exported folder, as far as its configuration decides that.

"yes" is compared at every export; "expected" was read in the program's source (versions below) and
not run here; "no" names what the program lacks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from transformers import PretrainedConfig, __version__

Loads = Literal["yes", "expected", "no"]

_VLLM_TOWERS: Final = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Consumer:
    """A program that reads model folders, and whether it can read this one."""

    name: str
    loads: Loads
    reason: str


def consumers(config: PretrainedConfig) -> list[Consumer]:
    """Return what is known of each program about a folder of this configuration."""
    found: Any = config
    return [
        Consumer("transformers", "yes", f"compared with {__version__}, reloaded from disk"),
        Consumer("transformers 5.0 to 5.5", "expected", "the names are the released ones"),
        _served("vLLM 0.32", found, towers=_VLLM_TOWERS),
        _served("SGLang 0.5", found, towers=_VLLM_TOWERS[:1]),
        _served("mistral.rs 0.9", found, towers=_VLLM_TOWERS[:1]),
        Consumer("llama.cpp", "no", "its converter refuses the vision towers of LLaVA folders"),
    ]


def consumers_in_words(found: Sequence[Consumer]) -> str:
    """Return which programs would load an exported folder and which would not, and why."""
    loading = [
        consumer.name if consumer.loads == "yes" else f"{consumer.name} ({consumer.reason})"
        for consumer in found
        if consumer.loads != "no"
    ]
    others = [f"{c.name} ({c.reason})" for c in found if c.loads == "no"]
    words = f"would load the exported folder: {', '.join(loading)}"
    return f"{words}; would not: {', '.join(others)}" if others else words


def _served(name: str, config: Any, *, towers: tuple[str, ...]) -> Consumer:
    """Return whether a server builds this tower and projector."""
    tower = config.vision_config.model_type
    if config.model_type != "llava":
        return Consumer(name, "no", f"it is not known to load {config.model_type} with {tower}")
    if tower not in towers:
        return Consumer(name, "no", f"it builds {_listed(towers)} towers, this one is {tower}")
    if not isinstance(config.vision_feature_layer, int):
        return Consumer(name, "no", "it reads one feature layer, this model has several")
    if config.projector_hidden_act == "linear":
        return Consumer(name, "no", "it has no linear projector (projector_hidden_act: linear)")
    kind = config.text_config.model_type
    return Consumer(name, "expected", f"if it has the language model ({kind})")


def _listed(towers: tuple[str, ...]) -> str:
    return " and ".join(name.removesuffix("_vision_model").upper() for name in towers)
