"""The optimiser's state as safetensors and JSON, by parameter name."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlm_sft.atomic import write_json
from vlm_sft.errors import CheckpointError
from vlm_sft.train.checkpoint import (
    Component,
    check_tensors,
    host_copies,
    load_tensors,
    save_tensors,
)

TENSORS, VALUES = "optimizer.safetensors", "optimizer.json"
STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")


def optimizer_component(
    optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler | None" = None
) -> Component:
    """`optimizer.safetensors` and `optimizer.json` of an AdamW made by `build_optimizer`."""
    return Component(
        capture=lambda: _capture(optimizer, scaler),
        read=lambda folder: _read(folder, optimizer, scaler),
    )


def _capture(
    optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler | None"
) -> Callable[[Path], None]:
    tensors = host_copies(
        {
            f"{key}/{name}": optimizer.state[parameter][key]
            for name, parameter in _named(optimizer).items()
            if parameter in optimizer.state
            for key in STATE_KEYS
        }
    )
    groups = [
        {key: copy.copy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    values = {"groups": groups, "grad_scaler": scaler.state_dict() if scaler is not None else None}

    def write(folder: Path) -> None:
        save_tensors(folder / TENSORS, tensors)
        write_json(folder / VALUES, values)

    return write


def _read(
    folder: Path, optimizer: torch.optim.Optimizer, scaler: "torch.amp.GradScaler | None"
) -> None:
    values: dict[str, Any] = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    saved = [group["names"] for group in values["groups"]]
    own = [group["names"] for group in optimizer.param_groups]
    if saved != own:
        raise CheckpointError(
            f"{folder / VALUES}: its parameter groups hold {sum(map(len, saved))} tensors in "
            f"{len(saved)} groups, this run's {sum(map(len, own))} in {len(own)}, or under other "
            "names; resume with the configuration it was made with"
        )
    tensors = load_tensors(folder / TENSORS)
    named = _named(optimizer)
    if tensors:
        wanted: dict[str, torch.Tensor] = {}
        for name, parameter in named.items():
            wanted |= {f"exp_avg/{name}": parameter, f"exp_avg_sq/{name}": parameter}
            wanted[f"step/{name}"] = torch.zeros(())
        check_tensors(tensors, wanted, folder / TENSORS)
    state = optimizer.state_dict()
    state["state"] = {
        index: {key: tensors[f"{key}/{name}"] for key in STATE_KEYS}
        for index, name in enumerate(named)
        if tensors
    }
    optimizer.load_state_dict(state)
    if scaler is not None and values["grad_scaler"]:
        scaler.load_state_dict(values["grad_scaler"])


def _named(optimizer: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, in the order of the optimiser's own indices."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
