"""Training speed and peak memory of vlm_sft and its peers on the same rows, order and weights.

    scripts/benchmarks/bench_train  # CPU, tiny LLaVA, all peers
    scripts/benchmarks/bench_train --whole  # a whole set in steps of 16, shared image prefixes too
    scripts/benchmarks/bench_train --whole --size small --peers vlm_sft  # other shapes
    scripts/benchmarks/bench_train --device cuda --size 7b  # GPU: stage 1, LoRA, QLoRA, full
    scripts/benchmarks/bench_train --stages --steps 2  # the GPU's code path, tiny, on the CPU

On a CPU every peer is one process on one thread; figures are per process CPU-second, from the end
of the first step to the end of the last, medians over rounds in which the peers take turns. uv
creates the peers' environments under --environments the first time.
"""

import argparse
import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_environments import DEFAULT, environment_python
from bench_flops import sample_flops
from bench_model import SEED, make_model
from bench_plots import plot_peers
from bench_results import FOLDER, command_line, machine_facts, print_table, write_results
from bench_rows import Row, make_rows, write_images, write_rows
from bench_runs import BATCH, JobFields, Peer, Runs, say
from bench_sizes import SIZES
from bench_stages import STAGES, machine_rate, row_samples, stage_rows
from rich.console import Console

from vlm_sft.commands.run_command import run_command
from vlm_sft.config.schema import TrainConfig
from vlm_sft.data.sampler import epoch_order
from vlm_sft.errors import UserError

WHOLE_STEPS, WHOLE_BATCH = 12, 16
WHOLE_ROWS = WHOLE_STEPS * WHOLE_BATCH
WHOLE = f"A whole set: {WHOLE_ROWS} rows in {WHOLE_STEPS} steps of {WHOLE_BATCH}"
PACKED = {"train": {"micro_batch_size": None, "packing": {"max_tokens": 2048}}}
SHARED = {"train": {**PACKED["train"], "share_image_prefix": True}}
CANNOT_PACK = "not measured: this version of vlm_sft has no train.packing"
EQUAL_LOSS = 1e-4

REFERENCE = Peer("padded reference loop", "reference.py", "hf_trainer", 6.0)
OURS_PADDED = Peer("vlm_sft, padded", "ours.py", None, 2.7)
OURS_PACKED = Peer("vlm_sft, packed", "ours.py", None, 2.3, config=PACKED)
OURS_SHARED = Peer("vlm_sft, packed, shared prefixes", "ours.py", None, 1.8, config=SHARED)
SWIFT = Peer("ms-swift, batch 4", "ms_swift.py", "ms_swift", 3.7)
SWIFT_ONE = Peer("ms-swift, batch 1", "ms_swift.py", "ms_swift", 2.5, micro_batch_size=1)
WHOLE_PEERS = (OURS_PADDED, OURS_PACKED, OURS_SHARED, SWIFT, SWIFT_ONE)
"""Peers that are quick enough to be measured over a whole set."""
ALL_PEERS = (
    REFERENCE,
    OURS_PADDED,
    OURS_PACKED,
    SWIFT,
    SWIFT_ONE,
    Peer("HF Trainer, own collator", "hf_trainer.py", "hf_trainer", 7.2),
    Peer("TRL SFTTrainer", "trl_sft.py", "trl", 16.5),
)


def main(argv: Sequence[str]) -> int:
    """Run the requested benchmark; print and write the results."""
    arguments = _parse(argv)
    facts = machine_facts()
    device, size = arguments.device, SIZES[arguments.size]
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; run this where there is one")
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as name:
        work = Path(name)
        say("drawing the weights")
        wide = torch.bfloat16 if device == "cuda" else torch.float32
        make_model(size, work / "model", device=device, dtype=wide)
        if arguments.whole:
            _compare_on_whole_set(work, arguments, facts)
        elif arguments.stages or arguments.size != "tiny":
            stage_rows(work, arguments, facts, Runs(work, arguments))
        else:
            _compare_peers(work, arguments, facts)
    return 0


# --- the peers on the CPU


def _compare_peers(work: Path, arguments: argparse.Namespace, facts: JobFields) -> None:
    steps, rounds = arguments.steps, arguments.rounds
    rows = make_rows(BATCH * steps, seed=SEED)
    job = _data(work / "rows", rows) | {"steps": steps}
    peers = [peer for peer in ALL_PEERS if _wanted(peer, arguments)]
    runs = Runs(work, arguments)
    able = [peer for peer in peers if _missing(peer) is None]
    runs.planned = rounds * sum(peer.work(steps) for peer in able)
    _make_environments(able, arguments)
    found: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in able}
    for number in range(rounds):
        for peer in able:
            ours = {"rows": job["unordered"]} if peer.is_ours else {}
            one = runs.run(peer, _job(job | ours), note=f"round {number + 1} of {rounds}")
            found[peer.name].append(one)
    table = _peer_table(peers, found)
    _tell(arguments, facts, table, found, steps)


def _make_environments(peers: Sequence[Peer], arguments: argparse.Namespace) -> None:
    """Create what is missing, so that none is created while others are measured."""
    for peer in peers:
        if peer.environment is not None:
            environment_python(peer.environment, Path(arguments.environments))


def _job(data: JobFields) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "unordered"}


def _wanted(peer: Peer, arguments: argparse.Namespace) -> bool:
    words = arguments.peers
    return not words or any(word.lower() in peer.name.lower() for word in words)


def _missing(peer: Peer) -> str | None:
    """Why this version of vlm_sft cannot run the row; None where it can."""
    settings = peer.config.get("train", {})
    return None if set(settings) <= set(TrainConfig.model_fields) else CANNOT_PACK


def _data(folder: Path, rows: Sequence[Row]) -> dict[str, Any]:
    """The rows on the disk: as they are for vlm_sft, in the order of its seed for the peers."""
    folder.mkdir()
    write_images(rows, folder)
    write_rows(rows, folder / "rows.jsonl")
    order = epoch_order([1.0] * len(rows), seed=SEED, epoch=0)
    write_rows([rows[index] for index in order], folder / "ordered.jsonl")
    return {
        "unordered": str(folder / "rows.jsonl"),
        "rows": str(folder / "ordered.jsonl"),
        "images": str(folder),
    }


def _peer_table(
    peers: Sequence[Peer], found: Mapping[str, Sequence[JobFields]]
) -> list[dict[str, Any]]:
    best = next((n for n in (OURS_PACKED.name, OURS_PADDED.name) if found.get(n)), None)
    reference = found.get(REFERENCE.name)
    table = []
    for peer in peers:
        runs = found.get(peer.name)
        if not runs:
            table.append({"name": peer.name, "note": _missing(peer)})
            continue
        table.append(
            {
                "name": peer.name,
                **_figures(runs),
                "ours_faster": _ratio(found[best], runs) if best else None,
                "ours_memory": _memory_ratio(found[best], runs) if best else None,
                "loss_difference": _loss_difference(runs, reference) if reference else None,
                "note": None,
            }
        )
    return table


def _figures(runs: Sequence[JobFields]) -> dict[str, Any]:
    rates = [_rate(one) for one in runs]
    cost = [seconds for one in runs for seconds in _step_seconds(one)]
    return {
        "rate": statistics.median(rates),
        "rate_least": min(rates),
        "rate_most": max(rates),
        "step_seconds": statistics.median(cost),
        "peak_gib": statistics.median(one["peak_rss"] for one in runs) / 2**30,
    }


def _rate(run: JobFields) -> float:
    """Samples a CPU-second from the end of the first step to the end of the last."""
    batch, cpu = run["job"]["batch_size"], run["cpu"]
    return float(batch * (len(cpu) - 2) / (cpu[-1] - cpu[1]))


def _step_seconds(run: JobFields) -> list[float]:
    cpu = run["cpu"]
    return [after - before for before, after in itertools.pairwise(cpu[1:])]


def _ratio(ours: Sequence[JobFields], theirs: Sequence[JobFields]) -> float:
    """How many times as fast, round by round, the median."""
    return statistics.median(_rate(a) / _rate(b) for a, b in zip(ours, theirs, strict=True))


def _memory_ratio(ours: Sequence[JobFields], theirs: Sequence[JobFields]) -> float:
    return statistics.median(
        a["peak_rss"] / b["peak_rss"] for a, b in zip(ours, theirs, strict=True)
    )


def _loss_difference(runs: Sequence[JobFields], reference: Sequence[JobFields]) -> float:
    """Largest difference of a step's loss from the reference's, over all rounds."""
    return max(
        abs(a - b)
        for one in runs
        for a, b in zip(one["losses"], reference[0]["losses"], strict=True)
    )


# --- a whole set


def _compare_on_whole_set(work: Path, arguments: argparse.Namespace, facts: JobFields) -> None:
    """Measure whole sets, because shared prefixes change the order: only the set is the same.

    The losses of a peer's first step are compared with the reference on the same records.
    """
    peers = [peer for peer in WHOLE_PEERS if _wanted(peer, arguments)]
    if not peers:
        raise UserError(
            f"--peers {' '.join(arguments.peers)}: no peer of --whole has one of these words in "
            f"its name; they are {', '.join(peer.name for peer in WHOLE_PEERS)}"
        )
    runs = Runs(work, arguments)
    runs.planned = arguments.rounds * sum(peer.work(WHOLE_STEPS) for peer in peers)
    runs.planned += len(peers) * REFERENCE.work(1)  # the first step of each
    _make_environments([REFERENCE, *peers], arguments)
    rows = make_rows(WHOLE_ROWS, seed=SEED + 1)
    data = _data(work / "whole", rows)
    job = {
        "rows": data["unordered"],
        "images": data["images"],
        "steps": WHOLE_STEPS,
        "batch_size": WHOLE_BATCH,
    }
    size = SIZES[arguments.size]
    samples = row_samples(Path(data["unordered"]), rows, work / "model", "vicuna_v1")
    needed = sum(sample_flops(size, sample, "full") for sample in samples)
    found: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    rates: list[float] = []
    for number in range(arguments.rounds):
        rates.append(machine_rate("cpu"))
        for peer in peers:
            note = f"round {number + 1} of {arguments.rounds}"
            found[peer.name].append(runs.run(peer, job, note=note))
    limit = statistics.median(rates)
    table = []
    for peer in peers:
        mine, best = found[peer.name], found.get(SWIFT_ONE.name)
        speeds = [_whole_rate(one) for one in mine]
        ours = mine[0]["trained"][:1] if peer.is_ours else None
        first = ours[0] if ours else [row["id"] for row in rows[:WHOLE_BATCH]]
        pairs = list(zip(mine, best, strict=True)) if best else []
        table.append(
            {
                "name": peer.name,
                "rate": statistics.median(speeds),
                "rate_least": min(speeds),
                "rate_most": max(speeds),
                "faster": statistics.median(_whole_rate(a) / _whole_rate(b) for a, b in pairs)
                if pairs
                else None,
                "limit_share": statistics.median(speeds) * needed / WHOLE_ROWS / limit,
                "peak_gib": statistics.median(one["peak_rss"] for one in mine) / 2**30,
                "loss_difference": _first_loss_difference(runs, job, rows, mine[0], first),
            }
        )
    _write_whole(arguments, facts, table, limit, needed, found)


def _write_whole(
    arguments: argparse.Namespace,
    facts: JobFields,
    table: Sequence[dict[str, Any]],
    limit: float,
    needed: float,
    found: Mapping[str, Sequence[JobFields]],
) -> None:
    name = f"whole-cpu-{arguments.size}"
    heading = (
        f"{WHOLE}, {arguments.rounds} rounds; a matrix product runs at {limit / 1e9:.1f} GFLOP/s "
        f"on one thread, and a row needs {needed / WHOLE_ROWS / 1e9:.1f} GFLOP"
    )
    print_table(heading, WHOLE_COLUMNS, table)
    write_results(
        Path(arguments.output),
        name,
        title=f"A whole set of LLaVA's shape, {arguments.size} shapes on one CPU thread",
        command=command_line("scripts/benchmarks/bench_train", arguments.given),
        tables=[(heading, WHOLE_COLUMNS, table)],
        details={
            "shapes": dataclasses.asdict(SIZES[arguments.size]),
            "runs": {key: [_kept(one) for one in value] for key, value in found.items()},
        },
        facts=facts,
    )
    Console().print(f"written: {Path(arguments.output) / name}.json, .md", highlight=False)


def _whole_rate(run: JobFields) -> float:
    """Samples a CPU-second over all steps: orders differ, only the whole set is the same."""
    cpu = run["cpu"]
    return float(run["job"]["batch_size"] * (len(cpu) - 1) / (cpu[-1] - cpu[0]))


def _first_loss_difference(
    runs: Runs, job: JobFields, rows: Sequence[Row], mine: JobFields, first: Sequence[str]
) -> float:
    """Return how far the first step's loss is from the reference's on the same records."""
    by_id = {row["id"]: row for row in rows}
    path = runs.work / "first.jsonl"
    write_rows([by_id[record_id] for record_id in first], path)
    job = {**job, "rows": str(path), "steps": 1, "batch_size": len(first)}
    reference = runs.run(REFERENCE, job, note="the first step's records")
    return float(abs(mine["losses"][0] - reference["losses"][0]))


# --- telling


PEER_COLUMNS = {
    "name": "peer",
    "rate": "samples / CPU-s",
    "rate_least": "least",
    "rate_most": "most",
    "step_seconds": "CPU-s a step",
    "peak_gib": "peak RSS, GiB",
    "ours_faster": "vlm_sft faster by",
    "ours_memory": "vlm_sft peak / its",
    "loss_difference": "loss off by",
    "note": "",
}
WHOLE_COLUMNS = {
    "name": "peer",
    "rate": "samples / CPU-s",
    "rate_least": "least",
    "rate_most": "most",
    "faster": "x ms-swift, batch 1",
    "limit_share": "of the matrix product's rate",
    "peak_gib": "peak RSS, GiB",
    "loss_difference": "loss off by",
}


def _tell(
    arguments: argparse.Namespace,
    facts: JobFields,
    table: Sequence[dict[str, Any]],
    found: Mapping[str, Sequence[JobFields]],
    steps: int,
) -> None:
    title = "Training step: vlm_sft and its peers on one CPU thread"
    peers = f"Tiny LLaVA, {steps} steps of {BATCH} rows, {arguments.rounds} rounds"
    print_table(peers, PEER_COLUMNS, table)
    for row in table:
        if (row.get("loss_difference") or 0.0) > EQUAL_LOSS:
            say(f"{row['name']}: its losses differ from the reference by more than {EQUAL_LOSS}")
    output = Path(arguments.output)
    name = "train-cpu"
    write_results(
        output,
        name,
        title=title,
        command=command_line("scripts/benchmarks/bench_train", arguments.given),
        tables=[(peers, PEER_COLUMNS, table)],
        details={"runs": {key: [_kept(one) for one in value] for key, value in found.items()}},
        facts=facts,
        plot=f"{name}.png",
    )
    plot_peers([row for row in table if "rate" in row], output / f"{name}.png", title=title)
    Console().print(f"written: {output / name}.json, .md, .png", highlight=False)


def _kept(run: JobFields) -> dict[str, Any]:
    kept = ("cpu", "losses", "targets", "tokens", "peak_rss", "cpu_total", "versions")
    return {key: run[key] for key in kept}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmarks/bench_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny")
    parser.add_argument(
        "--whole", action="store_true", help="a whole set, with shared image prefixes, on a CPU"
    )
    parser.add_argument("--stages", action="store_true", help="the stages instead of the peers")
    parser.add_argument(
        "--only", nargs="*", choices=tuple(STAGES), default=list(STAGES), help="of the stages"
    )
    parser.add_argument("--peers", nargs="*", help="only those whose name has one of these words")
    parser.add_argument("--steps", type=int, default=4, help="steps a run, the first not counted")
    parser.add_argument("--rounds", type=int, default=2, help="times over all peers (2)")
    parser.add_argument("--environments", default=str(DEFAULT), metavar="DIR")
    parser.add_argument("--output", default=str(FOLDER), metavar="DIR")
    parser.add_argument("--scratch", default=None, metavar="DIR", help="for models and runs")
    arguments = parser.parse_args(argv)
    arguments.given = list(argv)
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first step is not counted")
    return arguments


if __name__ == "__main__":
    run_command(main)
