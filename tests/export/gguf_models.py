"""Tiny checkpoints with real tokenizers, for exports to GGUF."""

from typing import Any

import torch

from tests.model.tiny import LLAMA, VIT, tiny_model
from tests.tokenizers_for_tests import load
from vlm_sft.data.chat_template import load_template
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.inference.loaded_model import LoadedModel

WIDER: dict[str, Any] = {**VIT, "image_size": 56, "hidden_size": 64, "intermediate_size": 128}
SIGLIP: dict[str, Any] = {
    "library": "transformers",
    "config": {"model_type": "siglip_vision_model", **WIDER},
}
CLIP: dict[str, Any] = {
    "library": "transformers",
    "config": {"model_type": "clip_vision_model", **WIDER},
}
LLM: dict[str, Any] = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}


def checkpoint(
    tokenizer: str = "bytes", template: str = "chatml", aspect: Any = "pad", **keys: Any
) -> LoadedModel:
    """A model whose answers depend on the image, as `load_checkpoint` returns it."""
    found = load(tokenizer)
    keys = {"tower": SIGLIP, "language_model": LLM, **keys}
    keys["language_model"] = {**keys["language_model"], "vocab_size": len(found) + 3}
    model = tiny_model(**keys)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embed" not in name:
            parameter.data.mul_(4)  # random weights of the usual size ignore the image
    return LoadedModel(
        model=model.eval().requires_grad_(False),
        tokenizer=found,
        chat_tokenizer=ChatTokenizer(load_template(template, found), found),
        image_spec=model.vision_tower.image_spec,
        image_aspect=aspect,
        image_processing="exact",
        config=None,
        manifest={},
    )


def log_probabilities(found: LoadedModel, ids: list[int]) -> torch.Tensor:
    """Natural log-probabilities of the token after text without images."""
    row = torch.tensor([ids])
    mask = torch.ones_like(row, dtype=torch.bool)
    return found.model.logits(row, attention_mask=mask)[0, -1].log_softmax(-1)
