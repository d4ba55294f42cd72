"""Simulate the forward and backward pass of a micro-batch on fake tensors.

The model's own code runs on tensors that have shapes but no values, so that whatever it saves for
the backward pass is counted, for any architecture of transformers and without computing anything.
The dispatched kernels are those of the CPU, which save the same tensors as the fused attention of a
GPU.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlm_sft.config.schema import LoraConfig
from vlm_sft.data.batch import Batch
from vlm_sft.errors import UserError
from vlm_sft.model.activation_checkpointing import CheckpointPolicy, set_activation_checkpointing
from vlm_sft.model.dtypes import cast_floating
from vlm_sft.model.language_model import causal_lm, decoder_layers, decoder_of
from vlm_sft.model.last_layer import prune_last_mlp
from vlm_sft.model.packed_attention import PackedLayout, install_packed_attention
from vlm_sft.model.vision_tower import VisionTower
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.planning.flops import DecoderFlops, Flops, count_flops
from vlm_sft.planning.meta_model import FeatureStub, MetaModel, make_fake
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.train.live_bytes import LiveBytes

SHALLOW: Final = (2, 3)
"""Layers of the two small models from which a deep model of identical layers is extrapolated."""

_PROBE: Final = 64
"""Tokens of the passes that count FLOPs."""

Measured = TypeVar("Measured", "Footprint", DecoderFlops)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one micro-batch besides weights, gradients and optimizer state.

    Attributes:
        images: Pixels or features, and what tower and projector save for the backward pass.
        activations: What the decoder layers save.
        loss: Logits and what else the loss saves.
        forward_peak: Most bytes alive at once during the forward pass.
        backward_peak: Most bytes alive at once during the backward pass.
    """

    images: float
    activations: float
    loss: float
    forward_peak: float
    backward_peak: float

    @property
    def peak(self) -> float:
        """Most bytes alive at once; exceeds the sum of the parts by the transient tensors."""
        return max(self.forward_peak, self.backward_peak)


class TowerSimulation:
    """The frozen vision tower on fake tensors, shared by all training methods.

    Args:
        tower: On the meta device.
    """

    def __init__(self, tower: VisionTower) -> None:
        self._tower, self._mode = copy.deepcopy(tower), FakeTensorMode()
        make_fake(self._tower, self._mode)

    def peak(self, num_crops: int) -> float:
        """Return the most bytes alive while the tower encodes crops, pixels and features included.

        Nothing is saved for a backward pass, so every crop adds the same.
        """
        one, two = self._peaks
        return one + (num_crops - 1) * (two - one)

    @functools.cached_property
    def _peaks(self) -> tuple[int, int]:
        return self._peak(1), self._peak(2)

    def _peak(self, num_images: int) -> int:
        with self._mode:
            live = LiveBytes([*self._tower.parameters(), *self._tower.buffers()])
            with live:
                self._tower(self._pixels(num_images))
            return live.peak

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of encoding one image."""
        with self._mode:
            return sum(count_flops(lambda: self._tower(self._pixels(1))))

    def _pixels(self, num_images: int) -> Tensor:
        size = self._tower.image_spec.size
        return torch.empty(num_images, 3, size, size, dtype=torch.uint8)


class Simulation:
    """The micro-batches of one training method, on fake tensors.

    Args:
        meta_model: The shapes of the model.
        tower: Its tower.
        trainable: The trainable parts.
        lora: Adapters; None for none.
        precision: `bf16`, `fp16` or `fp32`.
        sharded: FSDP2 gathers weights in the compute dtype, so that autocast makes no copies.
        packed: Micro-batches are packed rows; otherwise they are padded.
        cached_features: Micro-batches have features of a cache in place of images.
    """

    def __init__(
        self,
        meta_model: MetaModel,
        tower: TowerSimulation,
        trainable: Set[str],
        *,
        lora: LoraConfig | None,
        precision: str,
        sharded: bool = False,
        packed: bool = False,
        cached_features: bool = False,
    ) -> None:
        self._meta_model, self._tower, self._precision = meta_model, tower, precision
        self._packed, self._cached_features = packed, cached_features
        self._trainable, self._lora, self._sharded = trainable, lora, sharded
        self._models: dict[int, tuple[FakeTensorMode, VisionLanguageModel]] = {}
        self._footprints: dict[tuple[MicroBatch, CheckpointPolicy], Footprint] = {}

    def footprint(self, batch: MicroBatch, policy: CheckpointPolicy) -> Footprint:
        """Return the bytes of a micro-batch under an activation checkpointing policy."""
        found = self._footprints.get((batch, policy))
        if found is None:
            found = self._at_full_depth(lambda depth: self._run(depth, batch, policy))
            # The model holds a stub in place of its tower, whose own peak is during the forward
            # pass, before the decoder. Without images the tower encodes a dummy image.
            encoded = 0 if self._cached_features and batch.images else max(1, batch.crops)
            tower = self._tower.peak(encoded) if encoded else 0.0
            found = dataclasses.replace(found, forward_peak=max(found.forward_peak, tower))
            self._footprints[batch, policy] = found
        return found

    @functools.cached_property
    def flops(self) -> Flops:
        """FLOPs of a token, a target and an image.

        Raises:
            UserError: If the layers use less than half of their weights for a token.
        """
        mode, model = self._model(SHALLOW[0])
        _require_dense(model, self._decoder_flops(SHALLOW[0]))
        with mode:
            tower = 0.0 if self._cached_features else self._tower.flops
            image = tower + sum(count_flops(lambda: self._projector_pass(model)))
            target = self._target_flops(model)
        return Flops(self._at_full_depth(self._decoder_flops), target, image)

    # --- depth

    def _at_full_depth(self, measure: Callable[[int], Measured]) -> Measured:
        """Return `measure(depth)` for all layers, extrapolated if all layers are identical.

        The values are linear in the depth, so two shallow models determine them exactly. This holds
        for the peaks too: gradients exist beforehand and do not count, so both peaks are at a
        moment when the activations of all layers are alive.

        Raises:
            UserError: If the model branches on the values of tensors.
        """
        depth = self._meta_model.num_layers
        try:
            if not self._meta_model.has_identical_layers or depth <= SHALLOW[1]:
                return measure(depth)
            low, high = measure(SHALLOW[0]), measure(SHALLOW[1])
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            kind = self._meta_model.language_config.model_type
            raise UserError(
                f"model.language_model: what a {kind} model computes depends on the values of "
                f"tensors ({error.func}), so it cannot be planned from shapes alone; train a few "
                "steps and measure their memory instead"
            ) from None
        steps = (depth - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
        values = {
            key: value + steps * (vars(high)[key] - value) for key, value in vars(low).items()
        }
        return type(low)(**values)

    def _model(self, depth: int) -> tuple[FakeTensorMode, VisionLanguageModel]:
        """Return the model with this many decoder layers, prepared as training prepares it."""
        depth = min(depth, self._meta_model.num_layers)
        if depth not in self._models:
            model = self._meta_model.build(self._trainable, lora=self._lora, num_layers=depth)
            if self._sharded:
                cast_floating(model, self._meta_model.dtype)
            if self._packed:
                install_packed_attention(causal_lm(model.language_model))
                prune_last_mlp(model.language_model)
            mode = FakeTensorMode()
            make_fake(model, mode)
            self._models[depth] = mode, model.train()
        return self._models[depth]

    # --- bytes

    def _run(self, depth: int, batch: MicroBatch, policy: CheckpointPolicy) -> Footprint:
        mode, model = self._model(depth)
        set_activation_checkpointing(model, policy)
        single_row = batch.rows == 1 and not self._packed
        with mode, _without_square_mask(model) if single_row else nullcontext():
            live = LiveBytes(_weights_and_gradients(model))
            with live:
                loss, saved = self._forward(model, batch, live)
                forward_peak = live.peak
                live.restart()
                loss.backward()
        return Footprint(*saved, forward_peak, live.peak)

    def _forward(
        self, model: VisionLanguageModel, shape: MicroBatch, live: LiveBytes
    ) -> tuple[Tensor, tuple[int, int, int]]:
        """Run the four steps of `VisionLanguageModel.forward` on a fake batch.

        `forward` itself cannot be called: it counts image placeholders, and the ids have no values.

        Returns:
            The loss, and the bytes that are alive because of the images, the decoder and the loss.
        """
        targets = torch.zeros(shape.targets, dtype=torch.int64)
        size = shape.rows, shape.length
        batch = Batch(
            record_ids=("",) * shape.records,
            input_ids=torch.zeros(*size, dtype=torch.int64),
            attention_mask=torch.ones(*size, dtype=torch.bool) if shape.rows > 1 else None,
            segments=None,
            target_positions=targets,
            target_ids=targets,
            target_records=targets,
            unique_target_positions=targets,
        )
        # Attention saves the same per token however a row is divided, so one segment represents
        # all records of a packed row.
        layout = (
            PackedLayout([(shape.length, -1)], target_positions=targets) if self._packed else None
        )
        images = self._images(model, max(1, shape.crops))
        with self._autocast():
            # A variable, as in `forward`: the embeddings of the images live until the loss is done.
            image_embeds = self._image_embeds(model, images)
            embeds = model.embed(batch.input_ids, image_embeds)
            image_bytes = live.now
            hidden, router = model.decode(
                embeds, batch.attention_mask, layout, with_router_loss=True
            )
            activation_bytes = live.now - image_bytes
            loss = model.loss(hidden, batch, router).loss_sum
            loss_bytes = live.now - image_bytes - activation_bytes
        return loss, (image_bytes, activation_bytes, loss_bytes)

    def _images(self, model: VisionLanguageModel, count: int) -> Tensor:
        """Return the images of a batch, or their features where these come from a cache."""
        if self._cached_features:
            return cast(FeatureStub, model.vision_tower).features(count)
        size = self._meta_model.tower.image_spec.size
        return torch.empty(count, 3, size, size, dtype=torch.uint8)

    def _image_embeds(self, model: VisionLanguageModel, images: Tensor) -> Tensor:
        crops = (model.project if self._cached_features else model.encode_images)(images)
        if not model.layout_rule.needs_sizes:
            return crops
        # The tokens of the images are a copy. A row of an image has a newline more than its crops,
        # and none of their padding: about as many tokens.
        tokens = crops.flatten(0, 1)
        ends = [] if model.image_newline is None else [model.image_newline.to(tokens.dtype)[None]]
        return torch.cat([tokens, *ends])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast("cpu", dtype=self._meta_model.dtype)

    # --- FLOPs

    def _decoder_flops(self, depth: int) -> DecoderFlops:
        mode, model = self._model(depth)
        set_activation_checkpointing(model, "none")
        decoder = decoder_of(model.language_model)
        outputs: list[Tensor] = []

        def forward() -> None:
            embeds = self._empty_states(model).requires_grad_()
            with self._autocast():
                outputs.append(
                    decoder(inputs_embeds=embeds[None], use_cache=False).last_hidden_state
                )

        with mode:
            products, attention = count_flops(forward)
            backward, _ = count_flops(lambda: outputs.pop().sum().backward())
        return DecoderFlops(products / _PROBE, backward / _PROBE, attention / _PROBE**2)

    def _projector_pass(self, model: VisionLanguageModel) -> None:
        with self._autocast():
            embeds = self._image_embeds(model, self._images(model, 1))
        embeds.sum().backward()

    def _target_flops(self, model: VisionLanguageModel) -> float:
        """Return the FLOPs of a target in the head.

        One pass forward, one for the gradient of the hidden states and, if the head is trainable,
        one for its own. The backward pass is not counted by running it: the chunked loss computes
        the gradient inside its forward pass, out of the counter's reach.
        """
        states = self._empty_states(model)
        head = cast(nn.Module, causal_lm(model.language_model).get_output_embeddings())
        passes = 2 + any(parameter.requires_grad for parameter in head.parameters())
        with self._autocast():
            forward = sum(count_flops(lambda: model.loss_logits(states)))
        return passes * forward / _PROBE

    def _empty_states(self, model: VisionLanguageModel) -> Tensor:
        """Return states `[_PROBE, D]` of the language model."""
        table: Any = causal_lm(model.language_model).get_input_embeddings()
        return torch.empty(_PROBE, int(table.weight.shape[1]), dtype=self._meta_model.dtype)


_MASKLESS_SDPA: Final = "sdpa_without_mask"


@contextmanager
def _without_square_mask(model: VisionLanguageModel) -> Iterator[None]:
    """Make SDPA run without a mask, as it does for a single row without padding.

    transformers omits the causal mask if it finds that nothing is padded, which it looks up by
    value. Fake tensors have none, so it would build a `[T, T]` mask that the real run does not
    have. An attention that is registered under an unknown name gets no mask.
    """
    config = causal_lm(model.language_model).config.get_text_config()
    configured = config._attn_implementation
    if configured != "sdpa":
        yield
        return
    AttentionInterface.register(_MASKLESS_SDPA, sdpa_attention_forward)
    config._attn_implementation = _MASKLESS_SDPA
    try:
        yield
    finally:
        config._attn_implementation = configured


def _weights_and_gradients(model: nn.Module) -> list[Tensor]:
    """Return weights, buffers and gradients, which are allocated if they do not exist yet."""
    gradients = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            gradients.append(parameter.grad)
    return [*model.parameters(), *model.buffers(), *gradients]


def _require_dense(model: VisionLanguageModel, counted: DecoderFlops) -> None:
    """Refuse a mixture of experts, whose grouped products the FLOP counter does not know."""
    layers = (p for layer in decoder_layers(model.language_model) for p in layer.parameters())
    weights = sum(parameter.numel() for parameter in layers if parameter.ndim >= 2)
    if counted.forward < weights:  # a dense layer has 2 FLOPs per weight
        raise UserError(
            "model.language_model: its layers use only part of their weights for a token (a "
            "mixture of experts?), whose FLOPs cannot be counted here; use a dense model, or time "
            "a few real steps"
        )
