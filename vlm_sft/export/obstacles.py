"""Check before training whether a model can be exported."""

from collections.abc import Callable, Sequence

import torch

from vlm_sft.errors import UserError
from vlm_sft.export.consumers import Consumer, hf_consumers
from vlm_sft.export.stock import (
    require_image_tokens,
    require_language_model,
    stock_config,
    stock_projector,
    stock_text_config,
    stock_vision,
    tied_config,
)
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.vlm import VisionLanguageModel


def export_obstacles(
    model: VisionLanguageModel, image_tokens: tuple[str, str] = ("", "")
) -> list[str]:
    """Return one sentence for each part that `export --to hf` would refuse; empty if none.

    Compares names, shapes and settings, and the features of one image. No weight of the language
    model is read, and the model is not changed. An export still compares the logits.

    Args:
        model: As training builds it, with or without adapters and 4-bit weights.
        image_tokens: `image_tokens` of the run's chat tokenizer.
    """
    checks: list[Callable[[], object]] = [
        lambda: stock_vision(model),
        lambda: stock_projector(model),
        lambda: require_image_tokens(model, image_tokens),
        lambda: require_language_model(causal_lm(model.language_model)),
    ]
    found = []
    with torch.random.fork_rng(devices=[]):  # building a class draws random weights
        for check in checks:
            try:
                check()
            except UserError as error:
                found.append(str(error))
    return found


def summarize_obstacles(obstacles: Sequence[str]) -> str:
    """Return "possible", or "not possible" with what `export_obstacles` found."""
    text = "; ".join(obstacle.removeprefix("export: ") for obstacle in obstacles)
    return f"not possible: {text}" if obstacles else "possible"


def export_consumers(model: VisionLanguageModel) -> list[Consumer]:
    """Return for each program whether it loads the exported folder of a model.

    Args:
        model: A model without obstacles.
    """
    language_model = causal_lm(model.language_model)
    rows = language_model.get_input_embeddings().weight.shape[0]
    with torch.random.fork_rng(devices=[]):
        tower = stock_vision(model)
        text_config = stock_text_config(language_model, rows)
        config = stock_config(model, tower, text_config, image_token_id=rows)
        config = tied_config(language_model, tower.model_class, config)
    return hf_consumers(config)
