"""One micro-batch's forward and backward on fake tensors: its bytes and FLOPs, without computing.

The model's own code runs on tensors that have shapes and no values, so whatever it keeps for the
backward pass is counted, for any architecture of transformers. Kernels are those of the CPU, which
keep the same tensors as the GPU's fused attention.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence, Set
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
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlm_sft.config.schema import LoraConfig
from vlm_sft.data.batch import Batch
from vlm_sft.errors import UserError
from vlm_sft.model.activation_checkpointing import Policy, set_recomputing
from vlm_sft.model.dtypes import cast_floating
from vlm_sft.model.last_layer import prune_last_mlp
from vlm_sft.model.packed_attention import PackedLayout, install_packed_attention
from vlm_sft.model.vision_tower import VisionTower
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm, decoder_of
from vlm_sft.planning.blueprint import Blueprint, GivenFeatures, layers_of, make_fake
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.train.live_bytes import LiveBytes

SHALLOW: Final = (2, 3)
"""Layers of the two small models that stand for a deep one whose layers are all alike."""

_PROBE: Final = 64
"""Positions of the runs that count FLOPs."""

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one micro-batch beyond weights, gradients and optimizer state.

    Attributes:
        images: Pixels, and what tower and projector leave for the backward pass.
        activations: What the language model's layers keep for it.
        loss: Logits and what else the loss keeps.
        forward_peak: Most bytes alive at once in the forward pass.
        backward_peak: Likewise in the backward pass.
    """

    images: float
    activations: float
    loss: float
    forward_peak: float
    backward_peak: float

    @property
    def peak(self) -> float:
        """Most bytes alive at once; above the parts' sum by what only passes by."""
        return max(self.forward_peak, self.backward_peak)


@dataclass(frozen=True)
class DecoderFlops:
    """Of the language model without its head, 2 a multiply-add.

    Attributes:
        forward: One token's matrix products.
        backward: Likewise; frozen weights cost once the forward's, trained ones twice.
        attention: One pair of positions, forward; the backward pass costs twice that.
    """

    forward: float
    backward: float
    attention: float


@dataclass(frozen=True)
class Flops:
    """What each thing costs.

    Attributes:
        decoder: A token's layers.
        target: A supervised token's head, forward and backward.
        image: An image's tower (forward only) and projector (forward and backward).
    """

    decoder: DecoderFlops
    target: float
    image: float

    def of(
        self,
        *,
        tokens: float,
        attended: float,
        targets: float,
        images: float,
        policy: Policy = "none",
    ) -> float:
        """FLOPs of so much, forward and backward; `full` computes every layer's forward twice.

        Of the attention's square the half below the diagonal counts.
        """
        forwards = 2 if policy == "full" else 1
        token = forwards * self.decoder.forward + self.decoder.backward
        pair = self.decoder.attention / 2 * (forwards + 2)
        return tokens * token + attended * pair + targets * self.target + images * self.image

    def of_batch(self, batch: MicroBatch, policy: Policy = "none") -> float:
        """FLOPs of one micro-batch; one without images runs a constant one."""
        return self.of(
            tokens=batch.tokens,
            attended=batch.attended,
            targets=batch.targets,
            images=max(1, batch.images),
            policy=policy,
        )


class TowerSimulation:
    """The frozen tower on fake tensors; the same for every way of training."""

    def __init__(self, tower: VisionTower) -> None:
        self._tower, self._mode = copy.deepcopy(tower), FakeTensorMode()
        make_fake(self._tower, self._mode)

    def peak(self, images: int) -> float:
        """Most bytes alive while so many images go through, pixels and features included."""
        one, two = self._peaks
        return one + (images - 1) * (two - one)

    @functools.cached_property
    def _peaks(self) -> tuple[int, int]:
        return self._peak(1), self._peak(2)

    def _peak(self, images: int) -> int:
        with self._mode:
            live = LiveBytes([*self._tower.parameters(), *self._tower.buffers()])
            with live:
                self._tower(self._pixels(images))
            return live.peak

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of one image, forward."""
        with self._mode:
            return sum(_counted(lambda: self._tower(self._pixels(1))))

    def _pixels(self, count: int) -> Tensor:
        size = self._tower.image_spec.size
        return torch.empty(count, 3, size, size, dtype=torch.uint8)


class Simulation:
    """Micro-batches of one way of training, on fake tensors.

    Args:
        blueprint: The model's shapes.
        tower: Its tower.
        trainable: Parts that learn.
        lora: Adapters, where `adapter` learns.
        precision: bf16, fp16 or fp32.
        sharded: Weights are gathered in the dtype of the forward pass, so none are cast in it.
        packed: Micro-batches are packs; else padded.
        features: The tower's features come from a cache, in the place of images.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        tower: TowerSimulation,
        trainable: Set[str],
        *,
        lora: LoraConfig | None,
        precision: str,
        sharded: bool = False,
        packed: bool = False,
        features: bool = False,
    ) -> None:
        self._blueprint, self._tower, self._precision = blueprint, tower, precision
        self._packed, self._features = packed, features
        self._trainable, self._lora, self._sharded = trainable, lora, sharded
        self._models: dict[int, tuple[FakeTensorMode, VisionLanguageModel]] = {}
        self._footprints: dict[tuple[MicroBatch, Policy], Footprint] = {}

    def footprint(self, batch: MicroBatch, policy: Policy) -> Footprint:
        """Bytes of a micro-batch under a policy."""
        found = self._footprints.get((batch, policy))
        if found is None:
            found = self._at_full_depth(lambda depth: self._run(depth, batch, policy))
            shown = 0 if self._features and batch.images else max(1, batch.images)
            tower = self._tower.peak(shown) if shown else 0.0
            found = dataclasses.replace(found, forward_peak=max(found.forward_peak, tower))
            self._footprints[batch, policy] = found
        return found

    @functools.cached_property
    def flops(self) -> Flops:
        """What a token, a target and an image cost.

        Raises:
            UserError: The layers compute with less than half of their weights for a token.
        """
        mode, model = self._model(SHALLOW[0])
        _require_dense(model, self._decoder_flops(SHALLOW[0]))
        with mode:
            tower = 0.0 if self._features else self._tower.flops
            image = tower + sum(_counted(lambda: self._projector_pass(model)))
            target = self._target_flops(model)
        return Flops(self._at_full_depth(self._decoder_flops), target, image)

    # --- depth

    def _at_full_depth(self, measure: Callable[[int], Measured]) -> Measured:
        """`measure(layers)` for all layers; of a deep model carried on from two shallow ones.

        Exact for what grows by the same with every layer. The peaks do: gradients are there
        beforehand, so that both lie where all layers' activations are alive.
        """
        try:
            return self._carried_on(measure)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            kind = self._blueprint.language_config.model_type
            raise UserError(
                f"model.language_model: a {kind} model looks at values to decide what it computes "
                f"({error.func}), so it cannot be planned without them; train a few steps and look "
                "at their memory instead"
            ) from None

    def _carried_on(self, measure: Callable[[int], Measured]) -> Measured:
        depth = self._blueprint.num_layers
        if not self._blueprint.layers_are_alike or depth <= SHALLOW[1]:
            return measure(depth)
        low, high = measure(SHALLOW[0]), measure(SHALLOW[1])
        steps = (depth - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
        values = {
            key: value + steps * (vars(high)[key] - value) for key, value in vars(low).items()
        }
        return type(low)(**values)

    def _model(self, depth: int) -> tuple[FakeTensorMode, VisionLanguageModel]:
        depth = min(depth, self._blueprint.num_layers)
        if depth not in self._models:
            model = self._blueprint.model(self._trainable, lora=self._lora, num_layers=depth)
            if self._sharded:
                cast_floating(model, self._blueprint.dtype)
            if self._packed:
                install_packed_attention(causal_lm(model.language_model))
                prune_last_mlp(model.language_model)
            mode = FakeTensorMode()
            make_fake(model, mode)
            self._models[depth] = mode, model.train()
        return self._models[depth]

    # --- bytes

    def _run(self, depth: int, batch: MicroBatch, policy: Policy) -> Footprint:
        mode, model = self._model(depth)
        set_recomputing(model, policy)
        alone = batch.rows == 1 and not self._packed
        with mode, _no_mask_made(model) if alone else nullcontext():
            live = LiveBytes(_with_gradients(model))
            with live:
                loss, parts = self._forward(model, batch, live)
                forward_peak = live.peak
                live.restart()
                loss.backward()
        return Footprint(*parts, forward_peak, live.peak)

    def _forward(
        self, model: VisionLanguageModel, batch: MicroBatch, live: LiveBytes
    ) -> tuple[Tensor, tuple[int, int, int]]:
        """Run the steps of `VisionLanguageModel.forward`; return the loss and their bytes.

        The batch is given by its sizes: what it looks up by value (placeholders, targets) is not
        known to fake tensors, so the number of placeholders is not checked.
        """
        size = batch.rows, batch.length
        targets = torch.zeros(batch.targets, dtype=torch.int64)
        fake = Batch(
            record_ids=("",) * batch.records,
            input_ids=torch.zeros(*size, dtype=torch.int64),
            attention_mask=torch.ones(*size, dtype=torch.bool) if batch.rows > 1 else None,
            segments=None,
            target_positions=targets,
            target_ids=targets,
            target_records=targets,
            unique_target_positions=targets,
        )
        images = self._images(model, max(1, batch.images))
        # Bytes do not depend on which records are packed: attention keeps the same per token.
        segments = [(batch.length, -1)]
        layout = PackedLayout(segments, target_positions=targets) if self._packed else None
        with self._autocast():
            embeds = model.embed(fake.input_ids, self._image_embeds(model, images))
            seen = live.now
            hidden, router = model.decode(
                embeds, fake.attention_mask, layout, with_router_loss=True
            )
            activations = live.now - seen
            loss = model.loss(hidden, fake, router).loss_sum
            return loss, (seen, activations, live.now - seen - activations)

    def _images(self, model: VisionLanguageModel, count: int) -> Tensor:
        """What a batch brings along of so many images: bytes, or features."""
        if self._features:
            return cast(GivenFeatures, model.vision_tower).features(count)
        size = self._blueprint.tower.image_spec.size
        return torch.empty(count, 3, size, size, dtype=torch.uint8)

    def _image_embeds(self, model: VisionLanguageModel, images: Tensor) -> Tensor:
        return (model.project if self._features else model.encode_images)(images)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast("cpu", dtype=self._blueprint.dtype)

    # --- FLOPs

    def _decoder_flops(self, depth: int) -> DecoderFlops:
        mode, model = self._model(depth)
        set_recomputing(model, "none")
        decoder = decoder_of(model.language_model)
        hidden: list[Tensor] = []

        def forward() -> None:
            embeds = torch.empty(1, _PROBE, _width(model), dtype=self._dtype, requires_grad=True)
            with self._autocast():
                hidden.append(decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state)

        with mode:
            products, attention = _counted(forward)
            backward, _ = _counted(lambda: hidden.pop().sum().backward())
        return DecoderFlops(products / _PROBE, backward / _PROBE, attention / _PROBE**2)

    def _projector_pass(self, model: VisionLanguageModel) -> None:
        with self._autocast():
            images = self._image_embeds(model, self._images(model, 1))
        images.sum().backward()

    def _target_flops(self, model: VisionLanguageModel) -> float:
        """Forward, and once more for the states' gradient and, where it learns, the head's own.

        Not counted in the loss itself, which takes its gradient inside the forward pass, where the
        counter cannot follow.
        """
        states = torch.empty(_PROBE, _width(model), dtype=self._dtype)
        head = cast(nn.Module, causal_lm(model.language_model).get_output_embeddings())
        passes = 2 + any(parameter.requires_grad for parameter in head.parameters())
        with self._autocast():
            forward = sum(_counted(lambda: model.loss_logits(states)))
        return passes * forward / _PROBE

    @property
    def _dtype(self) -> torch.dtype:
        return self._blueprint.dtype


@contextmanager
def _no_mask_made(model: VisionLanguageModel) -> Iterator[None]:
    """One row without padding, whose causal SDPA needs no mask.

    transformers sees that by looking at values; of tensors without any it takes the worst, a
    square mask. An attention that it does not know gets none, and this one is SDPA by a name of
    its own.
    """
    config = causal_lm(model.language_model).config.get_text_config()
    asked = config._attn_implementation
    if asked != "sdpa":
        yield
        return
    AttentionInterface.register(_MASKLESS, sdpa_attention_forward)
    config._attn_implementation = _MASKLESS
    try:
        yield
    finally:
        config._attn_implementation = asked


_MASKLESS: Final = "sdpa_without_mask"


def _with_gradients(model: nn.Module) -> list[Tensor]:
    """Weights, buffers and gradients, which are made here where there are none."""
    gradients = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            gradients.append(parameter.grad)
    return [*model.parameters(), *model.buffers(), *gradients]


def _counted(work: Callable[[], Any]) -> tuple[int, int]:
    """FLOPs of matrix products (and convolutions), and of attention."""
    fast_path = {torch.ops.aten._native_multi_head_attention: _fast_attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=fast_path)
    with counter:
        work()
    found = counter.get_flop_counts()["Global"]
    attention = sum(n for op, n in found.items() if "attention" in str(op) or "bmm" in str(op))
    return sum(found.values()) - attention, attention


def _require_dense(model: VisionLanguageModel, counted: DecoderFlops) -> None:
    """Refuse a mixture of experts, whose products the counter does not see."""
    layers = (p for layer in layers_of(model.language_model) for p in layer.parameters())
    weights = sum(parameter.numel() for parameter in layers if parameter.ndim >= 2)
    if counted.forward < weights:  # a dense layer takes two FLOPs a weight
        raise UserError(
            "model.language_model: its layers use only part of their weights for a token (a "
            "mixture of experts?), whose FLOPs cannot be counted here; take a dense model, or time "
            "a few real steps"
        )


def _fast_attention_flops(query: Sequence[int], *_: Any, **__: Any) -> int:
    """Of PyTorch's own attention module where it learns nothing: four projections, attention."""
    rows, tokens, width = query
    return rows * (8 * tokens * width**2 + 4 * tokens**2 * width)


def _width(model: VisionLanguageModel) -> int:
    table: Any = causal_lm(model.language_model).get_input_embeddings()
    return int(table.weight.shape[1])
