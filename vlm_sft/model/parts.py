"""The four parts of a model: vision tower, projector, language model and adapter."""

from collections.abc import Set
from typing import Final

import torch
from torch import nn

from vlm_sft.model.vlm import IMAGE_NEWLINE, VisionLanguageModel

PARTS: Final = ("vision_tower", "projector", "language_model", "adapter")


def parameters_by_part(model: VisionLanguageModel) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Return the parameters of each part under their full names; each is in exactly one part.

    `adapter` has the LoRA matrices of the language model, `language_model` the rest of it. Tied
    weights appear once.
    """
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        parts[part_of(name)].append((name, parameter))
    return parts


def part_of(name: str) -> str:
    """Return the part of a parameter of `VisionLanguageModel`, by its full name."""
    if name.startswith("vision_tower."):
        return "vision_tower"
    if name == IMAGE_NEWLINE or name.startswith("multi_modal_projector."):
        return "projector"
    return "adapter" if ".lora_" in name else "language_model"


def set_trainable(
    model: VisionLanguageModel, trainable: Set[str], *, widen_language_model: bool = True
) -> None:
    """Make the given parts trainable in float32, and freeze all others in their dtype.

    Args:
        model: Changed in place.
        trainable: Any of `projector`, `language_model`, `adapter`; each must have parameters.
        widen_language_model: False keeps the dtype of the language model's weights.
    """
    unknown = set(trainable) - (set(PARTS) - {"vision_tower"})
    assert not unknown, f"cannot be trained: {sorted(unknown)}"
    for part, parameters in parameters_by_part(model).items():
        assert part not in trainable or parameters, f"the model has no {part}"
        widen = widen_language_model or part != "language_model"
        for _, parameter in parameters:
            parameter.requires_grad_(False)
            if part in trainable:
                if widen:
                    parameter.data = parameter.data.to(torch.float32)
                parameter.requires_grad_(True)
