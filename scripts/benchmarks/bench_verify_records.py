"""Time and memory of `data_tools.verify` on many records.

    python scripts/benchmarks/bench_verify_records.py [--records 1000000] [--cases DIR]

Writes so many LLaVA records (.jsonl) about the images of the verification cases: the answers of all
case files, again and again, each time in another order, so that no image follows itself. Then runs
`python -m data_tools.verify` on them in one thread, and prints records a CPU second, the time, and
the peak of the command's memory, which must not grow with the number of records.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.coco import read_coco

CASES = Path(__file__).parents[2] / "tests" / "data_tools" / "verify_cases"


def main(argv: Sequence[str]) -> int:
    """Write the records, run the command, print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--cases", type=Path, default=CASES, help="folder of case files and COCO's")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_records(root, arguments.cases, arguments.records)
        command = [
            sys.executable, "-m", "data_tools.verify", "--out", str(root / "out"),
            "--instances", str(arguments.cases / "instances.json"),
            "--captions", str(arguments.cases / "captions.json"),
            "--images", str(root / "images"), "--records", str(root / "records.jsonl"),
        ]  # fmt: skip
        start = time.monotonic()
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.monotonic() - start
        size = (root / "out" / "verdicts.jsonl").stat().st_size
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime
    print(done.stdout)
    print(
        f"{arguments.records:,} records: {arguments.records / cpu:,.0f} a CPU second, "
        f"{cpu:,.0f} CPU seconds, {seconds:,.0f} seconds, {used.ru_maxrss / 1024:.0f} MB at the "
        f"most, {size / 1e6:,.0f} MB of verdicts"
    )
    return 0


def write_records(root: Path, cases: Path, number: int) -> None:
    """Write records.jsonl and an empty file for each image."""
    index = read_coco(cases / "instances.json", cases / "captions.json")
    names = {image.id: image.file_name for image in index.images}
    (root / "images").mkdir()
    for name in names.values():
        (root / "images" / name).touch()
    found = [
        json.loads(line)
        for path in sorted(cases.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    with (root / "records.jsonl").open("w", encoding="utf-8") as file:
        for place, case in enumerate(in_many_orders(found, number)):
            turns = [
                {"from": role, "value": text}
                for turn in case["turns"]
                for role, text in zip(("human", "gpt"), turn, strict=True)
            ]
            record = {
                "id": place, "image": names[case["image_id"]], "type": case["type"],
                "conversations": turns,
            }  # fmt: skip
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def in_many_orders(cases: list[dict[str, Any]], number: int) -> Iterator[dict[str, Any]]:
    """Yield so many cases; all of them before one comes again."""
    rng = random.Random(0)
    for start in range(0, number, len(cases)):
        rng.shuffle(cases)
        yield from cases[: number - start]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
