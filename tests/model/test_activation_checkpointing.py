"""What the layers keep for the backward pass, and that no choice of it changes a bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint

from tests.model.tiny import GEMMA2, LLAMA, batch_of, images, rows, tiny_model
from vlm_sft.config.schema import LoraConfig
from vlm_sft.errors import UserError
from vlm_sft.model import activation_checkpointing as recompute
from vlm_sft.model.activation_checkpointing import (
    POLICIES,
    CheckpointPolicy,
    set_activation_checkpointing,
)
from vlm_sft.model.language_model import causal_lm, decoder_of
from vlm_sft.model.parts import set_trainable
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.live_bytes import LiveBytes

LORA = LoraConfig(r=4, alpha=8, dropout=0.2)
STAGES = {
    "stage 1": (None, {"projector"}),
    "stage 2 with adapters": (LORA, {"projector", "adapter"}),
    "stage 2 in full": (None, {"projector", "language_model"}),
}
BATCHES = [
    batch_of(*rows([5, -1, 6, 100], [5, 100, 101]), images(1)),
    batch_of(*rows([5, 100, 101])),
]


def learning(stage: str, policy: CheckpointPolicy, **tree: Any) -> VisionLanguageModel:
    lora, trainable = STAGES[stage]
    model = tiny_model(lora=lora, language_model={**LLAMA, **tree})
    set_trainable(model, trainable)
    set_activation_checkpointing(model, policy)
    return model.train()


@pytest.mark.parametrize("stage", STAGES)
def test_loss_and_gradients_are_the_same_to_the_bit_whatever_is_recomputed(stage: str) -> None:
    losses, gradients = [], []
    for policy in POLICIES:
        model = learning(stage, policy)
        torch.manual_seed(3)  # dropout of the adapters
        outputs = [model(batch) for batch in BATCHES]
        torch.stack([output.loss_sum for output in outputs]).sum().backward()
        losses.append([output.loss_sum.item() for output in outputs])
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert losses[0] == losses[1] == losses[2]
    assert any(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert torch.equal(gradient, gradients[2][name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_selective_keeps_less_if_weights_are_trainable_and_full_keeps_least(stage: str) -> None:
    kept = []
    for policy in POLICIES:
        model = learning(stage, policy, num_hidden_layers=4)
        with LiveBytes() as live:
            batch = rows([5, -1] + [6, 100] * 100)
            output = model(batch_of(*batch, images(1)))
            kept.append(live.now)
        output.loss_sum.backward()
    # Frozen layers keep little as it is (see below): 6 widths and 3 gates, or 7 widths and 2 gates.
    assert kept[1] < (1.05 if stage == "stage 1" else 0.7) * kept[0]
    assert kept[2] < 0.5 * min(kept[:2])


def test_the_policy_can_be_changed_and_taken_back() -> None:
    model = learning("stage 1", "none")
    kept = []
    for policy in ("none", "full", "none"):
        set_activation_checkpointing(model, policy)
        kept.append(sum(saved_by(lambda: model(BATCHES[0])).values()))
    assert kept[0] == kept[2] > kept[1]


def saved_by(forward: Callable[[], Any]) -> dict[int, int]:
    """Bytes of every storage that autograd saves, by its address."""
    found: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)  # so that no address is used twice
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(forward())
    return found


def test_frozen_linear_layers_save_no_input() -> None:
    model = learning("stage 1", "none")
    inputs: dict[str, Tensor] = {}
    for name, module in decoder_of(model.language_model).named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0])
            )
    saved = saved_by(lambda: model(BATCHES[0]))
    assert len(inputs) == 2 * 7
    needed = [name for name, kept in inputs.items() if kept.untyped_storage().data_ptr() in saved]
    # Attention's own backward needs its output, which o_proj is given.
    assert {name.rsplit(".", 1)[1] for name in needed} <= {"o_proj"}


def test_a_frozen_llama_layer_saves_what_its_norms_rotation_attention_and_gate_need() -> None:
    per_layer = []
    for layers in (2, 3):
        model = learning("stage 1", "none", num_hidden_layers=layers)
        batch = rows([5] + [6, 100] * 40)
        saved = saved_by(lambda m=model, b=batch: m(batch_of(*b)))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        per_layer.append(sum(size for address, size in saved.items() if address not in own))
    tokens, width, hidden, heads = 81, 48, 64, 2
    norms = 2 * (width + 1)  # each its input, and the scale of a token
    attention = 4 * width + heads  # rotated queries and keys, values, output; one sum a head
    gate = 3 * hidden  # the gate before and after SiLU, and the other factor
    numbers = tokens * (norms + attention + gate)
    assert per_layer[1] - per_layer[0] == pytest.approx(4 * numbers, rel=0.02)


@pytest.mark.parametrize(
    ("operation", "shapes", "kept"),
    [
        (torch.ops.aten.mm.default, [(9, 48), (48, 64)], True),
        (torch.ops.aten.mm.default, [(9, 4), (4, 64)], False),
        (torch.ops.aten.addmm.default, [(64,), (9, 48), (48, 64)], True),
        (torch.ops.aten.bmm.default, [(2, 9, 8), (2, 8, 9)], False),
        (torch.ops.aten.mul.Tensor, [(9, 48), (9, 48)], False),
        (torch.ops.aten._scaled_dot_product_flash_attention.default, [(1, 2, 9, 24)] * 3, True),
    ],
)
def test_selective_keeps_products_and_attention_but_not_what_is_cheap(
    operation: Any, shapes: list[tuple[int, ...]], kept: bool
) -> None:
    decided = recompute._selective_policy(None, operation, *map(torch.empty, shapes))
    assert (decided is checkpoint.CheckpointPolicy.MUST_SAVE) == kept


def test_other_families_support_checkpointing_too() -> None:
    found = []
    for policy in POLICIES:
        model = tiny_model(language_model=GEMMA2)
        set_trainable(model, {"projector"})
        set_activation_checkpointing(model, policy)
        model.train()(BATCHES[0]).loss_sum.backward()
        found.append([p.grad for p in model.multi_modal_projector.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))


def test_a_model_that_cannot_recompute_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(causal_lm(model.language_model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match="LlamaForCausalLM has no support for full"):
        set_activation_checkpointing(model, "full")
