"""Measure a checkpoint on held-out pictures: `python -m vlm_sft.evaluate CHECKPOINT ...`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from vlm_sft.atomic import write_json
from vlm_sft.config import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.formats import read_records
from vlm_sft.errors import RecordError, UserError, run_command
from vlm_sft.evaluation.captions import caption_loss, other_pictures, summarize_captions
from vlm_sft.evaluation.probes import CONDITIONS, Condition, judge, read_probes, summarize
from vlm_sft.inference import VlmRun, load_run
from vlm_sft.progress import track

EXAMPLE = """example:
  python -m vlm_sft.evaluate runs/stage2/final --probes held_out/existence.json \\
      held_out/counting.json --images held_out/images --captions held_out/captions.json \\
      --out results.json
"""


def main(argv: Sequence[str]) -> int:
    """Measure, print a table, write `--out`; returns the exit code."""
    arguments = _parse(argv)
    conditions = _conditions(arguments.conditions)
    files = {path: read_probes(path) for path in arguments.probes}
    records = _read_captions(arguments.captions, arguments.images) if arguments.captions else []
    run = load_run(arguments.checkpoint, device=arguments.device)
    results: dict[str, Any] = {
        "checkpoint": str(arguments.checkpoint),
        "step": run.manifest.get("step"),
        "interval": "95 % percentile bootstrap over pictures; Wilson's where all answers are alike",
        "seed": arguments.seed,
        "probes": {},
    }
    for path, probes in files.items():
        kept = _first_pictures([p.image for p in probes], arguments.max_pictures)
        chosen = [probe for probe in probes if probe.image in kept]
        results["probes"][path.stem] = {
            condition: _measure(run, chosen, arguments, condition, path.stem)
            for condition in conditions
        }
    if records:
        results["captions"] = _measure_captions(run, records, arguments)
    write_json(arguments.out, results)
    Console().print(results_table(results))
    return 0


def results_table(results: dict[str, Any]) -> Table:
    """The results as a table for people."""
    table = Table(title="held-out pictures, 95 % intervals clustered by picture")
    for name in ("measure", "picture", "questions", "result", "balanced", "chance"):
        table.add_column(name)
    for name, by_condition in results["probes"].items():
        for condition, found in by_condition.items():
            table.add_row(
                name,
                condition,
                f"{found['questions']:,}",
                _shown(found["accuracy"]),
                _shown(found["balanced_accuracy"]),
                f"{found['chance']:.2f}",
            )
    for condition in ("right", "shuffled", "difference"):
        if "captions" in results:
            found = results["captions"]
            count = f"{found['records']:,}"
            table.add_row("caption loss a token", condition, count, _shown(found[condition]))
    return table


def _measure(
    run: VlmRun, probes: list[Any], arguments: argparse.Namespace, condition: Condition, name: str
) -> dict[str, Any]:
    total = len({probe.image for probe in probes})
    judged = judge(run, probes, arguments.images, condition, seed=arguments.seed)
    verdicts = [v for group in track(judged, total, f"{name}, {condition}") for v in group]
    return summarize(verdicts, seed=arguments.seed)


def _measure_captions(
    run: VlmRun, records: list[Conversation], arguments: argparse.Namespace
) -> dict[str, Any]:
    kept = _first_pictures([str(r.images[0]) for r in records], arguments.max_pictures)
    records = [record for record in records if str(record.images[0]) in kept]
    others = other_pictures(records, seed=arguments.seed)
    losses = [
        caption_loss(run, record, Path(others[str(record.images[0])]))
        for record in track(records, description="captions")
    ]
    return summarize_captions(losses, seed=arguments.seed)


def _read_captions(path: Path, images: Path) -> list[Conversation]:
    records = []
    for record in read_records(DataFile(path=str(path), image_root=str(images))):
        if isinstance(record, RecordError):
            raise record
        if len(record.images) != 1 or not isinstance(record.images[0], Path):
            raise UserError(f"{record.where}: expected a record with one picture file")
        records.append(record)
    return records


def _first_pictures(images: Sequence[str], count: int | None) -> set[str]:
    return set(list(dict.fromkeys(images))[:count])


def _conditions(text: str) -> list[Condition]:
    names = text.split(",")
    if unknown := [name for name in names if name not in get_args(Condition)]:
        raise UserError(f"--conditions {unknown[0]}: expected some of {', '.join(CONDITIONS)}")
    return [condition for condition in CONDITIONS if condition in names]


def _shown(found: dict[str, float]) -> str:
    return f"{found['estimate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vlm_sft.evaluate",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/final or RUN/checkpoints/step-N")
    parser.add_argument("--probes", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--images", type=Path, required=True, metavar="DIR")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="records of one picture each")
    parser.add_argument("--conditions", default=",".join(CONDITIONS), metavar="right,blank,...")
    parser.add_argument("--max-pictures", type=int, metavar="N", help="the first N of each file")
    parser.add_argument("--out", type=Path, default=Path("results.json"), metavar="FILE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default: cuda where it is, else cpu")
    arguments = parser.parse_args(argv)
    if not arguments.probes and not arguments.captions:
        raise UserError("nothing to measure; give --probes FILE, --captions FILE or both")
    if arguments.max_pictures is not None and arguments.max_pictures < 1:
        raise UserError(f"--max-pictures {arguments.max_pictures}: expected 1 or more")
    return arguments


if __name__ == "__main__":
    run_command(main)
