"""Memory of one rank at the peak of a training step, for every training method of a run.

Peak = static memory (weights, gradients, optimizer state, communication buffers; formulas over the
shapes of the model) + footprint of the largest micro-batch (`simulate.py`) + allocator overhead.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from vlm_sft.config.method import TRAINABLE, Method
from vlm_sft.config.schema import LoraConfig, RunConfig
from vlm_sft.model.activation_checkpointing import CheckpointPolicy
from vlm_sft.model.costs import image_cost
from vlm_sft.model.dtypes import DTYPES
from vlm_sft.model.language_model import causal_lm, decoder_layers, decoder_of
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.model.quantization import linear_layers, quantized_bytes
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.planning.gpus import CUDA_OVERHEAD, FRAGMENTATION, Device
from vlm_sft.planning.meta_model import MetaModel
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.planning.simulate import Simulation, TowerSimulation
from vlm_sft.train.optimizer import ADAMW_STATE_BYTES, adamw_state_bytes

_SEARCH_TOLERANCE: Final = 0.01
"""`Estimator.largest` stops once it leaves at most this share of the memory free."""


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that one rank holds throughout training.

    Attributes:
        weights: Weights of each part of the model.
        gradients: Gradients of the trainable weights, in float32.
        optimizer: AdamW's two moments: float32, or with 8-bit AdamW one byte each and their scales.
        communication: Buffers besides the rank's own tensors: gradient buckets (DDP), or gathered
            layers (FSDP2); with QLoRA, one dequantized layer.
    """

    weights: dict[str, float]
    gradients: float
    optimizer: float
    communication: float = 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step, by purpose.

    Attributes:
        weights: See `StaticMemory`.
        gradients: See `StaticMemory`.
        optimizer: See `StaticMemory`.
        communication: See `StaticMemory`.
        cast_weights: 16-bit copies of the trainable weights, which autocast makes and keeps.
        activations: What the decoder layers save for the backward pass, without those copies.
        loss: Logits and what else the loss saves.
        images: Pixels or features, and what the projector saves.
        transient: Tensors that are alive at the peak only: temporaries of the largest operators.
        overhead: CUDA context, workspaces and fragmentation; assumed.
    """

    weights: dict[str, float]
    gradients: float
    optimizer: float
    communication: float
    cast_weights: float
    activations: float
    loss: float
    images: float
    transient: float
    overhead: float

    @property
    def allocated(self) -> float:
        """Bytes of tensors, the quantity of `torch.cuda.max_memory_allocated`."""
        return self.total - self.overhead

    @property
    def total(self) -> float:
        """Bytes of device memory that are needed."""
        parts = dict(vars(self))
        return sum(parts.pop("weights").values()) + sum(parts.values())


class Estimator:
    """Memory of a run under every training method, activation checkpointing and micro-batch.

    Models and simulations are built when they are first needed and then kept.

    Args:
        config: The run.
        device: The device it is planned for.
        gpus: Number of these devices (ranks).
        efficiency: Share of the device's FLOP/s that a step reaches; used by `speed.py`.

    Raises:
        UserError: If the shapes of the model are not on this machine, or it cannot be built.
    """

    def __init__(self, config: RunConfig, device: Device, *, gpus: int, efficiency: float) -> None:
        self.config, self.device, self.gpus, self.efficiency = config, device, gpus, efficiency
        self.meta_model = MetaModel(config.model, dtype=DTYPES[config.train.precision])
        self._tower = TowerSimulation(self.meta_model.tower)
        self._simulations: dict[tuple[str, bool], Simulation] = {}
        self._models: dict[str, VisionLanguageModel] = {}

    def model(self, method: Method) -> VisionLanguageModel:
        """Return the model of a method on the meta device; QLoRA's is that of LoRA."""
        key = "lora" if method == "qlora" else method
        if key not in self._models:
            self._models[key] = self.meta_model.build(TRAINABLE[method], lora=self._lora(method))
        return self._models[key]

    def simulation(self, method: Method) -> Simulation:
        """Return the simulation of a method's micro-batches; QLoRA's is that of LoRA."""
        key = "lora" if method == "qlora" else method, self.is_sharded(method)
        if key not in self._simulations:
            self._simulations[key] = Simulation(
                self.meta_model,
                self._tower,
                TRAINABLE[method],
                lora=self._lora(method),
                precision=self.config.train.precision,
                sharded=self.is_sharded(method),
                packed=self.config.train.packing is not None,
                cached_features=self.config.data.feature_cache is not None,
            )
        return self._simulations[key]

    def _lora(self, method: Method) -> LoraConfig | None:
        return (self.config.lora or LoraConfig()) if method in ("lora", "qlora") else None

    def is_sharded(self, method: Method) -> bool:
        """Return whether weights, gradients and optimizer state are sharded over the ranks."""
        return method == "full" and self.gpus > 1 and self.config.train.sharding != "none"

    def is_quantized(self, method: Method) -> bool:
        """Return whether the linear layers of the language model are held in 4 bits."""
        configured = self.config.model.language_model.quantization is not None
        return method == "qlora" or (method == "stage1" and configured)

    def image_cost(self, method: Method) -> float:
        """Return the cost of an image's crop in tokens, by which training balances packed rows."""
        if self.config.data.feature_cache is not None:
            return 0.0
        model = self.model(method)
        with_tower = VisionLanguageModel(
            self.meta_model.tower,
            model.multi_modal_projector,
            model.language_model,
            model.layout_rule,
            model.image_newline,
        )
        return image_cost(with_tower)

    # --- static memory

    def static_memory(self, method: Method) -> StaticMemory:
        """Return the bytes that one rank holds throughout training."""
        parts = parameters_by_part(self.model(method))
        weights = {
            part: float(sum(p.numel() * p.element_size() for _, p in named))
            for part, named in parts.items()
        }
        # The model has a stub in the place of its tower.
        tower = self.meta_model.tower.parameters()
        weights["vision_tower"] = float(sum(p.numel() * p.element_size() for p in tower))
        trainable = [p.numel() for named in parts.values() for _, p in named if p.requires_grad]
        if self.is_sharded(method):
            return self._sharded_static_memory(method, weights, sum(trainable))
        # DDP reduces gradients in buckets, which are copies of them.
        communication = 4.0 * sum(trainable) if self.gpus > 1 else 0.0
        if self.is_quantized(method):
            sizes, width = self.quantized_layer_sizes(method), self.meta_model.dtype.itemsize
            weights["language_model"] += self.quantized_bytes(sizes) - width * sum(sizes)
            communication += width * max(sizes)  # one layer at a time is dequantized
        state = float(adamw_state_bytes(trainable, self.config.optim.optimizer))
        return StaticMemory(weights, 4.0 * sum(trainable), state, communication)

    def _sharded_static_memory(
        self, method: Method, weights: dict[str, float], num_trainable: int
    ) -> StaticMemory:
        """Return the bytes of one rank under FSDP2, which shards all but the frozen tower."""
        own = {part: w if part == "vision_tower" else w / self.gpus for part, w in weights.items()}
        layers = decoder_layers(self.model(method).language_model)
        largest = max(sum(p.numel() for p in layer.parameters()) for layer in layers)
        # Embeddings, head and projector form the root group, which stays gathered during a step.
        root = num_trainable - sum(p.numel() for layer in layers for p in layer.parameters())
        width = self.meta_model.dtype.itemsize
        # Gathered at the same time in the compute dtype: the layer in use, the prefetched next one
        # and the root. In the backward pass also one layer's full gradient, in the compute dtype
        # and in float32, in which it is reduced (`MixedPrecisionPolicy.reduce_dtype`).
        communication = width * (2 * largest + root) + (width + 4) * largest
        gradients = 4 * num_trainable / self.gpus
        state = ADAMW_STATE_BYTES * num_trainable / self.gpus
        return StaticMemory(own, gradients, state, communication)

    def quantized_layer_sizes(self, method: Method) -> list[int]:
        """Return the weights of each layer that QLoRA quantizes: neither head nor adapters."""
        layers = linear_layers(causal_lm(self.model(method).language_model))
        return [layer.weight.numel() for name, layer in layers.items() if ".lora_" not in name]

    def quantized_bytes(self, sizes: list[int]) -> int:
        """Return the bytes of layers of these numbers of weights in 4 bits."""
        double = self.config.model.language_model.double_quantization
        return sum(quantized_bytes(size, double_quantization=double) for size in sizes)

    # --- peak memory

    def memory(
        self, method: Method, policy: CheckpointPolicy, batch: MicroBatch, *, micro_batches: int = 2
    ) -> Memory:
        """Return the bytes of one rank at the peak of a step.

        Args:
            method: The training method.
            policy: Activation checkpointing.
            batch: The largest micro-batch.
            micro_batches: Micro-batches per step; it matters whether there are several.
        """
        static = self.static_memory(method)
        footprint = self.simulation(method).footprint(batch, policy)
        saved = footprint.images + footprint.activations + footprint.loss
        cast_weights = self._cast_weight_bytes(method)
        update = self._update_bytes(method)
        peak = footprint.peak
        if self.device.is_cpu:
            # On a GPU the pixels are a copy on the device that is freed after the tower; on a CPU
            # they are the loaded batch itself, alive until the end of the backward pass.
            peak = max(footprint.forward_peak, footprint.backward_peak + self._input_bytes(batch))
        if micro_batches == 1:
            # Gradients do not exist in the forward pass, and in the backward pass they are
            # allocated while activations are freed. So they only count with what exceeds the peak
            # of the activations: during the update, gradients and its temporaries are alive.
            gradients, transient = max(0.0, static.gradients + update - peak), peak - saved
        else:
            # From the second micro-batch on the gradients are there all the time. The update comes
            # after the activations are freed, so the larger of both peaks counts.
            gradients, transient = static.gradients, max(peak, update) - saved
        held = sum(static.weights.values()) + gradients + static.optimizer + static.communication
        overhead = 0.0
        if not self.device.is_cpu:
            overhead = FRAGMENTATION * (held + saved + transient) + CUDA_OVERHEAD
        return Memory(
            weights=static.weights,
            gradients=gradients,
            optimizer=static.optimizer,
            communication=static.communication,
            cast_weights=cast_weights,
            activations=footprint.activations - cast_weights,
            loss=footprint.loss,
            images=footprint.images,
            transient=transient,
            overhead=overhead,
        )

    def _input_bytes(self, batch: MicroBatch) -> int:
        """Return the bytes of a micro-batch's images (uint8) or of their cached features."""
        tower = self.meta_model.tower
        if self.config.data.feature_cache is not None:
            return batch.crops * tower.num_tokens * tower.width * tower.dtype.itemsize
        return 3 * batch.crops * tower.image_spec.size**2

    def _cast_weight_bytes(self, method: Method) -> float:
        """Return the bytes of autocast's copies of the decoder's trainable weights.

        Autocast caches the copy of every weight that requires a gradient until the end of its
        context. FSDP2 gathers weights in the compute dtype instead, so it needs no copies.
        """
        dtype = self.meta_model.dtype
        if self.is_sharded(method) or dtype == torch.float32:
            return 0.0
        modules = decoder_of(self.model(method).language_model).modules()
        weights = {m.weight for m in modules if isinstance(m, nn.Linear) and m.weight.requires_grad}
        return float(sum(dtype.itemsize * weight.numel() for weight in weights))

    def _update_bytes(self, method: Method) -> float:
        """Return the temporaries of the optimizer's update, which is fused on GPUs and needs none.

        On a CPU: two float32 tensors as large as the largest parameter.
        """
        if not self.device.is_cpu:
            return 0.0
        return 8.0 * max(p.numel() for p in self.model(method).parameters() if p.requires_grad)

    # --- what fits

    def fits(self, memory: Memory, *, margin: float = 0.0) -> bool:
        """Return whether the device has enough memory, with a share `margin` of it left free."""
        return memory.total <= (1 - margin) * self.device.memory

    def largest(
        self,
        method: Method,
        policy: CheckpointPolicy,
        make: Callable[[int], MicroBatch],
        *,
        limit: int,
    ) -> int:
        """Return the largest `n` up to `limit` for which `make(n)` fits; 0 if not even 1 does.

        The bytes are close to piecewise linear in `n`, so the root of the excess over the device's
        memory is found by regula falsi in a few simulations (bisection would take ten). The search
        also ends when what fits leaves less than `_SEARCH_TOLERANCE` of the memory free.
        """

        def excess(count: int) -> float:
            return self.memory(method, policy, make(count)).total - self.device.memory

        high, excess_high = limit, excess(limit)
        if excess_high <= 0:
            return limit
        low, excess_low = 1, excess(1)
        if excess_low > 0:
            return 0
        free = -excess_low  # at `low`; `excess_low` itself is changed below
        while high - low > 1 and free > _SEARCH_TOLERANCE * self.device.memory:
            # The root of the line through both ends, kept strictly between them.
            middle = low + int((high - low) * excess_low / (excess_low - excess_high))
            middle = min(max(middle, low + 1), high - 1)
            value = excess(middle)
            # The Illinois variant: halve the value at the end that is kept. Without it, one end
            # of a convex function would stay in place and the steps would become tiny.
            if value <= 0:
                low, excess_low, free, excess_high = middle, value, -value, excess_high / 2
            else:
                high, excess_high, excess_low = middle, value, excess_low / 2
        return low
