"""What a run's data really asks of the model: lengths, targets and images, and its micro-batches.

Read as training reads it: the same files, chat_tokenizer, length limit and order of records.
"""

import dataclasses
import hashlib
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from vlm_sft.config.schema import DataFile, RunConfig
from vlm_sft.data.build import make_collator, make_sampler, sampled_steps
from vlm_sft.data.conversation import Conversation, ImageSource
from vlm_sft.data.dataset import shared_prefix
from vlm_sft.data.filtering import FilterResult, RecordFilter
from vlm_sft.data.images import ImageSpec, read_pixels
from vlm_sft.data.packing import PackingStats, pack_items, packing_stats
from vlm_sft.data.records import open_records
from vlm_sft.data.sampler import StepSampler
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import RecordError, UserError
from vlm_sft.planning.micro_batch import MicroBatch
from vlm_sft.utils.progress import track

TIMED_IMAGES: Final = 12
"""Images that are opened to see how fast this machine does it."""


@dataclass
class FileSurvey:
    """One file's records.

    Attributes:
        path: The file.
        weight: How often each record is seen in an epoch.
        records: All of them.
        looked_at: Those that were tokenized: all, or a sample.
        left_out: Of those looked at, by reason, what would not be trained on.
        lengths: Tokens of each that would be, image tokens included.
        targets: Likewise supervised tokens.
        images: Likewise images.
        prefixes: Likewise a digest of what other records may begin with too; empty: none.
        prefix_lengths: Likewise its tokens.
    """

    path: str
    weight: float
    records: int = 0
    looked_at: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    prefixes: list[bytes] = field(default_factory=list)
    prefix_lengths: list[int] = field(default_factory=list)

    def add(self, result: FilterResult, *, num_image_tokens: int) -> None:
        """Count one record in."""
        self.looked_at += 1
        if result.tokenized is None or result.record is None:
            self.left_out[result.entry.reason] += 1
            return
        self.lengths.append(result.length)
        self.targets.append(result.tokenized.num_targets)
        self.images.append(result.tokenized.num_images)
        found = shared_prefix(result.record, result.tokenized, num_image_tokens=num_image_tokens)
        prefix, length = found or (b"", 0)
        self.prefixes.append(prefix)
        self.prefix_lengths.append(length)

    @property
    def scale(self) -> float:
        """Records of the file that one record looked at stands for."""
        return self.records / max(1, self.looked_at)


@dataclass(frozen=True)
class Survey:
    """All training files' records.

    Attributes:
        files: One after the other.
        sources: A few images, to be timed.
    """

    files: tuple[FileSurvey, ...]
    sources: tuple[ImageSource, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every record was tokenized, not a sample."""
        return all(file.looked_at == file.records for file in self.files)

    @property
    def records_per_epoch(self) -> float:
        """Records seen in one epoch, by the files' weights."""
        return sum(file.scale * len(file.lengths) * file.weight for file in self.files)

    def mean(self, what: str) -> float:
        """Mean of `lengths`, `targets`, `images` or `squares` over the records of an epoch."""
        return self._sums(what, 1) / self.records_per_epoch

    def error_of_mean(self) -> float:
        """Half of the 95 % interval of the mean length, as a share of it; 0 where all were read."""
        if self.is_whole:
            return 0.0
        mean = self.mean("lengths")
        variance = self.mean("squares") - mean**2
        looked_at = sum(len(file.lengths) for file in self.files)
        return float(1.96 * math.sqrt(max(0.0, variance) / looked_at) / mean)

    def longest(self) -> int:
        """Tokens of the longest record looked at."""
        return max(max(file.lengths, default=0) for file in self.files)

    def _sums(self, what: str, power: int) -> float:
        if what == "squares":
            what, power = "lengths", 2
        return sum(
            file.scale * file.weight * float((np.asarray(getattr(file, what)) ** power).sum())
            for file in self.files
        )


def survey(
    config: RunConfig, chat_tokenizer: ChatTokenizer, *, num_image_tokens: int, sample: int
) -> Survey:
    """Read the run's training files.

    Args:
        config: Files, length limit and policy.
        chat_tokenizer: Makes ids and labels.
        num_image_tokens: Of an image.
        sample: Records of each file that are tokenized, drawn at random; 0: all.

    Raises:
        UserError: A file cannot be read, or no record would be trained on.
    """
    record_filter = RecordFilter(
        chat_tokenizer, num_image_tokens=num_image_tokens, config=config.data
    )
    sources: list[ImageSource] = []
    files = [
        _survey_file(file, record_filter, sources, sample, num_image_tokens)
        for file in config.data.train
    ]
    found = Survey(tuple(files), tuple(sources))
    if not found.records_per_epoch:
        names = ", ".join(file.path for file in files)
        reasons = sum((file.left_out for file in files), Counter[str]())
        told = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items()) or "empty"
        raise UserError(
            f"{names}: no record to train on ({told}); see python -m vlm_sft.check",
            code="no_records",
        )
    return found


def _survey_file(
    file: DataFile,
    record_filter: RecordFilter,
    sources: list[ImageSource],
    sample: int,
    num_image_tokens: int,
) -> FileSurvey:
    found = FileSurvey(file.path, file.weight)
    records = open_records(file)
    tracked = track(records.conversations, records.total, f"reading {Path(file.path).name}")
    counted = _counted(tracked, found, sources)
    for result in record_filter.filter_all(_sampled(counted, sample) if sample else counted):
        found.add(result, num_image_tokens=num_image_tokens)
    return found


def _counted(
    records: Iterator[Conversation | RecordError], found: FileSurvey, sources: list[ImageSource]
) -> Iterator[Conversation | RecordError]:
    """The records with digests for embedded images; a few of those are kept apart."""
    for record in records:
        found.records += 1
        if isinstance(record, Conversation):
            sources.extend(record.images[: TIMED_IMAGES - len(sources)])
            images = tuple(
                hashlib.sha256(image).digest() if isinstance(image, bytes) else image
                for image in record.images
            )
            record = dataclasses.replace(record, images=images)
        yield record


def _sampled(records: Iterator[Any], size: int) -> list[Any]:
    """So many at random, all where there are no more (Vitter 1985, algorithm R)."""
    generator, kept = random.Random(0), list[Any]()
    for number, record in enumerate(records):
        if number < size:
            kept.append(record)
        else:
            place = generator.randrange(number + 1)
            if place < size:
                kept[place] = record
    return kept


@dataclass(frozen=True)
class Workload:
    """A run's micro-batches.

    Attributes:
        batches: Of one epoch, as every process together takes them; of a sample's own epoch where
            not all records were read.
        steps: Optimizer steps of the run.
        records: Records that the run sees.
        micro_batches_a_step: Of each process.
        mean_length: Tokens of a record, without padding; a shared prefix counts once.
        mean_square: Of what attends to itself, the square's mean; likewise.
        packing: Of some steps, where records are packed; None: they are padded.
    """

    batches: tuple[MicroBatch, ...]
    steps: int
    records: float
    micro_batches_a_step: int
    mean_length: float
    mean_square: float
    packing: PackingStats | None = None

    @property
    def largest(self) -> MicroBatch:
        """The micro-batch of the most positions, which sets the peak of memory."""
        return max(self.batches, key=lambda batch: (batch.tokens, batch.targets, batch.images))

    def total(self, what: str) -> int:
        """Sum of a micro-batch's attribute over all."""
        return sum(getattr(batch, what) for batch in self.batches)


@dataclass(frozen=True)
class _Records:
    """The records looked at, one by one; what packing needs to know of them (`RecordLengths`)."""

    lengths: list[int]
    targets: list[int]
    num_images: list[int]
    prefix_ids: list[int]
    prefix_lengths: list[int]
    weights: list[float]

    @classmethod
    def of(cls, found: Survey) -> "_Records":
        """Of all files; a sample's in the proportions of the run."""

        def joined(name: str) -> list[Any]:
            return [value for file in found.files for value in getattr(file, name)]

        weights = [file.weight * file.scale for file in found.files for _ in file.lengths]
        if found.is_whole:
            weights = [file.weight for file in found.files for _ in file.lengths]
        else:  # an epoch of the sample
            smallest = min(weights)
            weights = [weight / smallest for weight in weights]
        numbers: dict[bytes, int] = {}
        keys = [numbers.setdefault(p, len(numbers)) if p else -1 for p in joined("prefixes")]
        lengths, prefix_lengths = joined("lengths"), joined("prefix_lengths")
        return cls(lengths, joined("targets"), joined("images"), keys, prefix_lengths, weights)

    @property
    def has_image(self) -> list[bool]:
        """Whether a record has an image."""
        return [count > 0 for count in self.num_images]

    def batch(self, indices: Sequence[int], config: RunConfig) -> MicroBatch:
        """The shape of a micro-batch of these records, packed or padded."""
        return (
            self._padded(indices) if config.train.packing is None else self._packed(indices, config)
        )

    def _padded(self, indices: Sequence[int]) -> MicroBatch:
        return MicroBatch.padded(
            [self.lengths[i] for i in indices],
            targets=sum(self.targets[i] for i in indices),
            images=sum(self.num_images[i] for i in indices),
        )

    def _packed(self, indices: Sequence[int], config: RunConfig) -> MicroBatch:
        packing, share = config.train.packing, config.train.share_image_prefix
        assert packing is not None
        units = list(pack_items(indices, self, packing.max_tokens, share_image_prefix=share))
        tokens = sum(unit.tokens for unit in units)
        squares = sum(self.lengths[i] ** 2 for i in indices)
        shared = sum(
            (len(unit.indices) - 1) * self.prefix_lengths[unit.indices[0]] ** 2 for unit in units
        )
        return MicroBatch(
            1,
            tokens + -tokens % packing.round_to,
            sum(self.targets[i] for i in indices),
            sum(unit.images for unit in units),
            len(indices),
            squares - shared,
        )


def plan_workload(
    config: RunConfig, found: Survey, *, gpus: int, image_cost: float = 0.0
) -> Workload:
    """The micro-batches that the run's sampler and seed make of the records.

    Args:
        config: The run.
        found: Its records.
        gpus: Processes that share a step.
        image_cost: What an image weighs where records are packed, in tokens.
    """
    records = _Records.of(found)
    sampler = make_sampler(config, records)
    collator = make_collator(config, 0, image_cost)  # nothing is loaded, so nothing filled up
    of_steps = [
        [micro_batch for micro_batch in of_step if micro_batch]
        for of_step in (
            collator.assign_to_ranks(records, sampler.step_indices(step), gpus)
            for step in range(sampler.steps_per_epoch)
        )
    ]
    batches = tuple(records.batch(indices, config) for of_step in of_steps for indices in of_step)
    steps, seen = _length_of_run(config, found, sampler)
    a_step = math.ceil(max(map(len, of_steps)) / gpus)
    length, square = found.mean("lengths"), found.mean("squares")
    if config.train.packing is None:
        return Workload(batches, steps, seen, a_step, length, square)
    looks = sum(batch.records for batch in batches)
    length = sum(batch.length for batch in batches) / looks
    square = sum(batch.attended for batch in batches) / looks
    figures = packing_stats(
        [of_steps[step] for step in sampled_steps(len(of_steps))],
        records,
        max_tokens=config.train.packing.max_tokens,
        share_image_prefix=config.train.share_image_prefix,
    )
    return Workload(batches, steps, seen, a_step, length, square, figures)


def _length_of_run(config: RunConfig, found: Survey, sampler: StepSampler) -> tuple[int, float]:
    """Steps, and records that they see."""
    train, epoch = config.train, found.records_per_epoch
    if found.is_whole:
        steps = sampler.total_steps(train.epochs)
    else:
        steps = max(1, math.ceil(train.epochs * epoch / train.global_batch_size))
    records = train.epochs * epoch
    if train.max_steps is not None and train.max_steps < steps:
        return train.max_steps, min(records, train.max_steps * float(train.global_batch_size))
    return steps, records


def images_per_cpu_second(
    sources: Sequence[ImageSource], spec: ImageSpec, config: RunConfig
) -> float | None:
    """How many images one core of this machine makes into pixels in a second.

    Measured on a few of the run's own; None where none of them can be opened.
    """
    seconds = []
    for source in sources:
        start = time.process_time()
        try:
            read_pixels(source, spec, config.data.image_aspect, config.data.image_processing)
        except UserError:
            continue  # training's affair: the image is only wanted for its time here
        seconds.append(time.process_time() - start)
    seconds = seconds[1:] or seconds  # the first one also loads the decoder
    return len(seconds) / sum(seconds) if seconds and sum(seconds) > 0 else None
