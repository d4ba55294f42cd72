"""Choose records, and write them under unique ids as messages, in a second reading."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.digests import hashed
from data_tools.mix.config import MixConfig
from data_tools.mix.quotas import RecordCounts
from data_tools.mix.read import Source, data_file
from vlm_sft.data.record_writer import as_messages
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.progress import track


def choose(source: Source, wanted: RecordCounts, *, split: bool) -> NDArray[np.uint32]:
    """Return how often each record is taken: in random order, repeatedly if there are too few."""
    usable = source.usable
    pools = [(usable, wanted.plain)]
    if split:
        unsure = usable["cannot_tell"]
        pools = [(usable[~unsure], wanted.plain), (usable[unsure], wanted.cannot_tell)]
    times = np.zeros(len(source.records), np.uint32)
    for pool, number in pools:
        rows = pool["order"].sort_values(kind="stable").index[: source.config.cap]
        if number and len(rows):
            rounds, more = divmod(number, len(rows))
            times[rows] = rounds
            times[rows[:more]] += 1
    return times


def common_root(config: MixConfig, sources: Sequence[Source]) -> Path:
    """Return the directory that contains the images of all sources."""
    if config.image_root is not None:
        return Path(os.path.abspath(config.image_root))
    roots = []
    for source in sources:
        if not source.config.replay:
            file = data_file(source.config)
            path = Path(file.path)
            root = file.image_root or (path if path.is_dir() else path.parent)
            roots.append(os.path.abspath(root))
    return Path(os.path.commonpath(roots or [os.path.abspath(config.output_dir)]))


def mixed_records(
    sources: Sequence[Source], times: Sequence[NDArray[np.uint32]], image_root: Path
) -> Iterator[dict[str, Any]]:
    """Yield the mixture in the order of the sources and their files; the trainer shuffles.

    Raises:
        UserError: An image is outside `image_root`, two records get the same id, or a source has
            changed since it was first read.
    """
    given: set[int] = set()
    for source, taken in zip(sources, times, strict=True):
        ids = source.records["id"][source.records["id"] != 0]
        repeated = set(ids[ids.duplicated(keep=False)].tolist())
        seen: Counter[int] = Counter()
        found = track(source.conversations(), len(taken), f"writing {source.config.name}")
        for place, record in enumerate(found):
            if place >= len(taken) or (isinstance(record, RecordError) and taken[place]):
                raise UserError(f"{source.config.path}: has changed while it was read; mix again")
            if isinstance(record, RecordError):
                continue
            name = f"{source.config.name}/{record.id}"
            if (own := hashed(record.id)) in repeated:
                seen[own] += 1
                name += f"#{seen[own]}" if seen[own] > 1 else ""
            for copy in range(1, int(taken[place]) + 1):
                record_id = f"{name}+{copy}" if copy > 1 else name
                key = hashed(record_id)
                if key in given:
                    raise UserError(
                        f"two records would get the id {record_id!r}: an id of the source ends in "
                        "a suffix that repeated records get (#2, +2); change that id"
                    )
                given.add(key)
                yield {"id": record_id, "messages": as_messages(record, image_root)}
