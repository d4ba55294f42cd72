"""The ranks of a run: set them up, and share results and errors between them."""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
)

from vlm_sft.errors import UserError
from vlm_sft.utils.libraries import library_call, one_line
from vlm_sft.utils.process_group import ProcessGroup, Value


def make_accelerator(
    precision: Literal["bf16", "fp16", "fp32"],
    *,
    trackers: list[str] | None = None,
    project_dir: str | None = None,
) -> Accelerator:
    """Create the accelerator: device, precision, and rank and world size from the launcher.

    The world size is 1 without a launcher such as `torchrun` or `accelerate launch`.

    Args:
        precision: Precision of the forward pass.
        trackers: Names of experiment trackers.
        project_dir: Directory that trackers write to.

    Raises:
        UserError: fp16 without a GPU, or bf16 on a GPU that does not support it.
    """
    has_gpu = torch.accelerator.is_available()
    require_precision(precision)
    with library_call("accelerate", "train.precision, train.trackers or the launcher", "start"):
        return Accelerator(
            cpu=not has_gpu,
            mixed_precision="no" if precision == "fp32" else precision,
            # Given explicitly: a value from the environment would divide every gradient.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=project_dir, logging_dir=project_dir),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )


def require_precision(precision: Literal["bf16", "fp16", "fp32"]) -> None:
    """Check that this machine supports a precision.

    Raises:
        UserError: fp16 without a GPU, or bf16 on a GPU that does not support it.
    """
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision: fp16 needs an NVIDIA or AMD GPU; use fp32 or bf16 here")
    if precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UserError("train.precision: this GPU does not support bf16; use fp16 or fp32")


def rank0_only(accelerator: Accelerator, action: Callable[[], Value]) -> Value:
    """Call `action` on rank 0 and return its result, or raise its error, on every rank.

    Only a user error or an OSError is passed on; all ranks must call this.
    """
    if accelerator.num_processes == 1:
        return action()
    ranks = ProcessGroup(accelerator.process_index, lambda value: gather_object([value]))
    return ranks.rank0_then_broadcast(action)


def checkpoint_group(accelerator: Accelerator) -> ProcessGroup:
    """Create a process group of all ranks for saving checkpoints.

    It is a gloo group of its own, so that a thread can save while training runs its collectives:
    two threads must not use one group, whose collectives are matched by order alone.
    """
    group = cast(Any, torch.distributed.new_group(backend="gloo"))

    def all_gather(value: Any) -> list[Any]:
        found: list[Any] = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(found, value, group=group)
        return found

    return ProcessGroup(accelerator.process_index, all_gather)


def raise_on_all_ranks(accelerator: Accelerator, failure: Exception | None) -> None:
    """Raise an error of any rank on all ranks, so that none waits for the others; a collective.

    Args:
        accelerator: The run's ranks.
        failure: The error of this rank, or None.
    """
    found = [failure]
    if accelerator.num_processes > 1:
        if failure is not None and not isinstance(failure, (UserError, OSError)):
            found = [RuntimeError(one_line(failure))]  # another type may not survive pickling
        found = gather_object(found)
    for error in [failure, *found]:
        if error is not None:
            raise error


def all_reduce_sum(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Return the element-wise sum of `values` over all ranks."""
    if accelerator.num_processes == 1:
        return values
    return accelerator.reduce(values, reduction="sum")
