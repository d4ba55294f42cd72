"""LoRA adapters on the language model, through peft; the tower and the projector get none."""

import copy
import difflib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

_TYPO_SIMILARITY: Final = 0.8
"""difflib's similarity from which a target counts as a typo of a known name: `q_prj` of `q_proj`,
but not `gate_proj` of `v_proj`."""


def add_lora(model: VisionLanguageModel, config: LoraConfig, *, seed: int) -> None:
    """Add float32 adapters, initialized from `seed`, to the language model in place.

    Args:
        model: Its language model is replaced by a `peft.PeftModel` that wraps it. It may be
            quantized: peft's `prepare_model_for_kbit_training` is not needed, since
            `set_trainable` freezes weights, norms compute in float32 for any dtype, and
            non-reentrant activation checkpointing needs no gradient at its input.
        config: Targets, rank and the other settings of LoRA.
        seed: Seed of the initial weights.

    Raises:
        UserError: If a target matches no linear layer of the language model.
    """
    language_model = causal_lm(model.language_model)
    # Full paths inside the language model: by its last name alone, `q_proj` would match modules of
    # a CLIP tower too.
    paths = _supported_targets(language_model, target_paths(language_model, config.targets), config)
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
        model.language_model = with_adapters(language_model, peft_config)


def target_paths(language_model: PreTrainedModel, targets: Sequence[str] | str) -> list[str]:
    """Return the full paths of the linear layers that match `lora.targets`, in the model's order.

    Args:
        language_model: A model without adapters.
        targets: `all-linear` for all linear layers except the output head; or a list of last names
            (`q_proj`) or ends of paths (`layers.0.self_attn.q_proj`).

    Raises:
        UserError: If a target matches nothing; the message names the closest known one.
    """
    linear = list(linear_layers(language_model))
    if isinstance(targets, str):
        if not linear:
            raise UserError(
                f"lora.targets: {type(language_model).__name__} has no nn.Linear layer to adapt; "
                "remove `lora` for full fine-tuning"
            )
        return linear
    for target in targets:
        if not any(_matches(name, target) for name in linear):
            raise UserError(_unknown_target(language_model, target, linear))
    return [name for name in linear if any(_matches(name, target) for target in targets)]


def merged_language_model(model: VisionLanguageModel) -> PreTrainedModel:
    """Return the language model with its adapters merged, as a plain transformers model.

    Merged weights are rounded to the dtype of the weights. `model` is not changed: the result is a
    copy, so the weights are in memory twice. Without adapters and quantization it is the language
    model itself.

    Quantized weights are dequantized first, to the dtype of the embeddings. The adapters were
    trained on these weights; merged into those from before quantization, they would give another
    model.

    Raises:
        UserError: If an adapter contains NaN or infinity.
    """
    language_model = model.language_model
    quantized = any(map(is_quantized, language_model.parameters()))
    if not isinstance(language_model, peft.PeftModel):
        plain = cast(PreTrainedModel, language_model)
        return _dequantized(copy.deepcopy(plain)) if quantized else plain
    copied = _dequantized_base(language_model) if quantized else copy.deepcopy(language_model)
    try:
        merged = copied.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise UserError(f"the adapters cannot be merged: {' '.join(str(error).split())}") from None
    return cast(PreTrainedModel, merged)


def base_language_model(model: VisionLanguageModel) -> PreTrainedModel:
    """Return the language model without its adapters, as a plain transformers model.

    A copy, as by `merged_language_model`; quantized weights are dequantized.
    """
    language_model = model.language_model
    if not isinstance(language_model, peft.PeftModel):
        return merged_language_model(model)
    plain = cast(PreTrainedModel, cast(Any, copy.deepcopy(language_model)).unload())
    quantized = any(map(is_quantized, plain.parameters()))
    return _dequantized(plain) if quantized else plain


def with_adapters(language_model: PreTrainedModel, config: peft.LoraConfig) -> peft.PeftModel:
    """Wrap a language model in peft with new adapters in float32."""
    with without_known_warnings():
        wrapped = peft.get_peft_model(language_model, config, autocast_adapter_dtype=True)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(torch.float32)
    if config.use_dora:
        _set_dora_magnitudes(wrapped)
    return cast(peft.PeftModel, wrapped)


@contextmanager
def without_known_warnings() -> Iterator[None]:
    """Ignore a warning of transformers that peft causes whenever it wraps a model."""
    with warnings.catch_warnings():
        # peft 0.19 reads this attribute under the name it had before transformers 5.2.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _set_dora_magnitudes(wrapped: nn.Module) -> None:
    """Set DoRA's initial magnitudes to the weight norms in float32 (arXiv 2402.09353, section 4).

    peft computes them in the dtype of the weights. Rounded to bfloat16 they differ from the norms
    by which DoRA divides, so that new adapters would change the model's output.
    """
    for layer in wrapped.modules():
        for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
            weight = dequantize_module_weight(cast(Any, layer).get_base_layer())
            magnitude.weight.data = torch.linalg.norm(weight.float(), dim=1)


def _dequantized_base(language_model: peft.PeftModel) -> peft.PeftModel:
    """Return a copy with the same adapters on dequantized weights."""
    base = _dequantized(cast(Any, copy.deepcopy(language_model)).unload())
    with torch.random.fork_rng(devices=[]):
        wrapped = with_adapters(base, copy.copy(language_model.peft_config["default"]))
    set_peft_model_state_dict(wrapped, get_peft_model_state_dict(language_model))
    return wrapped


def _dequantized(language_model: PreTrainedModel) -> PreTrainedModel:
    dequantize(language_model, language_model.get_input_embeddings().weight.dtype)
    return language_model


def _supported_targets(
    language_model: PreTrainedModel, paths: Sequence[str], config: LoraConfig
) -> list[str]:
    """Return the targets without those that peft would apply to fused experts.

    transformers 5 fuses the experts of some families into one tensor. peft then redirects their
    former names (`gate_proj`) to that tensor, both when an adapter is created and when it is
    loaded, although linear layers of the shared expert have the same names.

    Raises:
        UserError: If the user named such a target, or no other target is left.
    """
    names = {_last_name(path) for path in paths}
    redirected = {name for name in names if _is_redirected(language_model, name)}
    supported = [path for path in paths if _last_name(path) not in redirected]
    if redirected and (not supported or not isinstance(config.targets, str)):
        known = sorted({_last_name(path) for path in linear_layers(language_model)} - redirected)
        raise UserError(
            f"lora.targets: peft applies {', '.join(sorted(redirected))} of "
            f"{type(language_model).__name__} to the fused experts, which get no adapter here; "
            f"remove these targets. Other linear layers: {', '.join(known)}"
        )
    return supported


def _is_redirected(language_model: PreTrainedModel, name: str) -> bool:
    """Return whether peft's conversion removes a target from the list that it is given."""
    config = peft.LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=language_model, conversions=None)
    except ValueError:  # raised for a target that can only be converted together with others
        return True
    return name not in (config.target_modules or ())


def _last_name(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _unknown_target(model: PreTrainedModel, target: str, linear: Sequence[str]) -> str:
    """Return an error message that says why a target matches no linear layer."""
    known = sorted({_last_name(name) for name in linear})
    near = difflib.get_close_matches(target, known, n=1, cutoff=_TYPO_SIMILARITY)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if any(_matches(name, target) for name, _ in model.named_modules()):
        hint = "it is a module of another kind, which gets no adapter here. "
    elif experts := {_last_name(name) for name in fused_experts(model)}:
        hint += (
            f"The experts' weights are fused ({', '.join(sorted(experts))}) and get no adapter. "
        )
    return (
        f"lora.targets: {target!r} matches no linear layer of the language model; {hint}"
        f"known: {', '.join(known)}"
    )
