"""`train.activation_checkpointing: auto`: the fastest policy whose measured step fits in memory."""

import gc
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from accelerate import Accelerator
from torch import nn

from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import UserError
from vlm_sft.model.activation_checkpointing import (
    POLICIES,
    CheckpointPolicy,
    set_activation_checkpointing,
)
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.compile import eager
from vlm_sft.train.distributed import rank0_only, total
from vlm_sft.train.live_bytes import LiveBytes, NoRoom
from vlm_sft.train.optimizer import optimizer_state_bytes
from vlm_sft.train.step_loader import StepLoader
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.dtensor import is_sharded
from vlm_sft.utils.filesystem import warn_once
from vlm_sft.utils.libraries import one_line
from vlm_sft.utils.reading import read_json

logger = logging.getLogger(__name__)

FILE: Final = "activation_checkpointing.json"

MARGIN: Final = 0.1
"""Share of the memory that a step must leave free: for what the measured step did not show, such
as fragments between tensors, and the answers generated at evaluations."""


@dataclass(frozen=True)
class Trial:
    """A step that was measured.

    Attributes:
        policy: What its backward pass computed again.
        peak_bytes: Memory that the step takes beside what was there before it, and the optimizer's
            state where there is none yet; None where memory ran out before the step was done.
        room_bytes: What may be taken: free memory less `MARGIN`, in the process with the least.
    """

    policy: CheckpointPolicy
    peak_bytes: int | None
    room_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the step was done within the room."""
        return self.peak_bytes is not None and self.peak_bytes <= self.room_bytes

    def __str__(self) -> str:
        took = "ran out" if self.peak_bytes is None else f"took {_gib(self.peak_bytes)}"
        return f"{self.policy} {took} of {_gib(self.room_bytes)}"


@dataclass(frozen=True)
class Choice:
    """What was settled for a run, as `activation_checkpointing.json` keeps it.

    Attributes:
        policy: The one taken.
        trials: What was measured for it, in order.
        basis: What the measurement rests on; another device or batch asks for another one.
    """

    policy: CheckpointPolicy
    trials: tuple[Trial, ...]
    basis: Mapping[str, Any]

    def changed(self, basis: Mapping[str, Any]) -> str:
        """Return why the memory is measured again."""
        new = [key for key in basis if basis[key] != self.basis.get(key)]
        differing = ", ".join(f"{key} was {self.basis.get(key)}, is {basis[key]}" for key in new)
        return f"measured again because {differing}"

    def __str__(self) -> str:
        figures = "; ".join(str(trial) for trial in self.trials)
        text = (
            f"activation checkpointing: {self.policy} (a step of {self.basis['batch']}: {figures})"
        )
        if not self.trials[-1].fits:
            text += (
                "; even that may run out, so lower train.micro_batch_size (or "
                "train.packing.max_tokens) or data.max_length"
            )
        return text


def set_up_activation_checkpointing(
    config: RunConfig,
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    loader: StepLoader,
    accelerator: Accelerator,
    *,
    total_steps: int,
) -> None:
    """Apply `train.activation_checkpointing`; for `auto`, choose the policy by measuring.

    `auto` measures the run's longest micro-batch. Nothing is measured if the weights are sharded: a
    rank that runs out of memory would leave the others waiting in a collective.

    Args:
        config: The run's configuration.
        model: The model, before DDP wraps it: a measured step communicates nothing.
        optimizer: Whose state the measurement must leave room for.
        loader: Loads the longest micro-batch.
        accelerator: Device, precision and ranks; all ranks choose the same.
        total_steps: Optimizer steps of the run.
    """
    requested = config.train.activation_checkpointing
    if requested != "auto":
        set_activation_checkpointing(model, requested)
        return
    if is_sharded(model.parameters()):
        logger.info(
            "activation checkpointing: full; auto measures nothing if the weights are sharded, so "
            "set none or selective explicitly if there is enough memory"
        )
        set_activation_checkpointing(model, "full")
        return
    indices, several = longest_micro_batch(
        map(loader.micro_batches_of_all_ranks, range(total_steps)),
        loader.num_tokens,
        processes=accelerator.num_processes,
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    basis = {
        "device": device_named(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": config.train.precision,
        "compile": config.train.compile,
        "fp8": config.train.fp8,
        "learning": sum(parameter.numel() for parameter in parameters),
        "batch": f"{len(indices)} records in {loader.num_tokens(indices):,} positions",
    }

    def measured() -> tuple[Trial, ...]:
        batch = loader.load_micro_batch(indices)

        def step() -> None:
            # With several micro-batches per step, the gradients of those before are in memory.
            for parameter in parameters if several else ():
                parameter.grad = torch.zeros_like(parameter)
            with accelerator.autocast():
                output = model(batch.to(accelerator.device))
            output.loss_sum.backward()

        # Allocations of compiled code on a CPU cannot be counted; eager code needs no less.
        with eager(config.train.compile and accelerator.device.type == "cpu"):
            return measure(
                step,
                lambda policy: set_activation_checkpointing(model, policy),
                model,
                accelerator,
                later_bytes=0 if optimizer.state else optimizer_state_bytes(optimizer),
            )

    choice = choose_policy(Path(config.output_dir), basis, measured, accelerator)
    set_activation_checkpointing(model, choice.policy)


def choose_policy(
    output_dir: Path,
    basis: Mapping[str, Any],
    measured: Callable[[], tuple[Trial, ...]],
    accelerator: Accelerator,
) -> Choice:
    """Return the policy that this run chose before, if `basis` is unchanged, or measure one.

    Args:
        output_dir: The run directory, where the choice is stored.
        basis: What the measurement depends on.
        measured: Measures (see `measure`); called on every rank.
        accelerator: The ranks, which all get the same choice.
    """
    path = output_dir / FILE
    before = rank0_only(accelerator, lambda: _read(path))
    if rank0_only(accelerator, lambda: before is not None and before.basis == basis):
        assert before is not None
        return before
    trials = measured()
    choice = Choice(trials[-1].policy, trials, basis)
    if before is not None:
        logger.info("activation checkpointing: %s", before.changed(basis))
    logger.info("%s", choice)
    if accelerator.is_main_process:
        write_json(path, asdict(choice))
    return choice


def measure(
    step: Callable[[], None],
    set_policy: Callable[[CheckpointPolicy], None],
    model: nn.Module,
    accelerator: Accelerator,
    *,
    policies: Sequence[CheckpointPolicy] = POLICIES,
    later_bytes: int,
) -> tuple[Trial, ...]:
    """Run `step` under one policy after the other until one fits in every process.

    Afterwards the last one tried is set, and nothing else is changed: no gradient is left, and
    random generators are where they were.

    Args:
        step: A forward and a backward pass, without communication between processes.
        set_policy: Makes `step` one of a policy.
        model: Whose gradients are dropped after each trial.
        accelerator: Device and processes.
        policies: From the fastest to the smallest.
        later_bytes: Memory that is taken only after a first step (the optimizer's state).
    """
    trials: list[Trial] = []
    for policy in policies:
        set_policy(policy)
        room = _free_bytes(accelerator.device)
        peak = _peak_of(step, accelerator.device, limit=room - later_bytes)
        for parameter in model.parameters():
            parameter.grad = None
        gc.collect()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        peak = None if peak is None else peak + later_bytes
        trials.append(_agreed(Trial(policy, peak, int(room * (1 - MARGIN))), accelerator))
        if trials[-1].fits:
            break
    return tuple(trials)


def device_named(device: torch.device) -> str:
    """The device's name and memory; where both are the same, a measurement holds."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {_gib(properties.total_memory)}"
    return f"{device.type}, {_gib(psutil.virtual_memory().total)}"


def longest_micro_batch(
    steps: Iterable[Sequence[Sequence[int]]],
    num_positions: Callable[[Sequence[int]], int],
    *,
    processes: int,
) -> tuple[Sequence[int], bool]:
    """The micro-batch with most positions, and whether a process has several a step.

    Args:
        steps: The micro-batches of every step and process, as indices of records.
        num_positions: Of a micro-batch, what fills up included.
        processes: Among which a step's micro-batches are shared out.
    """
    longest: Sequence[int] = ()
    most, several = -1, False
    for micro_batches in steps:
        several = several or len(micro_batches) > processes
        for indices in micro_batches:
            if (positions := num_positions(indices)) > most:
                most, longest = positions, indices
    return longest, several


def _read(path: Path) -> Choice | None:
    """Return the choice that a file keeps; None, with a warning, where it cannot be used."""
    if not os.path.lexists(path):
        return None
    try:
        return _choice(read_json(path))
    except (OSError, UserError, LookupError, TypeError, ValueError) as error:
        warn_once(f"{path}: cannot be used ({one_line(error)}); the memory is measured again")
        return None


def _choice(tree: Any) -> Choice:
    trials = tuple(Trial(**trial) for trial in tree["trials"])
    figures = [figure for t in trials for figure in (t.peak_bytes or 0, t.room_bytes)]
    usable = bool(trials) and all(type(figure) is int for figure in figures)
    if not usable or tree["policy"] not in POLICIES or not isinstance(tree["basis"], dict):
        raise ValueError("it is not a choice with its measurements")
    return Choice(tree["policy"], trials, tree["basis"])


def _peak_of(step: Callable[[], None], device: torch.device, *, limit: int) -> int | None:
    """Most bytes that a step takes at a time; None where they are more than there are."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if not cuda:
            live = LiveBytes(limit=limit)
            try:
                with live:
                    step()
            except NoRoom:
                return None
            return live.peak
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_reserved(device)
        try:
            step()
        except torch.OutOfMemoryError:
            return None
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_reserved(device) - before


def _agreed(trial: Trial, accelerator: Accelerator) -> Trial:
    """The trial as every process tells it: of the most bytes and of the least room."""
    if accelerator.num_processes == 1:
        return trial
    figures = [trial.peak_bytes if trial.peak_bytes is not None else -1, trial.room_bytes]
    shared = torch.zeros(accelerator.num_processes, 2, dtype=torch.int64, device=accelerator.device)
    shared[accelerator.process_index] = torch.tensor(figures)
    peaks, rooms = total(accelerator, shared).T.tolist()
    return Trial(trial.policy, None if min(peaks) < 0 else max(peaks), min(rooms))


def _free_bytes(device: torch.device) -> int:
    """Memory that this process may still take, or has taken and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(psutil.virtual_memory().available, _container_bytes()) // sharing


def _container_bytes() -> int:
    """What a container's own limit (control groups, version 2) leaves of the memory."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # there is none, or no limit ("max")
        return 2**63
    return max(0, limit - used + int(stat.get("inactive_file", 0)))


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
