"""NEFTune: noise on text alone, of the paper's strength for every record, and only in training."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.model.tiny import batch_of, images, rows, sums_of, tiny_model
from tests.rounding import assert_near
from vlm_sft.model.neftune import add_noise, text_lengths
from vlm_sft.model.packed_attention import PackedLayout
from vlm_sft.model.vlm import VlmOutput

WIDTH = 32


def noise(lengths: torch.Tensor, alpha: float = 5.0) -> torch.Tensor:
    torch.manual_seed(1)
    return add_noise(torch.zeros(*lengths.shape, WIDTH), lengths, alpha)


def test_lengths_count_a_records_text_and_are_0_elsewhere() -> None:
    is_text = torch.tensor([[1, 0, 0, 1, 1], [1, 1, 0, 0, 0]]).bool()
    assert text_lengths(is_text).tolist() == [[3, 0, 0, 3, 3], [2, 2, 0, 0, 0]]
    packed = torch.tensor([[1, 0, 0, 1, 1, 1, 1]]).bool()
    layout = PackedLayout([(5, -1), (2, -1)])
    assert text_lengths(packed, layout).tolist() == [[3, 0, 0, 3, 3, 2, 2]]


def test_a_shared_prefix_counts_for_each_of_its_records_and_takes_the_longest_ones_length() -> None:
    is_text = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]]).bool()
    layout = PackedLayout([(1, -1), (3, -1), (1, 1), (3, 1)])
    assert text_lengths(is_text, layout).tolist() == [[1, 5, 5, 0, 3, 5, 5, 5]]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4), alpha=st.floats(0.1, 15.0))
def test_noise_is_within_the_papers_bound_and_about_as_large(
    lengths: list[int], alpha: float
) -> None:
    rows_of = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        rows_of[row, :length] = length
    found = noise(rows_of, alpha)
    for row, length in enumerate(lengths):
        bound = alpha / math.sqrt(length * WIDTH)
        assert found[row].abs().max() <= bound
        assert not found[row, length:].any()
        # Uniform: the whole record's noise has about the norm alpha / sqrt(3).
        assert 0.5 < found[row].norm() / (alpha / math.sqrt(3)) < 1.5


def test_packed_records_get_the_noise_of_padded_ones() -> None:
    padded = noise(torch.tensor([[3, 0, 3, 3], [2, 2, 0, 0]]))
    packed = noise(torch.tensor([[3, 0, 3, 3, 2, 2]]))
    assert torch.equal(torch.cat([padded[0], padded[1, :2]]), packed[0])


def test_a_batch_without_text_draws_nothing() -> None:
    assert not noise(torch.zeros(1, 4, dtype=torch.int64)).any()


def test_the_dtype_and_the_gradient_of_the_embeddings_are_kept() -> None:
    embeds = torch.ones(1, 3, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    found = add_noise(embeds, torch.tensor([[2, 0, 2]]), 5.0)
    assert found.dtype == torch.bfloat16
    found.sum().backward()
    assert embeds.grad is not None and torch.equal(embeds.grad, torch.ones_like(embeds))


def run(alpha: float | None, *, training: bool, seed: int = 0, padding: int = 0) -> VlmOutput:
    model = tiny_model()
    model.neftune_alpha = alpha
    ids, mask, labels = rows([5, -1, 6, 100, 101], [7, 102])
    pad = torch.nn.functional.pad
    batch = (pad(ids, (0, padding)), pad(mask, (0, padding)), pad(labels, (0, padding), value=-100))
    torch.manual_seed(seed)
    output: VlmOutput = model.train(training)(batch_of(*batch, images(1)))
    return output


def test_the_model_adds_it_in_training_alone_as_a_function_of_the_seed() -> None:
    plain = run(None, training=True).loss_sum
    assert torch.equal(run(5.0, training=False).loss_sum, plain)
    first, again, other = (run(5.0, training=True, seed=s).loss_sum for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert first != other != plain


def test_padding_changes_no_records_loss() -> None:
    alone, padded = (run(5.0, training=True, padding=p).per_record_loss for p in (0, 7))
    assert_near(padded, alone, sums_of(tiny_model()))


def test_image_embeddings_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.neftune_alpha = 5.0
    seen: list[torch.Tensor] = []
    model.language_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    ids, mask, labels = rows([5, -1, 6, 100])
    for training in (False, True):
        model.train(training)(batch_of(ids, mask, labels, images(1)))
    changed = (seen[0] != seen[1]).any(dim=-1)
    assert changed.tolist() == [[True, False, False, False, False, True, True]]
