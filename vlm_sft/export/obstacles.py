"""What becomes of a model when it is exported, known before it is trained."""

from collections.abc import Callable, Sequence

import torch

from vlm_sft.errors import UserError
from vlm_sft.export.consumers import Consumer, consumers
from vlm_sft.export.stock import (
    require_language_model,
    stock_config,
    stock_projector,
    stock_text_config,
    stock_tower,
)
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


def outlook(obstacles: Sequence[str]) -> str:
    """Return "possible", or "not possible" with what `export_obstacles` found."""
    words = "; ".join(obstacle.removeprefix("export: ") for obstacle in obstacles)
    return f"not possible: {words}" if obstacles else "possible"


def export_consumers(model: VisionLanguageModel) -> list[Consumer]:
    """Return what is known of each program about the exported folder of a model.

    Args:
        model: One that has no obstacles.
    """
    language_model = causal_lm(model.language_model)
    rows = language_model.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        tower = stock_tower(model.vision_tower)
    text_config = stock_text_config(language_model, rows)
    return consumers(stock_config(model, tower, text_config, image_token_id=rows))
