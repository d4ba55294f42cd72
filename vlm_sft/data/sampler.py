"""The records of each step: a pure function of the seed, the epoch and the position in it."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class StepSampler:
    """Returns the records of any step from explicit seeds, so it has no state to save or restore.

    The last batch of an epoch may be smaller: no record is dropped, and none is repeated to fill
    the batch.

    Args:
        weights: How often each record is seen in one epoch (see `epoch_order`).
        batch_size: Records per step (global: over all ranks and micro-batches).
        seed: Seed of the run.
        lengths: With `has_image`: group records of similar length and one modality in a batch.
        has_image: Whether each record has images.
        prefix_ids: In place of these two: records of one prefix id (not -1) follow one another.
    """

    def __init__(
        self,
        weights: Sequence[float],
        *,
        batch_size: int,
        seed: int,
        lengths: Sequence[int] | None = None,
        has_image: Sequence[bool] | None = None,
        prefix_ids: Sequence[int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self._weights = np.asarray(weights, dtype=np.float64)
        self._batch_size, self._seed = batch_size, seed
        self._lengths, self._has_image = lengths, has_image
        self._prefix_keys = prefix_ids
        self._cached: tuple[int, list[int]] = (0, self._order(0))

    @property
    def records_per_epoch(self) -> int:
        """Records seen in one epoch, repetitions counted; the same in every epoch."""
        return len(self._cached[1])

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch, the last smaller one included."""
        return math.ceil(self.records_per_epoch / self._batch_size)

    def total_steps(self, epochs: float) -> int:
        """Return the steps of `epochs` epochs, at least one; a started batch is completed."""
        full_epochs = math.floor(epochs)
        rest = round((epochs - full_epochs) * self.records_per_epoch, 6)
        return max(1, full_epochs * self.steps_per_epoch + math.ceil(rest / self._batch_size))

    def epoch_of(self, step: int) -> float:
        """Return the epochs that are done after `step` steps, as a fraction."""
        full_epochs, within = divmod(step, self.steps_per_epoch)
        seen = min(within * self._batch_size, self.records_per_epoch)
        return full_epochs + seen / self.records_per_epoch

    def step_indices(self, step: int) -> list[int]:
        """Return the record indices of a step, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._cached[0] != epoch:
            self._cached = (epoch, self._order(epoch))
        return self._cached[1][within * self._batch_size : (within + 1) * self._batch_size]

    def _order(self, epoch: int) -> list[int]:
        order = epoch_order(self._weights, seed=self._seed, epoch=epoch)
        if self._prefix_keys is not None:
            return group_by_prefix(order, self._prefix_keys)
        if self._lengths is None or self._has_image is None:
            return order
        return group_by_length(
            order,
            self._lengths,
            self._has_image,
            batch_size=self._batch_size,
            seed=self._seed,
            epoch=epoch,
        )


def epoch_order(
    weights: Sequence[float] | NDArray[np.float64], *, seed: int, epoch: int
) -> list[int]:
    """Return the record indices of an epoch in their order.

    A record of weight 2.5 is in every epoch twice, and in every other epoch a third time: of the n
    records that share a weight, round(fraction * n), at least one, are repeated once more, and the
    window of those moves on with each epoch, so that every record has its turn.

    Args:
        weights: How often each record is seen in one epoch, above zero.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.

    Raises:
        ValueError: If there are no records, or a weight is not a finite number above zero.
    """
    array = np.asarray(weights, dtype=np.float64)
    if not array.size:
        raise ValueError("there are no records to put in order")
    if not (np.isfinite(array) & (array > 0)).all():
        raise ValueError("every weight must be a finite number above zero")
    repeats = np.floor(array).astype(np.int64)
    for weight in np.unique(array[array != repeats]):
        members = np.flatnonzero(array == weight)
        repeats[_window(members, float(weight) % 1.0, seed, epoch)] += 1
    repeated = np.repeat(np.arange(len(array)), repeats)
    order: list[int] = repeated[_permutation(len(repeated), "order", seed, epoch)].tolist()
    return order


def group_by_length(
    order: Sequence[int],
    lengths: Sequence[int],
    has_image: Sequence[bool],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
) -> list[int]:
    """Return `order` rearranged so that a batch has one modality, longest records first.

    LLaVA's `get_modality_length_grouped_indices` (`llava/train/llava_trainer.py`) with explicit
    seeds: each modality is cut into batches, full batches are shuffled, and the rest of both comes
    last. Sorting within a batch puts similar lengths into the same micro-batch.
    """
    batches: list[list[int]] = []
    rest: list[int] = []
    for modality in (True, False):
        members = [index for index in order if bool(has_image[index]) is modality]
        in_full_batches = len(members) - len(members) % batch_size
        batches += [members[i : i + batch_size] for i in range(0, in_full_batches, batch_size)]
        rest += members[in_full_batches:]
    shuffled = [batches[i] for i in _permutation(len(batches), "batches", seed, epoch)]
    shuffled += [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]
    return [
        index
        for batch in shuffled
        for index in sorted(batch, key=lambda index: lengths[index], reverse=True)
    ]


def group_by_prefix(order: Sequence[int], prefix_ids: Sequence[int]) -> list[int]:
    """Return `order` rearranged so that records that share a prefix follow the first of them.

    This shuffles images instead of records. The second repetition of a record in an epoch is
    grouped with the second repetitions of the others, so that a group has no record twice.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    repetitions: dict[int, int] = {}
    for place, index in enumerate(order):
        repetition = repetitions[index] = repetitions.get(index, -1) + 1
        prefix_id = prefix_ids[index]
        # A record without a prefix is a group of its own, under a key that no other has.
        key = (prefix_id, repetition) if prefix_id >= 0 else (-1 - place, 0)
        groups.setdefault(key, []).append(index)
    return [index for group in groups.values() for index in group]


def _window(members: Indices, fraction: float, seed: int, epoch: int) -> Indices:
    size = max(1, round(fraction * len(members)))
    turns = members[_permutation(len(members), f"window {fraction!r}", seed, 0)]
    return np.take(turns, np.arange(epoch * size, (epoch + 1) * size), mode="wrap")


def _permutation(count: int, purpose: str, seed: int, epoch: int) -> Indices:
    """Return a permutation of range(count) that is the same in every version of numpy.

    numpy may change its shuffles, but not the raw bits of Philox; these are sorted stably.
    """
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return np.argsort(bits, kind="stable")
