"""A tiny model to be measured."""

from collections.abc import Iterator

import pytest
import torch

from vlm_sft.config.schema import LoraConfig, parse_config
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.model.build import build_model


@pytest.fixture(scope="module", params=["no adapter", "LoRA"])
def run(request: pytest.FixtureRequest) -> Iterator[LoadedModel]:
    tokenizer = byte_tokenizer()
    tower = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32}
    tower |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    language = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48}
    language |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    language |= {"vocab_size": len(tokenizer)}
    tree = {
        "output_dir": "unused",
        "model": {
            "vision_tower": {"library": "transformers", "config": tower},
            "language_model": {"config": language, "tokenizer": "bytes"},
        },
        "data": {"train": [{"path": "unused.json"}], "template": "chatml"},
        "optim": {"learning_rate": {"projector": 1e-3}},
        "train": {"global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"},
    }
    config = parse_config(tree, "test")
    lora = LoraConfig(r=2, alpha=8) if request.param == "LoRA" else None
    model = build_model(config.model, dtype=torch.float32, seed=0, lora=lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first: the adapter would do nothing
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    yield LoadedModel(
        model=model,
        tokenizer=tokenizer,
        chat_tokenizer=ChatTokenizer.from_name("chatml", tokenizer),
        image_spec=model.vision_tower.image_spec,
        image_aspect="pad",
        image_processing="fast",
        config=config,
        manifest={},
    )
