"""A few real training steps on this machine, beside what was predicted for them."""

import time
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from accelerate import Accelerator
from rich.table import Table
from torch import nn

from vlm_sft.config.method import TRAINABLE, Method
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.batch import Batch
from vlm_sft.data.build import load_data, load_language
from vlm_sft.data.loader import load_steps, micro_batches_of_rank
from vlm_sft.model.activation_checkpointing import Policy, set_recomputing
from vlm_sft.model.hashing import held_tensors
from vlm_sft.model.packed_attention import PackedLayout
from vlm_sft.model.parts import named_parts
from vlm_sft.model.quantization import require_quantization
from vlm_sft.planning.estimate import Estimator
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.feature_cache import use_feature_cache
from vlm_sft.train.live_bytes import LiveBytes
from vlm_sft.train.optimizer import build_optimizer, gradient_norm
from vlm_sft.train.packing_check import prepare_packing
from vlm_sft.train.setup import load_model, make_plan
from vlm_sft.train.train_step import accumulate_gradient

STEPS: Final = 3
"""Steps that are timed, after one that is not; one more is measured for its bytes."""

ON_A_GPU: Final = "torch.cuda.max_memory_allocated"
ON_A_CPU: Final = "bytes of all live tensors (weights, gradients, optimizer, what operators make)"


@dataclass(frozen=True)
class Calibration:
    """Predicted and measured.

    Attributes:
        predicted_bytes: Allocated at the peak of a step.
        measured_bytes: Likewise.
        predicted_seconds: Of a step, at the efficiency that was assumed or given.
        measured_seconds: Median of a few steps.
        efficiency: Share of the matrix products' rate that these steps reached.
        basis: How the bytes were measured.
    """

    predicted_bytes: float
    measured_bytes: float
    predicted_seconds: float
    measured_seconds: float
    efficiency: float
    basis: str

    @property
    def memory_error(self) -> float:
        """Predicted against measured bytes, as a share of the measured."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def time_error(self) -> float:
        """Predicted against measured seconds, as a share of the measured."""
        return self.predicted_seconds / self.measured_seconds - 1

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        errors = {"memory_error": self.memory_error, "time_error": self.time_error}
        return {**asdict(self), **errors}

    def table(self) -> Table:
        """Both beside each other."""
        table = Table(title="calibration: a few real steps here", title_justify="left")
        for column in ("", "predicted", "measured", "error"):
            table.add_column(column, justify="right" if column else "left")
        sizes = [f"{n / 2**20:,.1f} MiB" for n in (self.predicted_bytes, self.measured_bytes)]
        times = [f"{n:.4g} s" for n in (self.predicted_seconds, self.measured_seconds)]
        table.add_row("peak memory", *sizes, f"{self.memory_error:+.1%}")
        table.add_row("step", *times, f"{self.time_error:+.1%}")
        table.caption = f"memory measured as {self.basis}"
        return table


def calibrate(estimator: Estimator, method: Method, policy: Policy) -> Calibration:
    """Train a few steps as the stages do and compare; only a feature cache is written to.

    Args:
        estimator: Of the run, on this machine's device.
        method: The configured one.
        policy: The configured one.

    Raises:
        UserError: Model or data cannot be loaded, or a step does not fit.
    """
    steps = _Steps(estimator.config, method, policy)
    steps.take(0)
    seconds = sorted(steps.timed(number) for number in range(1, STEPS + 1))[STEPS // 2]
    batches = [micro_batch_of(batch) for batch in steps.batches(STEPS + 1)]
    measured = steps.bytes_of(STEPS + 1)
    largest = max(batches, key=lambda batch: batch.tokens)
    memory = estimator.memory(method, policy, largest, micro_batches=len(batches))
    flops = estimator.simulation(method).flops
    mean = [micro_batch_of(b) for number in range(1, STEPS + 1) for b in steps.batches(number)]
    spent = sum(flops.of_batch(batch, policy) for batch in mean) / STEPS
    rate = estimator.device.flops
    return Calibration(
        predicted_bytes=memory.allocated,
        measured_bytes=measured,
        predicted_seconds=spent / (rate * estimator.efficiency),
        measured_seconds=seconds,
        efficiency=spent / (rate * seconds),
        basis=ON_A_CPU if estimator.device.is_cpu else ON_A_GPU,
    )


class _Steps:
    """The run's first steps, to be taken one by one."""

    def __init__(self, config: RunConfig, method: Method, policy: Policy) -> None:
        require_quantization(config.model.language_model, TRAINABLE[method])
        self._max_norm = config.optim.max_grad_norm
        self._accelerator: Accelerator = make_accelerator(config.train.precision)
        language = load_language(config)
        model, _ = load_model(config, TRAINABLE[method])
        tower = model.vision_tower
        data = load_data(config, language.chat_tokenizer, tower.image_spec, tower.num_tokens)
        use_feature_cache(config, model, self._accelerator, data)
        self._data, self._plan = data.train, make_plan(config, language, data, model)
        set_recomputing(model, policy)
        model.train()
        self._model: nn.Module = model
        self._wrapped: nn.Module = self._accelerator.prepare(model)
        if config.train.packing is not None:
            precision, device = config.train.precision, self._accelerator.device
            autocast = self._accelerator.autocast()
            prepare_packing(model, config.train.packing, precision, device, autocast)
        self._optimizer = build_optimizer(named_parts(model), config.optim)
        self._trained = [p for group in self._optimizer.param_groups for p in group["params"]]

    def batches(self, number: int) -> list[Batch]:
        """The micro-batches of a step; beyond the run's last it begins anew."""
        records = self._plan.records_of_step(number % self._plan.total_steps)
        collator = self._plan.collator
        chunks = micro_batches_of_rank(collator, self._data, records, world_size=1, rank=0)
        return next(load_steps(self._data, [chunks], collator=collator, num_workers=0))

    def take(self, number: int) -> None:
        """One step in full."""
        self._update(self.batches(number))

    def timed(self, number: int) -> float:
        """Seconds of one step, without loading its records."""
        batches = self.batches(number)
        self._wait()
        start = time.perf_counter()
        self._update(batches)
        self._wait()
        return time.perf_counter() - start

    def bytes_of(self, number: int) -> float:
        """Bytes alive at the peak of one step."""
        batches = self.batches(number)
        self._optimizer.zero_grad(set_to_none=True)
        if self._accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._update(batches)
            return float(torch.cuda.max_memory_allocated())
        states = (value for kept in self._optimizer.state.values() for value in kept.values())
        state = [value for value in states if isinstance(value, torch.Tensor)]
        parameters = (held_tensors("", p) for p in self._model.parameters())
        weights = [tensor for held in parameters for _, tensor in held]
        known = [*weights, *self._model.buffers(), *state]
        pixels = [shown for batch in batches if (shown := _shown(batch)) is not None]
        live = LiveBytes([*known, *pixels])
        with live:
            self._update(batches)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in known}
        return sum(storages.values()) + max((t.nbytes for t in pixels), default=0) + live.peak

    def _update(self, batches: list[Batch]) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        accumulate_gradient(self._wrapped, batches, self._accelerator)
        gradient_norm(self._trained, self._max_norm)
        self._optimizer.step()

    def _wait(self) -> None:
        if self._accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def _shown(batch: Batch) -> torch.Tensor | None:
    """A batch's images, or their features."""
    return batch.pixel_values if batch.image_features is None else batch.image_features


def micro_batch_of(batch: Batch) -> MicroBatch:
    """Return the shape of a batch, which memory and FLOPs depend on."""
    images, (rows, length) = batch.num_images, batch.input_ids.shape
    if batch.segments is None:
        return MicroBatch.padded([length] * rows, targets=batch.num_targets, images=images)
    layout = PackedLayout(batch.segments)
    pairs = zip(layout.num_keys, layout.lengths, strict=True)
    attended = sum(keys**2 - (keys - own) ** 2 for keys, own in pairs)
    records = len(batch.record_ids)
    return MicroBatch(1, length, batch.num_targets, images, records, attended)
