"""Environment variables that would change a training run without appearing in its configuration.

Libraries read many. Those that would change what is computed are refused by name, with the setting
to use instead; those that change only how it is computed are recorded in every checkpoint, and a
resumed run reports which of them differ.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import UserError

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Refused:
    """One variable that a training run does not accept.

    Attributes:
        harmless: Values that change nothing, in lower case; an empty value never does.
        effect: What another value would do to the run.
        instead: What to do.
    """

    harmless: frozenset[str]
    effect: str
    instead: str


_OFF: Final = frozenset({"0", "false", "no", "off", "n", "f"})
_SHARDING: Final = "set train.sharding"

REFUSED: Final[Mapping[str, Refused]] = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": Refused(
        frozenset({"1"}),
        "divides every gradient by its value",
        "set train.batch_size and train.micro_batch_size",
    ),
    "ACCELERATE_DYNAMO_BACKEND": Refused(
        _OFF, "compiles the model outside of the configuration", "set train.compile"
    ),
    "ACCELERATE_USE_FSDP": Refused(_OFF, "shards the model as accelerate does", _SHARDING),
    "ACCELERATE_USE_DEEPSPEED": Refused(
        _OFF, "hands the model and the optimizer to DeepSpeed", _SHARDING
    ),
    "ACCELERATE_USE_MEGATRON_LM": Refused(_OFF, "hands the model to Megatron-LM", _SHARDING),
    "ACCELERATE_USE_PARALLELISM_CONFIG": Refused(
        _OFF, "splits the model over ranks as accelerate does", _SHARDING
    ),
    "ACCELERATE_DOWNCAST_BF16": Refused(_OFF, "rounds float32 to bfloat16", "set train.precision"),
    "XLA_USE_BF16": Refused(_OFF, "rounds float32 to bfloat16", "set train.precision"),
    "XLA_DOWNCAST_BF16": Refused(_OFF, "rounds float32 to bfloat16", "set train.precision"),
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": Refused(
        _OFF,
        "lets weight files run code when they are loaded",
        "save the weights as safetensors",
    ),
}

REFUSED_WHEN_COMPILING: Final[Mapping[str, Refused]] = {
    name: Refused(_OFF, effect, "set train.compile: false")
    for name, effect in (
        ("TORCH_COMPILE_DISABLE", "switches train.compile off"),
        ("TORCHDYNAMO_DISABLE", "switches train.compile off"),
        ("TORCHDYNAMO_SUPPRESS_ERRORS", "lets layers fall back to uncompiled code unreported"),
    )
}

TF32: Final = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""Variables that let fp32 matrix products keep 10 bits of mantissa; NVIDIA's images set one."""


def require_environment(config: RunConfig, environment: Environment = os.environ) -> None:
    """Refuse environment variables that would change the run without its configuration showing it.

    Raises:
        UserError: A variable is set to a value that changes the run; the message names it,
            its effect and the setting to use instead.
    """
    refused = {**REFUSED, **(REFUSED_WHEN_COMPILING if config.train.compile else {})}
    for name, rule in refused.items():
        value = environment.get(name, "").strip().lower()
        if value and value not in rule.harmless:
            raise UserError(
                f"the environment variable {name}={environment[name]} {rule.effect}, which the "
                f"configuration does not show; unset it and {rule.instead}"
            )
    launched = environment.get("ACCELERATE_MIXED_PRECISION", "").strip().lower()
    precision = config.train.precision
    if launched not in ("", "no", precision):
        raise UserError(
            f"the environment variable ACCELERATE_MIXED_PRECISION={launched} differs from "
            f"train.precision: {precision}; set train.precision, which is the one that counts, and "
            "unset the variable (accelerate launch --mixed_precision no)"
        )


def environment_notes(config: RunConfig, environment: Environment = os.environ) -> list[str]:
    """Return a line for each accepted variable that lowers the precision of the run."""
    if config.train.precision != "fp32":
        return []
    return [
        f"{name}={environment[name]}: fp32 matrix products on a GPU are computed in TF32"
        for name in TF32
        if environment.get(name) == "1"
    ]
