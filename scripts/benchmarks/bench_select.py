"""Score 10,000 and 100,000 tiny records with `select`: memory, speed, and a kill in the middle.

    python scripts/benchmarks/bench_select.py --folder /tmp/select

A tiny model is trained for one step. One record in ten has an image. Each number of records is
selected from by a process of its own, whose anonymous memory (without mapped files) is read ten
times a second. The process with the most records is killed with SIGKILL when half of its scores are
in the cache, and started again: the scores that were written may not be computed a second time.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pyarrow import parquet

ROOT = Path(__file__).parent.parent.parent
IMAGES = 500


def main(argv: Sequence[str]) -> int:
    """Print a line per start; return 0 if every score was computed once."""
    parser = argparse.ArgumentParser(prog="bench_select", description=__doc__)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args(argv)
    folder: Path = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    model = train(folder / "model")
    write_images(folder / "images")
    for records in arguments.records:
        config = write_records(folder, records, model)
        cache = folder / f"out-{records}" / "cache"
        before = len(digests(cache))
        killed = None
        if records == max(arguments.records) and before < records // 2:
            killed = run(config, cache, kill_at=records // 2)
            print(f"{records:,} records: {killed}, killed with {len(digests(cache)):,} scores")
            before = len(digests(cache))
        done = run(config, cache)
        found = digests(cache)
        twice = len(found) - len(set(found))
        print(
            f"{records:,} records: {done}, {before:,} scores before and "
            f"{len(found) - before:,} computed, {twice:,} of them a second time"
        )
        if twice or len(found) != records or done.code:
            return 1
    return 0


@dataclass(frozen=True)
class Start:
    """One start of the command: exit code, seconds, and its peak of anonymous memory in MB."""

    code: int
    seconds: float
    peak: float

    def __str__(self) -> str:
        return f"peak {self.peak:,.0f} MB anonymous, {self.seconds:,.0f} s"


def run(config: Path, cache: Path, *, kill_at: int | None = None) -> Start:
    """Run `select` to its end, or kill it once the cache has this many scores."""
    command = [sys.executable, "-m", "data_tools.select", str(config)]
    start, peak = time.monotonic(), 0.0
    with (config.parent / "log.txt").open("ab") as log:
        single = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=single)
        looked = start
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            if kill_at is not None and time.monotonic() - looked > 2:
                looked = time.monotonic()
                if len(digests(cache)) >= kill_at:
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.1)
    return Start(process.returncode, time.monotonic() - start, peak)


def anonymous(pid: int) -> float:
    """Return the anonymous memory of a process in MB; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) / 1000 for line in lines if line.startswith("RssAnon:"))


def digests(cache: Path) -> list[str]:
    """Return the digests of all scores in the cache."""
    parts = sorted(cache.glob("*/part-*.parquet"))
    return [
        d for p in parts for d in parquet.read_table(p, columns=["digest"])["digest"].to_pylist()
    ]


def train(folder: Path) -> Path:
    """Train the tiny model for one step, unless it is there; return its checkpoint."""
    if not (folder / "final" / "manifest.json").exists():
        quiet = ["projector=null", "train.trackers=[]", "train.eval_samples=0", "data.eval=[]"]
        command = [sys.executable, "-m", "vlm_sft.stage2", "configs/tiny/stage2.yaml", *quiet]
        command += [f"output_dir={folder}", "train.max_steps=1"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "final"


def write_images(folder: Path) -> None:
    """Write small images of noise."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        if not (path := folder / f"{number}.png").exists():
            Image.fromarray(noise).save(path)


def write_records(folder: Path, records: int, model: Path) -> Path:
    """Write records, each of them different, and the configuration; return its path."""
    draw = random.Random(0)
    data = folder / f"records-{records}.jsonl"
    with data.open("w") as file:
        for number in range(records):
            has_image = number % 10 == 0
            turns = [
                {"from": "human", "value": "<image>\n" * has_image + f"What is {number}?"},
                {"from": "gpt", "value": draw.choice(["A dog.", "Nothing.", "Two red cups."])},
            ]
            record: dict[str, Any] = {"id": f"r{number}", "type": draw.choice("abc")}
            record |= {"image": f"{number // 10 % IMAGES}.png"} if has_image else {}
            record["conversations"] = turns
            file.write(json.dumps(record) + "\n")
    config = folder / f"select-{records}.yaml"
    settings = {
        "output_dir": str(folder / f"out-{records}"),
        "path": str(data),
        "image_root": str(folder / "images"),
        "model": str(model),
        "rank_by": "ifd",
        "batching": "packed",
        "device": "cpu",
    }
    config.write_text(json.dumps(settings))
    return config


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
