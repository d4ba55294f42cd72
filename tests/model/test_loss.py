"""The chunked loss is the plain one: values, gradients, nothing kept."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vlm_sft.model import loss
from vlm_sft.model.loss import chunked_cross_entropy

WIDTH, VOCABULARY = 8, 30


def problem(count: int, *, bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=torch.float64)
    states = torch.randn(count, WIDTH, dtype=torch.float64, requires_grad=True)
    return head, states, torch.randint(VOCABULARY, (count,))


def gradients(total: Tensor, head: nn.Linear, states: Tensor) -> list[Tensor]:
    wanted = [states, *(p for p in head.parameters() if p.requires_grad)]
    return list(torch.autograd.grad(total * 0.3, wanted))


def capped(head: nn.Linear) -> Any:
    return lambda hidden: torch.tanh(head(hidden) / 2) * 2


@pytest.mark.parametrize("count", [1, 4, 5, 23])
@pytest.mark.parametrize("frozen", [False, True])
def test_chunks_add_up_to_the_whole_loss_and_its_gradient(
    count: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK", 5)
    head, states, targets = problem(count)
    head.requires_grad_(not frozen)
    expected = cross_entropy(capped(head)(states), targets, reduction="none")
    total, each = chunked_cross_entropy(capped(head), states, targets, list(head.parameters()))
    assert torch.allclose(each, expected, rtol=1e-12) and not each.requires_grad
    pairs = zip(
        gradients(total, head, states), gradients(expected.sum(), head, states), strict=True
    )
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-15) for a, b in pairs)


def test_with_nothing_to_predict_sum_and_gradients_are_zero() -> None:
    head, states, targets = problem(0)
    total, each = chunked_cross_entropy(head, states, targets, list(head.parameters()))
    assert float(total.detach()) == 0 and len(each) == 0
    found = gradients(total, head, states)
    assert [g.shape for g in found] == [(0, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)]
    assert not any(g.any() for g in found)


def test_without_gradients_none_are_worked_out() -> None:
    head, states, targets = problem(7)
    with torch.no_grad():
        total, each = chunked_cross_entropy(head, states, targets, list(head.parameters()))
    assert not total.requires_grad and len(each) == 7


def test_never_are_more_logits_there_than_a_chunk_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 5)
    head, states, targets = problem(23)
    seen: list[int] = []
    head.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    total, _ = chunked_cross_entropy(head, states, targets, list(head.parameters()))
    assert seen == [5, 5, 5, 5, 3]
    assert total.grad_fn is not None
    kept = sum(t.numel() for t in total.grad_fn.saved_tensors)  # type: ignore[attr-defined]
    assert kept == 23 * WIDTH + VOCABULARY * WIDTH + VOCABULARY


def test_each_chunk_is_computed_once_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 5)
    head, states, targets = problem(10)
    calls: list[int] = []
    head.register_forward_hook(lambda m, a, out: calls.append(len(out)))
    total, _ = chunked_cross_entropy(head, states, targets, list(head.parameters()))
    total.backward()
    assert calls == [5, 5]


def test_the_heads_gradient_is_summed_in_float32_over_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "CHUNK", 1)
    head, states, targets = problem(400)
    exact = gradients(cross_entropy(head(states), targets, reduction="sum"), head, states)[1]
    head.bfloat16()
    narrow = states.detach().bfloat16()
    total, _ = chunked_cross_entropy(
        lambda h: head(h).float(), narrow, targets, list(head.parameters())
    )
    (found,) = torch.autograd.grad(total * 0.3, [head.weight])
    assert found.dtype == torch.bfloat16
    assert float((found.double() - exact).norm() / exact.norm()) < 0.005
