"""Load this rank's micro-batches of every training step."""

from collections.abc import Iterator, Sequence

from accelerate import Accelerator

from vlm_sft.data.batch import Batch, Collator
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.loader import load_batch, load_steps, micro_batches_of_rank
from vlm_sft.data.sampler import StepSampler
from vlm_sft.train.run_log import RunLog


class StepLoader:
    """The micro-batches of each step, a pure function of the seed, the step and the rank.

    Args:
        dataset: The training records.
        sampler: The records of each step, over all ranks.
        collator: How the records of a step become micro-batches.
        run_log: The records that are excluded because they could not be loaded; it gets new ones.
        accelerator: The run's ranks.
        num_workers: Worker processes that load ahead; 0 loads in this process.
        skip_errors: Exclude records that cannot be loaded instead of raising.

    Attributes:
        run_log: The records used and excluded.
    """

    def __init__(
        self,
        dataset: SupervisedDataset,
        sampler: StepSampler,
        collator: Collator,
        run_log: RunLog,
        accelerator: Accelerator,
        *,
        num_workers: int,
        skip_errors: bool,
    ) -> None:
        self._dataset = dataset
        self._sampler = sampler
        self._collator = collator
        self.run_log = run_log
        self._accelerator = accelerator
        self._num_workers = num_workers
        self._skip_errors = skip_errors

    def load(self, first: int, last: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of the steps from `first` (from 0) up to `last` (exclusive).

        Raises:
            RecordError: A record cannot be loaded and `skip_errors` is false.
        """
        return load_steps(
            self._dataset,
            # Lazy: steps that are not loaded yet exclude the records found broken until then.
            map(self.micro_batches, range(first, last)),
            collator=self._collator,
            num_workers=self._num_workers,
            on_error=self.run_log.add_error if self._skip_errors else None,
        )

    def load_micro_batch(self, indices: Sequence[int]) -> Batch:
        """Load one micro-batch of these records in this process, without those that are broken."""
        return load_batch(
            self._dataset,
            self.run_log.usable(indices),
            collator=self._collator,
            on_error=(lambda error: None) if self._skip_errors else None,
        )

    def records(self, step: int) -> Sequence[int]:
        """Return the records of a step, over all ranks."""
        return self._sampler.step_indices(step)

    def epoch_after(self, step: int) -> float:
        """Return the number of epochs that are done after `step` steps."""
        return self._sampler.epoch_of(step)

    def has_image(self, step: int) -> bool:
        """Return whether a record of the step, on any rank, has an image."""
        return any(self._dataset.has_image[index] for index in self.records(step))

    def micro_batches(self, step: int) -> list[list[int]]:
        """Return this rank's micro-batches of a step, as many as every other rank has."""
        chunks = micro_batches_of_rank(
            self._collator,
            self._dataset,
            self.records(step),
            world_size=self._accelerator.num_processes,
            rank=self._accelerator.process_index,
        )
        return [self.run_log.usable(chunk) for chunk in chunks]

    def micro_batches_of_all_ranks(self, step: int) -> list[list[int]]:
        """Return all micro-batches of a step; number `j` is the one of rank `j % world_size`."""
        world_size = self._accelerator.num_processes
        return self._collator.assign_to_ranks(self._dataset, self.records(step), world_size)

    def num_tokens(self, indices: Sequence[int]) -> int:
        """Return the tokens of a micro-batch of these records, padding included."""
        return self._collator.num_tokens(self._dataset, indices)
