"""Which connector, and tiles or one square? The quickstart's parts trained at equal steps.

    scripts/benchmarks/study_connectors                       # both comparisons, seeds 1 and 2
    scripts/benchmarks/study_connectors --arms mlp resampler --seeds 1
    scripts/benchmarks/study_connectors --arms square tiles --scenes 400 --steps 40 80

With the quickstart's frozen encoder (EfficientNet-Lite0) and language model (SmolLM2 135M), two
comparisons on composed scenes with exact truth:

    mlp, resampler   objects of the quickstart's size; 9 tokens per image, averaged and projected
                     by mlp2x_gelu, or read by 9 queries from all 7 x 7 features
    square, tiles    small objects (8 to 16 % of the shorter side); mlp2x_gelu and 9 tokens of one
                     square, or of an overview and up to 4 tiles (dynamic), 9 tokens each

Within a comparison data, steps, batches and language model are the same. Each arm trains stage 1
and stage 2 and then answers questions of existence about held-out scenes by the training artist.
The table has the share of right answers with its 95 % interval over images, as `evaluate` reports
it; an accuracy near 0.5 is chance. An arm takes about 11 CPU-minutes, with tiles about 25.
Repeated, it goes on with the runs that are missing.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench_results import command_line, machine_facts, print_table, write_results
from study_processes import run_python

from vlm_sft.commands.run_command import run_command

ARTIST: Final = "openmoji"
COMMON: Final = [
    *("--categories", "configs/demo/categories.json", "--artist", ARTIST),
    *("--max-objects", "2", "--max-instances", "2", "--augment", "0.15"),
    *("--crowd-share", "0", "--visible-share", "0.8"),
    *("--backgrounds", "meadow,bokeh,clouds,gradient,blobs,room,water,desert"),
]
SCENES: Final = {
    "large": ["--scale", "0.4", "0.75", "--max-side", "320"],
    "small": ["--scale", "0.08", "0.16", "--max-side", "640"],
}
"""Options of `make_scenes` by the size of the objects."""

CONFIGS: Final = {
    "stage1": "configs/demo/stage1.yaml",
    "stage2": "configs/demo/stage2_lora.yaml",
}
POOLED: Final = "model.vision_tower.grid_pool=3"
UNPOOLED: Final = "model.vision_tower.grid_pool=null"
COLUMNS: Final = {
    "arm": "arm",
    "seed": "seed",
    "tokens": "tokens of a crop",
    "steps": "steps",
    "loss": "validation loss",
    "accuracy": "right answers (95 % interval)",
    "blank": "with a blank image",
}


@dataclass(frozen=True)
class Arm:
    """One way to turn an image into tokens: the scenes it is trained on, and its settings."""

    scenes: str
    overrides: tuple[str, ...]


ARMS: Final = {
    "mlp": Arm("large", (POOLED, "model.projector_type=mlp2x_gelu")),
    "resampler": Arm("large", (UNPOOLED, "model.projector_type=resampler", "model.num_queries=9")),
    "square": Arm("small", (POOLED,)),
    "tiles": Arm(
        "small", (POOLED, "model.image_tiling.layout=dynamic", "model.image_tiling.max_tiles=4")
    ),
}


def main(argv: Sequence[str]) -> int:
    """Train and ask what is missing, and write the table; returns the exit code."""
    arguments = _parse(argv)
    facts, work = machine_facts(), Path(arguments.work)
    run_python("scripts/demo_pieces.py", str(work / "pieces"))
    rows = []
    for seed in arguments.seeds:
        counts = {"train": arguments.scenes, "val": 24, "test": arguments.test_scenes}
        study = Study(work, seed, counts, tuple(arguments.steps))
        rows += [study.row(name) for name in arguments.arms]
    title = "Connectors and tiles at equal steps"
    print_table(title, COLUMNS, rows)
    if arguments.output is not None:
        write_results(
            Path(arguments.output),
            "connectors",
            title=title,
            command=command_line("scripts/benchmarks/study_connectors", argv),
            tables=[("Existence of objects in held-out scenes", COLUMNS, rows)],
            details={"scenes": arguments.scenes, "test_scenes": arguments.test_scenes},
            facts=facts,
        )
    return 0


class Study:
    """One seed: its scenes, questions, runs and answers.

    Args:
        work: Where all files go.
        seed: Of scenes, wording, weights and order.
        counts: Scenes of each size for training, validation and the questions.
        steps: Optimizer steps of stage 1 and stage 2.
    """

    def __init__(
        self, work: Path, seed: int, counts: Mapping[str, int], steps: tuple[int, int]
    ) -> None:
        self._work, self._seed, self._counts, self._steps = work, seed, counts, steps
        size = "-".join(map(str, [*counts.values(), *steps]))
        self._folder = work / f"seed{seed}-{size}"

    def row(self, name: str) -> dict[str, Any]:
        """Train an arm in both stages and ask it, unless that is done; return its row."""
        arm = ARMS[name]
        run = self._folder / name
        for split, count in self._counts.items():
            self._make_data(arm.scenes, split, count)
        for stage, config in CONFIGS.items():
            if not (run / stage / "final").is_dir():
                run_python("-m", f"vlm_sft.{stage}", config, *self.overrides(name, stage))
        answers = self._answers(name, run)
        found = answers["probes"]["existence"]
        processor = json.loads((run / "stage2/final/processor.json").read_text(encoding="utf-8"))
        return {
            "arm": f"{name} ({arm.scenes} objects)",
            "seed": self._seed,
            "tokens": processor["num_image_tokens"],
            "steps": " + ".join(map(str, self._steps)),
            "loss": f"{self._loss(run):.3f}",
            "accuracy": _with_interval(found["right"]["accuracy"]),
            "blank": _with_interval(found["blank"]["accuracy"]),
        }

    def _data(self, scenes: str, split: str) -> Path:
        return self._folder / f"data-{scenes}-{split}"

    def _make_data(self, scenes: str, split: str, count: int) -> None:
        data = self._data(scenes, split)
        if (data / "questions/build.json").exists():
            return
        seed = str(100 * self._seed + ["train", "val", "test"].index(split))
        options = [*COMMON, *SCENES[scenes], "--count", str(count), "--seed", seed]
        run_python("-m", "data_tools.make_scenes", "--out", str(data / "scenes"), *options)
        files = [
            *("--instances", f"{data}/scenes/annotations/instances_{ARTIST}.json"),
            *("--captions", f"{data}/scenes/annotations/captions_{ARTIST}.json"),
            *("--images", f"{data}/scenes/images", "--out", f"{data}/questions"),
        ]
        probes = ["--probes", "2"] if split == "test" else []
        form = ["--captions-from", "boxes", "--answers", "evidence", "--turns", "1"]
        form += ["--families", "existence", "--seed", seed]
        run_python("-m", "data_tools.build_coco", *files, *form, *probes)

    def overrides(self, name: str, stage: str) -> list[str]:
        """Return the settings of an arm's run that differ from the quickstart's configuration."""
        arm, run = ARMS[name], self._folder / name
        steps = self._steps[0] if stage == "stage1" else self._steps[1]
        files = {
            f"data.{key}": [
                {
                    "path": f"{self._data(arm.scenes, split)}/questions/{stage}.json",
                    "image_root": f"{self._data(arm.scenes, split)}/scenes/images",
                }
            ]
            for key, split in (("train", "train"), ("eval", "val"))
        }
        return [
            f"output_dir={run}/{stage}",
            f"seed={self._seed}",
            f"model.vision_tower.name={self._work}/pieces/efficientnet-lite0",
            f"model.language_model.name={self._work}/pieces/smollm2-135m-instruct",
            *(f"{key}={json.dumps(value)}" for key, value in files.items()),
            *("train.epochs=100", f"train.max_steps={steps}", f"train.eval_every_steps={steps}"),
            *("train.trackers=[]", "train.eval_samples=0"),
            f"projector={'null' if stage == 'stage1' else f'{run}/stage1/final'}",
            *arm.overrides,
        ]

    def evaluation(self, name: str) -> list[str]:
        """Return the arguments of `evaluate` that ask an arm's model."""
        run, test = self._folder / name, self._data(ARMS[name].scenes, "test")
        return [
            str(run / "stage2/final"),
            *("--images", f"{test}/scenes/images"),
            *("--probes", f"{test}/questions/existence.json"),
            *("--conditions", "right,blank"),
            *("--answers", "free_form", "--out", str(run / "results.json")),
        ]

    def _answers(self, name: str, run: Path) -> dict[str, Any]:
        results = run / "results.json"
        if not results.exists():
            run_python("-m", "vlm_sft.evaluate", *self.evaluation(name))
        found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
        return found

    def _loss(self, run: Path) -> float:
        lines = (run / "stage2/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [row["eval_loss"] for row in map(json.loads, lines) if "eval_loss" in row]
        return float(losses[-1])


def _with_interval(found: dict[str, float]) -> str:
    return f"{found['estimate']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmarks/study_connectors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scenes", type=int, default=1600, help="training scenes (1600)")
    parser.add_argument("--test-scenes", type=int, default=120, help="to ask about (120)")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[75, 170], help="of stage 1 and stage 2 (75 170)"
    )
    parser.add_argument("--work", default="demo/connectors", help="pieces, data and runs")
    parser.add_argument("--output", default=None, help="folder for a page of results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
