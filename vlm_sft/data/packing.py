"""Bin packing: which records of a step go into which packed row."""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class RecordLengths(Protocol):
    """What packing needs to know of the records, each sequence indexed by the record."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each record, image tokens included."""
        ...

    @property
    def num_images(self) -> Sequence[int]:
        """Images of each record."""
        ...

    @property
    def num_crops(self) -> Sequence[int]:
        """Crops of the images of each record."""
        ...

    @property
    def prefix_crops(self) -> Sequence[int]:
        """Crops of the first image; 0 where the prefix id is -1."""
        ...

    @property
    def prefix_ids(self) -> Sequence[int]:
        """Equal for records that agree up to and including their first image; -1: none."""
        ...

    @property
    def prefix_lengths(self) -> Sequence[int]:
        """Tokens up to and including the first image; 0 where the prefix id is -1."""
        ...


@dataclass(frozen=True)
class PackItem:
    """Records that are packed into the same row, and what they cost there.

    Attributes:
        indices: The records.
        tokens: Tokens that they take in a row; a shared prefix is counted once.
        images: Images; a shared one is counted once.
        crops: Their crops, which the vision tower encodes.
    """

    indices: tuple[int, ...]
    tokens: int
    images: int
    crops: int


def pack_records(
    indices: Sequence[int],
    records: RecordLengths,
    *,
    max_tokens: int,
    share_image_prefix: bool,
    world_size: int = 1,
    image_cost: float = 0.0,
) -> list[list[int]]:
    """Distribute the records of a step over rows of at most `max_tokens` tokens.

    The aim is few rows of about equal cost, since the ranks of a step wait for the slowest one.
    The result is a pure function of the arguments.

    Args:
        indices: The records of the step.
        records: Lengths of all records.
        max_tokens: Capacity of a row in tokens.
        share_image_prefix: Records of one image share the tokens up to and including the image.
        world_size: Number of ranks; row `j` is for rank `j % world_size`.
        image_cost: Cost of encoding a crop of an image, in tokens through the language model.

    Returns:
        Record indices of each row. Every index of `indices` appears exactly once. The number of
        rows is a multiple of `world_size`; where records run out, the last rows are empty.

    Raises:
        ValueError: If a record is longer than `max_tokens`.
    """
    items = list(pack_items(indices, records, max_tokens, share_image_prefix=share_image_prefix))
    # Start with as many rows as the tokens need at least, and add rows until all items fit: one
    # round of ranks, or 2 % where there are hundreds of rows, so that few attempts are needed.
    total = sum(item.tokens for item in items)
    num_rows = _round_up(-(-total // max_tokens), world_size)
    while (rows := _fill_rows(items, num_rows, max_tokens, image_cost)) is None:
        assert num_rows <= len(items), "every item fits into a row of its own"
        num_rows = _round_up(max(num_rows + 1, num_rows * 51 // 50), world_size)
    return rows


def pack_items(
    indices: Sequence[int], records: RecordLengths, max_tokens: int, *, share_image_prefix: bool
) -> Iterator[PackItem]:
    """Yield the units of packing: single records, or records of one prefix as far as they fit.

    Raises:
        ValueError: If a record is longer than `max_tokens`.
    """
    groups: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        prefix_id = records.prefix_ids[index] if share_image_prefix else -1
        # A record without a prefix is a group of its own, under a negative key that no other has.
        groups.setdefault(prefix_id if prefix_id >= 0 else -1 - place, []).append(index)
    for members in groups.values():
        shared = records.prefix_lengths[members[0]] if len(members) > 1 else 0
        # Fill one item after the other: the shared prefix, then each record's own rest.
        chosen: list[int] = []
        tokens = shared
        for index in members:
            rest = records.lengths[index] - shared
            if shared + rest > max_tokens:
                raise ValueError(
                    f"a record of {shared + rest} tokens does not fit into rows of {max_tokens}"
                )
            if tokens + rest > max_tokens:
                yield _item(chosen, records)
                chosen, tokens = [], shared
            chosen.append(index)
            tokens += rest
        yield _item(chosen, records)


def _item(members: Sequence[int], records: RecordLengths) -> PackItem:
    # Every member after the first leaves out the prefix, and with it the shared image.
    shared = records.prefix_lengths[members[0]] if len(members) > 1 else 0
    repeats = len(members) - 1
    tokens = sum(records.lengths[index] for index in members) - repeats * shared
    images = sum(records.num_images[index] for index in members) - (repeats if shared else 0)
    crops = sum(records.num_crops[index] for index in members)
    if shared:
        crops -= repeats * records.prefix_crops[members[0]]
    return PackItem(tuple(members), tokens, images, crops)


def _fill_rows(
    items: Sequence[PackItem], num_rows: int, max_tokens: int, image_cost: float
) -> list[list[int]] | None:
    """Distribute items over `num_rows` rows; None if this heuristic finds no place for one.

    Longest-processing-time-first scheduling (Graham 1969): take the items by falling cost and give
    each to the row of the least cost so far that has room for it.
    """
    costs = [item.tokens + image_cost * item.crops for item in items]
    by_cost = sorted(range(len(items)), key=lambda number: -costs[number])
    # A heap of (cost, row, tokens). Cost decides the order and tokens the capacity; they differ
    # where images are encoded. Ties go to the lower row number, so the result is deterministic.
    heap = [(0.0, row, 0) for row in range(num_rows)]
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for number in by_cost:
        full = []
        while heap and heap[0][2] + items[number].tokens > max_tokens:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, row, tokens = heapq.heappop(heap)
        rows[row].append(number)
        heapq.heappush(heap, (cost + costs[number], row, tokens + items[number].tokens))
        # Rows without room for this item may have room for the next, smaller one.
        for entry in full:
            heapq.heappush(heap, entry)
    # Within a row the records keep their order in the step.
    return [
        [index for number in sorted(chosen) for index in items[number].indices] for chosen in rows
    ]


def _round_up(count: int, multiple: int) -> int:
    """Return the smallest positive multiple that is at least `count`."""
    return max(1, -(-count // multiple)) * multiple


def prefix_groups(indices: Sequence[int], prefix_ids: Sequence[int]) -> Iterator[list[int]]:
    """Yield the records of a row in groups that share a prefix: neighbors of the same prefix id."""
    numbered = enumerate(indices)
    for _, run in itertools.groupby(
        numbered, key=lambda item: prefix_ids[item[1]] if prefix_ids[item[1]] >= 0 else -1 - item[0]
    ):
        yield [index for _, index in run]


@dataclass(frozen=True)
class PackingStats:
    """How well the rows of some steps are filled.

    Attributes:
        max_tokens: Capacity of a row in tokens.
        rows_per_step: Mean number of rows in a step, over all ranks.
        filled: Tokens of records divided by the capacity of all rows, 0 to 1.
        imbalance: Tokens of the longest row divided by the mean of its step, averaged over steps.
        saved: Share of all tokens that are not computed because a prefix is shared, 0 to 1.
    """

    max_tokens: int
    rows_per_step: float
    filled: float
    imbalance: float
    saved: float

    def summary(self) -> str:
        """Return one line for the log."""
        return (
            f"{self.rows_per_step:.1f} rows of up to {self.max_tokens:,} tokens per step, "
            f"{self.filled:.0%} filled, longest row {self.imbalance:.2f} times the mean; shared "
            f"prefixes save {self.saved:.1%} of all tokens"
        )


def packing_stats(
    steps: Sequence[Sequence[Sequence[int]]],
    records: RecordLengths,
    *,
    max_tokens: int,
    share_image_prefix: bool,
) -> PackingStats:
    """Measure the rows of some steps, as `pack_records` returned them."""
    num_rows, packed, unpacked, imbalance = 0, 0, 0, 0.0
    for rows in steps:
        tokens = [
            sum(
                item.tokens
                for item in pack_items(
                    row, records, max_tokens, share_image_prefix=share_image_prefix
                )
            )
            for row in rows
        ]
        num_rows += len(rows)
        packed += sum(tokens)
        unpacked += sum(records.lengths[index] for row in rows for index in row)
        imbalance += max(tokens) * len(tokens) / sum(tokens)
    return PackingStats(
        max_tokens=max_tokens,
        rows_per_step=num_rows / len(steps),
        filled=packed / (max_tokens * num_rows),
        imbalance=imbalance / len(steps),
        saved=1 - packed / unpacked,
    )
