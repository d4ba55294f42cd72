"""Set up activation checkpointing; `auto` takes the fastest policy whose measured step fits."""

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
from vlm_sft.train.distributed import all_reduce_sum, rank0_only
from vlm_sft.train.live_bytes import LimitExceeded, LiveBytes
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
"""Share of the memory that a step must leave free, for what the measured step does not show:
fragmentation and the samples generated at evaluations."""


@dataclass(frozen=True)
class Trial:
    """A measured step.

    Attributes:
        policy: What its backward pass recomputes.
        peak_bytes: Memory that the step needs in addition to what was allocated before it, with the
            optimizer's state if there is none yet; None if the step ran out of memory.
        room_bytes: Available memory: the free memory minus `MARGIN`, on the rank with the least.
    """

    policy: CheckpointPolicy
    peak_bytes: int | None
    room_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the step fits into the available memory."""
        return self.peak_bytes is not None and self.peak_bytes <= self.room_bytes

    def __str__(self) -> str:
        took = "ran out" if self.peak_bytes is None else f"took {_gib(self.peak_bytes)}"
        return f"{self.policy} {took} of {_gib(self.room_bytes)}"


@dataclass(frozen=True)
class PolicyChoice:
    """The policy chosen for a run, as `activation_checkpointing.json` stores it.

    Attributes:
        policy: The chosen policy.
        trials: The measured steps, in order.
        basis: What the measurement depends on; with another device or batch it is repeated.
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
        world_size=accelerator.num_processes,
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
) -> PolicyChoice:
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
    choice = PolicyChoice(trials[-1].policy, trials, basis)
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
    """Run `step` with one policy after the other until one fits on every rank.

    The last policy remains set. Nothing else is changed: gradients are freed, and random generators
    are restored.

    Args:
        step: A forward and a backward pass, without communication between ranks.
        set_policy: Sets the policy that `step` runs with.
        model: The model, whose gradients are freed after each trial.
        accelerator: Device and ranks.
        policies: From the fastest to the one that needs the least memory.
        later_bytes: Memory that is allocated only later (the optimizer's state).
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
    """Return the device's name and memory, which a measurement is valid for."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {_gib(properties.total_memory)}"
    return f"{device.type}, {_gib(psutil.virtual_memory().total)}"


def longest_micro_batch(
    steps: Iterable[Sequence[Sequence[int]]],
    num_tokens: Callable[[Sequence[int]], int],
    *,
    world_size: int,
) -> tuple[Sequence[int], bool]:
    """Return the micro-batch with most tokens, and whether a rank has several per step.

    Args:
        steps: The micro-batches of every step, on all ranks, as indices of records.
        num_tokens: Returns the tokens of a micro-batch, padding included.
        world_size: Number of ranks.
    """
    longest: Sequence[int] = ()
    most, several = -1, False
    for micro_batches in steps:
        several = several or len(micro_batches) > world_size
        for indices in micro_batches:
            if (tokens := num_tokens(indices)) > most:
                most, longest = tokens, indices
    return longest, several


def _read(path: Path) -> PolicyChoice | None:
    """Return the stored choice; None, with a warning, if the file cannot be used."""
    if not os.path.lexists(path):
        return None
    try:
        return _choice(read_json(path))
    except (OSError, UserError, LookupError, TypeError, ValueError) as error:
        warn_once(f"{path}: cannot be used ({one_line(error)}); the memory is measured again")
        return None


def _choice(tree: Any) -> PolicyChoice:
    trials = tuple(Trial(**trial) for trial in tree["trials"])
    figures = [figure for t in trials for figure in (t.peak_bytes or 0, t.room_bytes)]
    usable = bool(trials) and all(type(figure) is int for figure in figures)
    if not usable or tree["policy"] not in POLICIES or not isinstance(tree["basis"], dict):
        raise ValueError("it is not a stored choice")
    return PolicyChoice(tree["policy"], trials, tree["basis"])


def _peak_of(step: Callable[[], None], device: torch.device, *, limit: int) -> int | None:
    """Return the peak bytes of a step; None if they exceed `limit` or the GPU's memory."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if not cuda:
            live = LiveBytes(limit=limit)
            try:
                with live:
                    step()
            except LimitExceeded:
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
    """Return the trial that all ranks agree on: the highest peak, the least available memory."""
    if accelerator.num_processes == 1:
        return trial
    figures = [trial.peak_bytes if trial.peak_bytes is not None else -1, trial.room_bytes]
    shared = torch.zeros(accelerator.num_processes, 2, dtype=torch.int64, device=accelerator.device)
    shared[accelerator.process_index] = torch.tensor(figures)
    peaks, rooms = all_reduce_sum(accelerator, shared).T.tolist()
    return Trial(trial.policy, None if min(peaks) < 0 else max(peaks), min(rooms))


def _free_bytes(device: torch.device) -> int:
    """Return the memory that this process can still allocate, its cached blocks included."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(psutil.virtual_memory().available, _container_bytes()) // sharing


def _container_bytes() -> int:
    """Return what the limit of a container (cgroups v2) leaves of the memory."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or no limit ("max")
        return 2**63
    return max(0, limit - used + int(stat.get("inactive_file", 0)))


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
