"""One component of a checkpoint: snapshot it to host memory, write the snapshot, load it back.

Snapshot and write are separate steps, so that training can continue while a thread writes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm_sft.errors import CheckpointError
from vlm_sft.utils.dtensor import full_tensor, is_sharded, local_tensor, rank_and_world_size
from vlm_sft.utils.process_group import ProcessGroup

Writer = Callable[[Path], None]
"""Writes a snapshot into a folder."""


@dataclass(frozen=True)
class Component:
    """One component of a checkpoint, such as the projector or the optimizer.

    Compared with torch's `Stateful`, a component also knows its files.

    Attributes:
        snapshot: Copies the current state to host memory and returns the function that writes this
            copy into a folder.
        load: Reads the files into the live objects and checks every name and shape. None if the
            component is only written (configuration, tokenizer).
        tensors: Returns the live tensors that the component saves, under the names in its files.
            If any is sharded, all ranks snapshot and write the component, otherwise rank 0 alone.
        consolidate: Replaces the shards of several ranks by ordinary files, in the folder that
            becomes `final/`. Returns whether there were any shards.
    """

    snapshot: Callable[[], Writer]
    load: Callable[[Path], None] | None = None
    tensors: Callable[[], Mapping[str, torch.Tensor]] = dict
    consolidate: Callable[[Path], bool] = lambda folder: False


def plain_component(write: Writer) -> Component:
    """Return a component that does not change during a run and is only written."""
    return Component(lambda: write)


def tensor_component(
    tensors: Callable[[], Mapping[str, torch.Tensor]],
    write: Callable[[Path, Mapping[str, torch.Tensor]], None],
    load: Callable[[Path], None],
) -> Component:
    """Return a component of live tensors whose sharded ones are gathered and written by rank 0.

    Args:
        tensors: Returns the live tensors.
        write: Writes full copies of them in host memory into a folder.
        load: Reads the files into the live tensors.
    """

    def snapshot() -> Writer:
        live = tensors()
        copies = host_copies(live)
        if any(rank_and_world_size(tensor)[0] > 0 for tensor in live.values()):
            return lambda folder: None
        return lambda folder: write(folder, copies)

    return Component(snapshot, load, tensors)


def host_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy full tensors to host memory. Sharded ones are gathered: all ranks must call this.

    Names of one tensor (tied weights) get one copy, so that safetensors and transformers still see
    that the weights are tied.
    """
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    named = {}
    for name, tensor in tensors.items():
        # The shape is part of the key because a tensor and a view of its start share an address.
        key = (local_tensor(tensor).data_ptr(), tensor.shape)
        if key not in copies:
            # copy=True: on a CPU `.to("cpu")` would return the live tensor itself.
            copies[key] = full_tensor(tensor.detach()).to("cpu", copy=True).contiguous()
        named[name] = copies[key]
    return named


def snapshot_components(components: Mapping[str, Component], group: ProcessGroup) -> list[Writer]:
    """Snapshot all components and return the functions that write this rank's share of them."""
    return [
        component.snapshot()
        for component in components.values()
        if group.rank == 0 or is_sharded(component.tensors().values())
    ]


def require_all_saved(
    trainable: Mapping[str, torch.Tensor], components: Mapping[str, Component]
) -> None:
    """Check that every trainable tensor is saved by some component.

    Raises:
        CheckpointError: With the name of the first tensor that is not.
    """
    saved = {local_tensor(t).data_ptr() for c in components.values() for t in c.tensors().values()}
    missing = [name for name, t in trainable.items() if local_tensor(t).data_ptr() not in saved]
    if missing:
        raise CheckpointError(
            f"{missing[0]} is trainable but no part of a checkpoint saves it ({len(missing)} of "
            f"{len(trainable)} such); nothing was written - this is a bug, please report it",
            code="save_incomplete",
        )
