"""Real models of a few thousand weights, made on the spot."""

from typing import Any

import torch
from torch import Tensor

from tests.rounding import terms_of
from vlm_sft.config.schema import (
    ImageTilingConfig,
    LanguageModelConfig,
    LoraConfig,
    ModelConfig,
    VisionTowerConfig,
)
from vlm_sft.data.batch import Batch, targets_of
from vlm_sft.model.build import build_model
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID

VIT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CLIP: dict[str, Any] = {
    "library": "transformers",
    "config": {"model_type": "clip_vision_model", **VIT},
}
OPEN_CLIP: dict[str, Any] = {
    "library": "open_clip",
    "config": {
        "embed_dim": 16,
        "vision_cfg": {
            "layers": 3,
            "width": 32,
            "head_width": 16,
            "patch_size": 14,
            "image_size": 28,
        },
    },
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 300,
}
GEMMA2: dict[str, Any] = {
    **LLAMA,
    "model_type": "gemma2",
    "num_key_value_heads": 1,
    "head_dim": 24,
    "final_logit_softcapping": 0.05,
}
COHERE: dict[str, Any] = {**LLAMA, "model_type": "cohere", "logit_scale": 0.0625, "pad_token_id": 0}
GRANITE: dict[str, Any] = {**LLAMA, "model_type": "granite", "logits_scaling": 4.0}

TOKENS = 4
"""Of one image of the tiny CLIP: (28 / 14) squared."""


def model_config(
    tower: dict[str, Any] = CLIP,
    language_model: dict[str, Any] = LLAMA,
    projector_type: str = "mlp2x_gelu",
    tiling: dict[str, Any] | None = None,
    **held: Any,
) -> ModelConfig:
    return ModelConfig(
        vision_tower=VisionTowerConfig(**tower),
        image_tiling=ImageTilingConfig(**tiling or {}),
        projector_type=projector_type,
        language_model=LanguageModelConfig(config=language_model, tokenizer="bytes", **held),
    )


def tiny_model(
    *,
    tower: dict[str, Any] = CLIP,
    language_model: dict[str, Any] = LLAMA,
    projector_type: str = "mlp2x_gelu",
    lora: LoraConfig | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    tiling: dict[str, Any] | None = None,
    **held: Any,
) -> VisionLanguageModel:
    config = model_config(tower, language_model, projector_type, tiling, **held)
    return build_model(config, dtype=dtype, seed=seed, lora=lora)


def sums_of(model: VisionLanguageModel) -> int:
    """Return the terms that a tiny model's losses and logits pass through; see `rounding`."""
    vocabulary = model.language_model.get_input_embeddings().weight.shape[0]
    return terms_of(model, length=30) + int(vocabulary)


def images(count: int, *, seed: int = 0, size: int = 28) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def rows(*records: list[int], tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, mask and labels; -1 is a whole image, ids above 99 are supervised."""
    expanded = [
        [t for i in record for t in ([IMAGE_TOKEN_ID] * tokens if i == -1 else [i])]
        for record in records
    ]
    longest = max(map(len, expanded))
    ids = torch.tensor([r + [0] * (longest - len(r)) for r in expanded])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in expanded]).bool()
    labels = ids.masked_fill((ids < 100) | ~mask, IGNORE_INDEX)
    return ids, mask, labels


def batch_of(
    ids: Tensor, mask: Tensor, labels: Tensor | None = None, pixel_values: Tensor | None = None
) -> Batch:
    """Padded rows as a batch, a record each; labels as for models of transformers."""
    if labels is None:
        labels = torch.full_like(ids, IGNORE_INDEX)
    positions, targets, records = targets_of(labels)
    return Batch(
        record_ids=tuple(f"record-{row}" for row in range(len(ids))),
        input_ids=ids,
        attention_mask=mask.bool(),
        segments=None,
        target_positions=positions,
        target_ids=targets,
        target_records=records,
        unique_target_positions=positions,
        pixel_values=pixel_values,
    )
