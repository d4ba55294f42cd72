"""Index tar shards, read all their records and random images, and measure time and memory.

    python -m scripts.benchmarks.bench_shards --records 1000000 --folder /tmp/shards
    python -m scripts.benchmarks.bench_shards --records 1000000 --folder /tmp/arrow --arrow

Every record is a caption of 60 characters and an image of `--bytes` random bytes, which is read
and not decoded. The data is written first, unless the folder has it. With `--arrow` it is a folder
of `datasets` (`save_to_disk`), and images are read from its Arrow table.

Anonymous memory is what the process holds itself; the peak is the largest of samples that are taken
every 1,000 records. The resident size also counts pages of mapped files, which the system takes
back when it needs them.
"""

import argparse
import io
import os
import random
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    parser.add_argument("--arrow", action="store_true")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(arguments.folder / "cache")
    print(f"{arguments.records:,} records; at the start: {memory()}")
    if arguments.arrow:
        read_in_order(write_arrow(arguments.folder / "table", arguments.records, arguments.bytes))
        return 0
    shards = write_shards(arguments.folder, arguments.records, arguments.bytes)
    print(f"shards are written: {memory()}")
    for what in ("first time", "from the cache"):
        start = time.process_time()
        indices = [open_index(shard) for shard in shards]
        seconds = time.process_time() - start
        members = sum(map(len, indices))
        print(f"index, {what}: {members:,} members, {seconds:.1f} CPU s; {memory()}")
        del indices
        open_index.__globals__["_open_index"].cache_clear()
    read_in_order(arguments.folder)
    draw, start = random.Random(0), time.process_time()
    for _ in range(RANDOM_READS):
        number = draw.randrange(arguments.records)
        read_bytes(shards[number // PER_SHARD] / f"{number:08d}.jpg")
    rate = RANDOM_READS / (time.process_time() - start)
    print(f"random images: {rate:,.0f} per CPU s; {memory()}")
    return 0


def read_in_order(path: Path) -> None:
    """Read all records of a folder, and print time and memory."""
    start, count, peak = time.process_time(), 0, 0.0
    for record in open_records(DataFile(path=str(path))).conversations:
        count += isinstance(record, Conversation)
        if count % 1000 == 0:
            peak = max(peak, megabytes("RssAnon"))
    seconds = time.process_time() - start
    print(
        f"read in order: {count:,} records, {seconds:.1f} CPU s, anonymous peak {peak:.0f} MB; "
        f"{memory()}"
    )


def memory() -> str:
    """Return the anonymous memory of this process now, and its largest resident size."""
    return f"anonymous {megabytes('RssAnon'):.0f} MB, largest resident {megabytes('VmHWM'):.0f} MB"


def megabytes(name: str) -> float:
    """Return a size from the status of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1000
    raise RuntimeError(f"no {name} in /proc/self/status; run this on Linux")


def write_arrow(folder: Path, records: int, num_bytes: int) -> Path:
    """Write a folder of `datasets`, unless it exists; return it."""
    if not folder.exists():
        import datasets

        def rows() -> Iterator[dict[str, Any]]:
            draw = random.Random(0)
            for number in track(range(records), description="writing rows"):
                image = {"bytes": draw.randbytes(num_bytes), "path": None}
                yield {"image": image, "text": f"Caption {number} " + "of a scene " * 4}

        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        made = datasets.Dataset.from_generator(
            rows, features=features, cache_dir=str(folder.with_name("generated"))
        )
        made.save_to_disk(str(folder))
    return folder


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
