"""CPU-seconds of every command until it has answered `--help` or refused a wrong input.

    python scripts/benchmarks/bench_startup.py [REPEATS]

Prints the median over REPEATS starts (default: 5) of user and system time of the process.
"""

import os
import resource
import statistics
import subprocess
import sys
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


def main() -> None:
    """Print a line for every command."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for command in COMMANDS:
        cases = {"--help": ["--help"], **(WRONG if command in WITH_CONFIG else {})}
        found = {
            name: statistics.median(cpu_seconds([command, *words]) for _ in range(repeats))
            for name, words in cases.items()
        }
        print(f"{command:<24}" + "".join(f"  {n} {s:.2f} s" for n, s in found.items()), flush=True)


if __name__ == "__main__":
    main()
