"""Packs: each record once, none too long, equally heavy; labels predicted within their record."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft.data.dataset import Example
from vlm_sft.data.packing import (
    Group,
    groups_of,
    make_units,
    pack,
    packing_figures,
    plan_packs,
)
from vlm_sft.data.sampler import StepSampler, group_by_prefix
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID


@dataclass
class Lengths:
    lengths: Sequence[int]
    num_images: Sequence[int] = field(default_factory=list)
    prefix_keys: Sequence[int] = field(default_factory=list)
    prefix_lengths: Sequence[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_images = self.num_images or [0] * len(self.lengths)
        self.prefix_keys = self.prefix_keys or [-1] * len(self.lengths)
        self.prefix_lengths = self.prefix_lengths or [0] * len(self.lengths)


def record(name: str, ids: list[int], labels: list[int], images: int = 0) -> Example:
    pixels = torch.full((images, 3, 2, 2), len(ids), dtype=torch.uint8)
    return Example(name, torch.tensor(ids), torch.tensor(labels), pixels)


X, P = IGNORE_INDEX, IMAGE_TOKEN_ID


def test_records_lie_end_to_end_and_each_label_is_predicted_by_the_token_before_it() -> None:
    first = record("a", [5, 6, 7], [X, 6, 7])
    second = record("b", [8, 9], [X, 9])
    batch = pack([Group([first]), Group([second])], pad_token_id=0)
    assert batch.record_ids == ("a", "b")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.segments == ((3, -1), (2, -1))
    assert batch.sources.tolist() == [0, 1, 3]
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.records.tolist() == [0, 0, 1]
    assert batch.num_targets == 3 and batch.pixel_values is None


def test_a_shared_prefix_lies_there_once_and_its_last_state_predicts_each_branchs_first() -> None:
    first = record("a", [5, P, P, 6, 7], [X, X, X, 6, 7], images=1)
    second = record("b", [5, P, P, 8], [X, X, X, 8])
    alone = record("c", [9, 9], [X, 9])
    batch = pack([Group([alone]), Group([first, second], 3)], pad_token_id=0)
    assert batch.input_ids.tolist() == [[9, 9, 5, P, P, 6, 7, 8]]
    assert batch.segments == ((2, -1), (3, -1), (2, 1), (1, 1))
    assert batch.sources.tolist() == [0, 4, 5, 4]
    assert batch.targets.tolist() == [9, 6, 7, 8]
    assert batch.records.tolist() == [0, 1, 1, 2]
    assert batch.pixel_values is not None and batch.pixel_values.shape == (1, 3, 2, 2)


def test_rows_are_filled_up_by_a_segment_of_their_own() -> None:
    batch = pack([Group([record("a", [5, 6, 7], [X, 6, 7])])], pad_token_id=3, round_to=4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 3]]
    assert batch.segments == ((3, -1), (1, -1))
    assert batch.num_targets == 2


def test_what_cannot_be_packed_is_refused() -> None:
    good = record("a", [5, P, 7], [X, X, 7])
    with pytest.raises(ValueError, match="no records"):
        pack([], pad_token_id=0)
    with pytest.raises(ValueError, match="b begins otherwise than its group"):
        pack([Group([good, record("b", [4, P, 7], [X, X, 7])], 2)], pad_token_id=0)
    with pytest.raises(ValueError, match="b has a label in its group's prefix"):
        pack([Group([good, record("b", [5, P, 7], [X, P, 7])], 2)], pad_token_id=0)
    with pytest.raises(ValueError, match="first token has a label"):
        pack([Group([record("a", [5, 6], [5, 6])])], pad_token_id=0)
    with pytest.raises(ValueError, match="a record of 9 tokens is over 8"):
        plan_packs([0], Lengths([9]), max_tokens=8, share_prefixes=False)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Lengths, list[int], int]:
    """Records with images, some of which begin alike; some of them make a step."""
    count = draw(st.integers(1, 40))
    keys = draw(st.lists(st.integers(-1, 5), min_size=count, max_size=count))
    prefixes = [draw(st.integers(2, 30)) for _ in range(6)]
    rests = draw(st.lists(st.integers(1, 40), min_size=count, max_size=count))
    shared = [prefixes[key] if key >= 0 else 0 for key in keys]
    lengths = [a + b for a, b in zip(shared, rests, strict=True)]
    images = [int(key >= 0) + draw(st.integers(0, 1)) * int(key >= 0) for key in keys]
    order = draw(st.permutations(range(count)))
    return Lengths(lengths, images, keys, shared), list(order), draw(st.integers(70, 200))


@settings(max_examples=200, deadline=None)
@given(steps(), st.booleans(), st.integers(1, 4), st.sampled_from([0.0, 25.0]))
def test_packs_hold_every_record_once_and_never_too_many_tokens(
    step: tuple[Lengths, list[int], int], share: bool, processes: int, image_cost: float
) -> None:
    sizes, order, most = step
    packs = plan_packs(
        order,
        sizes,
        max_tokens=most,
        share_prefixes=share,
        num_processes=processes,
        image_cost=image_cost,
    )
    assert len(packs) % processes == 0
    assert sorted(index for chosen in packs for index in chosen) == sorted(order)
    for chosen in packs:
        groups = list(groups_of(chosen, sizes.prefix_keys)) if share else [[i] for i in chosen]
        saved = sum((len(g) - 1) * sizes.prefix_lengths[g[0]] for g in groups)
        tokens = sum(sizes.lengths[index] for index in chosen) - saved
        assert tokens <= most
        units = list(make_units(chosen, sizes, most, share_prefixes=share))
        assert sum(unit.tokens for unit in units) == tokens
        images = sum(sizes.num_images[index] for index in chosen)
        shared_images = sum(len(g) - 1 for g in groups if len(g) > 1)
        assert sum(unit.images for unit in units) == images - shared_images


def test_packs_are_about_equally_heavy_in_tokens_and_images() -> None:
    lengths = [100 + 7 * (i % 31) for i in range(200)]
    images = [int(i % 3 == 0) for i in range(200)]
    sizes = Lengths(lengths, images)
    packs = plan_packs(
        range(200),
        sizes,
        max_tokens=8192,
        share_prefixes=False,
        num_processes=4,
        image_cost=200.0,
    )
    weights = [sum(lengths[i] + 200 * images[i] for i in chosen) for chosen in packs]
    assert len(packs) == 8 and max(weights) <= 1.01 * min(weights)


def test_figures_say_what_a_shared_prefix_saves() -> None:
    sizes = Lengths([60, 70, 80, 90], [1, 1, 1, 0], [0, 0, -1, -1], [50, 50, 0, 0])
    figures = packing_figures([[[0, 1, 2, 3]]], sizes, max_tokens=250, share_prefixes=True)
    assert figures.packs_per_step == 1 and figures.heaviest == 1
    assert figures.saved == pytest.approx(50 / 300) and figures.filled == pytest.approx(1.0)
    assert "1.0 packs of up to 250 tokens a step, 100% filled" in figures.told(250)
    assert "save 16.7% of all tokens" in figures.told(250)
    apart = packing_figures([[[0, 1, 2, 3]]], sizes, max_tokens=300, share_prefixes=False)
    assert apart.saved == 0


def test_records_of_one_prefix_follow_the_first_of_them_and_second_looks_come_apart() -> None:
    assert group_by_prefix([3, 0, 2, 1], [7, -1, 7, -1]) == [3, 0, 2, 1]
    assert group_by_prefix([3, 0, 1, 2], [7, -1, 7, -1]) == [3, 0, 2, 1]
    assert group_by_prefix([0, 2, 1, 0, 2], [7, -1, 7]) == [0, 2, 1, 0, 2]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 6), min_size=1, max_size=60), st.integers(0, 3), st.integers(1, 9))
def test_grouped_epochs_hold_every_record_once_and_are_a_pure_function(
    keys: list[int], seed: int, batch: int
) -> None:
    sampler = StepSampler([1.0] * len(keys), batch_size=batch, seed=seed, prefix_keys=keys)
    epochs = sampler.steps_per_epoch
    order = [index for step in range(epochs) for index in sampler.step_indices(step)]
    assert sorted(order) == list(range(len(keys)))
    again = StepSampler([1.0] * len(keys), batch_size=batch, seed=seed, prefix_keys=keys)
    assert [again.step_indices(step) for step in reversed(range(epochs))][::-1] == [
        sampler.step_indices(step) for step in range(epochs)
    ]
    runs = [key for key, index in zip([keys[i] for i in order], order, strict=True) if key >= 0]
    starts = [key for i, key in enumerate(runs) if i == 0 or runs[i - 1] != key]
    assert len(starts) == len(set(starts))
