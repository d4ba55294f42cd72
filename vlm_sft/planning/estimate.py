"""Memory and time of a way of training: from shapes, simulated micro-batches and a device."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from vlm_sft.checkpoint.components import dtype_of
from vlm_sft.config.method import TRAINABLE, Method
from vlm_sft.config.schema import LoraConfig, RunConfig
from vlm_sft.model.activation_checkpointing import Policy
from vlm_sft.model.costs import image_cost
from vlm_sft.model.parts import named_parts
from vlm_sft.model.quantization import linear_layers
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm, decoder_of
from vlm_sft.planning.blueprint import Blueprint, layers_of
from vlm_sft.planning.gpus import CUDA_OVERHEAD, FRAGMENTATION, Device
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.planning.simulate import Simulation, TowerSimulation
from vlm_sft.planning.workload import Workload
from vlm_sft.train.optimizer import ADAMW_STATE_BYTES, adamw_state_bytes

_BLOCK: Final = 64
"""Weights in 4 bits that share a scale (bitsandbytes)."""

_NESTED: Final = 256
"""Scales in 8 bits that share one themselves."""

_NEARLY_FULL: Final = 0.01
"""Share of the memory that may be left free by what is called the largest."""


@dataclass(frozen=True)
class Standing:
    """Bytes that one process holds all the time.

    Attributes:
        weights: By part of the model.
        gradients: Of what is trained.
        optimizer: AdamW's moments, in float32 or in a byte each.
        exchange: Buckets of gradients for other processes; whole layers while they are worked on;
            with QLoRA a layer's weight in 16 bits.
    """

    weights: dict[str, float]
    gradients: float
    optimizer: float
    exchange: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at a step's peak, by part.

    Attributes:
        weights: By part of the model.
        gradients: See `Standing`.
        optimizer: See `Standing`.
        exchange: See `Standing`.
        cast_weights: Copies of trained weights in the dtype of the forward pass.
        activations: What the language model's layers keep.
        loss: Logits and what else the loss keeps.
        images: Pixels, features and what the projector keeps.
        passing: What is alive at the peak besides.
        overhead: Of the driver, and what lies idle between tensors.
    """

    weights: dict[str, float]
    gradients: float
    optimizer: float
    exchange: float
    cast_weights: float
    activations: float
    loss: float
    images: float
    passing: float
    overhead: float

    @property
    def allocated(self) -> float:
        """Bytes of tensors: what `torch.cuda.max_memory_allocated` would say."""
        parts = {key: value for key, value in vars(self).items() if key != "overhead"}
        return sum(parts.pop("weights").values()) + sum(parts.values())

    @property
    def total(self) -> float:
        """Bytes that the device must have."""
        return self.allocated + self.overhead


@dataclass(frozen=True)
class Speed:
    """How fast, and what holds it up.

    Attributes:
        samples_per_second: Records, all processes together.
        step_seconds: Of one optimizer step.
        hours: Of the run, without start and evaluation.
        bottleneck: The slowest of `seconds`.
        seconds: Of a step, by what takes them; they run side by side.
        teraflop_per_sample: Model FLOPs of a mean record, without padding and recomputing.
        utilization: Of the device's rate by those model FLOPs.
    """

    samples_per_second: float
    step_seconds: float
    hours: float
    bottleneck: str
    seconds: dict[str, float]
    teraflop_per_sample: float
    utilization: float


class Estimator:
    """Memory and speed of every way to train a run's model.

    Args:
        config: The run.
        device: What it is to run on.
        gpus: How many of them.
        efficiency: Share of the device's FLOP/s that a step reaches.

    Raises:
        UserError: The model's shapes are not on this machine, or cannot be built.
    """

    def __init__(self, config: RunConfig, device: Device, *, gpus: int, efficiency: float) -> None:
        self.config, self.device, self.gpus, self.efficiency = config, device, gpus, efficiency
        self.blueprint = Blueprint(config.model, dtype=dtype_of(config))
        self._tower = TowerSimulation(self.blueprint.tower)
        self._simulations: dict[tuple[str, bool], Simulation] = {}
        self._models: dict[str, VisionLanguageModel] = {}

    def simulation(self, method: Method) -> Simulation:
        """Micro-batches of a method; QLoRA's are LoRA's."""
        key = "lora" if method == "qlora" else method, self.is_sharded(method)
        if key not in self._simulations:
            self._simulations[key] = Simulation(
                self.blueprint,
                self._tower,
                TRAINABLE[method],
                lora=self._lora(method),
                precision=self.config.train.precision,
                sharded=key[1],
                packed=self.config.train.packing is not None,
                features=self.config.data.feature_cache is not None,
            )
        return self._simulations[key]

    def is_sharded(self, method: Method) -> bool:
        """Whether the processes share out weights, gradients and optimizer state."""
        return method == "full" and self.gpus > 1 and self.config.train.sharding != "none"

    def is_quantized(self, method: Method) -> bool:
        """Whether the language model's linear layers are held in 4 bits."""
        asked = self.config.model.language_model.quantization is not None
        return method == "qlora" or (method == "stage1" and asked)

    def image_cost(self, method: Method) -> float:
        """What an image weighs in a pack, in tokens; as training reckons it."""
        if self.config.data.feature_cache is not None:
            return 0.0
        model = self._model(method)
        whole = VisionLanguageModel(
            self.blueprint.tower, model.multi_modal_projector, model.language_model
        )
        return image_cost(whole)

    # --- memory

    def standing(self, method: Method) -> Standing:
        """Bytes that are there all the time."""
        model = self._model(method)
        parts = named_parts(model)
        weights = {
            part: float(sum(p.numel() * p.element_size() for _, p in named))
            for part, named in parts.items()
        }
        tower = self.blueprint.tower.parameters()
        weights["vision_tower"] = float(sum(p.numel() * p.element_size() for p in tower))
        learning = [p.numel() for named in parts.values() for _, p in named if p.requires_grad]
        trained = sum(learning)
        if self.is_sharded(method):
            return self._shared_out(model, weights, trained)
        exchange = 4.0 * trained if self.gpus > 1 else 0.0  # data-parallel buckets
        if self.is_quantized(method):
            sizes, size = quantised_sizes(model), self.blueprint.dtype.itemsize
            weights["language_model"] += self._packed_bytes(sizes) - size * sum(sizes)
            exchange += size * max(sizes)
        moments = float(adamw_state_bytes(learning, self.config.optim.optimizer))
        return Standing(weights, 4.0 * trained, moments, exchange)

    def _packed_bytes(self, sizes: list[int]) -> int:
        double = self.config.model.language_model.double_quantization
        return sum(packed_bytes(size, double=double) for size in sizes)

    def memory(
        self, method: Method, policy: Policy, batch: MicroBatch, *, micro_batches: int = 2
    ) -> Memory:
        """Bytes at the peak of a step.

        Args:
            method: Way of training.
            policy: What is recomputed.
            batch: The largest micro-batch.
            micro_batches: Of a step; the gradients of a single one come as its activations go.
        """
        standing, found = self.standing(method), self.simulation(method).footprint(batch, policy)
        cast = self._cast_weights(method)
        kept = found.images + found.activations + found.loss
        update, peak = self._update_bytes(method), found.peak
        if self.device.is_cpu:  # where the batch itself is used, and stays, instead of a copy
            peak = max(found.forward_peak, found.backward_peak + self._shown_bytes(batch))
        if micro_batches == 1:
            gradients, passing = max(0.0, standing.gradients + update - peak), peak - kept
        else:
            gradients, passing = standing.gradients, max(peak, update) - kept
        held = sum(standing.weights.values()) + gradients + standing.optimizer + standing.exchange
        idle = 0.0 if self.device.is_cpu else FRAGMENTATION * (held + kept + passing)
        return Memory(
            weights=standing.weights,
            gradients=gradients,
            optimizer=standing.optimizer,
            exchange=standing.exchange,
            cast_weights=cast,
            activations=found.activations - cast,
            loss=found.loss,
            images=found.images,
            passing=passing,
            overhead=idle + (0 if self.device.is_cpu else CUDA_OVERHEAD),
        )

    def _shown_bytes(self, batch: MicroBatch) -> int:
        """Bytes of a micro-batch's images, or of their features."""
        tower = self.blueprint.tower
        if self.config.data.feature_cache is not None:
            return batch.images * tower.num_tokens * tower.width * tower.dtype.itemsize
        return 3 * batch.images * tower.image_spec.size**2

    def fits(self, memory: Memory, *, margin: float = 0.0) -> bool:
        """Whether the device has room for it, this share of the room being left free."""
        return memory.total <= (1 - margin) * self.device.memory

    def largest(
        self, method: Method, policy: Policy, make: Callable[[int], MicroBatch], *, limit: int
    ) -> int:
        """The largest `n` up to `limit` for which `make(n)` fits; 0 where not even one does.

        Bytes grow with `n` along a line of few pieces, so that a few trials on the chord between
        what fits and what does not find it, or one that leaves next to nothing free.
        """

        def excess(count: int) -> float:
            return self.memory(method, policy, make(count)).total - self.device.memory

        high, above = limit, excess(limit)
        if above <= 0:
            return limit
        low, below = 1, excess(1)
        if below > 0:
            return 0
        free = -below
        while high - low > 1 and free > _NEARLY_FULL * self.device.memory:
            middle = low + int((high - low) * below / (below - above))
            middle = min(max(middle, low + 1), high - 1)
            value = excess(middle)
            if value <= 0:  # Illinois' rule: what stays where it is counts half
                low, below, free, above = middle, value, -value, above / 2
            else:
                high, above, below = middle, value, below / 2
        return low

    # --- time

    def speed(
        self, method: Method, policy: Policy, work: Workload, *, images_per_second: float | None
    ) -> Speed:
        """Time of a mean step and of the run.

        Args:
            method: Way of training.
            policy: What is recomputed.
            work: The run's micro-batches.
            images_per_second: That the host's loaders make together; None: not counted.
        """
        flops = self.simulation(method).flops
        steps = work.total("records") / self.config.train.global_batch_size
        spent = sum(flops.of_batch(batch, policy) for batch in work.batches)
        seconds = {
            "compute": spent / steps / self.gpus / (self.device.flops * self.efficiency)
            + self._dequantising(method, policy) * work.micro_batches_a_step,
            "memory bandwidth": self._weight_traffic(method, policy) * work.micro_batches_a_step
            + self._update_traffic(method),
        }
        if self.gpus > 1 and self.device.link:
            seconds["links between GPUs"] = self._exchange_seconds(method, work)
        if images_per_second:
            seconds["image loading"] = work.total("images") / steps / images_per_second
        step, bottleneck = max((value, key) for key, value in seconds.items())
        sample = self.teraflop_per_sample(method, work)
        rate = self.config.train.global_batch_size / step
        return Speed(
            samples_per_second=rate,
            step_seconds=step,
            hours=work.records / rate / 3600,
            bottleneck=bottleneck,
            seconds=seconds,
            teraflop_per_sample=sample,
            utilization=sample * 1e12 * rate / self.gpus / self.device.flops,
        )

    def teraflop_per_sample(self, method: Method, work: Workload) -> float:
        """Model TFLOP of a mean record: no padding, no recomputing."""
        found = self.simulation(method).flops.of(
            tokens=work.mean_length,
            attended=work.mean_square,
            targets=work.total("targets") / work.total("records"),
            images=work.total("images") / work.total("records"),
        )
        return found / 1e12

    def _weight_traffic(self, method: Method, policy: Policy) -> float:
        """Seconds to read the language model's weights once for every pass over them."""
        weights = self._language_size(method) * self.blueprint.dtype.itemsize
        return self._passes(policy) * weights / self.device.bandwidth

    def _update_traffic(self, method: Method) -> float:
        """Seconds to read weights, gradients and moments, and to write all but the gradients."""
        standing = self.standing(method)
        moved = 2 * standing.optimizer + 3 * standing.gradients  # a weight is as its gradient
        return moved / self.device.bandwidth

    def _dequantising(self, method: Method, policy: Policy) -> float:
        """Seconds of a micro-batch in which 4-bit weights are read and written in 16 bits."""
        if not self.is_quantized(method):
            return 0.0
        sizes = quantised_sizes(self._model(method))
        moved = self._packed_bytes(sizes) + self.blueprint.dtype.itemsize * sum(sizes)
        return self._passes(policy) * moved / self.device.bandwidth

    def _exchange_seconds(self, method: Method, work: Workload) -> float:
        """Seconds of a step on the links: a ring's, (N - 1) / N of the bytes each way."""
        share = (self.gpus - 1) / self.gpus
        trained = self.standing(method).gradients / 4
        if not self.is_sharded(method):
            return 2 * share * 4 * trained / self.device.link
        size = trained * self.gpus
        gathered = 2 * size * self.blueprint.dtype.itemsize  # before forward and backward
        return work.micro_batches_a_step * share * (gathered + 4 * size) / self.device.link

    def _passes(self, policy: Policy) -> int:
        return 3 if policy == "full" else 2

    # --- shapes

    def _lora(self, method: Method) -> LoraConfig | None:
        return (self.config.lora or LoraConfig()) if method in ("lora", "qlora") else None

    def _model(self, method: Method) -> VisionLanguageModel:
        key = "lora" if method == "qlora" else method
        if key not in self._models:
            self._models[key] = self.blueprint.model(TRAINABLE[method], lora=self._lora(method))
        return self._models[key]

    def _language_size(self, method: Method) -> int:
        parts = named_parts(self._model(method))
        return sum(p.numel() for part in ("language_model", "adapter") for _, p in parts[part])

    def _shared_out(
        self, model: VisionLanguageModel, weights: dict[str, float], trained: int
    ) -> Standing:
        """FSDP2: a row each; while a layer is worked on, it and the next one are whole."""
        own = {part: w if part == "vision_tower" else w / self.gpus for part, w in weights.items()}
        layers = [sum(p.numel() for p in layer.parameters()) for layer in self._layers(model)]
        root = trained - sum(layers)
        size = self.blueprint.dtype.itemsize
        # Two layers and the rest whole; one layer's gradient, and in float32 while it is summed.
        exchange = size * (2 * max(layers) + root) + (size + 4) * max(layers)
        moments = ADAMW_STATE_BYTES * trained / self.gpus
        return Standing(own, 4 * trained / self.gpus, moments, exchange)

    def _layers(self, model: VisionLanguageModel) -> list[nn.Module]:
        return layers_of(model.language_model)

    def _cast_weights(self, method: Method) -> float:
        """Bytes of the copies that autocast makes of the layers' trained weights, and keeps."""
        dtype = self.blueprint.dtype
        if self.is_sharded(method) or dtype == torch.float32:
            return 0.0
        linear = [m for m in decoder_of(self._model(method).language_model).modules()]
        weights = {m.weight for m in linear if isinstance(m, nn.Linear) and m.weight.requires_grad}
        return float(sum(dtype.itemsize * weight.numel() for weight in weights))

    def _update_bytes(self, method: Method) -> float:
        """What the optimizer needs beside its state: nothing on a GPU, where it is fused."""
        if not self.device.is_cpu:
            return 0.0
        largest = max(p.numel() for p in self._model(method).parameters() if p.requires_grad)
        return 8.0 * largest


def quantised_sizes(model: VisionLanguageModel) -> list[int]:
    """Weights of each linear layer that is held in 4 bits: all but the head and adapters."""
    layers = linear_layers(causal_lm(model.language_model))
    return [layer.weight.numel() for name, layer in layers.items() if ".lora_" not in name]


def packed_bytes(size: int, *, double: bool) -> int:
    """Of a layer of so many weights in 4 bits, as bitsandbytes holds them (QLoRA, section 3).

    Args:
        size: Weights.
        double: The scales are in a byte each, with scales of their own.
    """
    table, scales = 16 * 4, math.ceil(size / _BLOCK)
    own = math.ceil(size / 2) + table
    if not double:
        return own + 4 * scales
    offset_and_table = 4 + 256 * 4
    return own + scales + 4 * math.ceil(scales / _NESTED) + offset_and_table


def host_images_per_second(config: RunConfig, gpus: int, of_one_core: float | None) -> float:
    """Images a second of all loaders, of which every process has its own; 0: not known."""
    loaders = max(1, config.data.num_workers) * gpus
    return (of_one_core or 0.0) * min(loaders, os.cpu_count() or 1)
