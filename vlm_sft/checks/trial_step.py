"""Run the longest batch of a run forward and backward, and generate an answer, as in training."""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch
from torch import nn

from vlm_sft.checks.machine import run_device
from vlm_sft.checks.results import CheckResults
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.batch import Collator
from vlm_sft.data.build import Data, num_steps
from vlm_sft.data.loader import load_batch
from vlm_sft.data.sampler import StepSampler
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.inference.samples import SampleGenerator
from vlm_sft.model.dtypes import DTYPES
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.model.quantization import num_weights
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.checkpointing_policy import longest_micro_batch
from vlm_sft.train.determinism import deterministic
from vlm_sft.train.optimizer import build_optimizer
from vlm_sft.train.packing_check import prepare_packing
from vlm_sft.train.train_step import explain_out_of_memory
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.progress import format_seconds

CPU_FLOPS: Final = 2e12
"""Maximum work on a CPU, about a minute; of a larger batch only one record is used."""


def counted_steps(count: int) -> str:
    """Return `1 step` or `1,200 steps`."""
    return f"{count:,} step{'s' * (count != 1)}"


def try_longest_batch(
    config: RunConfig,
    sampler: StepSampler,
    collator: Collator,
    data: Data,
    model: VisionLanguageModel,
    results: CheckResults,
) -> None:
    """Compute loss and gradients of the longest batch, without an update, and check both."""
    device, positions = run_device(), collator.num_tokens
    with (
        results.check("longest batch"),
        _shared_memory(model, results),
        deterministic(config.train.deterministic),
    ):
        steps = (
            collator.assign_to_ranks(data.train, sampler.step_indices(step), 1)
            for step in range(num_steps(config, sampler))
        )
        indices, _ = longest_micro_batch(steps, lambda i: positions(data.train, i), world_size=1)
        chosen = _affordable(indices, data, model, device)
        if chosen is None:
            text = "not tried: it would take too long on a CPU; run this check on the GPU machine"
            results.add("longest batch", "note", text)
            return
        with (
            library_call("transformers", "model", "train on the longest batch"),
            report_out_of_memory(),
        ):
            started = time.monotonic()
            loss = _loss_with_gradients(config, collator, data, model, chosen, device)
            seconds = time.monotonic() - started
        _require_finite(loss)
        _require_gradients_where_trained(model)
        build_optimizer(parameters_by_part(model), config.optim)
        part = "" if len(chosen) == len(indices) else f" (of {len(indices)}, to save time on a CPU)"
        text = (
            f"{len(chosen)} records{part} in {positions(data.train, chosen):,} positions, "
            f"forward and backward on {device.type} in {config.train.precision}; loss {loss:.4f}, "
            "all trained parts and no frozen part have gradients"
        )
        results.add("longest batch", "good", text)
        if device.type == "cpu":
            total = num_steps(config, sampler)
            each = statistics.fmean(data.train.lengths) * config.train.global_batch_size
            expected = format_seconds(seconds / positions(data.train, chosen) * each * total)
            text = (
                f"about {expected} on this machine for {counted_steps(total)}, by this batch's "
                "time; loading, evaluating and saving come on top"
            )
            results.add("duration", "good", text)
    model.zero_grad(set_to_none=True)


def try_generation(
    config: RunConfig,
    chat_tokenizer: ChatTokenizer,
    data: Data,
    model: VisionLanguageModel,
    results: CheckResults,
) -> None:
    """Generate two tokens for one validation record, as the evaluations of training do."""
    if data.eval is None or not config.train.eval_samples or not len(data.eval):
        return
    if (
        _affordable([0], Data(data.eval, data.train_ledger, None, None), model, run_device())
        is None
    ):
        return
    generate = SampleGenerator(model, chat_tokenizer, data.eval, 1, max_new_tokens=2)
    model.eval()
    with (
        results.check("evaluation"),
        library_call("transformers", "model.language_model", "generate an answer"),
        report_out_of_memory(),
        torch.no_grad(),
        _autocast(config, run_device()),
    ):
        generate(None if config.data.on_error == "stop" else lambda fault: None)
        results.add("evaluation", "good", "the model generates answers to validation records")


def _affordable(
    indices: Sequence[int], data: Data, model: VisionLanguageModel, device: torch.device
) -> Sequence[int] | None:
    """Return the batch, or only its longest record, or None if even that takes too long."""
    weights = sum(map(num_weights, model.language_model.parameters()))
    longest = max(indices, key=lambda index: data.train.lengths[index])

    def flops(chosen: Sequence[int]) -> float:
        return 6.0 * weights * sum(data.train.lengths[index] for index in chosen)

    choices = (list(indices), [longest])
    # 6 FLOPs per weight and token: 2 forward, 4 backward.
    return next((c for c in choices if device.type != "cpu" or flops(c) <= CPU_FLOPS), None)


def _loss_with_gradients(
    config: RunConfig,
    collator: Collator,
    data: Data,
    model: VisionLanguageModel,
    indices: Sequence[int],
    device: torch.device,
) -> float:
    batch = load_batch(
        data.train,
        indices,
        collator=collator,
        on_error=None if config.data.on_error != "quarantine" else lambda error: None,
    )
    model.to(device).train()
    if (packing := config.train.packing) is not None:
        prepare_packing(model, packing, config.train.precision, device, _autocast(config, device))
    torch.manual_seed(config.seed)
    with explain_out_of_memory(batch):
        with _autocast(config, device):
            output = model(batch.to(device))
        (output.loss_sum / max(1, int(output.num_targets))).backward()
    return float(output.loss_sum.detach()) / max(1, int(output.num_targets))


def _autocast(config: RunConfig, device: torch.device) -> Any:
    precision = config.train.precision
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def _require_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"the loss is {loss}; look at these records with vlm_sft.show, and at the weights that "
            "the model was loaded from, or set train.precision to bf16 or fp32",
            code="not_finite",
        )


def _require_gradients_where_trained(model: VisionLanguageModel) -> None:
    """Check that every trained part has a gradient, and no frozen part.

    A single tensor may have none, e.g. an expert to which no token was routed.
    """
    for part, named in parameters_by_part(model).items():
        trained = [p for _, p in named if p.requires_grad]
        if trained and not any(p.grad is not None for p in trained):
            raise UserError(
                f"{part} is trained, but no gradient reaches it from the loss",
                code="nothing_learns",
            )
        with_gradient = next((name for name, p in named if not p.requires_grad and _has(p)), None)
        if with_gradient is not None:
            raise UserError(f"{part} is frozen, but {with_gradient} has a gradient")
        broken = next((name for name, p in named if _has(p) and not _finite(p)), None)
        if broken is not None:
            raise UserError(f"the gradient of {broken} is not finite", code="not_finite")


def _has(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None


def _finite(parameter: nn.Parameter) -> bool:
    assert parameter.grad is not None
    return bool(torch.isfinite(parameter.grad).all())


@contextmanager
def _shared_memory(model: VisionLanguageModel, results: CheckResults) -> Iterator[None]:
    """Turn an out-of-memory error into a warning if training would shard the weights."""
    try:
        yield
    except UserError as error:
        full_fine_tuning = any(
            p.requires_grad for _, p in parameters_by_part(model)["language_model"]
        )
        if error.reason != "out_of_memory" or not full_fine_tuning or torch.cuda.device_count() < 2:
            raise
        results.add("longest batch", "warning", f"on one GPU, without sharding: {error}")


@contextmanager
def report_out_of_memory() -> Iterator[None]:
    """Raise a UserError if this machine runs out of memory in the block."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not (
            isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text
        ):
            raise
        raise UserError(
            "this machine has not enough memory for the run's longest batch; lower "
            "train.micro_batch_size (or train.packing.max_tokens) or data.max_length, set "
            "train.activation_checkpointing: full, or train on more GPUs",
            code="out_of_memory",
        ) from error
