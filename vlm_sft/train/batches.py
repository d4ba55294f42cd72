"""The micro-batches of every step for one process, loaded ahead in an order set by the step."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlm_sft.constants import IGNORE_INDEX
from vlm_sft.data.collate import Batch, collate
from vlm_sft.data.dataset import Example
from vlm_sft.errors import RecordError, UserError

NOTICE_SECONDS = 5.0
"""How long to wait for the notice of a worker's death after its connection broke."""


class Examples(Protocol):
    """What the loop needs of a dataset."""

    def __len__(self) -> int: ...

    @property
    def record_ids(self) -> Sequence[str]: ...

    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True)
class Fault:
    """A record that could not be loaded while a run went on, and was left out.

    Attributes:
        index: Its place in the dataset.
        reason: The fault's name in `error_codes`, as the ledger has it.
        message: The sentence for people, which names record and file.
    """

    index: int
    reason: str
    message: str


def split(
    indices: Sequence[int], micro_batch_size: int, *, world_size: int, rank: int
) -> list[list[int]]:
    """This process's micro-batches of a step: chunk `j` goes to process `j % world_size`.

    Every process gets the same number of micro-batches; where records run out, the last is empty.
    """
    chunks = [
        list(indices[start : start + micro_batch_size])
        for start in range(0, len(indices), micro_batch_size)
    ]
    rounds = -(-len(chunks) // world_size)
    chunks += [[] for _ in range(rounds * world_size - len(chunks))]
    return chunks[rank::world_size]


def empty_batch(pad_token_id: int) -> Batch:
    """A batch of no record: no target, so its loss and its gradient are exactly zero."""
    ids = torch.full((1, 2), pad_token_id)
    return Batch(
        record_ids=(),
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        labels=torch.full_like(ids, IGNORE_INDEX),
        pixel_values=None,
    )


@dataclass(frozen=True)
class LazySteps:
    """The micro-batches of steps `first` to `last` (exclusive), worked out when asked for."""

    first: int
    last: int
    of_step: Callable[[int], list[list[int]]]

    def __iter__(self) -> Iterator[list[list[int]]]:
        return (self.of_step(step) for step in range(self.first, self.last))


def load_steps(
    examples: Examples,
    steps: Sequence[Sequence[Sequence[int]]] | LazySteps,
    *,
    pad_token_id: int,
    num_workers: int,
    on_fault: Callable[[Fault], None] | None = None,
) -> Iterator[list[Batch]]:
    """Yield the batches of one step after the other, as `steps` lists them.

    Workers read ahead by at most two micro-batches each; neither their number nor their speed
    changes what is yielded.

    Args:
        examples: The dataset.
        steps: For each step its micro-batches, each a list of places in the dataset.
        pad_token_id: Fills up shorter sequences.
        num_workers: Processes that load ahead.
        on_fault: Told of each record that cannot be loaded, before the step without it is yielded;
            None: such a record raises.

    Raises:
        RecordError: As the dataset raised it for a record, in a worker or not.
        RuntimeError: A worker died; see `lost_workers_told`.
    """
    loader = DataLoader(
        _Micro(examples, pad_token_id, lenient=on_fault is not None),
        batch_size=None,
        sampler=_Flat(steps),
        num_workers=num_workers,
        collate_fn=_same,
        prefetch_factor=2 if num_workers else None,
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
    loaded = iter(loader)
    for step in steps:
        yield [_unwrap(item, on_fault) for item in _next_items(loaded, step)]


def _next_items(
    loaded: Iterator["_Item | UserError"], step: Sequence[Sequence[int]]
) -> list["_Item | UserError"]:
    try:
        return list(islice(loaded, len(step)))
    except (ConnectionError, EOFError, FileNotFoundError):
        # The worker may have died while its tensors were fetched: wait for the notice of it.
        time.sleep(NOTICE_SECONDS)
        raise


@contextmanager
def lost_workers_told() -> Iterator[None]:
    """While it holds, a loader process that dies is told in a sentence.

    Torch raises its RuntimeError from a signal's handler, wherever this process is just then, so
    this belongs around all that is done with what `load_steps` yields.

    Raises:
        UserError: A worker died.
    """
    try:
        yield
    except RuntimeError as error:  # torch tells of a dead worker by its text alone
        if not any(text in str(error) for text in ("DataLoader worker", "Pin memory thread")):
            raise
        raise UserError(
            f"a loader process died while it read ahead ({' '.join(str(error).split())}); memory "
            "may have run out: set data.num_workers lower, or 0 to load in the training process - "
            "the same command goes on from the newest checkpoint",
            code="loader_died",
        ) from None


class _Flat(Sampler[list[int]]):
    def __init__(self, steps: Sequence[Sequence[Sequence[int]]] | LazySteps) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for micro_batch in step:
                yield list(micro_batch)


@dataclass(frozen=True)
class _Item:
    """A micro-batch of what could be loaded, and the rest."""

    batch: Batch
    faults: tuple[Fault, ...] = ()

    def pin_memory(self) -> "_Item":
        """With its batch in page-locked memory (DataLoader calls this where CUDA is)."""
        return replace(self, batch=self.batch.pin_memory())


class _Micro(Dataset[_Item | UserError]):
    """A dataset whose items are micro-batches, asked for by lists of record indices."""

    def __init__(self, examples: Examples, pad_token_id: int, *, lenient: bool) -> None:
        self.examples = examples
        self.pad_token_id = pad_token_id
        self.lenient = lenient

    def __getitem__(self, indices: list[int]) -> _Item | UserError:
        loaded: list[Example] = []
        faults: list[Fault] = []
        try:
            for index in indices:
                try:
                    loaded.append(self.examples[index])
                except RecordError as error:
                    if not self.lenient:
                        raise
                    faults.append(Fault(index, error.reason, str(error)))
        except UserError as error:  # as a value: a worker would add its own traceback to the text
            return error
        pad = self.pad_token_id
        return _Item(collate(loaded, pad) if loaded else empty_batch(pad), tuple(faults))


def _unwrap(item: _Item | UserError, on_fault: Callable[[Fault], None] | None) -> Batch:
    if isinstance(item, UserError):
        raise item
    for fault in item.faults:
        assert on_fault is not None
        on_fault(fault)
    return item.batch


def _same(item: Any) -> Any:
    return item
