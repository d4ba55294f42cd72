"""A few real training steps on this machine, beside what was predicted for them."""

import time
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from accelerate import Accelerator
from rich.table import Table
from torch import nn

from vlm_sft.assemble import load_data, load_language, load_model, make_plan
from vlm_sft.config import RunConfig
from vlm_sft.constants import IGNORE_INDEX
from vlm_sft.data.collate import Batch
from vlm_sft.model.parts import named_parts
from vlm_sft.planning.estimate import TRAINABLE, Estimator, Method
from vlm_sft.planning.live_bytes import LiveBytes
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.planning.simulate import Policy
from vlm_sft.train.batches import load_steps, split
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.optim import build_optimizer, gradient_norm
from vlm_sft.train.step import accumulate_gradient

STEPS: Final = 3
"""Steps that are timed, after one that is not; one more is measured for its bytes."""

ON_A_GPU: Final = "torch.cuda.max_memory_allocated"
ON_A_CPU: Final = "bytes of all live tensors (weights, gradients, optimiser, what operators make)"


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
    """Train a few steps as the stages do and compare; nothing is written.

    Args:
        estimator: Of the run, on this machine's device.
        method: The configured one.
        policy: The configured one.

    Raises:
        UserError: Model or data cannot be loaded, or a step does not fit.
    """
    steps = _Steps(estimator.config, method)
    steps.take(0)
    seconds = sorted(steps.timed(number) for number in range(1, STEPS + 1))[STEPS // 2]
    batches = [_shape_of(batch) for batch in steps.batches(STEPS + 1)]
    measured = steps.bytes_of(STEPS + 1)
    largest = max(batches, key=lambda batch: batch.tokens)
    memory = estimator.memory(method, policy, largest, micro_batches=len(batches))
    flops = estimator.simulation(method).flops
    mean = [_shape_of(b) for number in range(1, STEPS + 1) for b in steps.batches(number)]
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

    def __init__(self, config: RunConfig, method: Method) -> None:
        self._config = config
        self._accelerator: Accelerator = make_accelerator(config.train.precision)
        language = load_language(config)
        model, _ = load_model(config, TRAINABLE[method])
        self._data = load_data(config, language.renderer, model).train
        self._plan = make_plan(config, language, self._data)
        if config.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        self._model: nn.Module = model
        self._wrapped: nn.Module = self._accelerator.prepare(model)
        self._optimizer = build_optimizer(named_parts(model), config.optim)
        self._trained = [p for group in self._optimizer.param_groups for p in group["params"]]

    def batches(self, number: int) -> list[Batch]:
        """The micro-batches of a step; beyond the run's last it begins anew."""
        records = self._plan.records_of_step(number % self._plan.total_steps)
        chunks = split(records, self._config.train.micro_batch_size, world_size=1, rank=0)
        pad = self._plan.pad_token_id
        return next(load_steps(self._data, [chunks], pad_token_id=pad, num_workers=0))

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
        state = [t for s in self._optimizer.state.values() for t in s.values()]
        known = [*self._model.parameters(), *self._model.buffers(), *state]
        pixels = [b.pixel_values for b in batches if b.pixel_values is not None]
        live = LiveBytes([*known, *pixels])
        with live:
            self._update(batches)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in known}
        return sum(storages.values()) + max((t.nbytes for t in pixels), default=0) + live.peak

    def _update(self, batches: list[Batch]) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        accumulate_gradient(self._wrapped, batches, self._accelerator)
        gradient_norm(self._trained, self._config.optim.max_grad_norm)
        self._optimizer.step()

    def _wait(self) -> None:
        if self._accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def _shape_of(batch: Batch) -> MicroBatch:
    lengths = [batch.input_ids.shape[1]] * batch.input_ids.shape[0]
    targets = int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
    pictures = 0 if batch.pixel_values is None else len(batch.pixel_values)
    return MicroBatch.padded(lengths, targets=targets, pictures=pictures)
