"""Published shapes of models that recipes in `configs/` name, to plan them without any download.

The fields are those of each model's `config.json` that decide shapes. A configuration on this
machine always comes first.
"""

from collections.abc import Mapping
from typing import Any, Final

_CLIP_LARGE: Final = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_LLAMA_7B: Final = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
_QWEN2: Final = {"model_type": "qwen2", "max_position_embeddings": 32768}
_QWEN2_HALF_B: Final = {
    **_QWEN2,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}

KNOWN_TOWERS: Final[Mapping[str, Mapping[str, Any]]] = {
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
"""Vision towers of transformers. timm and open_clip know the shapes of their own names."""

KNOWN_LANGUAGE_MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    "lmsys/vicuna-7b-v1.3": {**_LLAMA_7B, "max_position_embeddings": 2048},
    "lmsys/vicuna-7b-v1.5": {**_LLAMA_7B, "max_position_embeddings": 4096},
    "Qwen/Qwen1.5-7B": {**_LLAMA_7B, **_QWEN2, "vocab_size": 151936},
    "Qwen/Qwen2-7B-Instruct": {
        **_QWEN2,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": _QWEN2_HALF_B,
    "Qwen/Qwen2.5-1.5B-Instruct": {
        **_QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
