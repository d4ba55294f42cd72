"""Count the bytes of live tensors, real or fake."""

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LimitExceeded(Exception):
    """More bytes are alive than the limit of `LiveBytes`."""


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of all storages that operators create.

    Like `torch.cuda.max_memory_allocated`, but without internal workspaces of operators and without
    rounding to the allocator's blocks. Views and outputs written in place are not new storages.

    Args:
        known: Existing tensors that do not count: weights, gradients, inputs.
        limit: Bytes alive at which to raise; None: no limit.

    Attributes:
        now: Bytes alive.
        peak: Most bytes alive at once since the last `restart`.

    Raises:
        LimitExceeded: Inside the operator that exceeds `limit`. Without it, a CPU process that
            runs out of memory is killed.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), *, limit: int | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._limit = limit
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def restart(self) -> None:
        """Start to measure the peak again."""
        self.peak = self.now

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator, then count the new storages of its results."""
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages(args)}
        for storage in _storages(result):
            if storage not in self._seen and storage._cdata not in given:
                self._count(storage)
        if self._limit is not None and self.now > self._limit:
            raise LimitExceeded
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
