"""How many bytes of tensors are alive at a time, for real tensors and for fake ones alike."""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoRoom(Exception):
    """More bytes are alive than `LiveBytes` was given."""


class LiveBytes(TorchDispatchMode):
    """While active, follows every storage from its making to its end.

    Counts what operators hand out, as `torch.cuda.max_memory_allocated` would, without their
    internal workspaces and the rounding to the allocator's blocks. What an operator is given and
    hands on, as a view or written in place, is not new.

    Args:
        known: Tensors that were there before and do not count: weights, gradients, inputs.
        limit: Bytes alive at which to give up; None: never.

    Attributes:
        now: Bytes alive.
        peak: Most bytes alive at once since the last `restart`.

    Raises:
        NoRoom: From within the operator that takes them beyond `limit`; a CPU has no error of its
            own for that, its process is killed.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), *, limit: int | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._limit = limit
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def restart(self) -> None:
        """Count the peak from here on."""
        self.peak = self.now

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator, then count what is new in its results."""
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages(args)}
        for storage in _storages(result):
            if storage not in self._seen and storage._cdata not in given:
                self._count(storage)
        if self._limit is not None and self.now > self._limit:
            raise NoRoom
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._seen.add(storage)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor):
            yield value.untyped_storage()
