"""Memory and time of `train.activation_checkpointing` and `optim.optimizer`.

    .venv/bin/python scripts/benchmarks/bench_memory.py
    .venv/bin/python scripts/benchmarks/bench_memory.py --hidden-size 512 --layers 8 --tokens 1024

For a Llama with random weights and a tiny tower, in each stage: bytes that the forward pass saves
for the backward pass, peak bytes of both, CPU-seconds of both (medians over rounds, the policies in
turns), and whether loss and gradients are bit-identical. Then a step of each optimizer on the same
weights: bytes of its state and CPU-seconds. `--compile` times compiled layers too. One thread.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vlm_sft.commands.run_command import run_command
from vlm_sft.config.schema import (
    LanguageModelConfig,
    LearningRates,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    VisionTowerConfig,
)
from vlm_sft.data.batch import Batch, pad_examples
from vlm_sft.data.dataset import Example
from vlm_sft.model.activation_checkpointing import POLICIES, set_activation_checkpointing
from vlm_sft.model.build import build_model
from vlm_sft.model.parts import parameters_by_part, set_trainable
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.compile import compile_layers
from vlm_sft.train.live_bytes import LiveBytes
from vlm_sft.train.optimizer import build_optimizer, optimizer_state_bytes, set_learning_rates
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID

STAGES: dict[str, set[str]] = {
    "stage 1": {"projector"},
    "stage 2, LoRA": {"projector", "adapter"},
    "stage 2, full": {"projector", "language_model"},
}
IMAGE = 16
"""Tokens of an image in the tiny tower."""


def main(argv: Sequence[str]) -> int:
    """Measure, and print the tables."""
    arguments = _parse(argv)
    torch.set_num_threads(1)
    console = Console(width=110)
    console.print(_policies(arguments))
    console.print(_optimizers(arguments))
    if arguments.compile:
        console.print(_compiled(arguments))
    return 0


def _policies(arguments: argparse.Namespace) -> Table:
    table = Table(title=f"{arguments.rows} records of {arguments.tokens} tokens, float32")
    for column in ("stage", "policy", "kept MiB", "peak MiB", "CPU-s", "same bits"):
        table.add_column(column, justify="left" if column in ("stage", "policy") else "right")
    for stage in STAGES:
        model, batch = _model(stage, arguments), _batch(arguments)
        reference: dict[str, Tensor] | None = None
        seconds: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        rows = []
        for policy in POLICIES:
            set_activation_checkpointing(model, policy)
            kept, peak, found = _measured(model, batch)
            reference = reference or found
            same = all(torch.equal(found[name], reference[name]) for name in reference)
            rows.append((stage, policy, kept, peak, same))
        for _ in range(arguments.rounds):
            for policy in POLICIES:
                set_activation_checkpointing(model, policy)
                seconds[policy].append(_cpu_seconds(lambda m=model, b=batch: _step(m, b)))
        for name, policy, kept, peak, same in rows:
            middle = statistics.median(seconds[policy])
            figures = f"{kept / 2**20:.1f}", f"{peak / 2**20:.1f}", f"{middle:.2f}"
            table.add_row(name, policy, *figures, "yes" if same else "NO")
    return table


def _optimizers(arguments: argparse.Namespace) -> Table:
    table = Table(title="optimizers, full fine-tuning")
    for column in ("optimizer", "weights", "state bytes per weight", "CPU-s per step"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for kind in ("adamw", "adamw_8bit"):
        model = _model("stage 2, full", arguments)
        rates = LearningRates(projector=1e-3, language_model=1e-4)
        config = OptimConfig.model_validate({"learning_rate": rates, "optimizer": kind})
        optimizer = build_optimizer(parameters_by_part(model), config)
        set_learning_rates(optimizer, 1.0)
        weights = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
        _step(model, _batch(arguments))
        seconds = [_cpu_seconds(optimizer.step) for _ in range(arguments.rounds + 1)]
        table.add_row(
            kind,
            f"{weights:,}",
            f"{optimizer_state_bytes(optimizer) / weights:.2f}",
            f"{statistics.median(seconds[1:]):.3f}",
        )
    return table


def _compiled(arguments: argparse.Namespace) -> Table:
    table = Table(title="train.compile")
    for column in ("stage", "plain CPU-s", "compiled CPU-s", "first step CPU-s", "loss differs by"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    batch = _batch(arguments)
    for stage in STAGES:
        plain, compiled = _model(stage, arguments), _model(stage, arguments)
        compile_layers(compiled, torch.device("cpu"))
        first = _cpu_seconds(lambda m=compiled: _step(m, batch))
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(arguments.rounds):
            for model in (plain, compiled):
                spent = _cpu_seconds(lambda m=model: _step(m, batch))
                seconds[model is compiled].append(spent)
        losses = []
        for model in (plain, compiled):
            torch.manual_seed(0)  # dropout
            losses.append(float(model(batch).loss_sum.detach()))
        middle = {which: statistics.median(found) for which, found in seconds.items()}
        off = abs(losses[0] - losses[1]) / losses[0]
        table.add_row(
            stage,
            f"{middle[False]:.2f}",
            f"{middle[True]:.2f}",
            f"{first:.1f}",
            f"{off:.1e}",
        )
    return table


def _model(stage: str, arguments: argparse.Namespace) -> VisionLanguageModel:
    heads = max(1, arguments.hidden_size // 64)
    tower = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    llama = {
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": arguments.hidden_size,
        "intermediate_size": arguments.hidden_size * 11 // 4,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": heads,
    }
    config = ModelConfig(
        vision_tower=VisionTowerConfig(library="transformers", config=tower),
        language_model=LanguageModelConfig(config=llama, tokenizer="bytes"),
    )
    lora = LoraConfig(r=16, dropout=0.05) if "adapter" in STAGES[stage] else None
    model = build_model(config, dtype=torch.float32, seed=0, lora=lora)
    set_trainable(model, STAGES[stage])
    return model.train()


def _batch(arguments: argparse.Namespace) -> Batch:
    """Return records of an image and text, with a seventh of all positions supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 1024, (arguments.rows, arguments.tokens), generator=generator)
    ids[:, 1 : 1 + IMAGE] = IMAGE_TOKEN_ID
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -arguments.tokens // 7 :] = ids[:, -arguments.tokens // 7 :]
    shape = (arguments.rows, 1, 3, 32, 32)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    rows = zip(ids, labels, pixels, strict=True)
    return pad_examples([Example(str(n), *row) for n, row in enumerate(rows)], pad_token_id=0)


def _step(model: VisionLanguageModel, batch: Batch) -> None:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    model(batch).loss_sum.backward()


def _measured(model: VisionLanguageModel, batch: Batch) -> tuple[int, int, dict[str, Tensor]]:
    """Return bytes saved by the forward pass, peak bytes, and loss and gradients by name."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    torch.manual_seed(0)
    with LiveBytes() as live:
        loss = model(batch).loss_sum
        kept = live.now
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return kept, live.peak, {"loss": loss.detach(), **found}


def _cpu_seconds(action: Callable[[], Any]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also time train.compile")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
