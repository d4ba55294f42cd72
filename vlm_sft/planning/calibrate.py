"""Compare the prediction with a few real training steps on this machine."""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from accelerate import Accelerator
from rich.table import Table
from torch import Tensor, nn

from vlm_sft.config.method import TRAINABLE, Method
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.batch import Batch
from vlm_sft.data.build import load_chat_tokenizer, load_data, make_collator, make_sampler
from vlm_sft.data.hf_tokenizer import padding_id
from vlm_sft.data.loader import load_steps, micro_batches_of_rank
from vlm_sft.model.activation_checkpointing import CheckpointPolicy, set_activation_checkpointing
from vlm_sft.model.costs import image_cost
from vlm_sft.model.hashing import stored_tensors
from vlm_sft.model.packed_attention import PackedLayout
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.model.quantization import require_quantization
from vlm_sft.planning.estimate import Estimator
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.feature_cache import use_feature_cache
from vlm_sft.train.live_bytes import LiveBytes
from vlm_sft.train.optimizer import build_optimizer, gradient_norm
from vlm_sft.train.packing_check import prepare_packing
from vlm_sft.train.setup import load_model
from vlm_sft.train.train_step import accumulate_gradient
from vlm_sft.utils.progress import track

TIMED_STEPS: Final = 3
"""Steps that are timed. One step before them is a warm-up; the memory of one after is measured."""

GPU_BASIS: Final = "torch.cuda.max_memory_allocated"
CPU_BASIS: Final = "bytes of all live tensors (weights, gradients, optimizer state, activations)"


@dataclass(frozen=True)
class Calibration:
    """Predicted and measured memory and time of a step.

    Attributes:
        predicted_bytes: Predicted peak of the allocated memory.
        measured_bytes: Measured peak of the allocated memory.
        predicted_seconds: Predicted time of a step, with the efficiency that was assumed or given.
        measured_seconds: Median of the timed steps.
        efficiency: Share of the matrix-product rate that the timed steps reached.
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
        """Relative error of the predicted bytes."""
        return self.predicted_bytes / self.measured_bytes - 1

    @property
    def time_error(self) -> float:
        """Relative error of the predicted seconds."""
        return self.predicted_seconds / self.measured_seconds - 1

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        errors = {"memory_error": self.memory_error, "time_error": self.time_error}
        return {**asdict(self), **errors}

    def table(self) -> Table:
        """Return a table of predicted and measured values."""
        table = Table(title="calibration: a few real steps on this machine", title_justify="left")
        for column in ("", "predicted", "measured", "error"):
            table.add_column(column, justify="right" if column else "left")
        sizes = [f"{n / 2**20:,.1f} MiB" for n in (self.predicted_bytes, self.measured_bytes)]
        times = [f"{n:.4g} s" for n in (self.predicted_seconds, self.measured_seconds)]
        table.add_row("peak memory", *sizes, f"{self.memory_error:+.1%}")
        table.add_row("step", *times, f"{self.time_error:+.1%}")
        table.caption = f"memory measured as {self.basis}"
        return table


def calibrate(estimator: Estimator, method: Method, policy: CheckpointPolicy) -> Calibration:
    """Train a few steps as the training commands do, and compare them with the prediction.

    Nothing is saved, except that `data.feature_cache` is filled.

    Args:
        estimator: The run on this machine's device.
        method: The configured training method.
        policy: Activation checkpointing.

    Raises:
        UserError: If the model or the data cannot be loaded, or a step does not fit.
    """
    steps = _TrainingSteps(estimator.config, method, policy)
    timed = range(1, TIMED_STEPS + 1)
    everything = track(range(TIMED_STEPS + 1), description="training steps to calibrate")
    seconds = statistics.median([steps.run(step) for step in everything][1:])
    measured_bytes = steps.peak_bytes(TIMED_STEPS + 1)

    shapes = [micro_batch_of(batch) for batch in steps.batches(TIMED_STEPS + 1)]
    largest = max(shapes, key=lambda shape: shape.tokens)
    memory = estimator.memory(method, policy, largest, micro_batches=len(shapes))
    flops = estimator.simulation(method).flops
    flops_per_step = (
        sum(
            flops.of_batch(micro_batch_of(batch), policy)
            for step in timed
            for batch in steps.batches(step)
        )
        / TIMED_STEPS
    )
    rate = estimator.device.flops
    return Calibration(
        predicted_bytes=memory.allocated,
        measured_bytes=measured_bytes,
        predicted_seconds=flops_per_step / (rate * estimator.efficiency),
        measured_seconds=seconds,
        efficiency=flops_per_step / (rate * seconds),
        basis=CPU_BASIS if estimator.device.is_cpu else GPU_BASIS,
    )


class _TrainingSteps:
    """The first optimizer steps of a run, run one at a time on one device."""

    def __init__(self, config: RunConfig, method: Method, policy: CheckpointPolicy) -> None:
        require_quantization(config.model.language_model.quantization, TRAINABLE[method])
        self._max_norm = config.optim.max_grad_norm
        self._accelerator: Accelerator = make_accelerator(config.train.precision)
        chat_tokenizer = load_chat_tokenizer(config)
        model, _ = load_model(config, TRAINABLE[method])
        image_spec = model.vision_tower.image_spec
        data = load_data(config, chat_tokenizer, image_spec, model.layout_rule)
        use_feature_cache(config, model, self._accelerator, data)
        self._records, self._sampler = data.train, make_sampler(config, data.train)
        pad_token_id = padding_id(chat_tokenizer.tokenizer)
        self._collator = make_collator(config, pad_token_id, image_cost(model))
        set_activation_checkpointing(model, policy)
        model.train()
        self._model: nn.Module = model
        self._wrapped: nn.Module = self._accelerator.prepare(model)
        if config.train.packing is not None:
            precision, device = config.train.precision, self._accelerator.device
            autocast = self._accelerator.autocast()
            prepare_packing(model, config.train.packing, precision, device, autocast)
        self._optimizer = build_optimizer(parameters_by_part(model), config.optim)
        self._trainable = [p for group in self._optimizer.param_groups for p in group["params"]]

    def batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step; a short data set repeats in further epochs."""
        indices = self._sampler.step_indices(step)
        micro_batches = micro_batches_of_rank(
            self._collator, self._records, indices, world_size=1, rank=0
        )
        loader = load_steps(self._records, [micro_batches], collator=self._collator, num_workers=0)
        return next(loader)

    def run(self, step: int) -> float:
        """Run one step; return its seconds without the time to load its records."""
        batches = self.batches(step)
        self._synchronize()
        start = time.perf_counter()
        self._update(batches)
        self._synchronize()
        return time.perf_counter() - start

    def peak_bytes(self, step: int) -> float:
        """Run one step; return the most bytes of tensors that were alive at once."""
        batches = self.batches(step)
        self._optimizer.zero_grad(set_to_none=True)
        if self._accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._update(batches)
            return float(torch.cuda.max_memory_allocated())
        # A CPU has no such counter. `LiveBytes` counts what is allocated during the step; add what
        # exists before it: weights (with the quantization state of packed ones), buffers, optimizer
        # state, and the loaded inputs, of which the prediction counts the largest micro-batch.
        states = (value for state in self._optimizer.state.values() for value in state.values())
        weights = (tensor for p in self._model.parameters() for _, tensor in stored_tensors("", p))
        existing = [
            *weights,
            *self._model.buffers(),
            *(value for value in states if isinstance(value, Tensor)),
        ]
        inputs = [tensor for batch in batches if (tensor := _image_input(batch)) is not None]
        live = LiveBytes([*existing, *inputs])
        with live:
            self._update(batches)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in existing}
        return sum(storages.values()) + max((t.nbytes for t in inputs), default=0) + live.peak

    def _update(self, batches: list[Batch]) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        accumulate_gradient(self._wrapped, batches, self._accelerator)
        gradient_norm(self._trainable, self._max_norm)
        self._optimizer.step()

    def _synchronize(self) -> None:
        if self._accelerator.device.type == "cuda":
            torch.cuda.synchronize()


def _image_input(batch: Batch) -> Tensor | None:
    """Return the images of a batch, or their features."""
    return batch.pixel_values if batch.image_features is None else batch.image_features


def micro_batch_of(batch: Batch) -> MicroBatch:
    """Return the shape of a batch, on which its memory and FLOPs depend."""
    images, crops, (rows, length) = batch.num_images, batch.num_crops, batch.input_ids.shape
    if batch.segments is None:
        return MicroBatch.padded(
            [length] * rows, targets=batch.num_targets, images=images, crops=crops
        )
    # The queries of a segment attend to the keys of its ancestors and its own. Before the causal
    # mask, these are the pairs of a sequence of all those keys without the pairs of its ancestors,
    # which count with the ancestors themselves.
    layout = PackedLayout(batch.segments)
    pairs = sum(
        keys**2 - (keys - length_of_segment) ** 2
        for keys, length_of_segment in zip(layout.num_keys, layout.lengths, strict=True)
    )
    records = len(batch.record_ids)
    return MicroBatch(1, length, batch.num_targets, images, crops, records, pairs)
