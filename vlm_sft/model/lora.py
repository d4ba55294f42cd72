"""LoRA on the language model through peft; never on the tower or the projector."""

import copy
import difflib
import warnings
from collections.abc import Sequence
from typing import cast

import peft
import torch
from torch import nn
from transformers import PreTrainedModel

from vlm_sft.config import LoraConfig
from vlm_sft.errors import UserError
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm


def add_lora(model: VisionLanguageModel, config: LoraConfig, *, seed: int) -> None:
    """Wrap the language model in peft with float32 adapters drawn from `seed`.

    Targets are handed to peft as full paths inside the language model, so that no like-named
    module elsewhere (CLIP has `q_proj` too) can be hit.

    Raises:
        UserError: If a target names no linear layer of the language model.
    """
    language_model = causal_lm(model.language_model)
    paths = target_paths(language_model, config.targets)
    peft_config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=paths,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft 0.19 still asks transformers 5.2x for this under its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(language_model, peft_config, autocast_adapter_dtype=True)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(torch.float32)
    model.language_model = wrapped


def target_paths(language_model: PreTrainedModel, targets: Sequence[str] | str) -> list[str]:
    """Full paths of the linear layers that `lora.targets` means, in the model's order.

    `all-linear`: all but the output head. Otherwise each target is a layer's last name (`q_proj`)
    or the end of its path (`layers.0.self_attn.q_proj`).

    Raises:
        UserError: If a target matches nothing; the nearest name is told.
    """
    head = language_model.get_output_embeddings()
    linear = [
        name
        for name, module in language_model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    ]
    if isinstance(targets, str):
        if not linear:
            raise UserError(
                f"lora.targets: {type(language_model).__name__} has no nn.Linear layer to adapt; "
                "remove `lora` and train the language model in full"
            )
        return linear
    for target in targets:
        if not any(_matches(name, target) for name in linear):
            raise UserError(_unknown_target(target, linear))
    return [name for name in linear if any(_matches(name, target) for target in targets)]


def merged_language_model(model: VisionLanguageModel) -> PreTrainedModel:
    """The language model with its adapters added into the weights, as a plain transformers model.

    A copy: `model` stays as it is, and for a moment the weights are in memory twice. Without
    adapters it is the language model itself. The sums are rounded to the weights' own dtype.

    Raises:
        UserError: If an adapter holds NaN or infinity.
    """
    language_model = model.language_model
    if not isinstance(language_model, peft.PeftModel):
        return cast(PreTrainedModel, language_model)
    try:
        merged = copy.deepcopy(language_model).merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapters cannot be merged: {' '.join(str(error).split())}") from None
    return cast(PreTrainedModel, merged)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _unknown_target(target: str, linear: Sequence[str]) -> str:
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    near = difflib.get_close_matches(target, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}" if near else "known: " + ", ".join(known)
    return f"lora.targets: {target!r} names no linear layer of the language model; {hint}?"
