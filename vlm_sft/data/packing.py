"""Packing: records laid end to end in one row, those of one image as branches of one prefix."""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vlm_sft.data.batch import Tensors
from vlm_sft.data.dataset import Example
from vlm_sft.utils.constants import IGNORE_INDEX, Segment


class Sizes(Protocol):
    """What planning needs to know of each record, by its place in the dataset."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens, image tokens included."""
        ...

    @property
    def num_images(self) -> Sequence[int]: ...

    @property
    def prefix_keys(self) -> Sequence[int]:
        """The same for records that begin alike up to and with their first image; -1: none."""
        ...

    @property
    def prefix_lengths(self) -> Sequence[int]:
        """Tokens up to and with the first image; 0 where there is no key."""
        ...


@dataclass(frozen=True)
class PackedBatch(Tensors):
    """One row of records laid end to end.

    Attributes:
        record_ids: The records' ids, in order.
        input_ids: [1, T] int64, `IMAGE_TOKEN_ID` where image features go, the pad id at the end.
        segments: All of the row: tokens of each stretch, and the one it continues (-1: none).
        sources: [num_targets] int64, where in the row the state lies that predicts.
        targets: [num_targets] int64, the token that it predicts.
        records: [num_targets] int64, whose loss that is, by place in `record_ids`.
        needed: [rows] int64, `sources` with each place once (a prefix predicts several tokens).
        pixel_values: [N, 3, H, W] uint8, images in the placeholders' order; None if none.
        image_features: [N, tokens, width], kept features of the images, in place of them.
        padding: Tokens at the end of the row that belong to no record.
    """

    record_ids: tuple[str, ...]
    input_ids: Tensor
    segments: tuple[Segment, ...]
    sources: Tensor
    targets: Tensor
    records: Tensor
    needed: Tensor
    pixel_values: Tensor | None
    image_features: Tensor | None = None
    padding: int = 0

    @property
    def num_targets(self) -> int:
        """Positions that carry loss."""
        return len(self.targets)


@dataclass(frozen=True)
class Group:
    """Records of which all but the first leave out what they share with it.

    Attributes:
        examples: The records; from the second on without the first image's pixels.
        prefix_length: Tokens at the beginning that all have alike; 0 where there is one record.
    """

    examples: Sequence[Example]
    prefix_length: int = 0


def pack(groups: Sequence[Group], pad_token_id: int, round_to: int = 1) -> PackedBatch:
    """Lay groups end to end, and fill up to a multiple of `round_to` tokens.

    A lone record is one segment. A group is its prefix, then each record's rest, which continues
    it. No state of one record predicts a token of another.

    Raises:
        ValueError: There are no records, or a group's do not begin alike.
    """
    row = _Row()
    for group in groups:
        row.add(group)
    return row.finish(pad_token_id, round_to)


class _Row:
    def __init__(self) -> None:
        self.length = 0
        self.record_ids: list[str] = []
        self.ids: list[Tensor] = []
        self.segments: list[Segment] = []
        self.sources: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.records: list[Tensor] = []
        self.pixels: list[Tensor] = []
        self.features: list[Tensor] = []

    def add(self, group: Group) -> None:
        shared = group.prefix_length
        parent, before = -1, 0
        if shared:
            prefix = group.examples[0].input_ids[:shared]
            for example in group.examples:
                if not torch.equal(example.input_ids[:shared], prefix):
                    raise ValueError(f"{example.record_id} begins otherwise than its group")
                if bool((example.labels[:shared] != IGNORE_INDEX).any()):
                    raise ValueError(f"{example.record_id} has a label in its group's prefix")
            parent, before = len(self.segments), self.length + shared - 1
            self._append(prefix, -1)
        for example in group.examples:
            start = self.length
            self._append(example.input_ids[shared:], parent)
            self._supervise(example.labels[shared:], start, before if shared else -1)
            self.record_ids.append(example.record_id)
            if len(example.pixel_values):
                self.pixels.append(example.pixel_values)
            if example.image_features is not None:
                self.features.append(example.image_features)

    def _append(self, ids: Tensor, parent: int) -> None:
        self.ids.append(ids)
        self.segments.append((len(ids), parent))
        self.length += len(ids)

    def _supervise(self, labels: Tensor, start: int, before: int) -> None:
        """Each label is predicted by the token before it, a branch's first by its prefix's last.

        A record's very first token has no label (`Example`), so nothing crosses a border.
        """
        places = (labels != IGNORE_INDEX).nonzero().flatten()
        sources = places + (start - 1)
        if len(places) and int(places[0]) == 0:
            if before < 0:
                raise ValueError("a record's first token has a label, but nothing predicts it")
            sources[0] = before
        self.sources.append(sources)
        self.targets.append(labels[places])
        self.records.append(torch.full_like(places, len(self.record_ids)))

    def finish(self, pad_token_id: int, round_to: int) -> PackedBatch:
        if not self.record_ids:
            raise ValueError("cannot make a pack of no records")
        missing = -self.length % round_to
        if missing:
            self._append(torch.full((missing,), pad_token_id), -1)
        sources = torch.cat(self.sources)
        return PackedBatch(
            record_ids=tuple(self.record_ids),
            input_ids=torch.cat(self.ids).unsqueeze(0),
            segments=tuple(self.segments),
            sources=sources,
            targets=torch.cat(self.targets),
            records=torch.cat(self.records),
            needed=torch.unique(sources),
            pixel_values=torch.cat(self.pixels) if self.pixels else None,
            image_features=torch.cat(self.features) if self.features else None,
            padding=missing,
        )


@dataclass(frozen=True)
class Unit:
    """Records that stay together in a pack, and what they cost.

    Attributes:
        indices: Their places in the dataset.
        tokens: Of the row that they take, a shared prefix counted once.
        images: That go through the tower, a shared one counted once.
    """

    indices: tuple[int, ...]
    tokens: int
    images: int


def plan_packs(
    indices: Sequence[int],
    sizes: Sizes,
    *,
    max_tokens: int,
    share_prefixes: bool,
    num_processes: int = 1,
    image_cost: float = 0.0,
) -> list[list[int]]:
    """Share out a step's records over as few packs as hold them, all about equally heavy.

    Longest first into the lightest pack (Graham's LPT rule), a pure function of its arguments. The
    number of packs is a multiple of the number of processes; pack `j` belongs to process
    `j % num_processes`; packs may be empty where records run out.

    Args:
        indices: The step's records.
        sizes: Of all records.
        max_tokens: Of one pack; no record is longer.
        share_prefixes: Records of one image share its prefix.
        num_processes: Among which the packs are shared out.
        image_cost: What an image costs to encode, in tokens of the language model.

    Raises:
        ValueError: A record alone is longer than `max_tokens`.
    """
    units = list(make_units(indices, sizes, max_tokens, share_prefixes=share_prefixes))
    total = sum(unit.tokens for unit in units)
    count = _multiple(-(-total // max_tokens), num_processes)
    while (packs := _share_out(units, count, max_tokens, image_cost)) is None:
        assert count <= len(units), "every unit fits into a pack of its own"
        count = _multiple(max(count + 1, count * 51 // 50), num_processes)
    return packs


def make_units(
    indices: Sequence[int], sizes: Sizes, max_tokens: int, *, share_prefixes: bool
) -> Iterator[Unit]:
    """What goes into packs whole: single records, or those of one prefix as far as they fit.

    Raises:
        ValueError: A record alone is longer than `max_tokens`.
    """
    by_key: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        key = sizes.prefix_keys[index] if share_prefixes else -1
        by_key.setdefault(key if key >= 0 else -1 - place, []).append(index)
    for members in by_key.values():
        shared = sizes.prefix_lengths[members[0]] if len(members) > 1 else 0
        taken: list[int] = []
        tokens = shared
        for index in members:
            rest = sizes.lengths[index] - shared
            if shared + rest > max_tokens:
                raise ValueError(f"a record of {shared + rest} tokens is over {max_tokens}")
            if tokens + rest > max_tokens:
                yield _unit(taken, sizes)
                taken, tokens = [], shared
            taken.append(index)
            tokens += rest
        yield _unit(taken, sizes)


def _unit(members: Sequence[int], sizes: Sizes) -> Unit:
    shared = sizes.prefix_lengths[members[0]] if len(members) > 1 else 0
    saved = len(members) - 1
    tokens = sum(sizes.lengths[index] for index in members) - saved * shared
    images = sum(sizes.num_images[index] for index in members) - (saved if shared else 0)
    return Unit(tuple(members), tokens, images)


@dataclass(frozen=True)
class PackingFigures:
    """What packing makes of some steps.

    Attributes:
        packs_per_step: Rows a step, over all processes.
        filled: Tokens of records among all tokens that the packs may have.
        heaviest: The heaviest pack's tokens over the mean of its step, averaged over the steps.
        saved: Tokens that need no computing since a prefix is shared, among all.
    """

    packs_per_step: float
    filled: float
    heaviest: float
    saved: float

    def told(self, max_tokens: int) -> str:
        """One sentence of it."""
        return (
            f"packing: {self.packs_per_step:.1f} packs of up to {max_tokens:,} tokens a step, "
            f"{self.filled:.0%} filled, the heaviest {self.heaviest:.2f} times the mean; shared "
            f"prefixes save {self.saved:.1%} of all tokens"
        )


def packing_figures(
    steps: Sequence[Sequence[Sequence[int]]],
    sizes: Sizes,
    *,
    max_tokens: int,
    share_prefixes: bool,
) -> PackingFigures:
    """How well the packs of some steps (as `plan_packs` planned them) are filled."""
    whole, room, counts, heaviest = 0, 0, 0, 0.0
    kept = 0
    for packs in steps:
        tokens = [
            sum(
                unit.tokens
                for unit in make_units(pack, sizes, max_tokens, share_prefixes=share_prefixes)
            )
            for pack in packs
        ]
        whole += sum(sizes.lengths[index] for pack in packs for index in pack)
        kept += sum(tokens)
        room += max_tokens * len(packs)
        counts += len(packs)
        heaviest += max(tokens) * len(tokens) / sum(tokens)
    count = len(steps)
    return PackingFigures(counts / count, kept / room, heaviest / count, 1 - kept / whole)


def groups_of(indices: Sequence[int], keys: Sequence[int]) -> Iterator[list[int]]:
    """A pack's records as they share prefixes: neighbors of one key, others alone."""
    numbered = enumerate(indices)
    for _, run in itertools.groupby(
        numbered, key=lambda item: keys[item[1]] if keys[item[1]] >= 0 else -1 - item[0]
    ):
        yield [index for _, index in run]


def _multiple(count: int, of: int) -> int:
    return max(1, -(-count // of)) * of


def _share_out(
    units: Sequence[Unit], count: int, max_tokens: int, image_cost: float
) -> list[list[int]] | None:
    """Units in `count` packs, or None where this rule finds no room."""
    weights = [unit.tokens + image_cost * unit.images for unit in units]
    heaviest_first = sorted(range(len(units)), key=lambda number: -weights[number])
    packs = [(0.0, place, 0) for place in range(count)]
    members: list[list[int]] = [[] for _ in range(count)]
    for number in heaviest_first:
        passed = []
        while packs and packs[0][2] + units[number].tokens > max_tokens:
            passed.append(heapq.heappop(packs))
        if not packs:
            return None
        weight, place, tokens = heapq.heappop(packs)
        members[place].append(number)
        heapq.heappush(packs, (weight + weights[number], place, tokens + units[number].tokens))
        for pack_left in passed:
            heapq.heappush(packs, pack_left)
    return [
        [index for number in sorted(chosen) for index in units[number].indices]
        for chosen in members
    ]
