"""Kill, damage and disturb training runs, and compare their results. Prints a table.

    scripts/reliability               # everything: 200 random kills, 1,000 flipped bits, ...
    scripts/reliability --quick       # a slice of each, within three minutes
    scripts/reliability --only kills  # one part: kills, places, shards, signals, disks, ...
    scripts/reliability --peer        # 20 kills for us and 20 for transformers' Trainer, compared

Every run is the real command on a tiny model, in a process that is really killed. A run is
identical if its weights, its optimizer state and the list of records of every step have the sha256
of an undisturbed run. Exit code 1 if anything differs.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.tools.reliability.damage import Found, flips, losses, truncations
from tests.tools.reliability.kills import Tally, named_kills, random_kills, untouched
from tests.tools.reliability.lab import KINDS, Lab, pack_shards
from tests.tools.reliability.processes import elastic, failed_rank, lost_rank
from tests.tools.reliability.trouble import (
    full_disks,
    lost_worker,
    second_run,
    small_disk,
    terminations,
)
from vlm_sft.commands.run_command import run_command
from vlm_sft.utils.progress import format_seconds

PARTS = ("kills", "places", "shards", "signals", "disks", "damage", "processes")
SETTINGS = (
    "train.save_every_steps=4",
    "train.max_steps=24",
    "train.eval_every_steps=null",
    "train.eval_samples=0",
    "data.num_workers=2",
    "train.micro_batch_size=3",
)
"""Steps of 8 records in micro-batches of 3, 3 and 2; dropout is on where there is LoRA."""
Row = tuple[str, str, str, str, str]


def main(argv: Sequence[str]) -> int:
    """Run the chosen parts; return 1 if anything failed."""
    arguments = _parse(argv)
    folder = Path(tempfile.mkdtemp(prefix="vlm_sft-reliability-"))
    rows: list[Row] = []
    faults: list[str] = []
    try:
        for part in arguments.parts:
            for row, found in MEASURES[part](folder, arguments):
                rows.append(row)
                faults += found
                print(" | ".join(row), file=sys.stderr, flush=True)
    finally:
        if not faults:
            shutil.rmtree(folder, ignore_errors=True)
    Console(width=max(100, Console().width)).print(_table(rows))
    for fault in faults:
        print(f"FAULT: {fault}")
    if faults:
        print(f"the runs are in {folder}")
    return 1 if faults else 0


Measured = Iterator[tuple[Row, list[str]]]


def _kills(folder: Path, arguments: argparse.Namespace) -> Measured:
    for kind in KINDS:
        lab = Lab(folder / f"kills-{kind}", kind, SETTINGS)
        count = 3 if arguments.quick else 67
        yield _tallied(
            "kill -9 at a random time", kind, random_kills(lab, count, seed=arguments.seed)
        )


def _places(folder: Path, arguments: argparse.Namespace) -> Measured:
    for kind in KINDS[:1] if arguments.quick else KINDS:
        lab = Lab(folder / f"places-{kind}", kind, SETTINGS)
        every = 4 if arguments.quick else 1
        yield _tallied("kill -9 at a named place", kind, named_kills(lab, every=every))


def _shards(folder: Path, arguments: argparse.Namespace) -> Measured:
    """Kill runs whose records and images are inside tar files."""
    records = pack_shards(folder / "shards")
    lab = Lab(folder / "kills-shards", "stage2", (*SETTINGS, f"data.train.0.path={records}"))
    count = 2 if arguments.quick else 20
    yield _tallied("kill -9, records in shards", "stage2", random_kills(lab, count, seed=2))


def _signals(folder: Path, arguments: argparse.Namespace) -> Measured:
    counts = {"stage2_lora": 1} if arguments.quick else dict(zip(KINDS, (17, 17, 16), strict=True))
    for kind, count in counts.items():
        lab = Lab(folder / f"signals-{kind}", kind, SETTINGS)
        yield _tallied("SIGTERM at a random time", kind, terminations(lab, count, seed=1))


def _disks(folder: Path, arguments: argparse.Namespace) -> Measured:
    for kind in KINDS[:1] if arguments.quick else KINDS:
        lab = Lab(folder / f"disks-{kind}", kind, SETTINGS)
        with small_disk(folder / "small", 64 << 20) as place:
            if place is None:
                yield ("disk full", kind, "not run", "no right to mount a small disk", "-"), []
            else:
                tenths = (1, 8) if arguments.quick else range(10)
                full = full_disks(lab, place, tenths=tenths)
                yield _tallied("disk full at a tenth of a save", kind, full)
    lab = Lab(folder / "shared", "stage1", SETTINGS)
    yield _single("second run in one folder", "stage1", lambda: second_run(lab))
    yield _single("loader process killed", "stage1", lambda: lost_worker(lab))


def _damage(folder: Path, arguments: argparse.Namespace) -> Measured:
    for kind in KINDS[-1:] if arguments.quick else KINDS:
        lab = Lab(folder / f"damage-{kind}", kind, SETTINGS)
        untouched(lab)
        run = lab.out("untouched")
        count = 50 if arguments.quick else 334
        yield _found("one bit flipped", kind, flips(run, count, seed=arguments.seed))
        yield _found("file cut short", kind, truncations(run))
        yield _found("file gone or too many", kind, losses(run))


def _processes(folder: Path, arguments: argparse.Namespace) -> Measured:
    for kind in KINDS[:1] if arguments.quick else KINDS:
        lab = Lab(folder / f"processes-{kind}", kind, (*SETTINGS, "data.num_workers=0"))
        sizes = (1, 2, 1) if arguments.quick else (1, 2, 4, 1)
        start = time.monotonic()
        found = elastic(lab, sizes)
        wrong = [] if found.same_order else [f"{kind}: another order of records"]
        if found.loss_difference > 1e-6:
            wrong.append(f"{kind}: losses differ by {found.loss_difference:.1e}")
        shown = f"same order, losses within {found.loss_difference:.1e}"
        what = "ranks " + " -> ".join(map(str, sizes))
        yield (what, kind, "1", shown if not wrong else "; ".join(wrong), _since(start)), wrong
    seconds, wrong = lost_rank(folder / "rank")
    shown = f"all ended after {seconds:.0f} s" if not wrong else "; ".join(wrong)
    yield ("rank killed", "stage1", "1", shown, format_seconds(seconds)), wrong
    seconds, wrong = failed_rank(folder / "failed rank")
    shown = "all ended, rank and record named" if not wrong else "; ".join(wrong)
    yield ("broken image in one rank", "stage1", "1", shown, format_seconds(seconds)), wrong


def _peer(folder: Path, arguments: argparse.Namespace) -> Measured:
    """The Trainer's losses are shown; ours are faults."""
    from tests.tools.reliability.peer import SETTINGS as THEIRS
    from tests.tools.reliability.peer import SYSTEMS, Ours, Score, comparison, killed_runs

    scores = {system.name: Score() for system in SYSTEMS}
    for number, kind in enumerate(KINDS):
        count = (arguments.peer + number) // len(KINDS)
        for system in SYSTEMS if count else ():
            what, start = f"kill -9, {system.name}", time.monotonic()
            lab = Lab(folder / f"peer-{system.__name__}-{kind}", kind, (*SETTINGS, *THEIRS))
            last = Score()
            for last in killed_runs(system(lab), count, seed=arguments.seed):
                print(f"\r{what}, {kind}: {last.kills}", end="\r", file=sys.stderr)
            scores[system.name] += last
            faults = last.faults() if system is Ours else []
            yield (what, kind, f"{last.kills}", last.sentence(), _since(start)), faults
    Console(width=max(100, Console().width)).print(comparison(scores))


MEASURES: dict[str, Callable[[Path, argparse.Namespace], Measured]] = {
    "kills": _kills,
    "places": _places,
    "shards": _shards,
    "signals": _signals,
    "disks": _disks,
    "damage": _damage,
    "processes": _processes,
    "peer": _peer,
}


def _tallied(what: str, kind: str, tallies: Iterator[Tally]) -> tuple[Row, list[str]]:
    start, last = time.monotonic(), Tally()
    for last in tallies:
        print(f"\r{what}, {kind}: {last.kills}", end="\r", file=sys.stderr)
    same = last.trials - len(last.faults)
    shown = f"{same} of {last.trials} runs identical, {last.several} of them with two or more kills"
    return (what, kind, f"{last.kills}", shown, _since(start)), last.faults


def _found(what: str, kind: str, found: Iterator[Found]) -> tuple[Row, list[str]]:
    start = time.monotonic()
    *_, last = found
    shown = f"{last.seen} of {last.tried} detected, the previous checkpoint used"
    return (what, kind, f"{last.tried}", shown, _since(start)), last.missed


def _single(what: str, kind: str, measure: Callable[[], str | None]) -> tuple[Row, list[str]]:
    start = time.monotonic()
    wrong = measure()
    row = (what, kind, "1", wrong or "refused or reported as it should be", _since(start))
    return row, [wrong] if wrong else []


def _since(start: float) -> str:
    return format_seconds(time.monotonic() - start)


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="disturbed runs and their results")
    for column, justify in (("event", "left"), ("run", "left"), ("times", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("result")
    table.add_column("time", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a slice of each, for every change")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    parser.add_argument(
        "--peer",
        nargs="?",
        type=int,
        const=20,
        metavar="KILLS",
        help="number of random kills (20) of our runs, and as many of transformers' Trainer",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the times and damages (1)")
    arguments = parser.parse_args(argv)
    arguments.parts = list(arguments.only or (() if arguments.peer else PARTS))
    arguments.parts += ["peer"] if arguments.peer else []
    return arguments


if __name__ == "__main__":
    run_command(main)
