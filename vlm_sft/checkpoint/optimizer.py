"""Save and load the state of AdamW as safetensors and JSON, by parameter name."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from vlm_sft.checkpoint.shards import has_shards, load_shards, snapshot_shard
from vlm_sft.checkpoint.snapshot import Component, host_copies
from vlm_sft.checkpoint.tensor_files import (
    check_tensors,
    copy_tensors,
    load_tensors,
    save_tensors,
)
from vlm_sft.errors import CheckpointError
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.dtensor import is_sharded
from vlm_sft.utils.reading import read_json

TENSORS: Final = "optimizer.safetensors"
VALUES: Final = "optimizer.json"
SHARDS: Final = "optimizer"
"""NAME of the shards; see `vlm_sft.checkpoint.shards`."""

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's two moments in torch's state of a parameter."""

CODEBOOKS: Final = ("qmap1", "qmap2")
"""Keys of bitsandbytes' quantization codebooks of the two moments, shared by all tensors."""


def optimizer_component(
    optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler | None" = None
) -> Component:
    """Return the component of an AdamW whose parameter groups carry `names`.

    It writes `optimizer.safetensors` (or shards, where the parameters are sharded) and
    `optimizer.json`.

    Args:
        optimizer: As `vlm_sft.train.optimizer.build_optimizer` makes it.
        scaler: The gradient scaler of an fp16 run.
    """
    return Component(
        snapshot=lambda: _snapshot(optimizer, scaler),
        load=lambda folder: _load(folder, optimizer, scaler),
        tensors=lambda: _state_tensors(optimizer),
    )


def is_eight_bit(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer is the 8-bit AdamW of bitsandbytes."""
    return type(optimizer).__module__.startswith("bitsandbytes")


def _state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the live state as `key/name`, and the codebooks once; empty before the first step."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in _named_parameters(optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            is_tensor = isinstance(value, torch.Tensor)
            found[key if key in CODEBOOKS else f"{key}/{name}"] = (
                value if is_tensor else torch.tensor(float(value))
            )
    return found


def _snapshot(
    optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler | None"
) -> Callable[[Path], None]:
    tensors = _state_tensors(optimizer)
    shard = snapshot_shard(tensors) if is_sharded(tensors.values()) else None
    copies = host_copies(tensors) if shard is None else {}
    groups = [
        {key: copy.copy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    values = {"groups": groups, "grad_scaler": scaler.state_dict() if scaler is not None else None}

    def write(folder: Path) -> None:
        if shard is None:
            save_tensors(folder / TENSORS, copies)
        else:
            shard.write(folder / SHARDS)
        if shard is None or shard.rank == 0:
            write_json(folder / VALUES, values)

    return write


def _load(
    folder: Path, optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler | None"
) -> None:
    # Of the saved groups only the names count: rates and decay come from the configuration, which
    # may have changed with --allow-change.
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
        _load_eight_bit(folder / TENSORS, optimizer)
    else:
        _load_adamw(folder, optimizer)
    if scaler is not None and values["grad_scaler"]:
        scaler.load_state_dict(values["grad_scaler"])


def _load_adamw(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    named = _named_parameters(optimizer)
    tensors = _load_state(folder, named)
    state = optimizer.state_dict()
    state["state"] = {
        index: {key: tensors[f"{key}/{name}"] for key in (*MOMENTS, "step")}
        for index, name in enumerate(named)
        if tensors
    }
    optimizer.load_state_dict(state)
    for name, parameter in named.items() if tensors else ():
        # `load_state_dict` casts the moments to the dtype of their weights, which may be narrower.
        optimizer.state[parameter] |= {key: tensors[f"{key}/{name}"] for key in MOMENTS}


def _load_eight_bit(file: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the quantized moments, their scales and the step counts.

    The moments mean something only with the codebooks that they were quantized with, so those of
    the installed bitsandbytes must be the same.
    """
    found = load_tensors(file)
    if not found:
        return
    _initialize_state(optimizer)
    live = _state_tensors(optimizer)
    check_tensors(found, live, file)
    for key in CODEBOOKS:
        if key in live and not torch.equal(found[key], live[key].cpu()):
            raise CheckpointError(
                f"{file}: its quantization codebook ({key}) is not that of the bitsandbytes "
                "installed here; install the version it was made with",
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
    for name, parameter in _named_parameters(optimizer).items():
        optimizer.state[parameter]["step"] = int(live[f"step/{name}"])


def _initialize_state(optimizer: Any) -> None:
    """Give every parameter the state that bitsandbytes creates at its first step."""
    for group_index, group in enumerate(optimizer.param_groups):
        for parameter_index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, group_index, parameter_index)


def _load_state(folder: Path, named: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Read the state as this rank holds it, whether or not it was written in shards."""
    live: dict[str, torch.Tensor] = {}
    for name, parameter in named.items():
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        for key in MOMENTS:
            live[f"{key}/{name}"] = torch.zeros_like(parameter, dtype=dtype)
        live[f"step/{name}"] = torch.zeros(())
    if has_shards(folder / SHARDS):
        load_shards(folder / SHARDS, live)
        return live
    found = load_tensors(folder / TENSORS)
    if not found:
        return {}
    copy_tensors(found, live, folder / TENSORS)
    return live


def _named_parameters(optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """Return the parameters by name, in the order of the optimizer's own indices."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
