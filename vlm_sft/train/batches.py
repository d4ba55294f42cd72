"""The micro-batches of every step for one process, loaded ahead in an order set by the step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlm_sft.constants import IGNORE_INDEX
from vlm_sft.data.collate import Batch, collate
from vlm_sft.data.dataset import Example
from vlm_sft.errors import UserError


class Examples(Protocol):
    """What the loop needs of a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


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
) -> Iterator[list[Batch]]:
    """Yield the batches of one step after the other, as `steps` lists them.

    Workers read ahead by at most two micro-batches each; neither their number nor their speed
    changes what is yielded.

    Raises:
        RecordError: As the dataset raised it for a record, in a worker or not.
    """
    loader = DataLoader(
        _Micro(examples, pad_token_id),
        batch_size=None,
        sampler=_Flat(steps),
        num_workers=num_workers,
        collate_fn=_same,
        prefetch_factor=2 if num_workers else None,
        generator=torch.Generator(),
    )
    loaded = iter(loader)
    for step in steps:
        yield [_unwrap(item) for item in islice(loaded, len(step))]


class _Flat(Sampler[list[int]]):
    def __init__(self, steps: Sequence[Sequence[Sequence[int]]] | LazySteps) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            for micro_batch in step:
                yield list(micro_batch)


class _Micro(Dataset[Batch | UserError]):
    """A dataset whose items are micro-batches, asked for by lists of record indices."""

    def __init__(self, examples: Examples, pad_token_id: int) -> None:
        self.examples = examples
        self.pad_token_id = pad_token_id

    def __getitem__(self, indices: list[int]) -> Batch | UserError:
        if not indices:
            return empty_batch(self.pad_token_id)
        try:
            return collate([self.examples[index] for index in indices], self.pad_token_id)
        except UserError as error:  # as a value: a worker would add its own traceback to the text
            return error


def _unwrap(item: Batch | UserError) -> Batch:
    if isinstance(item, UserError):
        raise item
    return item


def _same(item: Any) -> Any:
    return item
