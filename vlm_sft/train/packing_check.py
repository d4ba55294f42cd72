"""Before the first step of a packed run: proof, on the model, that no record sees another."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from vlm_sft.config.schema import PackingConfig
from vlm_sft.errors import UserError
from vlm_sft.model.dtypes import DTYPES
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.last_layer import prune_last_mlp
from vlm_sft.model.packed_attention import (
    NAME,
    Backend,
    PackedLayout,
    choose_backend,
    install_packed_attention,
)
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import Segment
from vlm_sft.utils.libraries import library_call

SEGMENTS: Final[tuple[Segment, ...]] = ((7, -1), (5, -1), (4, 1), (6, 1))
"""A record of 7 tokens, and two of 9 and 11 that share their first 5."""

RECORDS: Final = (range(7), [*range(7, 16)], [*range(7, 12), *range(16, 22)])
"""Where in the row each record lies."""

OWN: Final = (range(7), range(12, 16), range(16, 22))
"""Of these what the other two do not see."""

TOLERANCE: Final = {"fp32": 2e-3, "bf16": 5e-2, "fp16": 2e-2}
"""Between a record in a pack and alone, relative to its largest logit; sums are taken in another
order there (and a GPU may round the factors of fp32 products)."""

LEAK: Final = 1e-6
"""Of a record's logits when another one's tokens change, relative: the same sums, so nothing."""


def prepare_packing(
    model: VisionLanguageModel,
    config: PackingConfig,
    precision: str,
    device: torch.device,
    autocast: AbstractContextManager[Any] | None = None,
    *,
    prune: bool = True,
) -> Backend:
    """Install packed attention, choose its kernel, and prove on this device that it isolates.

    Args:
        model: On `device`.
        config: Which kernel.
        precision: bf16, fp16 or fp32.
        device: Where it is to run.
        autocast: Under which it is to run.
        prune: Let the last layer skip what predicts nothing (compiled layers cannot).

    Raises:
        UserError: The kernel is not to be had, or the model computes its attention elsewhere.
    """
    language_model = causal_lm(model.language_model)
    dtype = DTYPES[precision]
    text = language_model.config.get_text_config()
    dropout = getattr(text, "attention_dropout", getattr(text, "attn_pdrop", 0.0)) or 0.0
    backend = choose_backend(config.attention, device, dtype, dropout)
    model.attention_backend = backend
    packing = library_call("transformers", "train.packing", "compute attention of packed records")
    with packing, autocast or nullcontext():
        own = _logits_alone(model, device)
        install_packed_attention(language_model)
        _require_same_attention(own, _logits_alone(model, device), model, TOLERANCE[precision])
        prove_isolation(model, backend, device, TOLERANCE[precision])
        if prune:
            prune_where_safe(model, backend, device, TOLERANCE[precision])
    return backend


@torch.no_grad()
def _logits_alone(model: VisionLanguageModel, device: torch.device) -> Tensor:
    """Logits of one record, unpacked, by whatever attention the model has now."""
    was_training = model.training
    model.eval()
    logits = model.logits(_probe(model, device)[:, list(RECORDS[2])])
    model.train(was_training)
    return logits


def _require_same_attention(
    own: Tensor, packed: Tensor, model: VisionLanguageModel, tolerance: float
) -> None:
    """Refuse a model whose own attention has more to it: sinks, capped scores, biases.

    Raises:
        UserError: Naming the model.
    """
    if (difference := _relative(packed, own)) > tolerance:
        raise UserError(
            f"train.packing: {type(causal_lm(model.language_model)).__name__} computes its "
            "attention in a way that packed attention does not (attention sinks, capped scores or "
            f"a bias; logits off by {difference:.2g}); set train.micro_batch_size instead of "
            "train.packing",
            code="packing_leaks",
        )


@torch.no_grad()
def prune_where_safe(
    model: VisionLanguageModel, backend: Backend, device: torch.device, tolerance: float
) -> bool:
    """Let the last layer skip what predicts nothing, if the other logits stay what they are.

    Returns whether it does.
    """
    pruned = prune_last_mlp(model.language_model)
    if pruned is None:
        return False
    was_training = model.training
    model.eval()
    row = _probe(model, device)
    needed = torch.arange(1, row.shape[1], 3, device=device)
    try:
        whole = model.logits(row, layout=PackedLayout(SEGMENTS, device, backend))
        part = model.logits(row, layout=PackedLayout(SEGMENTS, device, backend, needed))
        safe = _relative(part[:, needed], whole[:, needed]) <= tolerance
    except TypeError:  # a mixture of experts may give its router's scores besides
        safe = False
    model.train(was_training)
    if not safe:
        pruned.remove()
    return safe


@torch.no_grad()
def prove_isolation(
    model: nn.Module, backend: Backend, device: torch.device, tolerance: float
) -> None:
    """Compare a pack of three records, two of them with a shared prefix, with each of them alone.

    Then change the tokens of each in turn: no logit of another may move.

    Raises:
        UserError: Naming the model and what was seen.
    """
    was_training = model.training
    model.eval()
    try:
        fault = _fault(cast(VisionLanguageModel, model), backend, device, tolerance)
    finally:
        model.train(was_training)
    if fault is not None:
        name = type(causal_lm(cast(VisionLanguageModel, model).language_model)).__name__
        raise UserError(
            f"train.packing: {name} cannot be packed ({fault}, attention by {backend} as {NAME}); "
            "set train.micro_batch_size instead of train.packing",
            code="packing_leaks",
        )


def _fault(
    model: VisionLanguageModel, backend: Backend, device: torch.device, tolerance: float
) -> str | None:
    row = _probe(model, device)
    size, count = _vocabulary(model), row.shape[1]
    layout = PackedLayout(SEGMENTS, device, backend)
    try:
        packed = model.logits(row, layout=layout)[0]
    except TypeError as error:  # its forward does not hand on what the attention needs
        return f"it refuses the layout of a pack: {' '.join(str(error).split())}"
    for number, places in enumerate(RECORDS):
        alone = model.logits(row[:, list(places)])[0]
        difference = _relative(packed[list(places)], alone)
        if difference > tolerance:
            return f"record {number + 1} of 3 has logits off by {difference:.2g} in a pack"
    for number, places in enumerate(OWN):
        changed = row.clone()
        changed[0, list(places)] = (changed[0, list(places)] + 1) % size
        moved = model.logits(changed, layout=layout)[0]
        others = [place for place in range(count) if place not in places]
        if (difference := _relative(moved[others], packed[others])) > LEAK:
            return f"other logits move by {difference:.2g} when record {number + 1} of 3 changes"
    return None


def _probe(model: VisionLanguageModel, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    count = sum(length for length, _ in SEGMENTS)
    return torch.randint(_vocabulary(model), (1, count), generator=generator).to(device)


def _vocabulary(model: VisionLanguageModel) -> int:
    return int(causal_lm(model.language_model).get_input_embeddings().weight.shape[0])


def _relative(found: Tensor, expected: Tensor) -> float:
    scale = expected.float().abs().max().clamp_min(1e-12)
    difference = (found.float() - expected.float()).abs().max() / scale
    return float(difference.nan_to_num(nan=float("inf")))
