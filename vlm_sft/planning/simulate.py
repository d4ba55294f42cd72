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
from typing import Any, Final, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlm_sft.config import LoraConfig
from vlm_sft.errors import UserError
from vlm_sft.model.vision import VisionTower, cast_floating
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm, decoder_of
from vlm_sft.planning.blueprint import Blueprint, layers_of, make_fake
from vlm_sft.planning.live_bytes import LiveBytes
from vlm_sft.planning.micro_batch import MicroBatch

Policy = Literal["none", "selective", "full"]
"""What is computed again in the backward pass: nothing; of the language model's layers all but
matrix products and attention; whole layers."""

POLICIES: Final[tuple[Policy, ...]] = ("none", "selective", "full")

SHALLOW: Final = (2, 3)
"""Layers of the two small models that stand for a deep one whose layers are all alike."""

_PROBE: Final = 64
"""Positions of the runs that count FLOPs."""

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one micro-batch beyond weights, gradients and optimiser state.

    Attributes:
        pictures: Pixels, and what tower and projector leave for the backward pass.
        activations: What the language model's layers keep for it.
        loss: Logits and what else the loss keeps.
        forward_peak: Most bytes alive at once in the forward pass.
        backward_peak: Likewise in the backward pass.
    """

    pictures: float
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
        picture: A picture's tower (forward only) and projector (forward and backward).
    """

    decoder: DecoderFlops
    target: float
    picture: float

    def of(
        self,
        *,
        tokens: float,
        attended: float,
        targets: float,
        pictures: float,
        policy: Policy = "none",
    ) -> float:
        """FLOPs of so much, forward and backward; `full` computes every layer's forward twice.

        Of the attention's square the half below the diagonal counts.
        """
        forwards = 2 if policy == "full" else 1
        token = forwards * self.decoder.forward + self.decoder.backward
        pair = self.decoder.attention / 2 * (forwards + 2)
        return tokens * token + attended * pair + targets * self.target + pictures * self.picture

    def of_batch(self, batch: MicroBatch, policy: Policy = "none") -> float:
        """FLOPs of one micro-batch; one without pictures runs a constant one."""
        return self.of(
            tokens=batch.tokens,
            attended=batch.attended,
            targets=batch.targets,
            pictures=max(1, batch.pictures),
            policy=policy,
        )


class TowerSimulation:
    """The frozen tower on fake tensors; the same for every way of training."""

    def __init__(self, tower: VisionTower) -> None:
        self._tower, self._mode = copy.deepcopy(tower), FakeTensorMode()
        make_fake(self._tower, self._mode)

    def peak(self, pictures: int) -> float:
        """Most bytes alive while so many pictures go through, pixels and features included."""
        one, two = self._peaks
        return one + (pictures - 1) * (two - one)

    @functools.cached_property
    def _peaks(self) -> tuple[int, int]:
        return self._peak(1), self._peak(2)

    def _peak(self, pictures: int) -> int:
        with self._mode:
            live = LiveBytes([*self._tower.parameters(), *self._tower.buffers()])
            with live:
                self._tower(self._pixels(pictures))
            return live.peak

    @functools.cached_property
    def flops(self) -> float:
        """FLOPs of one picture, forward."""
        with self._mode:
            return sum(_counted(lambda: self._tower(self._pixels(1))))

    def _pixels(self, count: int) -> Tensor:
        size = self._tower.image_spec.size
        return torch.empty(count, 3, size, size)


class Simulation:
    """Micro-batches of one way of training, on fake tensors.

    Args:
        blueprint: The model's shapes.
        tower: Its tower.
        trainable: Parts that learn.
        lora: Adapters, where `adapter` learns.
        precision: bf16, fp16 or fp32.
        sharded: Weights are gathered in the dtype of the forward pass, so none are cast in it.
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
    ) -> None:
        self._blueprint, self._tower, self._precision = blueprint, tower, precision
        self._trainable, self._lora, self._sharded = trainable, lora, sharded
        self._models: dict[int, tuple[FakeTensorMode, VisionLanguageModel]] = {}
        self._footprints: dict[tuple[MicroBatch, Policy], Footprint] = {}

    def footprint(self, batch: MicroBatch, policy: Policy) -> Footprint:
        """Bytes of a micro-batch under a policy."""
        found = self._footprints.get((batch, policy))
        if found is None:
            found = self._at_full_depth(lambda depth: self._run(depth, batch, policy))
            tower = self._tower.peak(max(1, batch.pictures))
            found = dataclasses.replace(found, forward_peak=max(found.forward_peak, tower))
            self._footprints[batch, policy] = found
        return found

    @functools.cached_property
    def flops(self) -> Flops:
        """What a token, a target and a picture cost.

        Raises:
            UserError: The layers compute with less than half of their weights for a token.
        """
        mode, model = self._model(SHALLOW[0])
        _require_dense(model, self._decoder_flops(SHALLOW[0]))
        with mode:
            picture = self._tower.flops + sum(_counted(lambda: self._projector_pass(model)))
            target = sum(_counted(lambda: self._head_pass(model))) / _PROBE
        return Flops(self._at_full_depth(self._decoder_flops), target, picture)

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
            mode = FakeTensorMode()
            make_fake(model, mode)
            self._models[depth] = mode, model.train()
        return self._models[depth]

    # --- bytes

    def _run(self, depth: int, batch: MicroBatch, policy: Policy) -> Footprint:
        mode, model = self._model(depth)
        set_policy(model, policy)
        with mode, _no_mask_made(model) if batch.rows == 1 else nullcontext():
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
        """The steps of `VisionLanguageModel.forward`, and the bytes that its three parts leave.

        What they look up by value (places of pictures and targets) is given here by its size.
        """
        size = self._blueprint.tower.image_spec.size
        pixels = torch.empty(max(1, batch.pictures), 3, size, size)
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
        mask = torch.ones(batch.rows, batch.length, dtype=torch.bool) if batch.rows > 1 else None
        chosen = torch.zeros(batch.targets, dtype=torch.int64)
        with self._autocast():
            table = cast(nn.Module, causal_lm(model.language_model).get_input_embeddings())
            images = model.image_embeds_of(pixels)
            embeds = cast(Tensor, table(ids))
            embeds = embeds.masked_scatter((ids == 1)[..., None], images.to(embeds.dtype))
            pictures = live.now
            hidden = decoder_of(model.language_model)(
                inputs_embeds=embeds, attention_mask=mask, use_cache=False
            ).last_hidden_state
            activations = live.now - pictures
            loss = model._token_losses(hidden[chosen, chosen], chosen).sum()
            return loss, (pictures, activations, live.now - pictures - activations)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._precision == "fp32":
            return nullcontext()
        return torch.autocast("cpu", dtype=self._blueprint.dtype)

    # --- FLOPs

    def _decoder_flops(self, depth: int) -> DecoderFlops:
        mode, model = self._model(depth)
        set_policy(model, "none")
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
        size = self._blueprint.tower.image_spec.size
        with self._autocast():
            images = model.image_embeds_of(torch.empty(1, 3, size, size))
        images.sum().backward()

    def _head_pass(self, model: VisionLanguageModel) -> None:
        states = torch.empty(_PROBE, _width(model), dtype=self._dtype, requires_grad=True)
        with self._autocast():
            loss = model._token_losses(states, torch.zeros(_PROBE, dtype=torch.int64)).sum()
        loss.backward()

    @property
    def _dtype(self) -> torch.dtype:
        return self._blueprint.dtype


def set_policy(model: VisionLanguageModel, policy: Policy) -> None:
    """Make the language model's layers keep or recompute what `policy` says."""
    language_model: Any = causal_lm(model.language_model)
    renamed = hasattr(language_model, "activation_checkpointing_enable")  # since 5.2x
    prefix = "activation" if renamed else "gradient"
    if policy == "none":
        getattr(language_model, f"{prefix}_checkpointing_disable")()
        return
    how: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, list(_KEPT))
    enable = getattr(language_model, f"{prefix}_checkpointing_enable")
    enable(**{f"{prefix}_checkpointing_kwargs": how})


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

_KEPT: Final = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What `selective` keeps."""


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
