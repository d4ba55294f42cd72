"""Lengths, supervised tokens and images of a run's training records.

They are read as training reads them: the same files, chat template, tokenizer and length limit.
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
from vlm_sft.data.conversation import Conversation, ImageSource
from vlm_sft.data.dataset import shared_prefix
from vlm_sft.data.filtering import FilterResult, RecordFilter
from vlm_sft.data.image_layout import LayoutRule, num_crops
from vlm_sft.data.images import ImageSpec, read_crops, upright_size
from vlm_sft.data.records import open_records
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import ImageError, RecordError, UserError
from vlm_sft.utils.progress import track

TIMED_IMAGES: Final = 12
"""Images that are decoded to measure how fast this machine does it."""


@dataclass
class FileStats:
    """The records of one file. The lists have one entry per tokenized record that is not skipped.

    Attributes:
        path: The file.
        weight: How often each record is seen in an epoch.
        num_records: All records of the file.
        num_tokenized: Records that were tokenized: all, or a random sample.
        skipped: Tokenized records that training would skip or stop at, counted by reason.
        lengths: Tokens, including image tokens.
        targets: Supervised tokens.
        images: Images.
        crops: Their crops.
        prefixes: Digest of the tokens and the image that packing can share with other records;
            empty if there are none.
        prefix_lengths: Tokens of that prefix.
        prefix_crops: Crops of its image.
    """

    path: str
    weight: float
    num_records: int = 0
    num_tokenized: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    crops: list[int] = field(default_factory=list)
    prefixes: list[bytes] = field(default_factory=list)
    prefix_lengths: list[int] = field(default_factory=list)
    prefix_crops: list[int] = field(default_factory=list)

    def add(self, result: FilterResult) -> None:
        """Add one tokenized record."""
        self.num_tokenized += 1
        if result.tokenized is None or result.record is None:
            self.skipped[result.entry.reason] += 1
            return
        self.lengths.append(result.length)
        self.targets.append(result.tokenized.num_targets)
        self.images.append(result.tokenized.num_images)
        self.crops.append(num_crops(result.layouts))
        found = shared_prefix(result.record, result.tokenized, result.layouts)
        prefix, length = found or (b"", 0)
        self.prefixes.append(prefix)
        self.prefix_lengths.append(length)
        self.prefix_crops.append(result.layouts[0].num_crops if found else 0)

    @property
    def records_per_tokenized(self) -> float:
        """Records of the file that each tokenized one represents; 1 without sampling."""
        return self.num_records / max(1, self.num_tokenized)


@dataclass(frozen=True)
class DataStats:
    """The records of all training files.

    Attributes:
        files: Statistics per file, in the configuration's order.
        image_sources: A few images, whose decoding is timed.
        is_assumed: Whether the records are assumed (`--assume`), and not read.
    """

    files: tuple[FileStats, ...]
    image_sources: tuple[ImageSource, ...]
    is_assumed: bool = False

    @property
    def is_complete(self) -> bool:
        """Whether every record was tokenized, and not a sample."""
        return all(file.num_tokenized == file.num_records for file in self.files)

    @property
    def records_per_epoch(self) -> float:
        """Records seen in one epoch, by the weights of the files."""
        return sum(
            file.records_per_tokenized * len(file.lengths) * file.weight for file in self.files
        )

    def mean(self, attribute: str, *, power: int = 1) -> float:
        """Return the mean of an attribute over the records of an epoch.

        Args:
            attribute: `lengths`, `targets` or `images`.
            power: Exponent of each value; 2 for the mean square.
        """
        total = sum(
            file.records_per_tokenized
            * file.weight
            * float((np.asarray(getattr(file, attribute)) ** power).sum())
            for file in self.files
        )
        return total / self.records_per_epoch

    def mean_length_error(self) -> float:
        """Return half of the 95 % confidence interval of the mean length, as a share of the mean.

        0 if every record was tokenized.
        """
        if self.is_complete:
            return 0.0
        mean = self.mean("lengths")
        variance = max(0.0, self.mean("lengths", power=2) - mean**2)
        sample_size = sum(len(file.lengths) for file in self.files)
        return float(1.96 * math.sqrt(variance / sample_size) / mean)

    def longest(self) -> int:
        """Return the tokens of the longest tokenized record."""
        return max(max(file.lengths, default=0) for file in self.files)


def read_data_stats(
    config: RunConfig, chat_tokenizer: ChatTokenizer, *, layout_rule: LayoutRule, sample: int
) -> DataStats:
    """Read and tokenize the training files of a run.

    Args:
        config: The run.
        chat_tokenizer: Tokenizes conversations.
        layout_rule: Gives crops and tokens of every image.
        sample: Records of each file to tokenize, drawn at random; 0 for all.

    Raises:
        UserError: If a file cannot be read, or training would skip every record.
    """
    embedded = _EmbeddedImages(needs_sizes=layout_rule.needs_sizes)
    record_filter = RecordFilter(
        chat_tokenizer, layout_rule=layout_rule, config=config.data, size_of=embedded.size_of
    )
    image_sources: list[ImageSource] = []
    files = [
        _read_file(file, record_filter, image_sources, embedded, sample)
        for file in config.data.train
    ]
    stats = DataStats(tuple(files), tuple(image_sources))
    if not stats.records_per_epoch:
        names = ", ".join(file.path for file in files)
        skipped = sum((file.skipped for file in files), Counter[str]())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items()) or "empty"
        raise UserError(
            f"{names}: no record to train on ({reasons}); see python -m vlm_sft.check",
            code="no_records",
        )
    return stats


def _read_file(
    file: DataFile,
    record_filter: RecordFilter,
    image_sources: list[ImageSource],
    embedded: "_EmbeddedImages",
    sample: int,
) -> FileStats:
    stats = FileStats(file.path, file.weight)
    opened = open_records(file)
    records = _without_image_bytes(
        track(opened.conversations, opened.total, f"reading {Path(file.path).name}"),
        stats,
        image_sources,
        embedded,
    )
    for result in record_filter.filter_all(_random_sample(records, sample) if sample else records):
        stats.add(result)
    return stats


def _without_image_bytes(
    records: Iterator[Conversation | RecordError],
    stats: FileStats,
    image_sources: list[ImageSource],
    embedded: "_EmbeddedImages",
) -> Iterator[Conversation | RecordError]:
    """Count the records, collect a few images, and replace embedded images by their digests.

    A sample of 20,000 records is held in memory, which their encoded images would fill. Digests
    still tell which records share an image.
    """
    for record in records:
        stats.num_records += 1
        if isinstance(record, Conversation):
            image_sources.extend(record.images[: TIMED_IMAGES - len(image_sources)])
            images = tuple(
                embedded.digest(image) if isinstance(image, bytes) else image
                for image in record.images
            )
            record = dataclasses.replace(record, images=images)
        yield record


class _EmbeddedImages:
    """The sizes of embedded images by the digests that replace them.

    Args:
        needs_sizes: Whether tokens depend on them.
    """

    def __init__(self, *, needs_sizes: bool) -> None:
        self._needs_sizes = needs_sizes
        self._sizes: dict[bytes, tuple[int, int] | ImageError] = {}

    def digest(self, image: bytes) -> bytes:
        """Return the digest of an image, and remember its size or what is wrong with its header."""
        digest = hashlib.sha256(image).digest()
        if self._needs_sizes and digest not in self._sizes:
            try:
                self._sizes[digest] = upright_size(image)[:2]
            except ImageError as error:
                self._sizes[digest] = error
        return digest

    def size_of(self, source: ImageSource) -> tuple[int, int]:
        """Return the width and height of an image file, or of an image by its digest.

        Raises:
            ImageError: Its header cannot be read.
        """
        if not isinstance(source, bytes):
            return upright_size(source)[:2]
        size = self._sizes[source]
        if isinstance(size, ImageError):
            raise size
        return size


def _random_sample(records: Iterator[Any], size: int) -> list[Any]:
    """Return `size` records drawn uniformly from a stream, or all of a shorter one.

    Reservoir sampling, one pass over a stream of unknown length (Vitter 1985, algorithm R). The
    seed is fixed, so that a plan is reproducible.
    """
    generator, reservoir = random.Random(0), list[Any]()
    for number, record in enumerate(records):
        if number < size:
            reservoir.append(record)
        else:
            # Record `number` is kept with probability size / (number + 1), in a random place.
            place = generator.randrange(number + 1)
            if place < size:
                reservoir[place] = record
    return reservoir


def images_per_cpu_second(
    sources: Sequence[ImageSource], layout_rule: LayoutRule, spec: ImageSpec, config: RunConfig
) -> float | None:
    """Measure how many images per second one core decodes and resizes for the vision tower.

    Args:
        sources: A few images of the run.
        layout_rule: Gives their crops.
        spec: The tower's input.
        config: The run.

    Returns:
        Images per second of CPU time; None if no image can be read.
    """
    seconds = []
    for source in sources:
        start = time.process_time()
        try:
            aspect, processing = config.data.image_aspect, config.data.image_processing
            read_crops(source, layout_rule, spec, aspect, processing)
        except UserError:
            continue  # training and `check` report unreadable images; here only the time matters
        seconds.append(time.process_time() - start)
    seconds = seconds[1:] or seconds  # the first call also loads the decoder
    return len(seconds) / sum(seconds) if seconds and sum(seconds) > 0 else None
