"""Checks before and after training: trainable parts, frozen parts, gradients, saving."""

from collections.abc import Mapping, Sequence, Set
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.table import Table

from vlm_sft.checkpoint.folders import (
    begin_temporary,
    copy_checkpoint,
    delete_tree,
    write_checkpoint,
)
from vlm_sft.checkpoint.format import step_name, verify
from vlm_sft.checkpoint.snapshot import Component
from vlm_sft.errors import CheckpointError, UserError
from vlm_sft.model.quantization import dtype_name, num_weights
from vlm_sft.train.optimizer import NamedParameters
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.console import Console
from vlm_sft.utils.dtensor import full_tensor, local_tensor
from vlm_sft.utils.process_group import ProcessGroup

Parts = Mapping[str, NamedParameters]

PART_COLUMNS = ("part", "state", "parameters", "dtype", "peak learning rate")


def parts_rows(parts: Parts, rates: Mapping[str, float]) -> list[dict[str, str]]:
    """Return a row for every part: trainable or frozen, parameters, dtype, peak learning rate.

    Raises:
        UserError: Nothing is trainable.
    """
    if not any(is_trainable(named) for named in parts.values()):
        raise UserError(
            "nothing is trainable: every part of the model is frozen", code="nothing_learns"
        )
    rows = []
    for part, named in parts.items():
        if not named:
            continue
        trainable = is_trainable(named)
        dtypes = sorted({dtype_name(p) for _, p in named})
        values = (
            part,
            "trainable" if trainable else "frozen",
            f"{sum(num_weights(parameter) for _, parameter in named):,}",
            ", ".join(dtypes),
            f"{rates[part]:.2e}" if trainable else "-",
        )
        rows.append(dict(zip(PART_COLUMNS, values, strict=True)))
    return rows


def report_parts(
    parts: Parts, optimizer: torch.optim.Optimizer, accelerator: Accelerator, path: Path
) -> None:
    """Print the table of the model's parts on rank 0, and write it to `path` as JSON.

    Raises:
        UserError: Nothing is trainable.
    """
    rates = {group["part"]: group["peak_lr"] for group in optimizer.param_groups}
    rows = parts_rows(parts, rates)
    if accelerator.is_main_process:
        print_table(parts_table(rows))
        write_json(path, rows)


def parts_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Return the rows of `parts_rows` as a table."""
    table = Table(title="parts of the model")
    for column in PART_COLUMNS:
        table.add_column(column, justify="right" if column == "parameters" else "left")
    for row in rows:
        table.add_row(*row.values())
    return table


def print_table(table: Table) -> None:
    """Print a table to stderr, at least wide enough for all columns."""
    console = Console(stderr=True)
    if console.width < 90:
        console.width = 90
    console.print(table)


def is_trainable(named: NamedParameters) -> bool:
    """Return whether any parameter of a part is trainable."""
    return any(parameter.requires_grad for _, parameter in named)


def require_gradients(parts: Parts, *, without: Set[str] = frozenset()) -> None:
    """Check after the first backward pass that every trainable part has a nonzero gradient.

    Args:
        parts: The model's parameters by part.
        without: Parts that the step has no gradient for: the projector, if no record has an image.

    Raises:
        UserError: A part has none, so it would never be trained.
    """
    for part, named in parts.items():
        if part in without:
            continue
        gradients = [p.grad for _, p in named if p.requires_grad]
        if gradients and not any(g is not None and bool(full_tensor(g).any()) for g in gradients):
            raise UserError(
                f"{part} is trainable but has no gradient after the first step, so it would never "
                "change; its outputs do not reach the loss - check the masks with vlm_sft.show",
                code="nothing_learns",
            )


def dry_run_save(
    output_dir: Path,
    components: Mapping[str, Component],
    tensors: Sequence[tuple[str, torch.Tensor]],
    group: ProcessGroup | None = None,
) -> None:
    """Save a checkpoint, copy it to `final/`, load it, compare bit by bit, and delete both.

    The calls are those of a real save and of the end of a run, so a file system that refuses one of
    them is noticed before the first step.

    Args:
        output_dir: The run directory; everything is written to a temporary directory in it.
        components: The components of a checkpoint.
        tensors: The trainable tensors, which are compared; unchanged afterwards.
        group: The ranks that save together; None: this one.

    Raises:
        CheckpointError: A tensor was loaded with other values, or could not be loaded.
        OSError: The directory cannot be written.
    """
    group = group or ProcessGroup()
    place = group.rank0_then_broadcast(lambda: begin_temporary(output_dir / "rehearsal"))
    folder = place / step_name(0)
    before = [local_tensor(parameter.detach()).clone() for _, parameter in tensors]
    try:
        write_checkpoint(folder, components, {"step": 0, "rehearsal": True}, group)
        group.rank0_then_broadcast(
            lambda: copy_checkpoint(verify(folder), place / "final", components)
        )
        # Zero the live weights, so that the values that are compared come from the disk.
        with torch.no_grad():
            for _, parameter in tensors:
                local_tensor(parameter).zero_()
        group.all_ranks(lambda: _read_and_compare(folder, components, tensors, before))
    finally:
        with torch.no_grad():
            for (_, parameter), values in zip(tensors, before, strict=True):
                local_tensor(parameter).copy_(values)
        group.rank0_then_broadcast(lambda: delete_tree(place))


def _read_and_compare(
    folder: Path,
    components: Mapping[str, Component],
    tensors: Sequence[tuple[str, torch.Tensor]],
    before: Sequence[torch.Tensor],
) -> None:
    for component in components.values():
        if component.load is not None:
            component.load(folder)
    for (name, parameter), values in zip(tensors, before, strict=True):
        if not torch.equal(local_tensor(parameter), values):
            raise CheckpointError(
                f"{folder}: dry run of saving: {name} was not loaded as it was saved; the "
                "checkpoints of this run could not be trusted",
                code="save_changed",
            )


def require_unchanged(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Compare the checksums of the frozen parts at two times.

    Raises:
        UserError: A frozen part was changed.
    """
    for part, digest in before.items():
        if after[part] != digest:
            raise UserError(
                f"{part} is frozen but its weights changed during the run (sha256 {digest[:12]} "
                f"became {after[part][:12]}); the result cannot be trusted",
                code="frozen_part_moved",
            )
