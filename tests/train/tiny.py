"""A tiny real model, records for it, and processes to run it in."""

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.multiprocessing
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from vlm_sft.config.schema import LanguageModelConfig, LoraConfig, ModelConfig, VisionTowerConfig
from vlm_sft.data.dataset import Example
from vlm_sft.model.build import build_model
from vlm_sft.model.parts import set_trainable
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID

IMAGE_SIZE, NUM_IMAGE_TOKENS = 8, 4


def tiny_config() -> ModelConfig:
    return ModelConfig(
        vision_tower=VisionTowerConfig(
            library="transformers",
            config={
                "model_type": "clip_vision_model",
                "hidden_size": 8,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": IMAGE_SIZE,
                "patch_size": 4,
            },
        ),
        language_model=LanguageModelConfig(
            config={
                "model_type": "llama",
                "vocab_size": 40,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "max_position_embeddings": 64,
            },
            tokenizer="bytes",
            attn_implementation="sdpa",
        ),
    )


def tiny_model(*trainable: str, lora: LoraConfig | None = None) -> VisionLanguageModel:
    model = build_model(tiny_config(), dtype=torch.float32, seed=1, lora=lora)
    set_trainable(model, set(trainable))
    return model


def double_model(*trainable: str, **changes: Any) -> VisionLanguageModel:
    """In float64 throughout: GPT-2 takes its norms and its softmax in the dtype it is given.

    `changes` are settings of `ModelConfig`.
    """
    gpt2 = {
        "model_type": "gpt2",
        "vocab_size": 40,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    language_model = LanguageModelConfig(config=gpt2, tokenizer="bytes")
    config = tiny_config().model_copy(update={"language_model": language_model, **changes})
    model = build_model(config, dtype=torch.float64, seed=1)
    set_trainable(model, set(trainable))
    return model.double()


def example(number: int, *, length: int, supervised: bool = True, image: bool = True) -> Example:
    """A record of random content: image first (or none), the later half supervised."""
    generator = torch.Generator().manual_seed(number)
    text = torch.randint(1, 40, (length,), generator=generator)
    front = torch.full((NUM_IMAGE_TOKENS if image else 0,), IMAGE_TOKEN_ID)
    ids = torch.cat([text[:1], front, text[1:]])
    labels = torch.full_like(ids, IGNORE_INDEX)
    if supervised:
        labels[-(length // 2) :] = ids[-(length // 2) :]
    shape = (int(image), 3, IMAGE_SIZE, IMAGE_SIZE)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Example(f"record-{number}", ids, labels, pixels)


class Records(list[Example]):
    """Examples in memory."""

    @property
    def record_ids(self) -> list[str]:
        return [e.record_id for e in self]


def reset_accelerate() -> None:
    """Forget the process-wide state, which one Accelerator leaves for the next."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def in_processes(count: int, work: Callable[..., Any], *args: Any) -> Sequence[Any]:
    """What `work(accelerator, *args)` returns in each of `count` gloo processes."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_in_process, args=(rank, count, port, results, work, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [found[rank] for rank in range(count)]


def _in_process(
    rank: int, count: int, port: int, results: Any, work: Callable[..., Any], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == count
        results.put((rank, work(accelerator, *args)))
        accelerator.end_training()
    except BaseException as error:
        results.put((rank, repr(error)))
        raise
