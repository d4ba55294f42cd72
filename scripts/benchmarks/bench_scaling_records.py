"""Measure one size of the records part of `bench_scaling`, in a process of its own.

    python scripts/benchmarks/bench_scaling_records.py MODEL_FOLDER ROWS.jsonl RESULT.json

Reads, tokenizes and filters every record as a run does, orders an epoch, plans its packs, and
opens a few records; after each, the process's CPU-seconds and resident memory.
"""

import json
import os
import random
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_model import SEED
from bench_sizes import NUM_IMAGE_TOKENS
from transformers import AutoTokenizer

from vlm_sft.config.schema import DataConfig, DataFile
from vlm_sft.data.dataset import SupervisedDataset
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.images import ImageSpec
from vlm_sft.data.ledger import Ledger
from vlm_sft.data.packing import pack_records
from vlm_sft.data.sampler import StepSampler
from vlm_sft.data.tokenize import ChatTokenizer

STEP, PACK, OPENED, LOOKED_AT = 128, 8192, 64, 1000
CLIP = ImageSpec(336, (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758), "bicubic")


@dataclass(frozen=True)
class Point:
    """CPU-seconds of this process so far, and its resident memory in bytes."""

    cpu: float
    resident: int

    @classmethod
    def now(cls) -> "Point":
        """Where the process is."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(time.process_time(), pages * os.sysconf("SC_PAGE_SIZE"))


def main(model: Path, rows: Path, result: Path) -> None:
    """Measure and write."""
    tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer")
    chat_tokenizer = ChatTokenizer.from_name("vicuna_v1", tokenizer)
    Path("/proc/self/clear_refs").write_text("5")  # what the imports' peak was is not asked for
    points = {"start": Point.now()}
    config = DataConfig(train=[DataFile(path=str(rows))], image_aspect="crop")
    ledger = Ledger()
    data = SupervisedDataset(
        config.train,
        chat_tokenizer,
        CLIP,
        layout_rule=LayoutRule(NUM_IMAGE_TOKENS),
        config=config,
        ledger=ledger,
    )
    points["read and tokenized"] = Point.now()
    peak = _peak_resident()
    sampler = StepSampler(data.weights, batch_size=STEP, seed=SEED, prefix_ids=data.prefix_ids)
    steps = [sampler.step_indices(step) for step in range(sampler.steps_per_epoch)]
    points["in order"] = Point.now()
    for indices in steps:
        pack_records(indices, data, max_tokens=PACK, share_image_prefix=True)
    points["packed"] = Point.now()
    draw = random.Random(SEED)
    for _ in range(OPENED):
        data[draw.randrange(len(data))]
    points["opened"] = Point.now()
    found = {
        "records": len(data),
        "tokens": int(np.mean(data.lengths[:LOOKED_AT])),
        "opened": OPENED,
        "points": {name: asdict(point) for name, point in points.items()},
        "peak_while_reading": peak,
        "state_bytes": _state_bytes(data, ledger),
    }
    result.write_text(json.dumps(found))


def _peak_resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _state_bytes(data: SupervisedDataset, ledger: Ledger) -> dict[str, float]:
    """Bytes a record of everything the data set and its ledger keep, by name, the most first."""
    held = {name: value for name, value in vars(data).items() if _is_held(value)}
    held["ledger"] = ledger.entries
    sizes = {name: _size(value) / len(data) for name, value in held.items()}
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _is_held(value: Any) -> bool:
    return isinstance(value, (list, array, np.ndarray)) and len(value) > LOOKED_AT // 2


def _size(values: Any) -> float:
    """Bytes of a sequence and all it holds, the elements' taken from evenly spread ones."""
    if isinstance(values, np.ndarray):
        return float(values.nbytes)
    own = sys.getsizeof(values)
    if isinstance(values, array):
        return float(own)
    stride = max(1, len(values) // LOOKED_AT)
    looked_at = values[::stride]
    seen: set[int] = set()
    return own + sum(_deep(element, seen) for element in looked_at) * len(values) / len(looked_at)


def _deep(value: Any, seen: set[int]) -> int:
    """Bytes of an object and what it refers to, each counted once; small shared ones not at all."""
    if id(value) in seen or value is None or isinstance(value, bool):
        return 0
    if isinstance(value, int) and -5 <= value <= 256:
        return 0
    seen.add(id(value))
    size = sys.getsizeof(value)
    parts: Sequence[Any] = ()
    if isinstance(value, (tuple, list)):
        parts = value
    elif is_dataclass(value):
        size += sys.getsizeof(vars(value)) if hasattr(value, "__dict__") else 0
        parts = [getattr(value, field.name) for field in fields(value)]
    return size + sum(_deep(part, seen) for part in parts)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
