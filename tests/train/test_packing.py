"""Packed training is padded training with other sums: same records, same losses, same gradients."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.model.tiny import sums_of
from tests.rounding import rounding
from tests.train.test_train_step import largest_difference
from tests.train.tiny import (
    IMAGE_SIZE,
    NUM_IMAGE_TOKENS,
    Records,
    double_model,
    example,
    in_processes,
    tiny_model,
)
from vlm_sft.config.schema import PackingConfig
from vlm_sft.data.batch import Collator, LoadError, PackedCollator, PaddedCollator
from vlm_sft.data.dataset import Example
from vlm_sft.data.loader import load_steps, micro_batches_of_rank
from vlm_sft.errors import RecordError, UserError
from vlm_sft.model.activation_checkpointing import set_activation_checkpointing
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.packed_attention import PackedLayout, install_packed_attention
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train import packing_check as isolation
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.fsdp import shard
from vlm_sft.train.packing_check import check_no_leakage, prepare_packing
from vlm_sft.train.train_step import accumulate_gradient
from vlm_sft.train.validation import validation_loss
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from vlm_sft.utils.dtensor import full_tensor

TRAINABLE = ("projector", "language_model")


class Imaged(Records):
    """Examples of which those of one image begin alike."""

    broken: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[int]:
        return [len(e.input_ids) for e in self]

    @property
    def num_images(self) -> list[int]:
        return [len(e.pixel_values) for e in self]

    @property
    def num_crops(self) -> list[int]:
        return self.num_images

    @property
    def prefix_crops(self) -> list[int]:
        return [int(length > 0) for length in self.prefix_lengths]

    @property
    def prefix_ids(self) -> list[int]:
        return [int(e.pixel_values.sum()) if len(e.pixel_values) else -1 for e in self]

    @property
    def prefix_lengths(self) -> list[int]:
        return [1 + NUM_IMAGE_TOKENS if len(e.pixel_values) else 0 for e in self]

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if index in self.broken:
            raise RecordError("image_broken", "torn", record_id=f"record-{index}", where="a")
        return super().__getitem__(index)

    def example(self, index: int, *, first_image: int = 0) -> Example:
        found = self[index]
        pixels = found.pixel_values[first_image:]
        return Example(found.record_id, found.input_ids, found.labels, pixels)


def records(count: int = 9) -> Imaged:
    """Unequal lengths; three images of up to three records each, text-only ones between."""
    found = Imaged()
    for number in range(count):
        made = example(number, length=4 + 3 * (number % 4), supervised=number % 5 != 4, image=False)
        ids, labels = made.input_ids, made.labels
        pixels = made.pixel_values
        if number % 3 != 2:
            image = number % 4 // 2
            generator = torch.Generator().manual_seed(image)
            shape = (1, 3, IMAGE_SIZE, IMAGE_SIZE)
            pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            front = torch.cat([torch.tensor([7]), torch.full((NUM_IMAGE_TOKENS,), IMAGE_TOKEN_ID)])
            ids = torch.cat([front, ids])
            labels = torch.cat([torch.full((len(front),), IGNORE_INDEX), labels])
        if number < 2:  # supervised from the first token after their image
            labels[1 + NUM_IMAGE_TOKENS :] = ids[1 + NUM_IMAGE_TOKENS :]
        found.append(Example(made.record_id, ids, labels, pixels))
    return found


def packed(max_tokens: int, *, share: bool, round_to: int = 1) -> PackedCollator:
    return PackedCollator(max_tokens, share, round_to, image_cost=0.0, pad_token_id=0)


def gradients(
    accelerator: Accelerator, collator: Collator, *, sharded: bool = False
) -> tuple[dict[str, Any], float, int, dict[str, float]]:
    model = double_model(*TRAINABLE)
    install_packed_attention(causal_lm(model.language_model))
    if sharded:
        shard(model, accelerator, "fp32")
    wrapped = model if sharded else accelerator.prepare(model)
    mine = micro_batches_of_rank(
        collator,
        records(),
        range(9),
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    (batches,) = load_steps(records(), [mine], collator=collator, num_workers=0)
    found = accumulate_gradient(wrapped, batches, accelerator)
    by_name = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    losses = {name: float(loss) for name, loss in found.record_losses}
    grads = {name: full_tensor(grad).numpy() for name, grad in by_name.items()}
    return grads, found.loss, found.num_targets, losses


WAYS = {
    "one pack": packed(400, share=False),
    "two packs": packed(80, share=False),
    "shared prefixes": packed(400, share=True),
    "shared prefixes, small packs": packed(40, share=True),
    "filled up": packed(64, share=True, round_to=16),
}


@pytest.mark.parametrize("way", sorted(WAYS))
def test_packing_changes_neither_loss_nor_gradient(way: str) -> None:
    expected, loss, targets, losses = gradients(make_accelerator("fp32"), PaddedCollator(9, 0))
    found, packed_loss, packed_targets, packed_losses = gradients(
        make_accelerator("fp32"), WAYS[way]
    )
    assert packed_targets == targets > 30
    assert packed_loss == pytest.approx(loss, rel=1e-12)
    assert packed_losses == pytest.approx(losses, rel=1e-10)
    assert all(grad.dtype == np.float64 for grad in found.values())
    assert any(grad.any() for name, grad in found.items() if "multi_modal_projector" in name)
    assert largest_difference(expected, found) <= 1e-10


def everything(accelerator: Accelerator) -> dict[str, Any]:
    shared = packed(64, share=True)
    return {
        "replicated": gradients(accelerator, shared),
        "sharded": gradients(accelerator, shared, sharded=True),
        "proof": prove_in_process(accelerator),
    }


def prove_in_process(accelerator: Accelerator) -> str:
    model = tiny_model(*TRAINABLE)
    shard(model, accelerator, "fp32")
    config = PackingConfig(max_tokens=64)
    return prepare_packing(model, config, "fp32", accelerator.device)


@pytest.fixture(scope="module")
def two_processes() -> Sequence[dict[str, Any]]:
    return in_processes(2, everything)


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_packs_of_two_processes_add_up_to_the_same_gradient(
    kind: str, two_processes: Sequence[dict[str, Any]]
) -> None:
    expected, loss, targets, _ = gradients(make_accelerator("fp32"), PaddedCollator(9, 0))
    for found in two_processes:
        assert isinstance(found, dict), found
        grads, packed_loss, packed_targets, _ = found[kind]
        assert packed_targets == targets
        assert packed_loss == pytest.approx(loss, rel=1e-12)
        assert largest_difference(expected, grads) <= 1e-10
        assert found["proof"] == "sdpa"


def test_held_out_records_are_packed_too_and_have_the_same_loss() -> None:
    found = []
    for collator in (PaddedCollator(4, 0), packed(80, share=True)):
        model = tiny_model(*TRAINABLE)
        install_packed_attention(causal_lm(model.language_model))
        accelerator = make_accelerator("fp32")
        loss = validation_loss(model, records(), accelerator, collator=collator, num_workers=0)
        found.append(loss)
    assert found[0][1] == found[1][1]
    assert found[1][0] == pytest.approx(found[0][0], rel=rounding(sums_of(model)))


def test_a_record_that_cannot_be_loaded_leaves_the_rest_of_its_group_whole() -> None:
    broken = records()
    broken.broken = (0,)
    collator = packed(400, share=True)
    met: list[LoadError] = []
    step = micro_batches_of_rank(collator, records(), range(9), world_size=1, rank=0)
    (batches,) = load_steps(broken, [step], collator=collator, num_workers=0, on_error=met.append)
    assert [(fault.index, fault.reason) for fault in met] == [(0, "image_broken")]
    (batch,) = batches
    assert batch.segments is not None and len(batch.record_ids) == 8
    places = batch.input_ids == IMAGE_TOKEN_ID
    assert batch.pixel_values is not None
    assert int(places.sum()) == len(batch.pixel_values) * NUM_IMAGE_TOKENS
    with pytest.raises(RecordError, match="torn"):
        list(load_steps(broken, [step], collator=collator, num_workers=0))


def test_a_pack_of_which_nothing_can_be_loaded_adds_nothing() -> None:
    broken = records()
    broken.broken = tuple(range(9))
    collator = packed(400, share=True)
    met: list[LoadError] = []
    step = micro_batches_of_rank(collator, records(), range(9), world_size=1, rank=0)
    ((batch,),) = load_steps(broken, [step], collator=collator, num_workers=0, on_error=met.append)
    assert len(met) == 9 and batch.record_ids == () and batch.num_targets == 0


# --- the proof before the first step


def model_that(attends: Any) -> VisionLanguageModel:
    model = tiny_model()
    install_packed_attention(causal_lm(model.language_model))
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.mul_(4)
    for layer in causal_lm(model.language_model).model.layers:  # type: ignore[attr-defined]
        plain = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, plain=plain, **k: plain(*a, **attends(k))
    return model


def without_layout(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "packed_layout"}


def with_other_parents(options: dict[str, Any]) -> dict[str, Any]:
    """The second branch continues the first record instead of its prefix."""
    layout = options.get("packed_layout")
    if layout is not None:
        parents = [0 if parent == 1 else parent for parent in layout.parents]
        segments = list(zip(layout.lengths, parents, strict=True))
        options = options | {"packed_layout": PackedLayout(segments)}
    return options


def test_a_model_that_keeps_records_apart_is_let_through() -> None:
    model = model_that(lambda options: options)
    model.train()
    check_no_leakage(model, "sdpa", torch.device("cpu"), 1e-5)
    assert model.language_model.training


@pytest.mark.parametrize("attends", [without_layout, with_other_parents])
def test_a_model_in_which_records_see_others_is_refused(attends: Any) -> None:
    with pytest.raises(UserError, match=r"LlamaForCausalLM cannot be packed .*logits off by") as e:
        check_no_leakage(model_that(attends), "sdpa", torch.device("cpu"), 1e-3)
    assert e.value.reason == "packing_leaks"


def test_a_leak_too_small_for_rounding_is_seen_when_another_record_changes() -> None:
    model = model_that(lambda options: options)
    norm = causal_lm(model.language_model).model.norm  # type: ignore[attr-defined]
    plain = norm.forward
    norm.forward = lambda x: plain(x) + 1e-4 * plain(x).mean(dim=1, keepdim=True)
    with pytest.raises(UserError, match=r"other logits change by .* when record 1 of 3 changes"):
        check_no_leakage(model, "sdpa", torch.device("cpu"), 1.0)


def test_a_model_whose_forward_takes_no_layout_is_refused() -> None:
    model = tiny_model()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "rwkv", vocab_size=40, hidden_size=16, num_hidden_layers=2, context_length=64
    )
    model.language_model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="RwkvForCausalLM cannot be packed"):
        prepare_packing(model, PackingConfig(max_tokens=64), "fp32", torch.device("cpu"))


def test_the_proof_takes_place_on_every_packed_start(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    monkeypatch.setattr(isolation, "check_no_leakage", lambda model, *rest: seen.append(model))
    model = tiny_model()
    prepare_packing(model, PackingConfig(max_tokens=64), "fp32", torch.device("cpu"))
    assert seen == [model]


# --- the last layer only where a token is predicted


def llama_gradients(prune: bool, checkpointing: bool = False) -> tuple[dict[str, Any], int]:
    model = tiny_model(*TRAINABLE)
    install_packed_attention(causal_lm(model.language_model))
    if prune:
        assert isolation.prune_where_safe(model, "sdpa", torch.device("cpu"), 1e-5)
    if checkpointing:
        set_activation_checkpointing(model, "full")
    model.train()
    rows: list[int] = []
    last = causal_lm(model.language_model).model.layers[-1]  # type: ignore[attr-defined]
    last.mlp.down_proj.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[1]))
    collator = packed(400, share=True)
    step = micro_batches_of_rank(collator, records(), range(9), world_size=1, rank=0)
    (batches,) = load_steps(records(), [step], collator=collator, num_workers=0)
    accumulate_gradient(model, batches, make_accelerator("fp32"))
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return grads, rows[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_last_mlp_skips_what_predicts_nothing_and_every_gradient_stays(
    checkpointing: bool,
) -> None:
    whole, all_rows = llama_gradients(prune=False)
    pruned, some_rows = llama_gradients(prune=True, checkpointing=checkpointing)
    assert some_rows < all_rows / 2
    assert largest_difference(whole, pruned) <= 1e-5


def test_where_skipping_would_change_a_needed_logit_nothing_is_skipped() -> None:
    model = tiny_model()
    install_packed_attention(causal_lm(model.language_model))
    mlp = causal_lm(model.language_model).model.layers[-1].mlp  # type: ignore[attr-defined]
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + x.mean(dim=1, keepdim=True)
    assert not isolation.prune_where_safe(model, "sdpa", torch.device("cpu"), 1e-5)
    assert not mlp._forward_hooks and not mlp._forward_pre_hooks


def test_rows_that_are_padded_or_asked_for_logits_are_computed_whole() -> None:
    model = tiny_model()
    install_packed_attention(causal_lm(model.language_model))
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    before = model.logits(ids, attention_mask=mask)
    assert isolation.prune_where_safe(model, "sdpa", torch.device("cpu"), 1e-5)
    assert torch.equal(model.logits(ids, attention_mask=mask), before)
