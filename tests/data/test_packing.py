"""Packed rows hold each record once, are never too long, and cost about the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft.data.packing import (
    pack_items,
    pack_records,
    packing_stats,
    prefix_groups,
)
from vlm_sft.data.sampler import StepSampler, group_by_prefix


@dataclass
class Lengths:
    lengths: Sequence[int]
    num_images: Sequence[int] = field(default_factory=list)
    prefix_ids: Sequence[int] = field(default_factory=list)
    prefix_lengths: Sequence[int] = field(default_factory=list)
    num_crops: Sequence[int] = field(default_factory=list)
    prefix_crops: Sequence[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_images = self.num_images or [0] * len(self.lengths)
        self.num_crops = self.num_crops or self.num_images
        self.prefix_ids = self.prefix_ids or [-1] * len(self.lengths)
        self.prefix_lengths = self.prefix_lengths or [0] * len(self.lengths)
        self.prefix_crops = self.prefix_crops or [int(n > 0) for n in self.prefix_lengths]


def test_a_record_that_is_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a record of 9 tokens does not fit into rows of 8"):
        pack_records([0], Lengths([9]), max_tokens=8, share_image_prefix=False)


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
def test_rows_hold_every_record_once_and_never_too_many_tokens(
    step: tuple[Lengths, list[int], int], share: bool, world_size: int, image_cost: float
) -> None:
    sizes, order, most = step
    rows = pack_records(
        order,
        sizes,
        max_tokens=most,
        share_image_prefix=share,
        world_size=world_size,
        image_cost=image_cost,
    )
    assert len(rows) % world_size == 0
    assert sorted(index for chosen in rows for index in chosen) == sorted(order)
    for chosen in rows:
        groups = list(prefix_groups(chosen, sizes.prefix_ids)) if share else [[i] for i in chosen]
        saved = sum((len(g) - 1) * sizes.prefix_lengths[g[0]] for g in groups)
        tokens = sum(sizes.lengths[index] for index in chosen) - saved
        assert tokens <= most
        items = list(pack_items(chosen, sizes, most, share_image_prefix=share))
        assert sum(item.tokens for item in items) == tokens
        images = sum(sizes.num_images[index] for index in chosen)
        shared_images = sum(len(g) - 1 for g in groups if len(g) > 1)
        assert sum(item.images for item in items) == images - shared_images


def test_rows_cost_about_the_same_in_tokens_and_images() -> None:
    lengths = [100 + 7 * (i % 31) for i in range(200)]
    images = [int(i % 3 == 0) for i in range(200)]
    sizes = Lengths(lengths, images)
    rows = pack_records(
        range(200),
        sizes,
        max_tokens=8192,
        share_image_prefix=False,
        world_size=4,
        image_cost=200.0,
    )
    costs = [sum(lengths[i] + 200 * images[i] for i in chosen) for chosen in rows]
    assert len(rows) == 8 and max(costs) <= 1.01 * min(costs)


def test_stats_report_what_a_shared_prefix_saves() -> None:
    sizes = Lengths([60, 70, 80, 90], [1, 1, 1, 0], [0, 0, -1, -1], [50, 50, 0, 0])
    stats = packing_stats([[[0, 1, 2, 3]]], sizes, max_tokens=250, share_image_prefix=True)
    assert stats.rows_per_step == 1 and stats.imbalance == 1
    assert stats.saved == pytest.approx(50 / 300) and stats.filled == pytest.approx(1.0)
    assert "1.0 rows of up to 250 tokens per step, 100% filled" in stats.summary()
    assert "save 16.7% of all tokens" in stats.summary()
    apart = packing_stats([[[0, 1, 2, 3]]], sizes, max_tokens=300, share_image_prefix=False)
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
    sampler = StepSampler([1.0] * len(keys), batch_size=batch, seed=seed, prefix_ids=keys)
    epochs = sampler.steps_per_epoch
    order = [index for step in range(epochs) for index in sampler.step_indices(step)]
    assert sorted(order) == list(range(len(keys)))
    again = StepSampler([1.0] * len(keys), batch_size=batch, seed=seed, prefix_ids=keys)
    assert [again.step_indices(step) for step in reversed(range(epochs))][::-1] == [
        sampler.step_indices(step) for step in range(epochs)
    ]
    runs = [key for key, index in zip([keys[i] for i in order], order, strict=True) if key >= 0]
    starts = [key for i, key in enumerate(runs) if i == 0 or runs[i - 1] != key]
    assert len(starts) == len(set(starts))
