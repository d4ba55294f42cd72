"""Which records a step sees: pure functions of the seed, the epoch and the position in it."""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]


class StepSampler:
    """The records of every step, from explicit seeds; nothing to save, nothing to restore.

    An epoch's last batch may be smaller: no record is dropped and none repeated to fill it up.

    Args:
        weights: How often each record is seen in one epoch (see `epoch_order`).
        batch_size: Records a step (global: over all processes and micro-batches).
        seed: The run's seed.
        lengths: With `has_image`: put records of like length and one modality into a batch.
        has_image: Whether each record has images.
        prefix_ids: Instead of these two: records of one key (not -1) come one behind the other.
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
        """Records seen in one epoch, repeats counted; the same in every epoch."""
        return len(self._cached[1])

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch, the last smaller one included."""
        return math.ceil(self.records_per_epoch / self._batch_size)

    def total_steps(self, epochs: float) -> int:
        """Steps that `epochs` take, at least one; half an epoch ends with its last begun batch."""
        whole = math.floor(epochs)
        rest = round((epochs - whole) * self.records_per_epoch, 6)
        return max(1, whole * self.steps_per_epoch + math.ceil(rest / self._batch_size))

    def epoch_of(self, step: int) -> float:
        """Epochs that lie behind when `step` steps (counted from 0) are done."""
        whole, within = divmod(step, self.steps_per_epoch)
        seen = min(within * self._batch_size, self.records_per_epoch)
        return whole + seen / self.records_per_epoch

    def step_indices(self, step: int) -> list[int]:
        """Indices of the records of global step `step`, counted from 0 over all epochs."""
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
    """Record indices in the order that epoch `epoch` sees them.

    A weight of 2.5 is twice in every epoch and a third time in every other: of the n records that
    share a weight, round(fraction * n) (at least one) get the extra look, and the window of those
    moves on with each epoch, so that all get their turn.

    Raises:
        ValueError: There are no records, or a weight is not above zero.
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
    looks = np.repeat(np.arange(len(array)), repeats)
    order: list[int] = looks[_permutation(len(looks), "order", seed, epoch)].tolist()
    return order


def step_indices(
    step: int,
    weights: Sequence[float],
    *,
    batch_size: int,
    seed: int,
    lengths: Sequence[int] | None = None,
    has_image: Sequence[bool] | None = None,
) -> list[int]:
    """`StepSampler.step_indices` for one look; make a StepSampler for many."""
    sampler = StepSampler(
        weights, batch_size=batch_size, seed=seed, lengths=lengths, has_image=has_image
    )
    return sampler.step_indices(step)


def group_by_length(
    order: Sequence[int],
    lengths: Sequence[int],
    has_image: Sequence[bool],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
) -> list[int]:
    """`order` rearranged so that a batch has one modality, longest records first.

    LLaVA's `get_modality_length_grouped_indices` (`llava/train/llava_trainer.py`), drawn from
    explicit seeds: each modality is cut into batches, whole batches are shuffled, what is left of
    the two comes last. Sorting within a batch puts like lengths into the same micro-batch.
    """
    batches: list[list[int]] = []
    rest: list[int] = []
    for modality in (True, False):
        members = [index for index in order if bool(has_image[index]) is modality]
        whole = len(members) - len(members) % batch_size
        batches += [members[i : i + batch_size] for i in range(0, whole, batch_size)]
        rest += members[whole:]
    shuffled = [batches[i] for i in _permutation(len(batches), "batches", seed, epoch)]
    shuffled += [rest[i : i + batch_size] for i in range(0, len(rest), batch_size)]
    return [
        index
        for batch in shuffled
        for index in sorted(batch, key=lambda index: lengths[index], reverse=True)
    ]


def group_by_prefix(order: Sequence[int], prefix_ids: Sequence[int]) -> list[int]:
    """`order` rearranged so that records that share a prefix follow the first of them.

    So images are shuffled instead of records. A record that an epoch sees again goes with the
    others' second looks.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    looks: dict[int, int] = {}
    for place, index in enumerate(order):
        look = looks[index] = looks.get(index, -1) + 1
        key = prefix_ids[index]
        groups.setdefault((key, look) if key >= 0 else (-1 - place, 0), []).append(index)
    return [index for group in groups.values() for index in group]


def _window(members: Indices, fraction: float, seed: int, epoch: int) -> Indices:
    size = max(1, round(fraction * len(members)))
    turns = members[_permutation(len(members), f"window {fraction!r}", seed, 0)]
    return np.take(turns, np.arange(epoch * size, (epoch + 1) * size), mode="wrap")


def _permutation(count: int, purpose: str, seed: int, epoch: int) -> Indices:
    """A shuffle of range(count) that no numpy version changes: raw Philox bits, stably sorted."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{epoch}".encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return np.argsort(bits, kind="stable")
