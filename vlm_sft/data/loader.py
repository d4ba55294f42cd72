"""The micro-batches of every step for one process, loaded ahead in an order set by the step."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlm_sft.data.batch import Batch, collate
from vlm_sft.data.dataset import Example
from vlm_sft.data.packing import (
    Group,
    PackedBatch,
    Sizes,
    groups_of,
    make_units,
    pack,
    plan_packs,
)
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.constants import IGNORE_INDEX

NOTICE_SECONDS = 5.0
"""How long to wait for the notice of a worker's death after its connection broke."""


class Examples(Protocol):
    """What the loop needs of a dataset."""

    def __len__(self) -> int: ...

    @property
    def record_ids(self) -> Sequence[str]: ...

    def __getitem__(self, index: int, /) -> Example: ...


class PackableExamples(Examples, Sizes, Protocol):
    """What packing needs of a dataset besides."""

    def example(self, index: int, *, first_image: int = 0) -> Example: ...


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


class Batching(Protocol):
    """How records become micro-batches: padded or packed."""

    def share_out(
        self, records: Any, indices: Sequence[int], num_processes: int
    ) -> list[list[int]]:
        """The micro-batches of some records, a multiple of `num_processes`; see `split`."""
        ...

    def num_positions(self, records: Any, indices: Sequence[int]) -> int:
        """Positions that a micro-batch takes through the model, what fills up included."""
        ...

    def load(self, examples: Any, indices: Sequence[int], faults: "Faults") -> "AnyBatch":
        """One micro-batch; what cannot be loaded is noted in `faults`."""
        ...


@dataclass
class Faults:
    """What could not be loaded of a micro-batch.

    Attributes:
        lenient: Go on without such records; else the first raises.
        met: They.
    """

    lenient: bool
    met: list[Fault] = field(default_factory=list)

    def note(self, index: int, error: RecordError) -> None:
        """Keep an error, or raise it."""
        if not self.lenient:
            raise error
        self.met.append(Fault(index, error.reason, str(error)))


def split(
    batching: Batching, records: Any, indices: Sequence[int], *, world_size: int, rank: int
) -> list[list[int]]:
    """This process's micro-batches of a step: number `j` goes to process `j % world_size`.

    Every process gets the same number of micro-batches; where records run out, they are empty.
    """
    return batching.share_out(records, indices, world_size)[rank::world_size]


@dataclass(frozen=True)
class Padded:
    """So many records at once, padded to the longest."""

    micro_batch_size: int
    pad_token_id: int

    def share_out(
        self, records: Any, indices: Sequence[int], num_processes: int
    ) -> list[list[int]]:
        """Chunks of records as they come; where they run out, empty ones."""
        size = self.micro_batch_size
        chunks = [list(indices[start : start + size]) for start in range(0, len(indices), size)]
        return chunks + [[] for _ in range(-len(chunks) % num_processes)]

    def num_positions(self, records: Sizes, indices: Sequence[int]) -> int:
        """Every record is as long as the longest."""
        return len(indices) * max((records.lengths[index] for index in indices), default=0)

    def load(self, examples: "Examples", indices: Sequence[int], faults: Faults) -> Batch:
        """The records that can be loaded, padded on the right."""
        loaded: list[Example] = []
        for index in indices:
            try:
                loaded.append(examples[index])
            except RecordError as error:
                faults.note(index, error)
        return collate(loaded, self.pad_token_id) if loaded else empty_batch(self.pad_token_id)


@dataclass(frozen=True)
class Packed:
    """Records laid end to end in rows of at most `max_tokens`; see `plan_packs`."""

    max_tokens: int
    share_prefixes: bool
    round_to: int
    image_cost: float
    pad_token_id: int

    def share_out(
        self, records: Sizes, indices: Sequence[int], num_processes: int
    ) -> list[list[int]]:
        """Packs about equally heavy; where records run out, empty ones."""
        return plan_packs(
            indices,
            records,
            max_tokens=self.max_tokens,
            share_prefixes=self.share_prefixes,
            num_processes=num_processes,
            image_cost=self.image_cost,
        )

    def num_positions(self, records: Sizes, indices: Sequence[int]) -> int:
        """The records end to end, shared prefixes once, filled up."""
        share = self.share_prefixes
        units = make_units(indices, records, self.max_tokens, share_prefixes=share)
        tokens = sum(unit.tokens for unit in units)
        return tokens + -tokens % self.round_to

    def load(
        self, examples: "PackableExamples", indices: Sequence[int], faults: Faults
    ) -> "AnyBatch":
        """The records that can be loaded in one row; a shared image is opened once."""
        alone = ([index] for index in indices)
        together = groups_of(indices, examples.prefix_keys) if self.share_prefixes else alone
        groups = []
        for members in together:
            loaded: list[Example] = []
            for index in members:
                try:
                    loaded.append(examples.example(index, first_image=1 if loaded else 0))
                except RecordError as error:
                    faults.note(index, error)
            if loaded:
                shared = examples.prefix_lengths[members[0]] if len(loaded) > 1 else 0
                groups.append(Group(loaded, shared))
        if not groups:
            return empty_batch(self.pad_token_id)
        return pack(groups, self.pad_token_id, self.round_to)


AnyBatch = Batch | PackedBatch


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
    batching: Batching,
    num_workers: int,
    on_fault: Callable[[Fault], None] | None = None,
) -> Iterator[list[AnyBatch]]:
    """Yield the batches of one step after the other, as `steps` lists them.

    Workers read ahead by at most two micro-batches each; neither their number nor their speed
    changes what is yielded.

    Args:
        examples: The dataset.
        steps: For each step its micro-batches, each a list of places in the dataset.
        batching: Makes a micro-batch of records.
        num_workers: Processes that load ahead.
        on_fault: Told of each record that cannot be loaded, before the step without it is yielded;
            None: such a record raises.

    Raises:
        RecordError: As the dataset raised it for a record, in a worker or not.
        RuntimeError: A worker died; see `lost_workers_told`.
    """
    loader = DataLoader(
        _Micro(examples, batching, lenient=on_fault is not None),
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

    batch: AnyBatch
    faults: tuple[Fault, ...] = ()

    def pin_memory(self) -> "_Item":
        """With its batch in page-locked memory (DataLoader calls this where CUDA is)."""
        return replace(self, batch=self.batch.pin_memory())


class _Micro(Dataset[_Item | UserError]):
    """A dataset whose items are micro-batches, asked for by lists of record indices."""

    def __init__(self, examples: Examples, batching: Batching, *, lenient: bool) -> None:
        self.examples = examples
        self.batching = batching
        self.lenient = lenient

    def __getitem__(self, indices: list[int]) -> _Item | UserError:
        faults = Faults(self.lenient)
        try:
            batch = self.batching.load(self.examples, indices, faults)
        except UserError as error:  # as a value: a worker would add its own traceback to the text
            return error
        return _Item(batch, tuple(faults.met))


def _unwrap(item: _Item | UserError, on_fault: Callable[[Fault], None] | None) -> AnyBatch:
    if isinstance(item, UserError):
        raise item
    for fault in item.faults:
        assert on_fault is not None
        on_fault(fault)
    return item.batch


def _same(item: Any) -> Any:
    return item
