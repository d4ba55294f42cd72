"""The micro-batches of a run: what its sampler and collator make of the records."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_sft.config.schema import PackingConfig, RunConfig
from vlm_sft.data.build import make_collator, make_sampler, sampled_steps
from vlm_sft.data.packing import PackingStats, pack_items, packing_stats
from vlm_sft.data.sampler import StepSampler
from vlm_sft.planning.data_stats import DataStats
from vlm_sft.planning.micro_batch import MicroBatch


@dataclass(frozen=True)
class StepStats:
    """The micro-batches of a run.

    Attributes:
        micro_batches: Those of one epoch, of all ranks. If the records were sampled, those of an
            epoch of the sample.
        num_steps: Optimizer steps of the run.
        num_records: Records that the run trains on, repeated ones included.
        micro_batches_per_step: Micro-batches of each rank in a step, at most.
        mean_length: Tokens per record, without padding; a shared prefix counts once.
        mean_attention_pairs: `MicroBatch.attention_pairs` per record, without padding.
        packing: How well some steps are packed; None if records are padded.
    """

    micro_batches: tuple[MicroBatch, ...]
    num_steps: int
    num_records: float
    micro_batches_per_step: int
    mean_length: float
    mean_attention_pairs: float
    packing: PackingStats | None = None

    @property
    def largest(self) -> MicroBatch:
        """The micro-batch with the most tokens, which has the highest memory peak."""
        return max(self.micro_batches, key=lambda batch: (batch.tokens, batch.targets, batch.crops))

    def total(self, attribute: str) -> int:
        """Return the sum of an attribute of `MicroBatch` over all micro-batches."""
        return sum(getattr(batch, attribute) for batch in self.micro_batches)


def plan_steps(
    config: RunConfig, stats: DataStats, *, gpus: int, image_cost: float = 0.0
) -> StepStats:
    """Form the micro-batches of an epoch with the run's own sampler, collator and seed.

    Args:
        config: The run.
        stats: Its records.
        gpus: Number of ranks.
        image_cost: Cost of an image in tokens, with which packed rows are balanced.
    """
    records = _Records.of(stats)
    sampler = make_sampler(config, records)
    collator = make_collator(config, pad_token_id=0, image_cost=image_cost)  # only assigns records
    steps = [
        [
            indices
            for indices in collator.assign_to_ranks(records, sampler.step_indices(step), gpus)
            if indices
        ]
        for step in range(sampler.steps_per_epoch)
    ]
    packing = config.train.packing
    if packing is None:
        micro_batches = tuple(records.padded(indices) for step in steps for indices in step)
        mean_length, mean_pairs = stats.mean("lengths"), stats.mean("lengths", power=2)
        figures = None
    else:
        share = config.train.share_image_prefix
        micro_batches = tuple(
            records.packed(indices, packing, share_image_prefix=share)
            for step in steps
            for indices in step
        )
        num_records = sum(batch.records for batch in micro_batches)
        mean_length = sum(batch.length for batch in micro_batches) / num_records
        mean_pairs = sum(batch.attention_pairs for batch in micro_batches) / num_records
        figures = packing_stats(
            [steps[step] for step in sampled_steps(len(steps))],
            records,
            max_tokens=packing.max_tokens,
            share_image_prefix=share,
        )
    num_steps, num_records_of_run = _length_of_run(config, stats, sampler)
    return StepStats(
        micro_batches,
        num_steps,
        num_records_of_run,
        math.ceil(max(map(len, steps)) / gpus),
        mean_length,
        mean_pairs,
        figures,
    )


def _length_of_run(config: RunConfig, stats: DataStats, sampler: StepSampler) -> tuple[int, float]:
    """Return the optimizer steps of the run and the records that it trains on."""
    train = config.train
    num_records = train.epochs * stats.records_per_epoch
    if stats.is_complete:
        steps = sampler.total_steps(train.epochs)
    else:  # the sampler knows the sample only
        steps = max(1, math.ceil(num_records / train.global_batch_size))
    if train.max_steps is not None and train.max_steps < steps:
        return train.max_steps, min(num_records, train.max_steps * float(train.global_batch_size))
    return steps, num_records


@dataclass(frozen=True)
class _Records:
    """The tokenized records of all files in the columns that sampler and packing read.

    It satisfies `RecordLengths` as the data set of a run does.
    """

    lengths: list[int]
    targets: list[int]
    num_images: list[int]
    num_crops: list[int]
    prefix_crops: list[int]
    prefix_ids: list[int]
    prefix_lengths: list[int]
    weights: list[float]

    @classmethod
    def of(cls, stats: DataStats) -> "_Records":
        """Concatenate the records of all files."""

        def column(name: str) -> list[Any]:
            return [value for file in stats.files for value in getattr(file, name)]

        if stats.is_complete:
            weights = [file.weight for file in stats.files for _ in file.lengths]
        else:
            # Keep the run's proportions of the files, and scale them so that the record of the
            # smallest weight is seen once: an epoch of the sample is then not longer than needed.
            weights = [
                file.weight * file.records_per_tokenized
                for file in stats.files
                for _ in file.lengths
            ]
            smallest = min(weights)
            weights = [weight / smallest for weight in weights]
        ids: dict[bytes, int] = {}
        prefix_ids = [ids.setdefault(p, len(ids)) if p else -1 for p in column("prefixes")]
        return cls(
            column("lengths"),
            column("targets"),
            column("images"),
            column("crops"),
            column("prefix_crops"),
            prefix_ids,
            column("prefix_lengths"),
            weights,
        )

    @property
    def has_image(self) -> list[bool]:
        """Whether each record has an image."""
        return [count > 0 for count in self.num_images]

    def padded(self, indices: Sequence[int]) -> MicroBatch:
        """Return the shape of these records in a padded micro-batch."""
        return MicroBatch.padded(
            [self.lengths[i] for i in indices],
            targets=sum(self.targets[i] for i in indices),
            images=sum(self.num_images[i] for i in indices),
            crops=sum(self.num_crops[i] for i in indices),
        )

    def packed(
        self, indices: Sequence[int], packing: PackingConfig, *, share_image_prefix: bool
    ) -> MicroBatch:
        """Return the shape of these records in one packed row."""
        items = list(
            pack_items(indices, self, packing.max_tokens, share_image_prefix=share_image_prefix)
        )
        tokens = sum(item.tokens for item in items)
        # A record attends within itself, its prefix included, whether that is shared or not. But
        # of the records that share a prefix, only one computes the prefix's own rows.
        pairs = sum(self.lengths[i] ** 2 for i in indices) - sum(
            (len(item.indices) - 1) * self.prefix_lengths[item.indices[0]] ** 2 for item in items
        )
        return MicroBatch(
            rows=1,
            length=tokens + -tokens % packing.round_to,
            targets=sum(self.targets[i] for i in indices),
            images=sum(item.images for item in items),
            crops=sum(item.crops for item in items),
            records=len(indices),
            attention_pairs=pairs,
        )
