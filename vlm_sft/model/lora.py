"""LoRA on the language model through peft; never on the tower or the projector."""

import copy
import difflib
import warnings
from collections.abc import Sequence
from typing import Any, Final, cast

import peft
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers import PreTrainedModel

from vlm_sft.config.schema import LoraConfig
from vlm_sft.errors import UserError
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.quantization import dequantize, is_quantized, linear_layers
from vlm_sft.model.router import fused_experts
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.libraries import library_call

_MISSPELLED: Final = 0.8
"""Similarity (difflib's) from which a name passes for a misspelling: `q_prj`, but not `gate_proj`
for `v_proj`."""


def add_lora(model: VisionLanguageModel, config: LoraConfig, *, seed: int) -> None:
    """Wrap the language model in peft with float32 adapters drawn from `seed`.

    Quantized layers are adapted as they are. peft's `prepare_model_for_kbit_training` has nothing
    to add: `set_trainable` freezes, norms compute in float32 whatever their dtype, and gradient
    checkpointing is of the kind that needs no gradient at its input.

    Targets are handed to peft as full paths inside the language model, so that no like-named
    module elsewhere (CLIP has `q_proj` too) can be hit.

    Raises:
        UserError: If a target names no linear layer of the language model.
    """
    language_model = causal_lm(model.language_model)
    paths = _kept_by_peft(language_model, target_paths(language_model, config.targets), config)
    peft_config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        target_modules=paths,
        bias="none",
    )
    adding = library_call("peft", "lora", "add adapters to this model")
    with adding, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.language_model = _wrapped(language_model, peft_config)


def target_paths(language_model: PreTrainedModel, targets: Sequence[str] | str) -> list[str]:
    """Full paths of the linear layers that `lora.targets` means, in the model's order.

    `all-linear`: all but the output head. Otherwise each target is a layer's last name (`q_proj`)
    or the end of its path (`layers.0.self_attn.q_proj`).

    Raises:
        UserError: If a target matches nothing; the nearest name is told.
    """
    linear = list(linear_layers(language_model))
    if isinstance(targets, str):
        if not linear:
            raise UserError(
                f"lora.targets: {type(language_model).__name__} has no nn.Linear layer to adapt; "
                "remove `lora` and train the language model in full"
            )
        return linear
    for target in targets:
        if not any(_matches(name, target) for name in linear):
            raise UserError(_unknown_target(language_model, target, linear))
    return [name for name in linear if any(_matches(name, target) for target in targets)]


def merged_language_model(model: VisionLanguageModel) -> PreTrainedModel:
    """The language model with its adapters added into the weights, as a plain transformers model.

    A copy: `model` stays as it is, and for a moment the weights are in memory twice. Without
    adapters it is the language model itself. The sums are rounded to the weights' own dtype.

    Quantized weights are unpacked first, to the dtype of the embeddings: adapters learnt beside
    those, and added to the weights from before quantization they would make another model.

    Raises:
        UserError: If an adapter holds NaN or infinity.
    """
    language_model = model.language_model
    quantized = any(map(is_quantized, language_model.parameters()))
    if not isinstance(language_model, peft.PeftModel):
        live = cast(PreTrainedModel, language_model)
        return _dequantized(copy.deepcopy(live)) if quantized else live
    copied = _on_plain_weights(language_model) if quantized else copy.deepcopy(language_model)
    try:
        merged = copied.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapters cannot be merged: {' '.join(str(error).split())}") from None
    return cast(PreTrainedModel, merged)


def _wrapped(language_model: PreTrainedModel, config: peft.LoraConfig) -> peft.PeftModel:
    with warnings.catch_warnings():
        # peft 0.19 still asks transformers 5.2x for this under its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        wrapped = peft.get_peft_model(language_model, config, autocast_adapter_dtype=True)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(torch.float32)
    if config.use_dora:
        _measure_magnitudes(wrapped)
    return cast(peft.PeftModel, wrapped)


def _measure_magnitudes(wrapped: nn.Module) -> None:
    """DoRA's first magnitudes in float32: rounded to bfloat16, fresh adapters change the model."""
    for layer in wrapped.modules():
        for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
            weight = dequantize_module_weight(cast(Any, layer).get_base_layer())
            magnitude.weight.data = torch.linalg.norm(weight.float(), dim=1)


def _on_plain_weights(language_model: peft.PeftModel) -> peft.PeftModel:
    """A copy whose adapters stand on unpacked weights."""
    base = _dequantized(cast(Any, copy.deepcopy(language_model)).unload())
    with torch.random.fork_rng(devices=[]):
        wrapped = _wrapped(base, copy.copy(language_model.peft_config["default"]))
    set_peft_model_state_dict(wrapped, get_peft_model_state_dict(language_model))
    return wrapped


def _dequantized(language_model: PreTrainedModel) -> PreTrainedModel:
    dequantize(language_model, language_model.get_input_embeddings().weight.dtype)
    return language_model


def _kept_by_peft(
    language_model: PreTrainedModel, paths: Sequence[str], config: LoraConfig
) -> list[str]:
    """Return the targets without those that peft would move from a linear layer to the experts.

    In some families with fused experts peft takes `gate_proj`, which is also a linear layer of the
    shared expert, for the fused tensor, whenever the adapter is made or loaded.

    Raises:
        UserError: The user named such a target.
    """
    moved = {name for name in {_last(path) for path in paths} if _is_moved(language_model, name)}
    kept = [path for path in paths if _last(path) not in moved]
    if moved and (not kept or not isinstance(config.targets, str)):
        known = sorted({_last(path) for path in linear_layers(language_model)} - moved)
        raise UserError(
            f"lora.targets: peft takes {', '.join(sorted(moved))} of "
            f"{type(language_model).__name__} for the fused experts, which get no adapter here; "
            f"leave these out. Other linear layers: {', '.join(known)}"
        )
    return kept


def _is_moved(language_model: PreTrainedModel, name: str) -> bool:
    config = peft.LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=language_model, conversions=None)
    except ValueError:  # it would move this one only together with others
        return True
    return name not in (config.target_modules or ())


def _last(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _unknown_target(model: PreTrainedModel, target: str, linear: Sequence[str]) -> str:
    """Say why a target matches nothing: it is no `nn.Linear`, or misspelled."""
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    near = difflib.get_close_matches(target, known, n=1, cutoff=_MISSPELLED)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if any(_matches(name, target) for name, _ in model.named_modules()):
        hint = "it is a module of another kind, which gets no adapter here. "
    elif experts := {name.rsplit(".", 1)[-1] for name in fused_experts(model)}:
        hint += (
            f"The experts' weights are fused ({', '.join(sorted(experts))}) and get no adapter. "
        )
    return (
        f"lora.targets: {target!r} names no linear layer of the language model; {hint}"
        f"known: {', '.join(known)}"
    )
