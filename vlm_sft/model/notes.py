"""Notes on a model that a run logs at its start: router loss, dropout, weights without adapter."""

from typing import cast

from torch import nn
from transformers import PreTrainedModel

from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.model.quantization import num_weights
from vlm_sft.model.router import fused_experts, router_note
from vlm_sft.model.vlm import VisionLanguageModel


def model_notes(model: VisionLanguageModel) -> list[str]:
    """Return one line for everything about the model that a user may not expect.

    A mixture of experts' router loss, dropout of the language model's own configuration, and
    weights that LoRA does not adapt.
    """
    language_model = causal_lm(model.language_model)
    notes = [router_note(language_model), _dropout_note(language_model)]
    if parameters_by_part(model)["adapter"]:
        notes.append(_unadapted_note(language_model))
    return [note for note in notes if note is not None]


def _dropout_note(language_model: nn.Module) -> str | None:
    """Return a note with the nonzero dropout probabilities of the model's configuration."""
    config = cast(PreTrainedModel, language_model).config.get_text_config()
    found = [
        f"{name} {value:g}"
        for name, value in sorted(config.to_dict().items())
        if "drop" in name
        and not name.startswith(("classifier", "summary"))
        and isinstance(value, (int, float))
        and 0 < value < 1
    ]
    if not found:
        return None
    return f"dropout of the language model's own configuration is active: {', '.join(found)}"


def _unadapted_note(language_model: nn.Module) -> str | None:
    """Return a note with the weight matrices that get no adapter.

    Embeddings and the output head are not listed: nobody expects adapters there.
    """
    found: dict[str, int] = {}
    routed = bool(fused_experts(language_model))
    head = cast(PreTrainedModel, language_model).get_output_embeddings()
    for path, module in language_model.named_modules():
        # A linear layer without adapter was excluded by `lora.targets`, except in a mixture of
        # experts, where `all-linear` excludes some as well.
        adapted = isinstance(module, nn.Linear) and (not routed or path.endswith(".base_layer"))
        if adapted or isinstance(module, nn.Embedding) or module is head or ".lora_" in path:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim >= 2 and "lora_" not in name:
                label = f"{path.rsplit('.', 1)[-1]}.{name}"
                found[label] = found.get(label, 0) + num_weights(parameter)
    if not found:
        return None
    total = sum(num_weights(p) for p in language_model.parameters())
    what = "experts" if routed else "some weights"
    share = sum(found.values()) / total
    return f"{what}: no adapter ({', '.join(found)}; {share:.0%} of the language model's weights)"
