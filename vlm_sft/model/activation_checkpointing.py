"""Which activations of the language model's layers are kept for the backward pass."""

import functools
from typing import Any, Final, Literal, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from vlm_sft.errors import UserError
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm

Policy = Literal["none", "selective", "full"]

POLICIES: Final[tuple[Policy, ...]] = ("none", "selective", "full")
"""From the fastest to the smallest: all kept, the costly kept, only each layer's input kept."""

MATMULS: Final = frozenset(
    {"mm", "addmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm", "mkldnn_linear"}
)
"""Products whose results `selective` keeps. Batched ones are not among them: without a fused
kernel, attention's scores are such, and take more memory than all the rest."""

WIDENING: Final = 8
"""A product that makes its input so many times wider is cheap for its size (LoRA's second
factor) and is computed again."""


def set_recomputing(model: VisionLanguageModel, policy: Policy) -> None:
    """Decide for every layer of the language model what its backward pass computes again.

    The non-reentrant kind: it needs no gradient at its input, so frozen embeddings and text-only
    batches work unchanged; dropout draws the same numbers again. No policy changes a result. The
    frozen tower keeps nothing anyway, and the projector is small.

    Args:
        model: Changed in place; may be called again with another policy.
        policy: `none` keeps all, `selective` the results of matrix products and attention, `full`
            the input of each layer alone.

    Raises:
        UserError: The language model's class has no support for it in transformers.
    """
    language_model: Any = causal_lm(model.language_model)
    newer = hasattr(language_model, "activation_checkpointing_enable")  # its name since 5.2x
    kind = "activation" if newer else "gradient"
    if policy == "none":
        getattr(language_model, f"{kind}_checkpointing_disable")()
        return
    settings: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        settings["context_fn"] = _selective_contexts
    try:
        getattr(language_model, f"{kind}_checkpointing_enable")(settings)
    except ValueError:
        raise UserError(
            f"train.activation_checkpointing: {type(language_model).__name__} has no support for "
            f"{policy} in transformers; set it to none"
        ) from None


def _selective_contexts() -> tuple[Any, Any]:
    return cast("tuple[Any, Any]", create_selective_checkpoint_contexts(_keep_the_costly))


def _keep_the_costly(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kind = _kind(operation)
    if kind == "attention" or (kind == "product" and not _widens(args)):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


@functools.lru_cache(maxsize=1024)
def _kind(operation: Any) -> Literal["attention", "product", "other"]:
    """By name: which kernels there are depends on the device, torch and what is installed."""
    name = str(operation)
    if ("attention" in name or "attn" in name) and "backward" not in name:
        return "attention"
    return "product" if name.split(".")[1:2] and name.split(".")[1] in MATMULS else "other"


def _widens(args: Any) -> bool:
    matrices = [a for a in args if isinstance(a, Tensor) and a.ndim == 2][-2:]
    inner, outer = matrices[-1].shape if matrices else torch.Size((1, 1))
    return outer > WIDENING * inner
