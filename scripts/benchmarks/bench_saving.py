"""Time that resumable checkpoints add to a step, and their size, against plain file writing.

    .venv/bin/python scripts/benchmarks/bench_saving.py
    .venv/bin/python scripts/benchmarks/bench_saving.py --hidden-size 768 --layers 12

Runs stage 2 (full fine-tuning of a language model with random weights) in turns without
checkpoints, with synchronous and with asynchronous ones, and compares the step times that the runs
log. Then it writes the tensors of one checkpoint with torch.save, with safetensors, and with
safetensors plus fsync and sha256, which is a lower bound for a save. Medians over rounds.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from vlm_sft import stage1, stage2
from vlm_sft.commands.run_command import run_command
from vlm_sft.utils.progress import track

TINY = Path(__file__).resolve().parent.parent.parent / "configs" / "tiny"
STEPS, EVERY = 24, 6
MODES = {
    "no saving": (10**6, False),
    "saving in place": (EVERY, False),
    "saving beside training": (EVERY, True),
}


@dataclass(frozen=True)
class Timed:
    """One run: seconds of its steps, of those behind a save, and in all after the first step."""

    step: float
    after_save: float
    total: float


def main(argv: Sequence[str]) -> int:
    """Run, time, print."""
    arguments = _parse(argv)
    os.chdir(TINY.parent.parent)
    with tempfile.TemporaryDirectory(dir=arguments.disk) as name:
        folder = Path(name)
        found = _train(folder, arguments)
        checkpoint = folder / "saving in place" / "checkpoints" / f"step-{STEPS:08d}"
        files = [path for path in checkpoint.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        tensors = {
            f"{path.stem}/{key}": value
            for path in files
            if path.suffix == ".safetensors"
            for key, value in load_file(path).items()
        }
        plain = _plain_writes(tensors, folder)
    console = Console(width=100)
    console.print(_run_table(found, size))
    console.print(_write_table(plain, size))
    return 0


def _train(folder: Path, arguments: argparse.Namespace) -> dict[str, list[Timed]]:
    size, layers = arguments.hidden_size, arguments.layers
    config = "model.language_model.config."
    model = [
        f"{config}hidden_size={size}",
        f"{config}intermediate_size={4 * size}",
        f"{config}num_hidden_layers={layers}",
    ]
    common = ["train.trackers=[]", "train.eval_samples=0", "train.epochs=1000"]
    first = [f"output_dir={folder / 'stage1'}", "train.max_steps=1", *common, *model]
    _quietly(lambda: stage1.main([str(TINY / "stage1.yaml"), *first]))
    found: dict[str, list[Timed]] = {mode: [] for mode in MODES}
    runs = [(mode, number) for number in range(arguments.rounds) for mode in MODES]
    for mode, number in track(runs, description="training"):
        every, background = MODES[mode]
        out = folder / (mode if number == 0 else f"{mode} {number}")
        options = [
            f"output_dir={out}",
            f"projector={folder / 'stage1' / 'final'}",
            f"train.max_steps={STEPS}",
            f"train.save_every_steps={every}",
            f"train.async_checkpointing={str(background).lower()}",
            "train.eval_every_steps=null",
        ]
        _quietly(lambda o=options: stage2.main([str(TINY / "stage2.yaml"), *o, *common, *model]))  # type: ignore[misc]
        found[mode].append(_timed(out))
    return found


def _timed(out: Path) -> Timed:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clock = {row["step"]: row["seconds"] for row in rows if "loss" in row}
    steps = {step: clock[step] - clock[step - 1] for step in clock if step > 1}
    saved = [seconds for step, seconds in steps.items() if step % EVERY == 1]
    others = [seconds for step, seconds in steps.items() if step % EVERY != 1]
    return Timed(statistics.median(others), statistics.median(saved), clock[STEPS] - clock[1])


def _plain_writes(tensors: Mapping[str, torch.Tensor], folder: Path) -> dict[str, float]:
    """Median seconds of each way to write the tensors of one checkpoint."""
    path = folder / "plain"

    def synced() -> None:
        save_file(dict(tensors), path)
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def proven() -> None:
        synced()
        for _ in range(2):  # once for the manifest, once to prove what is on the disk
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")

    ways: dict[str, Callable[[], object]] = {
        "torch.save": lambda: torch.save(dict(tensors), path),
        "safetensors": lambda: save_file(dict(tensors), path),
        "safetensors, fsync": synced,
        "safetensors, fsync, sha256 twice": proven,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(5):
        for way, write in ways.items():
            path.unlink(missing_ok=True)
            start = time.perf_counter()
            write()
            times[way].append(time.perf_counter() - start)
    return {way: statistics.median(values) for way, values in times.items()}


def _run_table(found: Mapping[str, Sequence[Timed]], size: int) -> Table:
    table = Table(title=f"{STEPS} steps, a checkpoint of {size / 1e6:.0f} MB every {EVERY}")
    table.add_column("run")
    for column in ("a step", "a step behind a save", "a save costs the run", "of a step"):
        table.add_column(column, justify="right")
    without = statistics.median(timed.total for timed in found["no saving"])
    step = statistics.median(timed.step for timed in found["no saving"])
    for mode, timed in found.items():
        total = statistics.median(one.total for one in timed)
        # The save behind the last step is not in the clock of the steps.
        cost = (total - without) / ((STEPS - 1) // EVERY)
        table.add_row(
            mode,
            f"{statistics.median(one.step for one in timed):.3f} s",
            "-"
            if mode == "no saving"
            else f"{statistics.median(one.after_save for one in timed):.3f} s",
            "-" if mode == "no saving" else f"{cost:.3f} s",
            "-" if mode == "no saving" else f"{cost / step:.2f}",
        )
    return table


def _write_table(plain: Mapping[str, float], size: int) -> Table:
    table = Table(title="the same tensors written plainly")
    for column in ("way", "seconds", "MB/s"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for way, seconds in plain.items():
        table.add_row(way, f"{seconds:.3f}", f"{size / 1e6 / seconds:.0f}")
    return table


def _quietly(action: Callable[[], int]) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = action()
    if code:
        raise RuntimeError(said.getvalue())


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmarks/bench_saving.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hidden-size", type=int, default=512, help="of the language model (512)")
    parser.add_argument("--layers", type=int, default=8, help="of the language model (8)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (3)")
    parser.add_argument("--disk", metavar="DIR", help="where to write (the folder for temporaries)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
