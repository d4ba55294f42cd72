"""The DataLoader of a run: micro-batches, step after step, loaded ahead by worker processes."""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from vlm_sft.data.batch import Batch, Collator, LoadError
from vlm_sft.data.dataset import Example
from vlm_sft.data.packing import RecordLengths, prefix_groups
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.cores import available_cores
from vlm_sft.utils.filesystem import warn_once

NOTICE_SECONDS = 5.0
"""How long to wait for torch's notice of a worker's death after the connection to it broke."""

SECONDS_TO_FINISH = 120
"""How long a worker lives on after SIGTERM, if the run does not end it before."""


class Examples(RecordLengths, Protocol):
    """A dataset of examples (`SupervisedDataset`)."""

    def __len__(self) -> int: ...

    @property
    def record_ids(self) -> Sequence[str]: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def example(self, index: int, *, first_image: int = 0) -> Example:
        """Return an example without the pixels of the images before number `first_image`."""
        ...


OnLoadError = Callable[[LoadError], None]


def load_steps(
    dataset: Examples,
    steps: Iterable[Sequence[Sequence[int]]],
    *,
    collator: Collator,
    num_workers: int,
    on_error: OnLoadError | None = None,
) -> Iterator[list[Batch]]:
    """Yield the batches of one step after the other.

    Workers load at most two micro-batches ahead each. Neither their number nor their speed changes
    what is yielded.

    Args:
        dataset: The records.
        steps: The micro-batches of each step, as lists of record indices; at least one each. Read
            once, just ahead of loading.
        collator: Makes a `Batch` of the examples of a micro-batch.
        num_workers: Number of worker processes, at most one for each CPU core; 0 loads in this
            process.
        on_error: Called with each record that cannot be loaded, before the step without it is
            yielded. None: such a record raises.

    Raises:
        RecordError: As the dataset raised it for a record, in a worker or not, if `on_error` is
            None.
        RuntimeError: A worker died; see `lost_worker_errors`.
    """
    sizes: deque[int] = deque()
    num_workers = usable_workers(num_workers)

    def micro_batches() -> Iterator[list[int]]:
        for step in steps:
            sizes.append(len(step))
            yield from map(list, step)

    loader = DataLoader(
        _FetchedExamples(dataset, collator.share_image_prefix, skip_errors=on_error is not None),
        batch_sampler=micro_batches(),
        collate_fn=partial(_collate, collator),
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=outlive_stop_signals if num_workers else None,
        # A generator of its own: the loader would draw its base seed from the global one.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    batches: list[Batch] = []
    try:
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            for error in batch.load_errors:
                assert on_error is not None
                on_error(error)
            batches.append(batch)
            if len(batches) == sizes[0]:
                sizes.popleft()
                yield batches
                batches = []
    except (ConnectionError, EOFError, FileNotFoundError):
        # The worker may have died while its tensors were transferred. Torch then raises a better
        # error from its signal handler, which runs while this thread sleeps.
        time.sleep(NOTICE_SECONDS)
        raise


def usable_workers(wanted: int) -> int:
    """Return at most as many workers as this process has CPU cores; say so once if that is less."""
    cores = available_cores()
    if wanted > cores:
        warn_once(
            f"data.num_workers: {wanted} processes would share "
            f"{cores} CPU core{'s' * (cores > 1)}; starting {cores}"
        )
    return min(wanted, cores)


def outlive_stop_signals(_: int) -> None:
    """Keep a worker from signals to the process group of the run, or to all of its processes.

    Ctrl-C and `timeout` send them to the group, `pkill` and batch systems to each process. The run
    finishes its step first and needs its workers for that; it ends them itself, and they end by
    themselves if it is killed. A worker that hangs ends some time after SIGTERM.
    """
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_TO_FINISH))


def load_batch(
    dataset: Examples,
    indices: Sequence[int],
    *,
    collator: Collator,
    on_error: OnLoadError | None = None,
) -> Batch:
    """Load one micro-batch in this process; arguments and errors as for `load_steps`."""
    ((batch,),) = load_steps(
        dataset, [[indices]], collator=collator, num_workers=0, on_error=on_error
    )
    return batch


def micro_batches_of_rank(
    collator: Collator,
    records: RecordLengths,
    indices: Sequence[int],
    *,
    rank: int,
    world_size: int,
) -> list[list[int]]:
    """Return one rank's micro-batches of a step, as many as every other rank has."""
    return collator.assign_to_ranks(records, indices, world_size)[rank::world_size]


class _FetchedExamples(Dataset["Example | LoadError | UserError"]):
    """The examples of a micro-batch, with errors as values.

    An error that is raised in a worker would reach the user with the worker's traceback in its
    message.

    Args:
        dataset: The records.
        share_image_prefix: Load an image once for neighbors that share it.
        skip_errors: Skip records that cannot be loaded; otherwise the first of them ends the run.
    """

    def __init__(self, dataset: Examples, share_image_prefix: bool, *, skip_errors: bool) -> None:
        self._dataset = dataset
        self._share_image_prefix = share_image_prefix
        self._skip_errors = skip_errors

    def __getitems__(self, indices: list[int]) -> list[Example | LoadError | UserError]:
        """Return the examples of a micro-batch (DataLoader's fetcher calls this)."""
        items: list[Example | LoadError | UserError] = []
        for group in self._groups(indices):
            prefix_length = 0  # until one record of the group has been loaded with its image
            for index in group:
                try:
                    items.append(self._example(index, prefix_length))
                except RecordError as error:
                    if not self._skip_errors:
                        return [error]
                    items.append(LoadError.of(index, error))
                except UserError as error:
                    return [error]
                else:
                    if self._share_image_prefix:
                        prefix_length = self._dataset.prefix_lengths[group[0]]
        return items

    def _groups(self, indices: Sequence[int]) -> Iterator[list[int]]:
        if self._share_image_prefix:
            return prefix_groups(indices, self._dataset.prefix_ids)
        return ([index] for index in indices)

    def _example(self, index: int, prefix_length: int) -> Example:
        if not prefix_length:
            return self._dataset[index]
        example = self._dataset.example(index, first_image=1)
        return replace(example, shared_prefix_length=prefix_length)


def _collate(
    collator: Collator, items: Sequence[Example | LoadError | UserError]
) -> Batch | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
    batch = collator([item for item in items if isinstance(item, Example)])
    errors = tuple(item for item in items if isinstance(item, LoadError))
    return replace(batch, load_errors=errors)


@contextmanager
def lost_worker_errors() -> Iterator[None]:
    """Context manager that converts torch's error about a dead loader process into a `UserError`.

    Torch raises its RuntimeError from a signal handler, wherever this process is at that moment, so
    this belongs around everything that is done with what `load_steps` yields.

    Raises:
        UserError: If a worker died.
    """
    try:
        yield
    except RuntimeError as error:  # only the text identifies a dead worker
        if not any(text in str(error) for text in ("DataLoader worker", "Pin memory thread")):
            raise
        raise UserError(
            f"a data loader process died ({' '.join(str(error).split())}), possibly out of memory; "
            "lower data.num_workers, or set it to 0 to load in the training process - the same "
            "command resumes from the newest checkpoint",
            code="loader_died",
        ) from None
