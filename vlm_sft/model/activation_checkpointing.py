"""Activation checkpointing of the language model: what is kept and what is recomputed."""

import functools
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils import checkpoint

from vlm_sft.errors import UserError
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.vlm import VisionLanguageModel

CheckpointPolicy = Literal["none", "selective", "full"]

POLICIES: Final[tuple[CheckpointPolicy, ...]] = ("none", "selective", "full")
"""From the fastest to the one with the least memory. They keep all activations; the results of
matrix products and attention; the input of each layer."""

MATMULS: Final = frozenset(
    {"mm", "addmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm", "mkldnn_linear"}
)
"""Matrix products whose results `selective` keeps. `bmm` is not one of them: without a fused kernel
the scores of attention are batched products, and take more memory than everything else."""

WIDENING: Final = 8
"""`selective` recomputes a product whose result is more than this many times wider than its input,
such as the second factor of LoRA: it is cheap to compute for its size."""


def set_activation_checkpointing(model: VisionLanguageModel, policy: CheckpointPolicy) -> None:
    """Set what the backward pass of each decoder layer recomputes.

    No policy changes a result. Checkpointing is non-reentrant: it works with frozen embeddings and
    text-only batches, whose layer inputs need no gradient, and restores the random state, so that
    dropout draws the same mask again. The frozen tower saves nothing anyway, and the projector is
    small.

    Args:
        model: Changed in place; the policy can be changed again later.
        policy: `none` keeps all activations, `selective` the results of matrix products and
            attention, `full` the input of each layer.

    Raises:
        UserError: If transformers does not support it for the class of the language model.
    """
    language_model: Any = causal_lm(model.language_model)
    # Its name since transformers 5.2; before, `gradient_checkpointing_enable`.
    renamed = hasattr(language_model, "activation_checkpointing_enable")
    prefix = "activation" if renamed else "gradient"
    if policy == "none":
        getattr(language_model, f"{prefix}_checkpointing_disable")()
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        settings["context_fn"] = functools.partial(
            checkpoint.create_selective_checkpoint_contexts, _selective_policy
        )
    try:
        getattr(language_model, f"{prefix}_checkpointing_enable")(settings)
    except ValueError:
        raise UserError(
            f"train.activation_checkpointing: {type(language_model).__name__} has no support for "
            f"{policy} in transformers; set it to none"
        ) from None


def _selective_policy(
    _: Any, operation: Any, *args: Any, **kwargs: Any
) -> checkpoint.CheckpointPolicy:
    """Return whether the result of an operation is kept or recomputed."""
    kind = _kind(operation)
    if kind == "attention" or (kind == "product" and not _widens(args)):
        return checkpoint.CheckpointPolicy.MUST_SAVE
    return checkpoint.CheckpointPolicy.PREFER_RECOMPUTE


@functools.lru_cache(maxsize=1024)
def _kind(operation: Any) -> Literal["attention", "product", "other"]:
    """Classify an operation by its name: the set of kernels depends on device, torch and extras."""
    name = str(operation)
    if ("attention" in name or "attn" in name) and "backward" not in name:
        return "attention"
    return "product" if name.split(".")[1:2] and name.split(".")[1] in MATMULS else "other"


def _widens(args: Any) -> bool:
    """Return whether the last matrix of a product makes its input much wider."""
    matrices = [a for a in args if isinstance(a, Tensor) and a.ndim == 2][-2:]
    inner, outer = matrices[-1].shape if matrices else torch.Size((1, 1))
    return outer > WIDENING * inner
