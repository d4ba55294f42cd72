"""CPU seconds of answers on one thread: one by one, and batched with shared image prefixes.

    python -m scripts.benchmarks.bench_answers           # random weights of SmolLM2-135M's sizes
    python -m scripts.benchmarks.bench_answers --checkpoint RUN/final

Six questions about each image, as POPE has, with answers of at most 8 tokens. The answers of both
ways are compared: they may differ where the two most likely tokens are within rounding.
"""

import argparse
import json
import sys
import time

import torch

from vlm_sft.config.schema import parse_config
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.images import ImageCrops
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.inference.prompts import user_message
from vlm_sft.inference.shared_prefix import Prompts, answer_prompts
from vlm_sft.model.build import build_model

NAMES = ("dog", "cat", "car", "person", "chair", "bottle")
SUFFIX = "\nAnswer the question using a single word or phrase."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint")
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_checkpoint(arguments.checkpoint) if arguments.checkpoint else random_model()
    images = [noise(loaded, seed) for seed in range(arguments.images)]
    groups = [asked(loaded, image, arguments.tokens) for image in images]

    start = time.process_time()
    single = [
        answer_prompts(loaded, [Prompts(group.images, [prompt], [limit])], whole_prompts=True)[0][0]
        for group in groups
        for prompt, limit in zip(group.prompts, group.max_tokens, strict=True)
    ]
    alone = time.process_time() - start
    start = time.process_time()
    together = [answer for found in answer_prompts(loaded, groups) for answer in found]
    batched = time.process_time() - start
    same = sum(a.text == b.text for a, b in zip(single, together, strict=True))
    result = {
        "questions": len(single),
        "prompt_tokens": len(groups[0].prompts[0]),
        "cpu_seconds_one_by_one": round(alone, 2),
        "cpu_seconds_batched": round(batched, 2),
        "times_as_fast": round(alone / batched, 2),
        "same_answers": same,
    }
    json.dump(result, sys.stdout, indent=2)
    print()


def noise(loaded: LoadedModel, seed: int) -> ImageCrops:
    from io import BytesIO

    import numpy as np
    from PIL import Image

    size = loaded.image_spec.size
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return loaded.load_image(buffer.getvalue())


def asked(loaded: LoadedModel, image: ImageCrops, tokens: int) -> Prompts:
    prompts = [
        loaded.prompt_ids(user_message(f"Is there a {name}?{SUFFIX}", [b""]), [image.layout])
        for name in NAMES
    ]
    return Prompts((image,), prompts, [tokens] * len(prompts))


def random_model() -> LoadedModel:
    """Build a model with SmolLM2-135M's and CLIP-B/16's sizes (196 image tokens)."""
    tokenizer = byte_tokenizer()
    tower = {"model_type": "clip_vision_model", "hidden_size": 768, "intermediate_size": 3072}
    tower |= {"num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
    language = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536}
    language |= {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    tower_config = {"library": "transformers", "config": {**tower, "patch_size": 16}}
    tree = {
        "output_dir": "unused",
        "model": {
            "vision_tower": tower_config,
            "language_model": {
                "config": {**language, "vocab_size": len(tokenizer)}, "tokenizer": "bytes",
            },
        },
        "data": {"train": [{"path": "unused.json"}], "template": "chatml"},
        "optim": {"learning_rate": {"projector": 1e-3}},
        "train": {"global_batch_size": 1, "micro_batch_size": 1, "precision": "fp32"},
    }  # fmt: skip
    config = parse_config(tree, "benchmark")
    model = build_model(config.model, dtype=torch.float32, seed=0).requires_grad_(False).eval()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        chat_tokenizer=ChatTokenizer.from_name("chatml", tokenizer),
        image_spec=model.vision_tower.image_spec,
        image_aspect="pad",
        image_processing="fast",
        config=config,
        manifest={},
    )


if __name__ == "__main__":
    main()
