"""Repeat sampling and training: each round trains on the best samples of the newest model."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.table import Table

from vlm_sft.best_of.graders import Grader
from vlm_sft.commands.run_module import run_module
from vlm_sft.commands.sample import TRAIN, run
from vlm_sft.config.schema import load_config
from vlm_sft.errors import UserError
from vlm_sft.utils.console import Console, echo
from vlm_sft.utils.owned_files import write_owned_json
from vlm_sft.utils.ownership import MADE_BY, made_by, own_directory
from vlm_sft.utils.reading import read_json

KIND: Final = "sampling rounds"
ROUNDS: Final = "rounds.json"


def run_rounds(arguments: argparse.Namespace, verifier: Grader | None) -> int:
    """Run all rounds, print the held-out scores after each; return the exit code.

    Every round starts from what the configuration starts from, so that errors of earlier rounds
    are not trained further (STaR, arXiv 2203.14465). A repeated command goes on where it was.

    Args:
        arguments: Those of the command.
        verifier: The grader of `--score verifier`.

    Raises:
        UserError: A round keeps no sample, or sampling, training or the evaluation fails.
    """
    out: Path = arguments.out
    config = load_config(arguments.train)
    own_directory(out, KIND, inputs=[arguments.data, arguments.train, arguments.checkpoint],
                  setting="--out")  # fmt: skip
    kept = [file.model_dump(mode="json", exclude_defaults=True) for file in config.data.train]
    model: Path = arguments.checkpoint
    rows = [{"round": 0, "checkpoint": str(model), **_evaluated(arguments, model, out / "round-0")}]
    for number in range(1, arguments.rounds + 1):
        folder = out / f"round-{number}"
        echo(f"round {number} of {arguments.rounds}: sampling from {model}")
        found = run(arguments, model, folder / "samples", verifier)
        if not found["outcomes"].get("kept"):
            raise UserError(
                f"round {number}: no question has an acceptable sample; use easier questions, "
                "more samples (--n) or another --score",
                code="no_records",
            )
        files = [{"path": str(folder / "samples" / TRAIN), "image_root": found["image_root"]}]
        files += kept if arguments.keep_train_data else []
        train = [str(arguments.train), f"data.train={json.dumps(files)}"]
        run_module("vlm_sft.stage2", [*train, f"output_dir={folder / 'run'}"])
        model = folder / "run" / "final"
        kept_share = {key: found[key] for key in ("acceptable_share", "kept_share", "pairs")}
        scores = _evaluated(arguments, model, folder)
        rows.append({"round": number, "checkpoint": str(model), **kept_share, **scores})
        write_owned_json(out / ROUNDS, {MADE_BY: made_by("sample"), "rounds": rows})
    Console().print(rounds_table(rows))
    echo(f"{out / ROUNDS}; the last model is {model}", file=sys.stdout)
    return 0


def rounds_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the held-out scores after every round as a table."""
    table = Table(title="Held-out scores; 95 % intervals over images", box=box.SIMPLE_HEAD)
    for name in ("after round", "acceptable samples", "questions kept", *rows[0]["held_out"]):
        table.add_column(name, justify="right")
    for row in rows:
        shares = [row.get(name) for name in ("acceptable_share", "kept_share")]
        shown = ["" if share is None else f"{share:.1%}" for share in shares]
        table.add_row(str(row["round"]), *shown, *map(_score, row["held_out"].values()))
    return table


def _score(found: dict[str, Any]) -> str:
    interval = found["interval"]
    shown = f"{found['value']:.3f}"
    return shown if interval is None else f"{shown} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _evaluated(arguments: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """Evaluate a model on the held-out suite, and return the main score of every task."""
    options = ["--out", str(folder / "evaluation"), "--batch-size", str(arguments.batch_size)]
    if arguments.device:
        options += ["--device", arguments.device]
    is_first = model == arguments.checkpoint
    if is_first and arguments.template:
        options += ["--template", arguments.template]
    for base in arguments.base if is_first else []:
        options += ["--base", base]
    run_module("vlm_sft.evaluate", [str(model), str(arguments.held_out), *options])
    results = read_json(folder / "evaluation" / "results.json")
    scores = {}
    for name, task in results["tasks"].items():
        found = task["conditions"].get("right") or next(iter(task["conditions"].values()))
        interval = found.get(f"{task['main']}_interval")
        scores[name] = {"score": task["main"], "value": found[task["main"]], "interval": interval}
    return {"held_out": scores}
