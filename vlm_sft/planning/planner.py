"""Plan training options: a training method with an activation checkpointing policy, sized."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Final

from vlm_sft.config.method import METHODS, Method, training_method
from vlm_sft.model.activation_checkpointing import POLICIES, CheckpointPolicy
from vlm_sft.planning.data_stats import DataStats
from vlm_sft.planning.estimate import Estimator, Memory
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.planning.speed import Speed, estimate_speed, loader_images_per_second
from vlm_sft.planning.step_stats import StepStats
from vlm_sft.train.checkpointing_policy import MARGIN

ROW_UNIT: Final = 256
"""The largest packed row is searched in multiples of this many tokens."""

SEARCH_LIMIT: Final = 1024
"""No more rows of a micro-batch, or units of a packed row, are tried."""


@dataclass(frozen=True)
class TrainingOption:
    """One way to train, planned.

    Attributes:
        method: The training method.
        policy: Activation checkpointing.
        configured: Whether this is what the configuration selects.
        memory: Memory of one rank with the run's largest micro-batch.
        fits: Whether the device has that memory.
        speed: Throughput and bottleneck.
        largest_micro_batch: How many padded records of the longest length fit, up to 1,024; 0 if
            none does; None if it was not searched or records are packed.
        largest_packed_row: The largest `max_tokens` that fits, up to 262,144; 0 if none does; None
            if it was not searched or records are padded.
    """

    method: Method
    policy: CheckpointPolicy
    configured: bool
    memory: Memory
    fits: bool
    speed: Speed
    largest_micro_batch: int | None = None
    largest_packed_row: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Return plain values; bytes are integers."""
        memory = asdict(self.memory)
        weights = {part: round(size) for part, size in memory.pop("weights").items()}
        totals = {"allocated": self.memory.allocated, "total": self.memory.total}
        sizes = {key: round(size) for key, size in {**memory, **totals}.items()}
        return {**asdict(self), "memory": {"weights": weights, **sizes}}


@dataclass
class Planner:
    """Plans the training options of a run.

    Attributes:
        estimator: Estimates memory and speed.
        data: The run's records.
        steps: The run's micro-batches.
        images_per_cpu_second: Images that one core loads per second; None if not considered.
    """

    estimator: Estimator
    data: DataStats
    steps: StepStats
    images_per_cpu_second: float | None

    def by_policy(self) -> Sequence[TrainingOption]:
        """Return the configured method under every activation checkpointing policy."""
        method = training_method(self.estimator.config)
        options = [self._option(method, policy) for policy in POLICIES]
        return [replace(o, configured=o.policy == self.configured_policy) for o in options]

    def by_method(self) -> Sequence[TrainingOption]:
        """Return every method, with the largest micro-batch or packed row that fits.

        The configured method has its configured policy; any other the fastest policy that fits, or
        `full` if none does.
        """
        options = []
        for method in METHODS:
            if method == training_method(self.estimator.config):
                option = self._option(method, self.configured_policy)
                option = replace(option, configured=True)
            else:
                for policy in POLICIES:
                    option = self._option(method, policy)
                    if option.fits:
                        break
            options.append(self._with_largest(option))
        return options

    def chosen(self, method: Method, most: int) -> tuple[CheckpointPolicy, int, Memory] | None:
        """Return policy, micro-batch and memory with which a method fits; None if it never does.

        Less recomputation comes first as long as the micro-batch is at least half of `most`: a GPU
        is busy by then. Training's margin is left free.

        Args:
            method: The training method.
            most: Largest micro-batch, in records of the longest length.
        """
        sizes = [size for size in (most, most // 2) if size]
        options = [(policy, size) for policy in POLICIES for size in sizes]
        while sizes[-1] > 1:
            sizes = [sizes[-1] // 2]
            options += [(policy, sizes[0]) for policy in POLICIES]

        def memory(policy: CheckpointPolicy, size: int) -> Memory:
            return self.estimator.memory(method, policy, self.longest_records(size))

        if not self.estimator.fits(memory(*options[-1]), margin=MARGIN):
            return None  # the last option needs least
        for policy, size in options:
            found = memory(policy, size)
            if self.estimator.fits(found, margin=MARGIN):
                break
        return policy, size, found

    @cached_property
    def configured_policy(self) -> CheckpointPolicy:
        """The configured policy; for `auto`, the fastest that leaves training's margin free."""
        configured = self.estimator.config.train.activation_checkpointing
        if configured != "auto":
            return configured
        method = training_method(self.estimator.config)
        for policy in POLICIES:
            if self.estimator.fits(self._memory(method, policy), margin=MARGIN):
                return policy
        return "full"

    def _option(self, method: Method, policy: CheckpointPolicy) -> TrainingOption:
        estimator = self.estimator
        memory = self._memory(method, policy)
        rate = loader_images_per_second(
            estimator.config, estimator.gpus, self.images_per_cpu_second
        )
        return TrainingOption(
            method,
            policy,
            configured=False,
            memory=memory,
            fits=estimator.fits(memory),
            speed=estimate_speed(
                estimator, method, policy, self.steps, images_per_second=rate or None
            ),
        )

    def _memory(self, method: Method, policy: CheckpointPolicy) -> Memory:
        steps = self.steps
        return self.estimator.memory(
            method, policy, steps.largest, micro_batches=steps.micro_batches_per_step
        )

    def _with_largest(self, option: TrainingOption) -> TrainingOption:
        """Return the option with the largest micro-batch or packed row that fits."""
        packed = self.estimator.config.train.packing is not None
        make = self._packed_row if packed else self.longest_records
        found = self.estimator.largest(option.method, option.policy, make, limit=SEARCH_LIMIT)
        if packed:
            return replace(option, largest_packed_row=found * ROW_UNIT)
        return replace(option, largest_micro_batch=found)

    def longest_records(self, rows: int) -> MicroBatch:
        """Return `rows` records of the longest length.

        Targets, images and crops per record are those of the run's largest micro-batch.
        """
        largest, longest = self.steps.largest, self.data.longest()
        targets = max(1, rows * largest.targets // largest.rows)
        images = -(-rows * largest.images // largest.rows)  # rounded up
        crops = -(-rows * largest.crops // largest.rows)
        return MicroBatch(rows, longest, targets, images, crops, rows, rows * longest**2)

    def _packed_row(self, units: int) -> MicroBatch:
        """Return a row of `units * ROW_UNIT` tokens.

        Records, targets, images, crops and attention pairs per token are the means of the run.
        """
        tokens = units * ROW_UNIT
        share = tokens / self.steps.total("length")

        def scaled(attribute: str) -> int:
            return max(1, round(share * self.steps.total(attribute)))

        return MicroBatch(
            rows=1,
            length=tokens,
            targets=scaled("targets"),
            images=scaled("images"),
            crops=scaled("crops"),
            records=scaled("records"),
            attention_pairs=scaled("attention_pairs"),
        )
