"""The optimizer's state as safetensors and JSON, by parameter name."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_sft.checkpoint.shards import has_pieces, hold, read_pieces
from vlm_sft.checkpoint.store import (
    Component,
    check_tensors,
    copy_tensors,
    host_copies,
    load_tensors,
    save_tensors,
)
from vlm_sft.errors import CheckpointError
from vlm_sft.train.adamw_8bit import MAPS, is_eight_bit, make_state
from vlm_sft.train.adamw_bf16 import MOMENTS
from vlm_sft.train.fsdp import is_sharded
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.reading import read_json

TENSORS, VALUES, PIECES = "optimizer.safetensors", "optimizer.json", "optimizer"
ADAMW_KEYS = (*MOMENTS, "step")


def optimizer_component(
    optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler | None" = None
) -> Component:
    """`optimizer.safetensors` and `optimizer.json` of an AdamW made by `build_optimizer`.

    In pieces where processes share it.
    """
    return Component(
        capture=lambda: _capture(optimizer, scaler),
        read=lambda folder: _read(folder, optimizer, scaler),
        tensors=lambda: _tensors(optimizer),
    )


def _tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The live state as `key/name`, and once what all share; empty before the first step."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in _named(optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            is_tensor = isinstance(value, torch.Tensor)
            found[key if key in MAPS else f"{key}/{name}"] = (
                value if is_tensor else torch.tensor(float(value))
            )
    return found


def _capture(
    optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler | None"
) -> Callable[[Path], None]:
    tensors = _tensors(optimizer)
    piece = hold(tensors) if is_sharded(tensors.values()) else None
    held = host_copies(tensors) if piece is None else {}
    groups = [
        {key: copy.copy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    values = {"groups": groups, "grad_scaler": scaler.state_dict() if scaler is not None else None}

    def write(folder: Path) -> None:
        if piece is None:
            save_tensors(folder / TENSORS, held)
        else:
            piece.write(folder / PIECES)
        if piece is None or piece.process == 0:
            write_json(folder / VALUES, values)

    return write


def _read(
    folder: Path, optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler | None"
) -> None:
    values: dict[str, Any] = read_json(folder / VALUES)
    saved = [group["names"] for group in values["groups"]]
    own = [group["names"] for group in optimizer.param_groups]
    if saved != own:
        raise CheckpointError(
            f"{folder / VALUES}: its parameter groups hold {sum(map(len, saved))} tensors in "
            f"{len(saved)} groups, this run's {sum(map(len, own))} in {len(own)}, or under other "
            "names; resume with the configuration it was made with",
            code="tensors_differ",
        )
    if is_eight_bit(optimizer):
        _read_eight_bit(folder / TENSORS, optimizer)
    else:
        _read_adamw(folder, optimizer)
    if scaler is not None and values["grad_scaler"]:
        scaler.load_state_dict(values["grad_scaler"])


def _read_adamw(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    tensors = _read_tensors(folder, _named(optimizer))
    state = optimizer.state_dict()
    state["state"] = {
        index: {key: tensors[f"{key}/{name}"] for key in ADAMW_KEYS}
        for index, name in enumerate(_named(optimizer))
        if tensors
    }
    optimizer.load_state_dict(state)
    for name, parameter in _named(optimizer).items() if tensors else ():
        # torch gives the moments the dtype of their weights, which may be narrower.
        optimizer.state[parameter] |= {key: tensors[f"{key}/{name}"] for key in MOMENTS}


def _read_eight_bit(file: Path, optimizer: torch.optim.Optimizer) -> None:
    """Bytes, scales and step counts as they were; what the bytes mean must be what it was."""
    found = load_tensors(file)
    if not found:
        return
    make_state(optimizer)
    live = _tensors(optimizer)
    check_tensors(found, live, file)
    for key in MAPS:
        if key in live and not torch.equal(found[key], live[key].cpu()):
            raise CheckpointError(
                f"{file}: the numbers that its bytes stand for ({key}) are not those of the "
                "bitsandbytes installed here; install the version it was made with",
                code="tensors_differ",
            )
    for name, target in live.items():
        if found[name].dtype != target.dtype:
            raise CheckpointError(
                f"{file}: tensor {name!r} is {found[name].dtype}, expected {target.dtype}; install "
                "the bitsandbytes it was made with",
                code="tensors_differ",
            )
    copy_tensors(found, live, file)
    for name, parameter in _named(optimizer).items():
        optimizer.state[parameter]["step"] = int(live[f"step/{name}"])


def _read_tensors(folder: Path, named: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """The state as this process holds it, whole or in rows, however it was written."""
    live: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        for key in MOMENTS:
            live[f"{key}/{name}"] = torch.zeros_like(parameter, dtype=dtype)
        live[f"step/{name}"] = torch.zeros(())
    if has_pieces(folder / PIECES):
        read_pieces(folder / PIECES, live)
        return live
    found = load_tensors(folder / TENSORS)
    if not found:
        return {}
    copy_tensors(found, live, folder / TENSORS)
    return live


def _named(optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, in the order of the optimizer's own indices."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
