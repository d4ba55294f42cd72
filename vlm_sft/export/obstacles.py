"""What keeps a model from being exported, known before it is trained."""

from collections.abc import Callable

import torch

from vlm_sft.errors import UserError
from vlm_sft.export.stock import require_language_model, stock_projector, stock_tower
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm


def export_obstacles(model: VisionLanguageModel) -> list[str]:
    """Return one sentence for each part that `export --to hf` would refuse; empty if none.

    Looks at names, shapes and settings and at the features of one blank image; no weight of the
    language model is read, and the model is not changed. An export still compares the logits.

    Args:
        model: As training builds it, with or without adapters and 4-bit weights.
    """
    asked: list[Callable[[], object]] = [
        lambda: stock_tower(model.vision_tower),
        lambda: stock_projector(model.multi_modal_projector),
        lambda: require_language_model(causal_lm(model.language_model)),
    ]
    found = []
    with torch.random.fork_rng(devices=[]):  # classes draw weights when they are built
        for ask in asked:
            try:
                ask()
            except UserError as error:
                found.append(str(error))
    return found
