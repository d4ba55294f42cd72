"""Shard weights, gradients and optimizer state over the ranks with FSDP2."""

from collections.abc import Set
from typing import Literal

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import ConfigError
from vlm_sft.model.language_model import decoder_layers
from vlm_sft.model.vlm import VisionLanguageModel

COMPUTE_DTYPES = {"bf16": torch.bfloat16, "fp32": None}


Sharding = Literal["none", "zero2", "zero3"]


def choose_sharding(config: RunConfig, trainable: Set[str], *, world_size: int) -> Sharding:
    """Return how this run shards the weights it trains.

    Only full fine-tuning on several ranks is sharded; the projector and adapters are small enough
    to be replicated.

    Args:
        config: The run's configuration.
        trainable: Parts that the run trains.
        world_size: Number of ranks.

    Raises:
        ConfigError: Sharding was requested for a run that does not fine-tune the full language
            model, or another setting does not work with sharded weights.
    """
    train, full = config.train, "language_model" in trainable
    if train.sharding in ("zero2", "zero3") and not full:
        raise ConfigError(
            f"train.sharding: {train.sharding} is for full fine-tuning in stage 2; the projector "
            "and adapters are small, so leave it at auto or none"
        )
    if not full or world_size == 1 or train.sharding == "none":
        return "none"
    unsupported = {
        "optim.optimizer: adamw_8bit": config.optim.optimizer == "adamw_8bit",
        "train.compile: true": train.compile,
        "train.fp8: true": train.fp8,
        "train.master_weights: none": train.master_weights == "none",
    }
    for setting, is_set in unsupported.items():
        if is_set:
            raise ConfigError(
                f"{setting} does not work with sharded weights, which full fine-tuning on several "
                "ranks uses; set train.sharding: none, or leave this setting at its default"
            )
    return "zero3" if train.sharding == "auto" else train.sharding


def shard(
    model: VisionLanguageModel,
    accelerator: Accelerator,
    precision: str,
    *,
    reshard_after_forward: bool = True,
) -> None:
    """Shard projector and language model over all ranks, in place, along dimension 0.

    Every decoder layer is gathered just before it is used; the frozen vision tower is replicated.
    Sharded weights are fp32, gathered ones have the dtype of `precision`, and gradients are reduced
    in fp32.

    Args:
        model: Changed in place.
        accelerator: The ranks.
        precision: fp32 or bf16.
        reshard_after_forward: Free gathered weights after the forward pass and gather them again
            for the backward pass (ZeRO-3). False keeps them: less communication, more memory
            (ZeRO-2).

    Raises:
        ConfigError: fp16, whose loss scale would differ between ranks.
    """
    if precision not in COMPUTE_DTYPES:
        raise ConfigError(
            f"train.precision: {precision} does not work with sharded weights; use bf16 or fp32"
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = MixedPrecisionPolicy(
        param_dtype=COMPUTE_DTYPES[precision],
        reduce_dtype=torch.float32 if COMPUTE_DTYPES[precision] else None,
    )
    model.vision_tower.to(accelerator.device)
    # Layers first: the root then holds what is left (embeddings, norm, head, projector).
    for layer in decoder_layers(model.language_model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    frozen = set(model.vision_tower.parameters())
    fully_shard(
        model,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=reshard_after_forward,
        ignored_params=frozen,
    )
    register_fsdp_forward_method(model, "generate")
    register_fsdp_forward_method(model, "logits")
