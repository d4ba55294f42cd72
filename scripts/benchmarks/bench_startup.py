"""Time from a command to its answer, and from `vlm-sft stage1` to the first optimizer step.

    python scripts/benchmarks/bench_startup.py [--repeats N]
    python scripts/benchmarks/bench_startup.py --first-step CHECKOUT [CHECKOUT ...] [--repeats N]

The first form prints, for every command, the median over N starts (default: 5) of user and
system time until it has answered `--help` or refused a wrong input. The second starts stage 1 of
configs/tiny with the code of each checkout in turn, N times, until the first row of
`metrics.jsonl` is there, and prints the medians of wall time and of CPU time of the process.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CONFIG = "configs/tiny/stage1.yaml"
WITH_CONFIG = ("vlm_sft.stage1", "vlm_sft.stage2", "vlm_sft.check", "vlm_sft.plan", "vlm_sft.show")
COMMANDS = (
    "vlm_sft",
    "vlm_sft.config",
    *WITH_CONFIG,
    "vlm_sft.chat",
    "vlm_sft.evaluate",
    "vlm_sft.export",
    "vlm_sft.report",
    "vlm_sft.errors",
    "data_tools.build_coco",
    "data_tools.make_scenes",
    "data_tools.mix",
    "data_tools.pope",
    "data_tools.verify",
    "data_tools.instruct",
)
WRONG = {
    "misspelled key": [CONFIG, "data.max_lenght=3"],
    "no config": ["nowhere.yaml"],
    "no data": [CONFIG, "data.train.0.path=nowhere.json"],
}


def cpu_seconds(words: list[str]) -> float:
    """Return user and system time of one start, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def until_first_step(checkout: Path) -> tuple[float, float]:
    """Return wall time and CPU time from the start of stage 1 to its first logged step."""
    place = Path(tempfile.mkdtemp())
    rows = place / "run" / "metrics.jsonl"
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    start = time.monotonic()
    settings = [f"output_dir={place / 'run'}", "train.trackers=[]"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm_sft.stage1", CONFIG, *settings],
        cwd=checkout,
        stderr=subprocess.DEVNULL,
        env={**kept, "PYTHONPATH": str(checkout)},
    )
    try:
        while not (rows.exists() and rows.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"{checkout}: the run ended with {process.returncode}")
            time.sleep(0.01)
        wall = time.monotonic() - start
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return wall, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(place)


def print_first_steps(checkouts: Sequence[Path], repeats: int) -> None:
    """Print the medians of every checkout; one start of each is left out and fills the caches."""
    times: dict[Path, list[tuple[float, float]]] = {checkout: [] for checkout in checkouts}
    for _ in range(repeats + 1):
        for checkout in checkouts:
            times[checkout].append(until_first_step(checkout))
    for checkout, found in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*found[1:], strict=True))
        print(f"{checkout}: first step after {wall:.2f} s, {cpu:.2f} CPU-seconds", flush=True)


def main() -> None:
    """Print a line for every command, or for every checkout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--first-step", type=Path, nargs="+", metavar="CHECKOUT")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    arguments = parser.parse_args()
    if arguments.first_step:
        print_first_steps([path.absolute() for path in arguments.first_step], arguments.repeats)
        return
    for command in COMMANDS:
        cases = {"--help": ["--help"], **(WRONG if command in WITH_CONFIG else {})}
        found = {
            name: statistics.median(
                cpu_seconds([command, *words]) for _ in range(arguments.repeats)
            )
            for name, words in cases.items()
        }
        print(f"{command:<24}" + "".join(f"  {n} {s:.2f} s" for n, s in found.items()), flush=True)


if __name__ == "__main__":
    main()
