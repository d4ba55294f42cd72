"""Check which settings this machine or other settings do not allow, without building a model."""

from collections.abc import Set

import torch

from vlm_sft.checks.results import CheckResults
from vlm_sft.config.method import require_stage2
from vlm_sft.config.schema import RunConfig
from vlm_sft.model.fp8 import require_fp8
from vlm_sft.model.quantization import require_quantization
from vlm_sft.train.adamw_bf16 import require_master_weights
from vlm_sft.train.compile import require_compiler
from vlm_sft.train.distributed import require_precision
from vlm_sft.train.environment import require_environment
from vlm_sft.train.fsdp import choose_sharding
from vlm_sft.utils.libraries import require_extra, require_trackers


def run_device() -> torch.device:
    """Return the device that a run would use on this machine."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_machine(config: RunConfig, trainable: Set[str], results: CheckResults) -> None:
    """Make all checks that a run makes before it loads anything."""
    before, train = len(results.lines), config.train
    with results.check("environment"):
        require_environment(config)
    with results.check("trackers"):
        require_trackers(train.trackers)
    with results.check("quantization"):
        require_quantization(config.model.language_model.quantization, trainable)
    with results.check("master weights"):
        require_master_weights(config, trainable)
    with results.check("optimizer"):
        if config.optim.optimizer == "adamw_8bit":
            require_extra("bitsandbytes", "optim.optimizer: adamw_8bit")
    with results.check("precision"):
        require_precision(train.precision)
    with results.check("fp8"):
        if train.fp8:
            require_fp8(run_device(), train.precision)
    with results.check("compile"):
        if train.compile:
            require_compiler(run_device())
    with results.check("sharding"):
        choose_sharding(config, trainable, world_size=1)
    if config.lora is not None:
        with results.check("learning rates"):
            require_stage2(config)
    if len(results.lines) == before:
        text = (
            f"all settings are available on this machine ({run_device().type}, {train.precision})"
        )
        results.add("machine", "good", text)
    _warn_about_settings(config, trainable, results)


def _warn_about_settings(config: RunConfig, trainable: Set[str], results: CheckResults) -> None:
    """Warn about settings that a run accepts but that are rarely intended."""
    train, rates = config.train, config.optim.learning_rate
    language = trainable & {"language_model", "adapter"}
    warnings = {
        "optim.learning_rate.projector is 0, so the projector is not trained": rates.projector == 0,
        "optim.learning_rate.language_model is 0, so neither the language model nor its adapters "
        "are trained": bool(language) and rates.language_model == 0,
        "optim.warmup_ratio is 1: the learning rate reaches its maximum at the last step": (
            config.optim.warmup_ratio == 1
        ),
        "train.eval_every_steps is set, but data.eval is not: nothing is evaluated": (
            train.eval_every_steps is not None and not (config.data.eval or config.data.eval_text)
        ),
    }
    for text, applies in warnings.items():
        if applies:
            results.add("settings", "warning", text)
