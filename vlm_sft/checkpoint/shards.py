"""Tensors that several processes share, on disk: each writes its own rows, any may read them all.

`NAME.pieces.json` says which rows of which tensor lie in which `NAME.piece-K-of-N.safetensors`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vlm_sft.checkpoint.store import check_tensors, host_copies, save_tensors
from vlm_sft.errors import CheckpointError
from vlm_sft.train.fsdp import is_sharded, own_part, own_rows, process_of, rows_of
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.filesystem import sync
from vlm_sft.utils.reading import read_json


@dataclass(frozen=True)
class Piece:
    """What one process holds of some tensors, copied to host memory.

    Attributes:
        tensors: Its rows of shared tensors; the first process also has those that are not shared.
        index: What `NAME.pieces.json` says, the same in every process.
        process: Its number, from 0.
    """

    tensors: Mapping[str, Tensor]
    index: Mapping[str, Any]
    process: int

    def write(self, path: Path) -> None:
        """Write this process's file, and the index in the first; `path` ends in NAME."""
        file = piece_path(path, self.process, self.index["processes"])
        save_tensors(file, self.tensors)
        with file.open("rb") as written:
            sync(written.fileno(), file)  # by the process that wrote it: shared disks need that
        if self.process == 0:
            write_json(index_path(path), self.index)


def hold(tensors: Mapping[str, Tensor]) -> Piece:
    """Copy this process's part of tensors of which at least one is shared; no communication."""
    process, processes = max((process_of(t) for t in tensors.values()), key=lambda pair: pair[1])
    held = host_copies({name: own_part(tensor) for name, tensor in tensors.items()})
    first: dict[tuple[int, torch.Size], str] = {}
    described: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        original = first.setdefault((id(held[name]), tensor.shape), name)
        if original != name:
            aliases[name] = original
            continue
        shared = is_sharded([tensor])
        described[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "rows": _all_rows(tensor.shape[0], processes) if shared else None,
        }
        if shared or process == 0:
            kept[name] = held[name]
    index = {"processes": processes, "tensors": described, "aliases": aliases}
    return Piece(kept, index, process)


def has_pieces(path: Path) -> bool:
    """Whether tensors lie in pieces under this path and name."""
    return index_path(path).is_file()


def read_pieces(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Copy into live tensors, shared or not, the rows that this process holds of them.

    Whatever the number of processes was that wrote the pieces.

    Raises:
        CheckpointError: A name is missing or too many, or a shape differs; nothing was copied.
    """
    index = _index(path)
    shapes = {
        name: torch.empty(index["tensors"][_origin(index, name)]["shape"], device="meta")
        for name in [*index["tensors"], *index["aliases"]]
    }
    check_tensors(shapes, wanted, path)
    with _Files(path, index["processes"]) as files, torch.no_grad():
        for name, target in wanted.items():
            own_part(target).copy_(files.rows(_origin(index, name), index, own_rows(target)))


def assemble(path: Path) -> dict[str, Tensor]:
    """All tensors whole, in host memory; what is one tensor under two names stays one."""
    index = _index(path)
    with _Files(path, index["processes"]) as files:
        found = {name: files.rows(name, index, None) for name in index["tensors"]}
    return found | {name: found[origin] for name, origin in index["aliases"].items()}


def remove_pieces(path: Path) -> None:
    """Delete the index and every piece."""
    for process in range(_index(path)["processes"]):
        piece_path(path, process, _index(path)["processes"]).unlink()
    index_path(path).unlink()


def index_path(path: Path) -> Path:
    """`NAME.pieces.json`."""
    return path.with_name(f"{path.name}.pieces.json")


def piece_path(path: Path, process: int, processes: int) -> Path:
    """`NAME.piece-K-of-N.safetensors`, K counted from 1."""
    return path.with_name(f"{path.name}.piece-{process + 1:05d}-of-{processes:05d}.safetensors")


class _Files:
    """The open pieces of one index."""

    def __init__(self, path: Path, processes: int) -> None:
        self._paths = [piece_path(path, process, processes) for process in range(processes)]
        self._open: dict[int, Any] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def rows(self, name: str, index: Mapping[str, Any], wanted: tuple[int, int] | None) -> Tensor:
        """Rows `[wanted[0], wanted[1])` of a tensor, or all of it."""
        described = index["tensors"][name]
        if described["rows"] is None:
            found = self._file(0).get_tensor(name)
            return found if wanted is None else found[wanted[0] : wanted[1]]
        start, stop = wanted or (0, described["shape"][0])
        parts = []
        for process, (first, after) in enumerate(described["rows"]):
            low, high = max(start, first), min(stop, after)
            if low < high:
                piece = self._file(process).get_slice(name)
                parts.append(piece[low - first : high - first])
        if parts:
            return torch.cat(parts)
        dtype: torch.dtype = getattr(torch, described["dtype"])
        return torch.empty([0, *described["shape"][1:]], dtype=dtype)

    def _file(self, process: int) -> Any:
        if process not in self._open:
            path = self._paths[process]
            try:
                self._open[process] = safe_open(path, framework="pt")
            except Exception as error:
                raise CheckpointError(
                    f"{path}: cannot be read as safetensors: {error}", code="checkpoint_damaged"
                ) from None
        return self._open[process]


def _index(path: Path) -> dict[str, Any]:
    index: dict[str, Any] = read_json(index_path(path))
    return index


def _origin(index: Mapping[str, Any], name: str) -> str:
    origin: str = index["aliases"].get(name, name)
    return origin


def _all_rows(num_rows: int, processes: int) -> list[list[int]]:
    return [list(rows_of(num_rows, process, processes)) for process in range(processes)]
