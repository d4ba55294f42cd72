"""Sharded tensors on disk: each rank writes its own rows, and any number of ranks can read them.

`NAME.pieces.json` records which rows of a tensor are in which `NAME.piece-K-of-N.safetensors`. Its
keys are `processes` (N), `tensors` (for each name the dtype, the shape, and the rows of each rank,
null for a tensor that rank 0 holds whole), and `aliases` (the stored name of each tied tensor).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vlm_sft.checkpoint.snapshot import host_copies
from vlm_sft.checkpoint.tensor_files import check_tensors, save_tensors
from vlm_sft.errors import CheckpointError
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.dtensor import (
    is_sharded,
    local_rows,
    local_tensor,
    rank_and_world_size,
    rows_of_rank,
)
from vlm_sft.utils.filesystem import sync
from vlm_sft.utils.reading import read_json


@dataclass(frozen=True)
class Shard:
    """One rank's rows of some tensors, copied to host memory.

    Attributes:
        tensors: This rank's rows of the sharded tensors; on rank 0 also the tensors that are not
            sharded.
        index: The content of `NAME.pieces.json`, the same on every rank.
        rank: The rank.
    """

    tensors: Mapping[str, Tensor]
    index: Mapping[str, Any]
    rank: int

    def write(self, path: Path) -> None:
        """Write this rank's file, and on rank 0 the index; `path` ends in NAME."""
        file = shard_path(path, self.rank, self.index["processes"])
        save_tensors(file, self.tensors)
        # Synced by the rank that wrote it: on a network file system, rank 0 cannot flush what is
        # still in the cache of another machine.
        with file.open("rb") as written:
            sync(written.fileno(), file)
        if self.rank == 0:
            write_json(index_path(path), self.index)


def snapshot_shard(tensors: Mapping[str, Tensor]) -> Shard:
    """Copy this rank's rows of tensors of which at least one is sharded, without communication."""
    rank, world_size = max(map(rank_and_world_size, tensors.values()), key=lambda pair: pair[1])
    copies = host_copies({name: local_tensor(tensor) for name, tensor in tensors.items()})
    stored: dict[tuple[int, torch.Size], str] = {}
    described: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    saved: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # `host_copies` gives tied tensors one copy; safetensors refuses to store it twice.
        original = stored.setdefault((id(copies[name]), tensor.shape), name)
        if original != name:
            aliases[name] = original
            continue
        sharded = is_sharded([tensor])
        described[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "rows": _all_rows(tensor.shape[0], world_size) if sharded else None,
        }
        if sharded or rank == 0:
            saved[name] = copies[name]
    index = {"processes": world_size, "tensors": described, "aliases": aliases}
    return Shard(saved, index, rank)


def has_shards(path: Path) -> bool:
    """Return whether there are shards under this path and name."""
    return index_path(path).is_file()


def load_shards(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Copy into live tensors, sharded or not, the rows of them that this rank holds.

    The number of ranks that wrote the shards does not matter.

    Raises:
        CheckpointError: A name is missing or unexpected, or a shape differs; nothing was copied.
    """
    index = _read_index(path)
    shapes = {
        name: torch.empty(index["tensors"][_stored_name(index, name)]["shape"], device="meta")
        for name in [*index["tensors"], *index["aliases"]]
    }
    check_tensors(shapes, wanted, path)
    with _ShardFiles(path, index) as files, torch.no_grad():
        for name, target in wanted.items():
            rows = files.rows(_stored_name(index, name), local_rows(target))
            local_tensor(target).copy_(rows)


def consolidate_shards(path: Path) -> dict[str, Tensor]:
    """Read all tensors whole into host memory; tied tensors stay tied."""
    index = _read_index(path)
    with _ShardFiles(path, index) as files:
        found = {name: files.rows(name, None) for name in index["tensors"]}
    return found | {name: found[stored] for name, stored in index["aliases"].items()}


def delete_shards(path: Path) -> None:
    """Delete the index and every shard."""
    world_size = _read_index(path)["processes"]
    for rank in range(world_size):
        shard_path(path, rank, world_size).unlink()
    index_path(path).unlink()


def index_path(path: Path) -> Path:
    """Return `NAME.pieces.json`."""
    return path.with_name(f"{path.name}.pieces.json")


def shard_path(path: Path, rank: int, world_size: int) -> Path:
    """Return `NAME.piece-K-of-N.safetensors`; K is the rank plus 1."""
    return path.with_name(f"{path.name}.piece-{rank + 1:05d}-of-{world_size:05d}.safetensors")


class _ShardFiles:
    """The shards of one index, each opened when it is first needed."""

    def __init__(self, path: Path, index: Mapping[str, Any]) -> None:
        self._index = index
        world_size = index["processes"]
        self._paths = [shard_path(path, rank, world_size) for rank in range(world_size)]
        self._open: dict[int, Any] = {}

    def __enter__(self) -> "_ShardFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def rows(self, name: str, wanted: tuple[int, int] | None) -> Tensor:
        """Read rows `[wanted[0], wanted[1])` of a tensor, or all of them."""
        described = self._index["tensors"][name]
        if described["rows"] is None:
            found: Tensor = self._file(0).get_tensor(name)
            return found if wanted is None else found[wanted[0] : wanted[1]]
        start, stop = wanted or (0, described["shape"][0])
        parts = []
        # Rows of this rank now can be spread over several shards of another world size.
        for rank, (first, end) in enumerate(described["rows"]):
            low, high = max(start, first), min(stop, end)
            if low < high:
                shard = self._file(rank).get_slice(name)
                parts.append(shard[low - first : high - first])
        if parts:
            return torch.cat(parts)
        # A tensor with fewer rows than ranks leaves some ranks none.
        dtype: torch.dtype = getattr(torch, described["dtype"])
        return torch.empty([0, *described["shape"][1:]], dtype=dtype)

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            path = self._paths[rank]
            try:
                self._open[rank] = safe_open(path, framework="pt")
            except Exception as error:
                raise CheckpointError(
                    f"{path}: cannot be read as safetensors: {error}", code="checkpoint_damaged"
                ) from None
        return self._open[rank]


def _read_index(path: Path) -> dict[str, Any]:
    index: dict[str, Any] = read_json(index_path(path))
    return index


def _stored_name(index: Mapping[str, Any], name: str) -> str:
    """Return the name under which a tensor is stored, which differs for tied tensors."""
    stored: str = index["aliases"].get(name, name)
    return stored


def _all_rows(num_rows: int, world_size: int) -> list[list[int]]:
    return [list(rows_of_rank(num_rows, rank, world_size)) for rank in range(world_size)]
