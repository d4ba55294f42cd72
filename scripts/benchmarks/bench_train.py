"""Training speed and peak memory of vlm_sft and its peers on the same rows, order and weights.

    scripts/benchmarks/bench_train  # CPU, tiny LLaVA, all peers
    scripts/benchmarks/bench_train --sharing --size small  # shared prefixes only, other shapes
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
from bench_model import SEED, make_model
from bench_plots import plot_peers
from bench_results import FOLDER, command_line, machine_facts, print_table, write_results
from bench_rows import Row, make_rows, write_images, write_rows
from bench_runs import BATCH, JobFields, Peer, Runs, say
from bench_sizes import SIZES
from bench_stages import STAGES, stage_rows
from rich.console import Console

from vlm_sft.commands.run_command import run_command
from vlm_sft.config.schema import TrainConfig
from vlm_sft.data.sampler import epoch_order
from vlm_sft.errors import UserError

SHARING_ROWS, SHARING_BATCH = 48, 16
SHARING = f"Records of one image together: {SHARING_ROWS} rows in steps of {SHARING_BATCH}"
PACKED = {"train": {"micro_batch_size": None, "packing": {"max_tokens": 2048}}}
SHARED = {"train": {**PACKED["train"], "share_image_prefix": True}}
CANNOT_PACK = "not measured: this version of vlm_sft has no train.packing"
EQUAL_LOSS = 1e-4

REFERENCE = Peer("padded reference loop", "reference.py", "hf_trainer", 6.0)
OURS_PADDED = Peer("vlm_sft, padded", "ours.py", None, 2.7)
OURS_PACKED = Peer("vlm_sft, packed", "ours.py", None, 2.3, config=PACKED)
OURS_SHARED = Peer("vlm_sft, packed, shared prefixes", "ours.py", None, 1.8, config=SHARED)
ALL_PEERS = (
    REFERENCE,
    OURS_PADDED,
    OURS_PACKED,
    Peer("ms-swift, batch 4", "ms_swift.py", "ms_swift", 3.7),
    Peer("ms-swift, batch 1, 4 accumulated", "ms_swift.py", "ms_swift", 2.5, micro_batch_size=1),
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
        if arguments.sharing:
            _compare_sharing(work, arguments, facts)
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
    sharing = [peer for peer in (OURS_PACKED, OURS_SHARED) if _wanted(peer, arguments)]
    runs = Runs(work, arguments)
    able = [peer for peer in peers if _missing(peer) is None]
    shares = [peer for peer in sharing if _missing(peer) is None]
    sharing_steps = SHARING_ROWS // SHARING_BATCH
    runs.planned = rounds * sum(peer.weight * (steps + 3) for peer in able)
    runs.planned += rounds * sum(peer.weight * 4 * (sharing_steps + 3) for peer in shares)
    for peer in able:  # so that no environment is made while others are measured
        if peer.environment is not None:
            environment_python(peer.environment, Path(arguments.environments))
    found: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in able}
    for number in range(rounds):
        for peer in able:
            ours = {"rows": job["unordered"]} if peer.is_ours else {}
            one = runs.run(peer, _job(job | ours), note=f"round {number + 1} of {rounds}")
            found[peer.name].append(one)
    table = _peer_table(peers, found)
    shared_table = _sharing(work, runs, sharing, shares, rounds)
    _tell(arguments, facts, table, shared_table, found, steps)


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


# --- prefix sharing


def _compare_sharing(work: Path, arguments: argparse.Namespace, facts: JobFields) -> None:
    sharing, runs = (OURS_PACKED, OURS_SHARED), Runs(work, arguments)
    steps = SHARING_ROWS // SHARING_BATCH
    runs.planned = arguments.rounds * sum(peer.weight * 4 * (steps + 3) for peer in sharing)
    table = _sharing(work, runs, sharing, sharing, arguments.rounds)
    title = f"Shared prefixes, {arguments.size} shapes on one CPU thread"
    print_table(SHARING, SHARING_COLUMNS, table)
    name = f"sharing-cpu-{arguments.size}"
    write_results(
        Path(arguments.output),
        name,
        title=title,
        command=command_line("scripts/benchmarks/bench_train", arguments.given),
        tables=[(SHARING, SHARING_COLUMNS, table)],
        details={"shapes": dataclasses.asdict(SIZES[arguments.size])},
        facts=facts,
    )
    Console().print(f"written: {Path(arguments.output) / name}.json, .md", highlight=False)


def _sharing(
    work: Path,
    runs: Runs,
    sharing: Sequence[Peer],
    able: Sequence[Peer],
    rounds: int,
) -> list[dict[str, Any]]:
    """Packed with and without shared prefixes, over the whole of a set.

    Each has its own order; its losses are compared with the reference on the same records.
    """
    rows = make_rows(SHARING_ROWS, seed=SEED + 1)
    folder = work / "sharing"
    data = _data(folder, rows)
    steps = SHARING_ROWS // SHARING_BATCH
    job = {
        "rows": data["unordered"],
        "images": data["images"],
        "steps": steps,
        "batch_size": SHARING_BATCH,
    }
    found: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in able}
    for number in range(rounds):
        for peer in able:
            note = f"{SHARING_ROWS} rows, round {number + 1} of {rounds}"
            found[peer.name].append(runs.run(peer, job, note=note))
    plain = found.get(OURS_PACKED.name)
    table = []
    for peer in sharing:
        mine = found.get(peer.name)
        if not mine:
            table.append({"name": peer.name, "note": _missing(peer)})
            continue
        rates = [_whole_rate(one) for one in mine]
        pairs = zip(mine, plain, strict=True) if plain else ()
        table.append(
            {
                "name": peer.name,
                "rate": statistics.median(rates),
                "rate_least": min(rates),
                "rate_most": max(rates),
                "faster": statistics.median(_whole_rate(a) / _whole_rate(b) for a, b in pairs)
                if plain
                else None,
                "peak_gib": statistics.median(one["peak_rss"] for one in mine) / 2**30,
                "loss_difference": _difference_in_order(runs, job, rows, mine[0], folder),
                "note": None,
            }
        )
    return table


def _whole_rate(run: JobFields) -> float:
    """Samples a CPU-second over all steps: orders differ, only the whole set is the same."""
    cpu = run["cpu"]
    return float(run["job"]["batch_size"] * (len(cpu) - 1) / (cpu[-1] - cpu[0]))


def _difference_in_order(
    runs: Runs, job: JobFields, rows: Sequence[Row], mine: JobFields, folder: Path
) -> float:
    """Largest difference of the first step's loss from the reference's on the same records."""
    by_id = {row["id"]: row for row in rows}
    first = [by_id[record_id] for record_id in mine["trained"][0]]
    path = folder / "first.jsonl"
    write_rows(first, path)
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
SHARING_COLUMNS = {
    "name": "vlm_sft",
    "rate": "samples / CPU-s",
    "rate_least": "least",
    "rate_most": "most",
    "faster": "beside packed",
    "peak_gib": "peak RSS, GiB",
    "loss_difference": "loss differs by",
    "note": "",
}


def _tell(
    arguments: argparse.Namespace,
    facts: JobFields,
    table: Sequence[dict[str, Any]],
    shared: Sequence[dict[str, Any]],
    found: Mapping[str, Sequence[JobFields]],
    steps: int,
) -> None:
    title = "Training step: vlm_sft and its peers on one CPU thread"
    peers = f"Tiny LLaVA, {steps} steps of {BATCH} rows, {arguments.rounds} rounds"
    print_table(peers, PEER_COLUMNS, table)
    print_table(SHARING, SHARING_COLUMNS, shared)
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
        tables=[(peers, PEER_COLUMNS, table), (SHARING, SHARING_COLUMNS, shared)],
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
        "--sharing", action="store_true", help="only shared image prefixes, on a CPU"
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
