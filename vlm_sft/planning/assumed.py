"""Assumed records, for plans without the data: all of the same length."""

from dataclasses import dataclass

from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import UserError
from vlm_sft.planning.data_stats import DataStats, FileStats


@dataclass(frozen=True)
class AssumedRecords:
    """What `--assume` says about the records of an epoch.

    Attributes:
        count: Records of an epoch.
        tokens: Tokens of each, image tokens included.
        targets: Supervised tokens of each.
        crops: Images, or crops of an image, that the vision tower encodes for each.
    """

    count: int
    tokens: int
    targets: int
    crops: int


def parse_assumed(text: str) -> AssumedRecords:
    """Read `RECORDS,TOKENS,SUPERVISED` or `RECORDS,TOKENS,SUPERVISED,CROPS`.

    Raises:
        UserError: The text is something else, or more tokens are supervised than there are.
    """
    parts = text.split(",")
    numbers = [int(part) for part in parts if part.isascii() and part.isdigit() and int(part) > 0]
    if len(numbers) != len(parts) or len(parts) not in (3, 4):
        raise UserError(
            f"--assume {text}: expected RECORDS,TOKENS,SUPERVISED or RECORDS,TOKENS,SUPERVISED,"
            "CROPS, each at least 1, e.g. 665298,1200,200"
        )
    found = AssumedRecords(numbers[0], numbers[1], numbers[2], (numbers[3:] or [1])[0])
    if found.targets > found.tokens:
        raise UserError(
            f"--assume {text}: {found.targets:,} of {found.tokens:,} tokens cannot be supervised; "
            "give at most as many"
        )
    return found


def assumed_data_stats(assumed: AssumedRecords, config: RunConfig) -> DataStats:
    """Return the statistics of the assumed records; one step of them stands for all.

    Raises:
        UserError: If the records are longer than `data.max_length`.
    """
    if assumed.tokens > config.data.max_length:
        raise UserError(
            f"--assume: records of {assumed.tokens:,} tokens are longer than data.max_length "
            f"({config.data.max_length:,}); assume shorter ones"
        )
    sample = min(assumed.count, config.train.global_batch_size)
    records = FileStats(
        "assumed records",
        weight=1.0,
        num_records=assumed.count,
        num_tokenized=sample,
        lengths=[assumed.tokens] * sample,
        targets=[assumed.targets] * sample,
        images=[assumed.crops] * sample,
        crops=[assumed.crops] * sample,
        prefixes=[b""] * sample,
        prefix_lengths=[0] * sample,
        prefix_crops=[0] * sample,
    )
    return DataStats((records,), image_sources=(), is_assumed=True)
