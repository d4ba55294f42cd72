"""Evaluate the model on the validation records during training."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from vlm_sft.data.batch import Collator, LoadError
from vlm_sft.data.loader import Examples, load_steps, micro_batches_of_rank
from vlm_sft.train.compile import eager
from vlm_sft.train.distributed import all_reduce_sum, raise_on_all_ranks
from vlm_sft.utils.progress import track

GenerateSamples = Callable[[Callable[[LoadError], None] | None], list[dict[str, Any]]]
"""Generates answers to a few validation records, as rows of `samples.jsonl`. The argument is called
with each record that cannot be loaded; None: such a record raises."""


MeasureText = Callable[[], tuple[float, int]]
"""Returns the mean loss (nats) of a supervised token of the held-out text, and their number."""


EvaluateSuite = Callable[[], Mapping[str, float | None]]
"""Answers the questions of the run's suite on all ranks, and returns the metrics by name."""

LOWER_IS_BETTER: Final = (
    "eval_loss", "chair_i", "chair_s", "mean_absolute_error", "over_refusal", "wrong_confidence",
    "unclear", "without_number", "without_box", "empty",
)  # fmt: skip
"""Metrics, or last parts of their names, of which the smallest value is the best."""


@dataclass(frozen=True)
class ValidationResult:
    """The result of an evaluation.

    Attributes:
        loss: Mean loss of a supervised token, in nats.
        num_targets: Number of supervised tokens.
        samples: Rows of `samples.jsonl`.
    """

    loss: float
    num_targets: int
    samples: list[dict[str, Any]]


class BestEvaluation:
    """The best value of a metric so far, and how long ago it was reached.

    Args:
        metric: Name of the metric.
        history: Step and value of the evaluations before, oldest first.

    Attributes:
        metric: Name of the metric.
        step: Step of the best value; None without a value.
        value: The best value.
        num_since: Evaluations after it.
    """

    def __init__(self, metric: str, history: Sequence[tuple[int, float | None]] = ()) -> None:
        self.metric = metric
        self.step: int | None = None
        self.value: float | None = None
        self.num_since = 0
        for step, value in history:
            self.add(step, value)

    def add(self, step: int, value: float | None) -> bool:
        """Add an evaluation; return whether its value is better than all before it.

        A value that is not finite, such as the loss of a run that diverged, is never the best.
        """
        if value is None or not math.isfinite(value) or not self._is_better(value):
            self.num_since += 1
            return False
        self.step, self.value, self.num_since = step, value, 0
        return True

    def _is_better(self, value: float) -> bool:
        if self.value is None:
            return True
        lower = self.metric.rpartition(".")[2] in LOWER_IS_BETTER
        return value < self.value if lower else value > self.value


class Validation:
    """Evaluates a model on the validation records.

    Args:
        model: The model; left in training mode.
        dataset: The validation records.
        collator: How records become micro-batches.
        accelerator: Device, precision and ranks.
        num_workers: Worker processes that load ahead.
        samples: Generates samples, or None.
        sample_on_all_ranks: Generate on every rank, as sharded weights need.
        compiled: Whether layers are compiled. An evaluation runs uncompiled: its many shapes would
            each be compiled.
        on_quarantine: Called on rank 0 with each record that cannot be loaded; None: such a record
            raises.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Examples,
        collator: Collator,
        accelerator: Accelerator,
        *,
        num_workers: int,
        samples: GenerateSamples | None,
        sample_on_all_ranks: bool,
        compiled: bool,
        on_quarantine: Callable[[LoadError], None] | None,
    ) -> None:
        self._model = model
        self._dataset = dataset
        self._collator = collator
        self._accelerator = accelerator
        self._num_workers = num_workers
        self._samples = samples if accelerator.is_main_process or sample_on_all_ranks else None
        self._compiled = compiled
        self._on_quarantine = on_quarantine

    def run(self) -> ValidationResult:
        """Compute the loss of all validation records and generate samples.

        Raises:
            RecordError: A record cannot be loaded and is not to be quarantined.
            Exception: Any error of any rank, on all ranks.
        """
        errors: list[LoadError] = []
        on_error = None if self._on_quarantine is None else errors.append
        try:
            with eager(self._compiled):
                loss, num_targets = validation_loss(
                    self._model,
                    self._dataset,
                    self._accelerator,
                    collator=self._collator,
                    num_workers=self._num_workers,
                    on_error=on_error,
                )
                errors = gather_object(errors) if self._accelerator.num_processes > 1 else errors
                samples = self._generate(None if on_error is None else errors.append)
        finally:
            self._model.train()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # generation leaves blocks of sizes that training lacks
        if self._on_quarantine is not None and self._accelerator.is_main_process:
            for error in errors:
                self._on_quarantine(error)
        return ValidationResult(loss, num_targets, samples)

    def _generate(self, on_error: Callable[[LoadError], None] | None) -> list[dict[str, Any]]:
        if self._samples is None:
            return []
        self._model.eval()
        with torch.no_grad(), self._accelerator.autocast():
            return self._samples(on_error)


def text_loss(
    model: nn.Module,
    dataset: Examples,
    accelerator: Accelerator,
    *,
    collator: Collator,
    num_workers: int,
    compiled: bool,
) -> tuple[float, int]:
    """Return what `validation_loss` does of conversations without images.

    Args:
        model: The model; left in training mode.
        dataset: The conversations.
        accelerator: Device, precision and ranks.
        collator: How records become micro-batches.
        num_workers: Worker processes that load ahead.
        compiled: As for `Validation`.
    """
    try:
        with eager(compiled):
            return validation_loss(
                model, dataset, accelerator, collator=collator, num_workers=num_workers
            )
    finally:
        model.train()


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    examples: Examples,
    accelerator: Accelerator,
    *,
    collator: Collator,
    num_workers: int,
    on_error: Callable[[LoadError], None] | None = None,
) -> tuple[float, int]:
    """Return the mean loss (nats) of a supervised token and the number of supervised tokens.

    Leaves the model in evaluation mode. The loss is 0.0 without supervised tokens.

    Args:
        model: The model.
        examples: The records.
        accelerator: Device, precision and ranks, which share the records.
        collator: How records become micro-batches.
        num_workers: Worker processes that load ahead.
        on_error: Called with each record that cannot be loaded and is skipped; None: it raises.

    Raises:
        Exception: Any error of any rank, on all ranks.
    """
    mine = micro_batches_of_rank(
        collator,
        examples,
        range(len(examples)),
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    model.eval()
    loss = torch.zeros((), dtype=torch.float32, device=accelerator.device)
    count = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    steps = [[micro_batch] for micro_batch in mine]
    batches = load_steps(
        examples, steps, collator=collator, num_workers=num_workers, on_error=on_error
    )
    failure: Exception | None = None
    try:
        with accelerator.autocast():
            if accelerator.is_main_process:
                batches = track(batches, len(steps), "validation, batches")
            for (batch,) in batches:
                output = model(batch.to(accelerator.device))
                loss += output.loss_sum
                count += output.num_targets
    except Exception as error:  # raised below on every rank: the others would wait in `total`
        failure = error
    raise_on_all_ranks(accelerator, failure)
    targets = int(all_reduce_sum(accelerator, count))
    return float(all_reduce_sum(accelerator, loss)) / max(1, targets), targets
