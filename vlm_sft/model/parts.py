"""The four parts of a model, by name: what is trained, frozen, counted, saved."""

from collections.abc import Set
from typing import Final

import torch
from torch import nn

from vlm_sft.model.vlm import VisionLanguageModel

PARTS: Final = ("vision_tower", "projector", "language_model", "adapter")


def named_parts(model: VisionLanguageModel) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """Every parameter in exactly one part, under its full name in the model.

    `adapter` are the LoRA matrices inside the language model; `language_model` is the rest of it.
    Tied weights appear once.
    """
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        parts[part_of(name)].append((name, parameter))
    return parts


def part_of(name: str) -> str:
    """The part that a parameter of `VisionLanguageModel` belongs to, by its full name."""
    if name.startswith("vision_tower."):
        return "vision_tower"
    if name.startswith("multi_modal_projector."):
        return "projector"
    return "adapter" if ".lora_" in name else "language_model"


def set_trainable(
    model: VisionLanguageModel, trainable: Set[str], *, widen_language_model: bool = True
) -> None:
    """Train these parts, in float32, and freeze all others, in the dtype they have.

    Args:
        model: Changed in place.
        trainable: Of `projector`, `language_model`, `adapter`; each must have parameters.
        widen_language_model: False trains the language model's weights in the dtype they have.
    """
    unknown = set(trainable) - (set(PARTS) - {"vision_tower"})
    assert not unknown, f"cannot be trained: {sorted(unknown)}"
    for part, parameters in named_parts(model).items():
        assert part not in trainable or parameters, f"the model has no {part}"
        widen = widen_language_model or part != "language_model"
        for _, parameter in parameters:
            parameter.requires_grad_(False)
            if part in trainable:
                if widen:
                    parameter.data = parameter.data.to(torch.float32)
                parameter.requires_grad_(True)
