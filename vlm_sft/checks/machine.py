"""Settings that this machine or the other settings do not allow, found without building a model."""

from collections.abc import Set

import torch

from vlm_sft.checks.verdict import Verdict
from vlm_sft.commands.inputs import require_stage2
from vlm_sft.config.schema import RunConfig
from vlm_sft.model.fp8 import require_fp8
from vlm_sft.model.quantization import require_quantization
from vlm_sft.train.adamw_8bit import require_eight_bit
from vlm_sft.train.adamw_bf16 import require_roundable
from vlm_sft.train.compile import require_compiler
from vlm_sft.train.distributed import require_precision
from vlm_sft.train.environment import require_environment
from vlm_sft.train.fsdp import choose_sharding
from vlm_sft.train.metrics import require_trackers


def run_device() -> torch.device:
    """Return the device that a run would use here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def examine_machine(config: RunConfig, trainable: Set[str], verdict: Verdict) -> None:
    """Ask everything that the start of a run refuses before it loads anything."""
    before, train = len(verdict.lines), config.train
    with verdict.examine("environment"):
        require_environment(config)
    with verdict.examine("trackers"):
        require_trackers(train.trackers)
    with verdict.examine("quantization"):
        require_quantization(config.model.language_model, trainable)
    with verdict.examine("master weights"):
        require_roundable(config, trainable)
    with verdict.examine("optimizer"):
        if config.optim.optimizer == "adamw_8bit":
            require_eight_bit()
    with verdict.examine("precision"):
        require_precision(train.precision)
    with verdict.examine("fp8"):
        if train.fp8:
            require_fp8(run_device(), train.precision)
    with verdict.examine("compile"):
        if train.compile:
            require_compiler(run_device())
    with verdict.examine("sharding"):
        choose_sharding(config, trainable, world_size=1)
    if config.lora is not None:
        with verdict.examine("learning rates"):
            require_stage2(config)
    if len(verdict.lines) == before:
        words = f"the settings are available here ({run_device().type}, {train.precision})"
        verdict.add("machine", True, words)
    _warn_of_odd_settings(config, trainable, verdict)


def _warn_of_odd_settings(config: RunConfig, trainable: Set[str], verdict: Verdict) -> None:
    """Report settings that a run accepts, but that are rarely meant."""
    train, rates = config.train, config.optim.learning_rate
    language = trainable & {"language_model", "adapter"}
    warnings = {
        "optim.learning_rate.projector is 0, so the projector stays as it is": rates.projector == 0,
        "optim.learning_rate.language_model is 0, so the language model or its adapters stay as "
        "they are": bool(language) and rates.language_model == 0,
        "optim.warmup_ratio is 1: the learning rate rises to its peak at the last step": (
            config.optim.warmup_ratio == 1
        ),
        "train.eval_every_steps is set, but there is no data.eval: nothing is evaluated": (
            train.eval_every_steps is not None and not config.data.eval
        ),
    }
    for words, applies in warnings.items():
        if applies:
            verdict.report("settings", "warning", words)
