"""Access to a causal language model of transformers: decoder, layers, head, logits."""

from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_sft.errors import UserError
from vlm_sft.model.router import router_loss, router_loss_coefficient


def causal_lm(language_model: nn.Module) -> PreTrainedModel:
    """Return the model of transformers itself, without the wrapper of peft if it has one."""
    get_base_model = getattr(language_model, "get_base_model", None)
    return cast(PreTrainedModel, get_base_model() if get_base_model else language_model)


def decoder_of(language_model: nn.Module) -> nn.Module:
    """Return the causal language model without its head."""
    model = causal_lm(language_model)
    return cast(nn.Module, model.get_decoder() or model.base_model)


def decoder_layers(language_model: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers, in order.

    They are the decoder's first module list with as many entries as its configuration has layers:
    transformers names that list `layers` in most families, `h` or `blocks` in others.

    Raises:
        UserError: If there is no such list.
    """
    model = causal_lm(language_model)
    depth = model.config.get_text_config().num_hidden_layers
    for module in decoder_of(language_model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise UserError(
        f"model.language_model: {type(model).__name__} has no list of {depth} decoder layers; use "
        "a model of another family"
    )


def head_logits(language_model: nn.Module, hidden: Tensor) -> Tensor:
    """Return the logits `[..., V]` of hidden states `[..., D]`, as the model's own forward does.

    Cohere multiplies them by `logit_scale`, Granite divides them by `logits_scaling`, and Gemma 2
    caps them with `final_logit_softcapping`.
    """
    model = causal_lm(language_model)
    config = model.config.get_text_config()
    logits = cast(Tensor, cast(nn.Module, model.get_output_embeddings())(hidden))
    if getattr(config, "logit_scale", None) is not None:
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.no_grad()
def check_head(language_model: PreTrainedModel) -> None:
    """Check on three tokens that loss and logits are those of the model's own forward.

    Raises:
        UserError: If the model does something to its inputs, logits or loss that is not
            reproduced here, so that it would be trained on another loss than its own.
    """
    embeddings = cast(nn.Module, language_model.get_input_embeddings())
    device = next(embeddings.parameters()).device
    ids = torch.arange(3, device=device).unsqueeze(0)
    training, attention = language_model.training, language_model.config._attn_implementation
    language_model.eval()
    if device.type == "cpu" and "flash" in str(attention):  # needs a GPU
        language_model.set_attn_implementation("eager")
    expected = language_model(input_ids=ids, labels=ids, use_cache=False)
    routed = router_loss_coefficient(language_model) is not None
    options = {"output_router_logits": True} if routed else {}
    output = decoder_of(language_model)(inputs_embeds=embeddings(ids), use_cache=False, **options)
    logits = head_logits(language_model, output.last_hidden_state)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    if routed:
        loss = loss + router_loss(language_model, output.router_logits, None)
    language_model.train(training)
    if language_model.config._attn_implementation != attention:
        language_model.set_attn_implementation(attention)
    name = type(language_model).__name__
    if not expected.logits.isfinite().all():
        raise UserError(
            f"model.language_model: {name} computes logits that are not finite from three tokens, "
            "so its weights are damaged or overflow in this dtype; copy them again from where the "
            "model is from, or use another dtype"
        )
    if not torch.allclose(logits.float(), expected.logits.float(), rtol=1e-3, atol=1e-3):
        raise UserError(
            f"model.language_model: {name} computes its logits in a way that is not supported "
            f"(off by {(logits - expected.logits).abs().max().item():.2g}), so the loss would be "
            "wrong; use a model of another family"
        )
    if not torch.allclose(loss.float(), expected.loss.float(), rtol=1e-2, atol=1e-3):
        raise UserError(
            f"model.language_model: the own loss of {name} has a term that is not supported "
            f"({expected.loss.item():.4f} on three tokens, {loss.item():.4f} without it), so it "
            "would be missing; use a model of another family, or set output_router_logits to "
            "false in its configuration if that is the term"
        )
