"""Does best-of-N pay where only boxes are known? Two rounds against further training.

    scripts/benchmarks/study_best_of_n              # seeds 1 and 2
    scripts/benchmarks/study_best_of_n --seeds 1

The base model was trained on a few descriptions of scenes ("I see a cat and two boats.") until
they taught it little more. Of many more scenes only the boxes are known. `vlm-sft sample --score
verifier --rounds 2` samples descriptions of them, keeps for each scene the one of which the boxes
support most and contradict nothing, and trains on these and on the few; twice. The controls train
as many steps from the same model:

    few   on the few alone
    all   on the few and on true descriptions of the many: the upper limit

All are asked about held-out scenes. As the scenes are known exactly, so is whether the kept samples
are wholly true. The model is that of study_model.py; a repeated command goes on.
"""

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench_results import command_line, machine_facts, print_table, write_results
from study_model import StudyModel, run_module

from vlm_sft.commands.run_command import run_command
from vlm_sft.evaluation.suites.compare import compare_results, read_results
from vlm_sft.utils.atomic_files import write_json

TITLE: Final = "Best of N by the verifier, against further training"
BASE_STEPS, STEPS = 150, 100
"""Optimizer steps on the few until the study begins, and of each run."""
ROWS: Final = {
    "before": "before: trained on the few",
    "few": "control: further on the few",
    "all": "control: further on the few and true descriptions of the many",
    "round-1": "best of N, round 1",
    "round-2": "best of N, round 2",
}
COLUMNS: Final = {
    "arm": "model",
    "seed": "seed",
    "records": "records",
    "accuracy": "accuracy (95 % interval)",
    "gain": "minus before (95 % interval)",
    "minus_few": "minus further on the few (95 % interval)",
}
SAMPLE_COLUMNS: Final = {
    "round": "round",
    "seed": "seed",
    "questions": "questions",
    "acceptable": "samples without a contradiction",
    "kept": "questions with one",
    "pairs": "pairs",
    "true": "kept answers that are wholly true",
}


def main(argv: Sequence[str]) -> int:
    """Run what is missing and write the page; returns the exit code."""
    arguments = _parse(argv)
    facts = machine_facts()
    model = StudyModel(Path(arguments.work))
    model.make()
    rows, samples = [], []
    for seed in arguments.seeds:
        study = Study(model, seed, many=arguments.many, number=arguments.n)
        rows += study.rows()
        samples += [study.round(number) for number in (1, 2)]
    print_table(TITLE, COLUMNS, rows)
    print_table("What was sampled", SAMPLE_COLUMNS, samples)
    write_results(
        Path(arguments.output),
        "best-of-n",
        title=TITLE,
        command=command_line("scripts/benchmarks/study_best_of_n", argv),
        tables=[
            ("Existence of objects in held-out scenes", COLUMNS, rows),
            ("What was sampled", SAMPLE_COLUMNS, samples),
        ],
        details={
            "base_steps": BASE_STEPS,
            "steps": STEPS,
            "many": arguments.many,
            "n": arguments.n,
        },
        facts=facts,
    )
    return 0


class Study:
    """One seed: its questions, the model before, two rounds and the controls.

    Args:
        model: The scenes and the model that every run starts from.
        seed: Of the questions and the order of training.
        many: Scenes of which only the boxes are known.
        number: Samples of each of them.
    """

    def __init__(self, model: StudyModel, seed: int, *, many: int, number: int) -> None:
        self._model, self._seed, self._number = model, seed, number
        self._folder = model.work / "best-of-n" / f"seed{seed}"
        records = model.other_descriptions()
        random.Random(seed).shuffle(records)
        self._many = self._folder / "many.json"
        write_json(self._many, records[:many])
        self._truth = {row["id"]: row["conversations"][1]["value"] for row in records}
        few = len(json.loads(model.lessons.read_text(encoding="utf-8")))
        self._counts = {"few": few, "many": many}

    def rows(self) -> list[dict[str, Any]]:
        """Train and ask what is missing; return the rows of the table."""
        few, many, before = self._model.lessons, self._many, self._base()
        self._ask("before", before)
        for name, files in (("few", [few]), ("all", [few, many])):
            run, config = self._folder / name, self._folder / f"{name}.yaml"
            self._model.write_config(config, files, steps=STEPS, start_from=before)
            if not (run / "final").is_dir():
                run_module("vlm_sft.stage2", [str(config), f"output_dir={run}"])
            self._ask(name, run / "final")
        sample = [
            *(str(before), str(many), "--images", str(self._model.images("train"))),
            *("--score", "verifier", "--n", str(self._number), "--annotations"),
            *(str(self._model.annotations("train", what)) for what in ("instances", "captions")),
            *(
                "--top-p",
                "0.9",
                "--max-tokens",
                "24",
                "--batch-size",
                "64",
                "--seed",
                str(self._seed),
            ),
            *("--rounds", "2", "--train", str(self._folder / "few.yaml"), "--keep-train-data"),
            *("--held-out", str(self._model.suite), "--out", str(self._rounds)),
        ]
        run_module("vlm_sft.sample", sample)
        return [self.row(name) for name in ROWS]

    def round(self, number: int) -> dict[str, Any]:
        """Return what a round sampled and kept."""
        folder = self._rounds / f"round-{number}" / "samples"
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        with (folder / "train.jsonl").open(encoding="utf-8") as lines:
            kept = [json.loads(line) for line in lines]
        true = [
            things(row["messages"][-1]["content"][-1]["text"]) == things(self._truth[row["id"]])
            for row in kept
        ]
        return {
            "round": number,
            "seed": self._seed,
            "questions": results["questions"],
            "acceptable": f"{results['acceptable_share']:.1%}",
            "kept": f"{results['kept_share']:.1%}",
            "pairs": results["pairs"],
            "true": f"{statistics.mean(true):.1%}",
        }

    def _base(self) -> Path:
        """Return the model before, which both seeds share; train it if it is missing."""
        folder = self._folder.parent / "base"
        self._model.write_config(
            folder.with_suffix(".yaml"),
            [self._model.lessons],
            steps=BASE_STEPS,
            start_from=self._model.base,
        )
        if not (folder / "final").is_dir():
            run_module("vlm_sft.stage2", [f"{folder}.yaml", f"output_dir={folder}"])
        return folder / "final"

    @property
    def _rounds(self) -> Path:
        return self._folder / "rounds"

    def _ask(self, name: str, final: Path) -> None:
        out = self._evaluation(name)
        if not (out / "results.json").exists():
            suite = str(self._model.suite)
            run_module("vlm_sft.evaluate", [str(final), suite, "--out", str(out)])

    def _evaluation(self, name: str) -> Path:
        if name.startswith("round"):
            return self._rounds / name / "evaluation"
        return self._folder / f"{name}-evaluation"

    def row(self, name: str) -> dict[str, Any]:
        """Return the row of a model that has been asked."""
        results, before, few = (
            read_results(self._evaluation(one)) for one in (name, "before", "few")
        )
        scores = results.tasks["existence"]["conditions"]["right"]
        low, high = scores["prompt_strict_interval"]
        many = 0 if name in ("before", "few") else self._counts["many"]
        if name.startswith("round"):
            with (self._rounds / name / "samples/train.jsonl").open("rb") as lines:
                many = sum(1 for _ in lines)
        row: dict[str, Any] = {
            "arm": ROWS[name],
            "seed": self._seed,
            "records": self._counts["few"] + many,
            "accuracy": f"{scores['prompt_strict']:.1%} ({low:.1%} to {high:.1%})",
        }
        for key, other in (("gain", before), ("minus_few", few)):
            if other.path != results.path:
                (compared,) = compare_results(other, results)["comparisons"]
                row[key] = _difference(compared["difference"])
        return row


def things(text: str) -> set[str]:
    """Return what a description names, with numbers: `a cat`, `two boats`."""
    return set(text.removeprefix("I see ").removesuffix(".").split(" and "))


def _difference(found: Mapping[str, float]) -> str:
    return f"{found['estimate']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmarks/study_best_of_n",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--many", type=int, default=300, help="scenes with boxes (300)")
    parser.add_argument("--n", type=int, default=4, help="samples of each of these (4)")
    parser.add_argument("--work", default="demo/data-engine", help="data and runs")
    parser.add_argument("--output", default="docs/benchmarks", help="where the page goes")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
