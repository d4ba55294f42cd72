"""Models with random weights, made on the device, and records shaped like LLaVA-1.5's mixture."""

import copy
import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from bench_flops import Sample, sample_flops
from bench_rows import Row, make_captions, make_rows
from bench_sizes import NUM_IMAGE_TOKENS, SIZES, Size
from transformers import AutoConfig, AutoModelForCausalLM

from vlm_sft.config.method import TRAINABLE, Method
from vlm_sft.config.schema import LoraConfig, RunConfig
from vlm_sft.data.dataset import Example
from vlm_sft.model.build import build_vision_tower
from vlm_sft.model.connectors.build import build_connector
from vlm_sft.model.lora import add_lora
from vlm_sft.model.parts import set_trainable
from vlm_sft.model.quantization import quantize
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID

SEED = 42
TOKENS_A_WORD = 1.33
"""English words of the rows in a 32,000-piece vocabulary."""

TEMPLATE_TOKENS, TURN_TOKENS = 40, 8
"""System text of `vicuna_v1`, and the role names of one exchange."""


def run_config(size: Size, method: Method, *, pack: int | None, **train: Any) -> RunConfig:
    """Return the configuration of a run with these shapes, for the planner and the optimizer."""
    side = 336
    rates = {"projector": 1e-4, "language_model": 1e-4}
    if method == "stage1":
        del rates["language_model"]
    collator: dict[str, Any] = {"micro_batch_size": 8}
    if pack is not None:
        collator = {"packing": {"max_tokens": pack}}
    return RunConfig.model_validate(
        {
            "output_dir": "unused",
            "model": {
                "vision_tower": {
                    "library": "transformers",
                    "config": {
                        "model_type": "clip_vision_model",
                        "hidden_size": size.vision_width,
                        "intermediate_size": 4 * size.vision_width,
                        "num_hidden_layers": size.vision_layers,
                        "num_attention_heads": size.vision_heads,
                        "image_size": side,
                        "patch_size": 14,
                    },
                    "feature_layers": [-2],
                },
                "projector_type": "mlp2x_gelu",
                "language_model": {
                    "config": {
                        "model_type": "llama",
                        "vocab_size": size.vocabulary,
                        "hidden_size": size.width,
                        "intermediate_size": size.intermediate,
                        "num_hidden_layers": size.layers,
                        "num_attention_heads": size.heads,
                        "num_key_value_heads": size.heads,
                        "max_position_embeddings": 4096,
                        "tie_word_embeddings": False,
                    },
                    "tokenizer": "bytes",
                    "quantization": "nf4" if method == "qlora" else None,
                },
            },
            "lora": {"r": 128, "alpha": 256, "dropout": 0.0} if "lora" in method else None,
            "data": {"train": [{"path": "unused.json"}], "template": "vicuna_v1"},
            "optim": {"learning_rate": rates, "max_grad_norm": None},
            "train": {"global_batch_size": 32, "precision": "bf16", **collator, **train},
        }
    )


def make_model(config: RunConfig, method: Method, device: torch.device) -> VisionLanguageModel:
    """Draw the weights on `device`: frozen parts in bf16, trained ones in fp32."""
    frozen = torch.bfloat16
    tree = dict(copy.deepcopy(config.model.language_model.config or {}))
    llama = AutoConfig.for_model(tree.pop("model_type"), **tree)
    torch.manual_seed(SEED)
    dtype = torch.float32 if method == "full" else frozen
    with torch.device(device):
        language_model: Any = AutoModelForCausalLM.from_config(llama, dtype=dtype)
    if method == "qlora":
        double = config.model.language_model.double_quantization
        quantize(language_model, frozen, "nf4", double_quantization=double)
    tower = build_vision_tower(config.model.vision_tower, dtype=frozen, seed=SEED)
    connector = build_connector(
        config.model.projector_type, tower.grid, tower.width, llama.hidden_size, seed=SEED
    )
    model = VisionLanguageModel(tower, connector, language_model)
    if config.lora is not None:
        add_lora(model, cast(LoraConfig, config.lora), seed=SEED)
    model.requires_grad_(False)
    set_trainable(model, TRAINABLE[method])
    return model.to(device).train()


def forget(device: torch.device) -> None:
    """Give the memory of models that are no longer used back to the device."""
    gc.collect()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@dataclass
class Records:
    """Examples in memory, with what packing needs to know of them.

    Attributes:
        examples: The records; those that share an image hold the same pixels.
        prefix_ids: The same number for records that begin alike up to and with their image.
        samples: Tokens, targets and images of each, to count operations with.
    """

    examples: list[Example]
    prefix_ids: list[int]
    samples: list[Sample]
    record_ids: list[str] = field(init=False)
    lengths: list[int] = field(init=False)
    num_images: list[int] = field(init=False)
    num_crops: list[int] = field(init=False)
    prefix_crops: list[int] = field(init=False)
    prefix_lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        """Derive what packing asks for."""
        self.record_ids = [example.record_id for example in self.examples]
        self.lengths = [len(example.input_ids) for example in self.examples]
        self.num_images = [len(example.pixel_values) for example in self.examples]
        self.num_crops = self.num_images
        self.prefix_crops = [int(key >= 0) for key in self.prefix_ids]
        self.prefix_lengths = [
            PREFIX + NUM_IMAGE_TOKENS if key >= 0 else 0 for key in self.prefix_ids
        ]

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        """Return one record with all its pixels."""
        return self.examples[index]

    def example(self, index: int, *, first_image: int = 0) -> Example:
        """Return one record without its first `first_image` images."""
        whole = self.examples[index]
        kept = whole.pixel_values[first_image:]
        return Example(whole.record_id, whole.input_ids, whole.labels, kept)

    def mean_flops(self, size: Size, mode: str) -> float:
        """Return the mean model FLOPs of a record, forward and backward."""
        return sum(sample_flops(size, sample, mode) for sample in self.samples) / len(self.samples)


PREFIX = TEMPLATE_TOKENS
"""Tokens before the image."""


def mixture(count: int, size: Size, *, max_length: int = 2048) -> Records:
    """Return records with the lengths, turns and shared images of LLaVA-1.5's mixture."""
    return _records(make_rows(count, seed=SEED), size, max_length)


def captions(count: int, size: Size) -> Records:
    """Return records of stage 1: an image and a caption."""
    return _records(make_captions(count, seed=SEED), size, 2048)


def long_record(size: Size, tokens: int = 2048) -> Records:
    """Return one record with one image that has exactly `tokens` tokens."""
    text = tokens - NUM_IMAGE_TOKENS - PREFIX
    example = _example("long", [(text // 10, text - text // 10)], 0, size)
    assert len(example.input_ids) == tokens
    return Records([example], [0], [_sample(example)])


def _records(rows: Sequence[Row], size: Size, max_length: int) -> Records:
    examples, keys = [], []
    for row in rows:
        turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
        lengths = [int(len(text.split()) * TOKENS_A_WORD) + 1 for text in turns]
        pairs = list(zip(lengths[::2], lengths[1::2], strict=True))
        image = int(row["image"].split("/")[1].split(".")[0]) if "image" in row else None
        examples.append(_example(row["id"], pairs, image, size, max_length=max_length))
        keys.append(-1 if image is None else image)
    return Records(examples, keys, [_sample(example) for example in examples])


def _sample(example: Example) -> Sample:
    targets = int((example.labels != IGNORE_INDEX).sum())
    return Sample(len(example.input_ids), targets, len(example.pixel_values))


def _example(
    name: str,
    turns: Sequence[tuple[int, int]],
    image: int | None,
    size: Size,
    *,
    max_length: int = 10**9,
) -> Example:
    """Draw random token ids: a prefix, the image, then questions and answers of these lengths."""
    draw = torch.Generator().manual_seed(random.Random(name).getrandbits(31))
    same = torch.Generator().manual_seed(7)  # records of one image begin alike

    def ids(count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(3, size.vocabulary, (count,), generator=generator)

    pieces, learned = [ids(PREFIX, same)], [False]
    if image is not None:
        pieces.append(torch.full((NUM_IMAGE_TOKENS,), IMAGE_TOKEN_ID))
        learned.append(False)
    for asked, answered in turns:
        pieces += [ids(asked, draw), ids(answered, draw)]
        learned += [False, True]
    input_ids = torch.cat(pieces)[:max_length]
    labels = torch.cat(
        [
            piece if is_answer else torch.full_like(piece, IGNORE_INDEX)
            for piece, is_answer in zip(pieces, learned, strict=True)
        ]
    )[:max_length]
    pixels = torch.zeros(0, 3, 336, 336, dtype=torch.uint8)
    if image is not None:
        seeded = torch.Generator().manual_seed(image)
        shape = (1, 3, 336, 336)
        pixels = torch.randint(0, 256, shape, generator=seeded, dtype=torch.uint8)
    return Example(name, input_ids, labels, pixels)


def size_of(tiny: bool) -> Size:
    """Return the shapes of a run: CLIP ViT-L/14-336 with a 7B Llama, or tiny ones."""
    if tiny:
        return Size("tiny", 2, 32, 2, 2, 64, 96, 2, vocabulary=512)
    return SIZES["7b"]
