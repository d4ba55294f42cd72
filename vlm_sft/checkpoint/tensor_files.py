"""Write and read safetensors files, and copy their tensors strictly into live ones."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save_file

from vlm_sft.errors import CheckpointError
from vlm_sft.utils.dtensor import copy_into
from vlm_sft.utils.filesystem import naming


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors of any device as safetensors, sorted by name; the file is not synced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with naming(path):
        save_file(on_cpu, str(path))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        CheckpointError: The file is missing or not valid safetensors.
    """
    try:
        return load_file(str(path))
    except Exception:
        pass  # `load_file` maps the file into memory, which some network file systems refuse
    try:
        return load(path.read_bytes())
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors: {error}", code="checkpoint_damaged"
        ) from None


def copy_tensors(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str | Path
) -> None:
    """Copy the tensors of a file into the live ones of the same names, which may be sharded.

    Args:
        found: The tensors of the file.
        wanted: The live tensors.
        where: The file, for the message.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape; nothing was copied.
    """
    check_tensors(found, wanted, where)
    for name, target in wanted.items():
        copy_into(target, found[name])


def check_tensors(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str | Path
) -> None:
    """Compare the names and shapes of a file's tensors with those of the live ones.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape; the message names it.
    """
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(
            f"{where}: tensor {missing[0]!r} is missing ({len(missing)} of {len(wanted)} are); it "
            "was made for another model",
            code="tensors_differ",
        )
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(
            f"{where}: tensor {extra[0]!r} is not in this model ({len(extra)} such); it was made "
            "for another model",
            code="tensors_differ",
        )
    for name, target in wanted.items():
        if found[name].shape != target.shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} is {_shape(found[name])}, but this model's is "
                f"{_shape(target)}; use the tower, projector_type and language model that it was "
                "trained with",
                code="shapes_differ",
            )


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
