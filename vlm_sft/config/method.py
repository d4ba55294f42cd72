"""The training method of a run: which parts of the model it trains, and how."""

from collections.abc import Mapping, Set
from typing import Final, Literal

from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import ConfigError

Method = Literal["stage1", "lora", "qlora", "full"]
"""Train the projector alone, or with LoRA adapters, with adapters on a 4-bit language model, or
with the full language model."""

METHODS: Final[tuple[Method, ...]] = ("stage1", "lora", "qlora", "full")

Stage = Literal["stage1", "stage2"]

TRAINABLE: Final[Mapping[Method, Set[str]]] = {
    "stage1": {"projector"},
    "full": {"projector", "language_model"},
    "lora": {"projector", "adapter"},
    "qlora": {"projector", "adapter"},
}
"""The trainable parts of the model, by method; the vision tower is always frozen."""


def training_method(config: RunConfig, stage: Stage | None = None) -> Method:
    """Return the method that a configuration trains with.

    Args:
        config: The run's configuration.
        stage: The stage that is run. None infers it: LoRA or a learning rate of the language model
            means stage 2.
    """
    if config.lora is not None:
        return "lora" if config.model.language_model.quantization is None else "qlora"
    if stage is None:
        has_rate = "language_model" in config.optim.learning_rate.model_fields_set
        stage = "stage2" if has_rate else "stage1"
    return "full" if stage == "stage2" else "stage1"


def trainable_parts(config: RunConfig, stage: Stage | None = None) -> Set[str]:
    """Return the parts of the model that a run trains; arguments as for `training_method`."""
    return TRAINABLE[training_method(config, stage)]


def require_stage1(config: RunConfig) -> None:
    """Refuse settings of stage 2, which stage 1 would ignore.

    Raises:
        ConfigError: `lora`, `start_from`, `data.eval_text`, or a learning rate of the language
            model, is set.
    """
    if config.lora is not None:
        raise ConfigError("lora: stage 1 trains only the projector; remove it, or run stage 2")
    if config.start_from is not None:
        raise ConfigError(
            "start_from: stage 1 trains only the projector; name a checkpoint in projector, or run "
            "stage 2"
        )
    if config.data.eval_text:
        raise ConfigError(
            "data.eval_text: stage 1 does not train the language model, so the loss of text alone "
            "cannot change; remove it, or run stage 2"
        )
    rate = config.optim.learning_rate.language_model
    if rate:
        raise ConfigError(
            f"optim.learning_rate.language_model is {rate:g}, but stage 1 trains only the "
            "projector; remove it, or run stage 2 (vlm-sft stage2)"
        )


def require_stage2(config: RunConfig) -> None:
    """Refuse a stage 2 whose language model would silently have the learning rate 0.

    Raises:
        ConfigError: `optim.learning_rate.language_model` is not given.
    """
    if "language_model" not in config.optim.learning_rate.model_fields_set:
        raise ConfigError(
            "optim.learning_rate.language_model is missing, but stage 2 trains the language "
            "model or its adapters; give it, e.g. 2e-5 for full fine-tuning or 2e-4 with lora"
        )
