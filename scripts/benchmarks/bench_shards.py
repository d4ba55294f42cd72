"""Index tar shards, read all their records and random images, and measure time and memory.

    python -m scripts.benchmarks.bench_shards --records 1000000 --folder /tmp/shards

Every record is a caption of 60 characters and an image of `--bytes` random bytes, which is read
and not decoded. The shards are written first, unless the folder has them.
"""

import argparse
import io
import os
import random
import resource
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.images import read_bytes
from vlm_sft.data.records import open_records
from vlm_sft.utils.progress import track
from vlm_sft.utils.tar_index import open_index

PER_SHARD = 10_000
RANDOM_READS = 20_000


def main(argv: Sequence[str]) -> int:
    """Print a line per measurement; return 0."""
    parser = argparse.ArgumentParser(prog="bench_shards", description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--bytes", type=int, default=256)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(arguments.folder / "cache")
    shards = write_shards(arguments.folder, arguments.records, arguments.bytes)
    for what in ("first time", "from the cache"):
        start, before = time.process_time(), memory()
        indices = [open_index(shard) for shard in shards]
        seconds = time.process_time() - start
        members = sum(map(len, indices))
        grown = memory() - before
        print(f"index, {what}: {members:,} members, {seconds:.1f} CPU s, +{grown:.0f} MB")
        del indices
        open_index.__globals__["_open_index"].cache_clear()
    start, before, count = time.process_time(), memory(), 0
    for record in open_records(DataFile(path=str(arguments.folder))).conversations:
        count += isinstance(record, Conversation)
    seconds, grown = time.process_time() - start, memory() - before
    print(f"read in order: {count:,} records, {seconds:.1f} CPU s, +{grown:.0f} MB")
    draw, start, before = random.Random(0), time.process_time(), memory()
    for _ in range(RANDOM_READS):
        number = draw.randrange(arguments.records)
        read_bytes(shards[number // PER_SHARD] / f"{number:08d}.jpg")
    rate = RANDOM_READS / (time.process_time() - start)
    print(f"random images: {rate:,.0f} per CPU s, +{memory() - before:.0f} MB")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"peak of the process: {peak:.0f} MB")
    return 0


def memory() -> float:
    """Return the anonymous memory of this process in MB, which excludes mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1000
    raise RuntimeError("no RssAnon in /proc/self/status; run this on Linux")


def write_shards(folder: Path, records: int, num_bytes: int) -> list[Path]:
    """Write shards of `PER_SHARD` records, unless they exist; return their paths."""
    draw, paths = random.Random(0), []
    for first in track(range(0, records, PER_SHARD), description="writing shards"):
        path = folder / f"{first // PER_SHARD:05d}.tar"
        paths.append(path)
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".part"), "w") as archive:
            for number in range(first, min(first + PER_SHARD, records)):
                caption = f"Caption {number} " + "of a scene " * 4
                for ending, data in (
                    ("jpg", draw.randbytes(num_bytes)),
                    ("txt", caption.encode()),
                ):
                    info = tarfile.TarInfo(f"{number:08d}.{ending}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
                archive.members = []  # type: ignore[attr-defined]
        path.with_suffix(".part").rename(path)
    return paths


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
