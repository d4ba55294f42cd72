"""Does selecting data by scores pay when part of it is wrong? Each ranking against chance.

    scripts/benchmarks/study_selection                  # seeds 1 and 2
    scripts/benchmarks/study_selection --seeds 1 --selections ifd solved

Of descriptions of composed scenes ("I see a cat and two boats."), 30 % are wrong: one thing is
exchanged for one that is not there. A model that is trained on all of them scores them and samples
four answers to each. `vlm-sft data select` takes a
third by every ranking, `--train-control` trains the same model on it and on as many random records,
with the same steps, and compares both on held-out scenes. The share of wrong answers in each part
is known. The model is that of study_model.py; a repeated command goes on.
"""

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml
from bench_plots import plot_differences
from bench_results import command_line, machine_facts, print_table, write_results
from pyarrow import parquet
from study_model import StudyModel, run_module

from vlm_sft.commands.run_command import run_command
from vlm_sft.utils.atomic_files import write_json, write_text
from vlm_sft.utils.words import counted

TITLE: Final = "Selection of records of which 30 % are wrong, against random ones"
STEPS: Final = {"scorer": 50, "control": 50}
SELECTIONS: Final[dict[str, dict[str, Any]]] = {
    "ifd": {"preset": "ifd"},
    "s1": {"preset": "s1"},
    "necessity": {"rank_by": "necessity"},
    "loss": {"rank_by": "loss", "order": "lowest"},
    "solved": {"rank_by": "solved"},
}
SHOWN: Final = {
    "ifd": "`preset: ifd` (highest below 1)",
    "s1": "`preset: s1` (not solved by all samples, longest)",
    "necessity": "`rank_by: necessity` (highest)",
    "loss": "`rank_by: loss`, `order: lowest`",
    "solved": "`rank_by: solved` (most samples agree with the record)",
}
COLUMNS: Final = {
    "selection": "selection",
    "seed": "seed",
    "records": "records",
    "wrong": "wrong answers",
    "random_wrong": "wrong, random part",
    "selected": "accuracy",
    "random": "accuracy, random part",
    "difference": "difference (95 % interval)",
}
SCORE_COLUMNS: Final = {
    "column": "column",
    "seed": "seed",
    "right": "mean, right answers",
    "wrong": "mean, wrong answers",
    "auc": "a wrong one is lower than a right one",
}


def main(argv: Sequence[str]) -> int:
    """Run what is missing and write the page; returns the exit code."""
    arguments = _parse(argv)
    facts = machine_facts()
    model = StudyModel(Path(arguments.work))
    model.make()
    rows, scores = [], []
    for seed in arguments.seeds:
        study = Study(model, seed, arguments.share)
        rows += [study.row(name) for name in arguments.selections]
        scores += study.scores()
    if len(arguments.seeds) > 1:
        rows += [mean_row(name, rows) for name in arguments.selections]
    print_table(TITLE, COLUMNS, [shown(row) for row in rows])
    print_table("Scores of right and wrong answers", SCORE_COLUMNS, scores)
    folder = Path(arguments.output)
    plot_differences(
        [row for row in rows if row["seed"] != "mean"], folder / "selection.png", title=TITLE
    )
    write_results(
        folder,
        "selection",
        title=TITLE,
        command=command_line("scripts/benchmarks/study_selection", argv),
        tables=[
            ("Selected and random records at equal steps", COLUMNS, [shown(row) for row in rows]),
            ("What each score says of right and wrong answers", SCORE_COLUMNS, scores),
        ],
        details={"rows": rows, "steps": STEPS, "share_wrong": arguments.share},
        facts=facts,
        plot="selection.png",
    )
    return 0


class Study:
    """One seed: its wrong answers, scorer, samples, selections and controls.

    Args:
        model: The scenes and the model that every run starts from.
        seed: Of the wrong answers, the random records and the order of training.
        share: Of the records that get a wrong answer.
    """

    def __init__(self, model: StudyModel, seed: int, share: float) -> None:
        self._model, self._seed = model, seed
        self._folder = model.work / "selection" / f"seed{seed}"
        made, self._wrong = exchanged(
            model.other_descriptions(), model.categories("train"), share, seed
        )
        self._data = self._folder / "data.json"
        write_json(self._data, made)

    def row(self, name: str) -> dict[str, Any]:
        """Select, train and compare, unless that is done; return the row of the table."""
        found = self._folder / f"{name}.json"
        if not found.exists():
            self._select(name)
            write_json(found, self.read(name))
        return dict(json.loads(found.read_text(encoding="utf-8")))

    def read(self, name: str) -> dict[str, Any]:
        """Return the row of the selection that was made last."""
        parts = self._folder / "parts"
        control = json.loads((parts / "selection.json").read_text(encoding="utf-8"))["control"]
        (compared,) = control["comparisons"]
        table = parquet.read_table(parts / "scores.parquet").to_pydict()
        wrong = {
            part: [row in self._wrong for row, taken in enumerate(table[part]) if taken]
            for part in ("selected", "random")
        }
        return {
            "selection": name,
            "seed": self._seed,
            "records": len(wrong["selected"]),
            "wrong": statistics.mean(wrong["selected"]),
            "random_wrong": statistics.mean(wrong["random"]),
            "selected": compared["other"],
            "random": compared["first"],
            "difference": compared["difference"],
            "steps": control["steps"],
        }

    def scores(self) -> list[dict[str, Any]]:
        """Return what each column says of right and of wrong records."""
        table = parquet.read_table(self._folder / "parts/scores.parquet").to_pydict()
        rows = []
        for column in ("loss", "ifd", "necessity", "solved", "consistency"):
            known = [(value, row in self._wrong) for row, value in enumerate(table[column])
                     if value is not None]  # fmt: skip
            right = [value for value, is_wrong in known if not is_wrong]
            wrong = [value for value, is_wrong in known if is_wrong]
            lower = sum((w < r) + 0.5 * (w == r) for w in wrong for r in right)
            rows.append(
                {
                    "column": column,
                    "seed": self._seed,
                    "right": statistics.mean(right),
                    "wrong": statistics.mean(wrong),
                    "auc": lower / (len(wrong) * len(right)),
                }
            )
        return rows

    def _select(self, name: str) -> None:
        scorer, samples = self._folder / "scorer", self._folder / "samples"
        images = str(self._model.images("train"))
        if not (scorer / "final").is_dir():
            config = self._folder / "scorer.yaml"
            self._config(config, "scorer")
            run_module("vlm_sft.stage2", [str(config), f"output_dir={scorer}"])
        if not (samples / "results.json").exists():
            asked = [str(scorer / "final"), str(self._data), "--images", images]
            drawn = ["--n", "4", "--max-tokens", "24", "--batch-size", "64", "--score", "exact"]
            run_module("vlm_sft.sample", [*asked, *drawn, "--out", str(samples)])
        control = self._folder / "control.yaml"
        self._config(control, "control")
        settings = {
            "output_dir": str(self._folder / "parts"),
            "path": str(self._data),
            "image_root": images,
            "seed": self._seed,
            "model": str(scorer / "final"),
            "samples": str(samples / "samples.jsonl"),
            "share": 1 / 3,
            **SELECTIONS[name],
        }
        config = self._folder / f"select-{name}.yaml"
        write_text(config, yaml.safe_dump(settings, sort_keys=False))
        suite = str(self._model.suite)
        against = ["--train-control", str(control), "--held-out", suite]
        run_module("data_tools.select.__main__", [str(config), *against])

    def _config(self, path: Path, name: str) -> None:
        self._model.write_config(path, [self._data], steps=STEPS[name], start_from=self._model.base)


def exchanged(
    records: Sequence[dict[str, Any]], truth: Mapping[str, set[str]], share: float, seed: int
) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """Return records of which a share names a thing that is not there, and their places.

    Args:
        records: Answers of the form `I see a cat and two boats.`
        truth: Categories by image; under the empty name all that there are.
        share: Of the records.
        seed: Which, and how.
    """
    rng = random.Random(seed)
    wrong = frozenset(rng.sample(range(len(records)), round(share * len(records))))
    made = []
    for place, record in enumerate(records):
        if place in wrong:
            human, reply = record["conversations"]
            named = reply["value"].removeprefix("I see ").removesuffix(".").split(" and ")
            name = rng.choice(sorted(truth[""] - truth[record["image"]]))
            named[rng.randrange(len(named))] = counted(name, 1)
            text = f"I see {' and '.join(named)}."
            record = {**record, "conversations": [human, {**reply, "value": text}]}
        made.append(record)
    return made, wrong


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as the page has it."""
    found = row["difference"]
    interval = f" ({found['low']:+.3f} to {found['high']:+.3f})" if "low" in found else ""
    shares = {key: f"{row[key]:.1%}" for key in ("wrong", "random_wrong", "selected", "random")}
    return {
        **row,
        **shares,
        "selection": SHOWN[row["selection"]],
        "difference": f"{found['estimate']:+.3f}{interval}",
    }


def mean_row(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of a selection over the seeds."""
    mine = [row for row in rows if row["selection"] == name]
    means = {
        key: statistics.mean(row[key] for row in mine)
        for key in ("wrong", "random_wrong", "selected", "random")
    }
    estimate = statistics.mean(row["difference"]["estimate"] for row in mine)
    return {"selection": name, "seed": "mean", "records": mine[0]["records"], **means,
            "difference": {"estimate": estimate}}  # fmt: skip


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmarks/study_selection",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=list(SELECTIONS))
    parser.add_argument("--share", type=float, default=0.3, help="of wrong answers (0.3)")
    parser.add_argument("--work", default="demo/data-engine", help="data and runs")
    parser.add_argument("--output", default="docs/benchmarks", help="where the page goes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
