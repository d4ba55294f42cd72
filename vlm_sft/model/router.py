"""The load-balancing loss of mixture-of-experts routers, as transformers defines it."""

import sys
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel


def router_loss_coefficient(model: PreTrainedModel) -> float | None:
    """Return the weight of the router loss in the model's own training loss.

    None if that loss has no such term: the model has no router, transformers defines no loss for
    it, or its configuration says `output_router_logits: false`, which is the usual default.
    """
    config = model.config.get_text_config()
    if not getattr(config, "output_router_logits", False) or _balance(model) is None:
        return None
    for owner in (model, config):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if getattr(owner, name, None) is not None:
                return float(getattr(owner, name))
    return None


def router_loss(
    model: PreTrainedModel, router_logits: tuple[Tensor, ...], mask: Tensor | None
) -> Tensor:
    """Return the router loss of one micro-batch, multiplied by its coefficient (a scalar).

    The load-balancing loss of Switch Transformer (arXiv 2101.03961, equations 4 to 6), over all
    layers and all tokens that are not padding. It is a product of two means over tokens, so the
    loss of a large batch is not exactly the mean of the losses of its micro-batches.

    Args:
        model: A model whose `router_loss_coefficient` is not None.
        router_logits: `[B * T, experts]` of each layer, as the decoder returns them.
        mask: `[B, T]`, false (0) on padding; None: there is none.
    """
    balance, owner = _balance(model), cast(Any, model)
    assert balance is not None
    mask = None if mask is None else mask.long()
    loss = balance(router_logits, owner.num_experts, owner.num_experts_per_tok, mask)
    return cast(Tensor, loss) * cast(float, router_loss_coefficient(model))


def router_note(model: PreTrainedModel) -> str | None:
    """Return a line for the start of a run about the router loss; None without routed experts."""
    if not has_experts(model):
        return None
    coefficient = router_loss_coefficient(model)
    if coefficient is not None:
        return (
            f"router loss: included with coefficient {coefficient:g}; a step takes the mean over "
            "its micro-batches, weighted by their supervised tokens"
        )
    if _balance(model) is None:
        return f"router loss: none; transformers defines none for {type(model).__name__}"
    return "router loss: off (output_router_logits is false in the model's configuration)"


def has_experts(model: PreTrainedModel) -> bool:
    """Return whether the model routes tokens to experts, going by its configuration."""
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that hold the weights of several experts in one tensor, by name."""
    return {name: p for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name}


def _balance(model: PreTrainedModel) -> Callable[..., Tensor | int] | None:
    """Return the loss function in the model's own module of transformers, if it has one."""
    has_sizes = hasattr(model, "num_experts") and hasattr(model, "num_experts_per_tok")
    module = sys.modules[type(model).__module__]
    return getattr(module, "load_balancing_loss_func", None) if has_sizes else None
