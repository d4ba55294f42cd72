"""Read and write tensors that may be sharded over ranks by FSDP2 (`DTensor`, split along dim 0)."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    """Return whether any of the tensors is sharded over ranks."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, sharing memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from all ranks (a collective); return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rank_and_world_size(tensor: Tensor) -> tuple[int, int]:
    """Return this process's rank in the tensor's device mesh and the mesh's size.

    (0, 1) for a tensor that is not sharded.
    """
    if not isinstance(tensor, DTensor):
        return 0, 1
    return tensor.device_mesh.get_local_rank(), tensor.device_mesh.size()


def rows_of_rank(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the first row and the end (exclusive) of the rows that FSDP2 assigns to a rank.

    FSDP2 splits as `torch.chunk` does: equal chunks of `ceil(num_rows / world_size)`, so that the
    last ranks can have fewer rows or none.
    """
    chunk = math.ceil(num_rows / world_size)
    return min(rank * chunk, num_rows), min((rank + 1) * chunk, num_rows)


def local_rows(tensor: Tensor) -> tuple[int, int] | None:
    """Return the rows that this rank holds (see `rows_of_rank`); None if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return None
    return rows_of_rank(tensor.shape[0], *rank_and_world_size(tensor))


@torch.no_grad()
def copy_into(target: Tensor, values: Tensor) -> None:
    """Copy a full tensor into a live one of the same shape, which may be sharded."""
    rows = local_rows(target)
    local_tensor(target).copy_(values if rows is None else values[rows[0] : rows[1]])
