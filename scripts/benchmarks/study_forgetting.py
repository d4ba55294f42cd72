"""How much text has to be replayed so that stage 2 does not forget? The quickstart's model trained
with different shares of text.

    scripts/benchmarks/study_forgetting                         # repeat it after a kill
    scripts/benchmarks/study_forgetting --shares 0 10 --seeds 1 --methods lora
    scripts/benchmarks/study_forgetting --only-report           # the page of finished runs

Each run trains the quickstart's stage 2 (LoRA, or all weights with a small learning rate) for
equally many steps on a mixture that `data_tools.mix` makes of questions about composed scenes and
of a share of text (`replay_share`). `data.eval_text` measures the loss of held-out text before and
after, and questions of existence about held-out scenes measure what was learned of images.

The text is the language model's own: what SmolLM2 answers, greedily, to questions about functions
of Python's standard library. The functions of the held-out text are of other modules than those of
the replayed one. So the loss before training is low, and its rise is what training has changed; it
is no measure of knowledge. Other text, other models and longer training may need another share.
"""

import argparse
import importlib
import inspect
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from bench_results import command_line, machine_facts, print_table, write_results
from study_processes import run_python
from transformers import AutoModelForCausalLM, AutoTokenizer

from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.inspection.run_data import read_run
from vlm_sft.utils.atomic_files import write_json, write_text
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import read_json

ARTIST: Final = "openmoji"
SCENES: Final = [
    *("--categories", "configs/demo/categories.json", "--artist", ARTIST, "--max-side", "320"),
    *("--max-objects", "2", "--max-instances", "2", "--scale", "0.4", "0.75"),
    *("--augment", "0.15", "--crowd-share", "0", "--visible-share", "0.8"),
    *("--backgrounds", "meadow,bokeh,clouds,gradient,blobs,room,water,desert"),
]
REPLAYED: Final = (
    *("os", "os.path", "json", "random", "statistics", "collections", "shutil", "re", "math"),
    *("textwrap", "functools", "heapq", "bisect", "tempfile", "subprocess", "socket", "zipfile"),
)
HELD_OUT: Final = ("itertools", "string", "datetime", "pathlib", "csv", "copy", "operator", "glob")
"""Modules of Python whose functions are asked about."""

PROMPTS: Final = (
    "What does `{}` do in Python?",
    "Explain `{}` of Python to a beginner in two sentences.",
    "When would I use `{}` in a Python program?",
    "Give a short description of the Python function `{}`.",
)
METHODS: Final = {
    "lora": ("lora={r: 16, alpha: 32, dropout: 0.0, targets: all-linear}", 6e-4),
    "full": ("lora=null", 2e-5),
}
"""Settings of LoRA, and the peak learning rate of the language model, by method."""

BATCH: Final = 8
COLUMNS: Final = {
    "method": "method",
    "share": "replay",
    "seed": "seed",
    "text_records": "text records",
    "before": "text loss before",
    "after": "after",
    "change": "change",
    "accuracy": "existence (95 % interval)",
}


def main(argv: Sequence[str]) -> int:
    """Train and ask what is missing, and write the page; returns the exit code."""
    arguments = _parse(argv)
    facts, study = machine_facts(), Study(Path(arguments.work), *arguments.steps)
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        if not arguments.only_report:
            study.prepare(seed)
        for method in arguments.methods:
            for share in arguments.shares:
                if not arguments.only_report:
                    study.train(method, share, seed)
                if study.is_done(method, share, seed):
                    rows.append(study.row(method, share, seed))
    if not rows:
        raise UserError(f"{arguments.work}: no run is finished; run this without --only-report")
    title = "Text replay against forgetting"
    print_table(title, COLUMNS, rows)
    advice = [{"method": name, "share": recommended(rows, name)} for name in arguments.methods]
    print_table("Recommended share", ADVICE, advice)
    if arguments.output is not None:
        write_results(
            Path(arguments.output),
            "forgetting",
            title=title,
            command=command_line("scripts/benchmarks/study_forgetting", argv),
            tables=[
                ("Loss of held-out text, and questions about held-out scenes", COLUMNS, rows),
                ("Recommended share", ADVICE, advice),
            ],
            details={"steps": arguments.steps},
            facts=facts,
        )
    return 0


ADVICE: Final = {
    "method": "method",
    "share": "smallest share that halves the rise of the loss and costs no accuracy",
}


def recommended(rows: Sequence[dict[str, Any]], method: str) -> str:
    """Return the smallest share of text with which the loss of text rises half as much as without.

    The accuracy has to stay within the interval of the run without text. Values are means over
    seeds.

    Args:
        rows: Of `Study.row`.
        method: A key of `METHODS`.
    """
    shares = sorted({row["percent"] for row in rows if row["method"] == method})
    if 0 not in shares or len(shares) < 2:
        return "unknown: too few runs"

    def mean(share: int, key: str) -> float:
        found = [row[key] for row in rows if (row["method"], row["percent"]) == (method, share)]
        return sum(found) / len(found)

    if mean(0, "change") <= 0:
        return "0 %: the loss does not rise without text"
    for share in shares[1:]:
        halved = mean(share, "change") <= mean(0, "change") / 2
        if halved and mean(share, "estimate") >= mean(0, "low"):
            return f"{share} %"
    return "none of those tried"


class Study:
    """The pieces, data and runs of all seeds.

    Args:
        work: Where all files go.
        stage1_steps: Optimizer steps of stage 1.
        steps: Optimizer steps of each stage 2.
    """

    def __init__(self, work: Path, stage1_steps: int, steps: int) -> None:
        self._work, self._stage1_steps, self._steps = work, stage1_steps, steps

    def prepare(self, seed: int) -> None:
        """Make pieces, scenes, text and the projector of a seed, unless they are there."""
        run_python("scripts/demo_pieces.py", "demo/pieces")
        for split, count in (("train", 1600), ("test", 120)):
            self._make_scenes(split, count)
        for name, modules, number in (("replay", REPLAYED, 400), ("held_out", HELD_OUT, 48)):
            path = self._work / f"{name}.json"
            if not path.exists():
                write_json(path, answered(questions(modules, number), name))
        out = self._folder(seed) / "stage1"
        if not (out / "final").is_dir():
            run_python("-m", "vlm_sft.stage1", "configs/demo/stage1.yaml", *self._stage1(seed, out))

    def train(self, method: str, share: int, seed: int) -> None:
        """Mix, train and ask, unless that is done."""
        run = self._run(method, share, seed)
        if self.is_done(method, share, seed):
            return
        write_text(run / "mix.yaml", yaml.safe_dump(self.mixture(share, seed, run / "mix")))
        run_python("-m", "data_tools.mix", str(run / "mix.yaml"))
        run_python(
            "-m",
            "vlm_sft.stage2",
            "configs/demo/stage2_lora.yaml",
            *self.settings(method, share, seed),
        )
        run_python(
            "-m",
            "vlm_sft.evaluate",
            str(run / "stage2/final"),
            *("--images", str(self._work / "test/scenes/images")),
            *("--probes", str(self._work / "test/built/existence.json")),
            *("--conditions", "right", "--answers", "free_form"),
            *("--out", str(run / "results.json")),
        )

    def is_done(self, method: str, share: int, seed: int) -> bool:
        """Return whether a run was trained and asked."""
        return (self._run(method, share, seed) / "results.json").exists()

    def row(self, method: str, share: int, seed: int) -> dict[str, Any]:
        """Return the row of a finished run."""
        run = self._run(method, share, seed)
        text = read_run(run / "stage2").text_loss
        if text is None:
            raise UserError(f"{run}/stage2: has no loss of text before and after; remove {run}")
        found = read_json(run / "results.json")["probes"]["existence"]["right"]["accuracy"]
        interval = f"{found['low']:.3f} to {found['high']:.3f}"
        return {
            "method": method,
            "share": f"{share} %",
            "percent": share,
            "seed": seed,
            "text_records": round(share / 100 * self._steps * BATCH),
            **{key: text[key] for key in ("before", "after", "change")},
            "accuracy": f"{found['estimate']:.3f} ({interval})",
            **found,
        }

    def mixture(self, share: int, seed: int, out: Path) -> dict[str, Any]:
        """Return the configuration of `data_tools.mix` for one epoch of a run."""
        images = {
            "name": "scenes",
            "path": str(self._work / "train/built/stage2.json"),
            "image_root": str(self._work / "train/scenes/images"),
        }
        text = {"name": "text", "path": str(self._work / "replay.json"), "replay": True}
        found: dict[str, Any] = {
            "output_dir": str(out),
            "seed": seed,
            "total": self._steps * BATCH,
            "when_short": "upsample",
            "sources": [images, text] if share else [images],
        }
        return found | ({"replay_share": share / 100} if share else {})

    def settings(self, method: str, share: int, seed: int) -> list[str]:
        """Return the settings of a run that differ from the quickstart's configuration."""
        run, (lora, rate) = self._run(method, share, seed), METHODS[method]
        train = {"path": str(run / "mix/train.jsonl"), "image_root": self._images("train")}
        return [
            *(f"output_dir={run}/stage2", f"seed={seed}", lora),
            f"projector={self._folder(seed)}/stage1/final",
            f"data.train={json.dumps([train])}",
            "data.eval=[]",
            f"data.eval_text={json.dumps([{'path': str(self._work / 'held_out.json')}])}",
            *self._common(),
            f"optim.learning_rate.language_model={rate}",
            *("train.epochs=10", f"train.max_steps={self._steps}"),
            *(f"train.global_batch_size={BATCH}", "train.eval_every_steps=null"),
            f"train.save_every_steps={self._steps}",
        ]

    def _stage1(self, seed: int, out: Path) -> list[str]:
        train = {
            "path": str(self._work / "train/built/stage1.json"),
            "image_root": self._images("train"),
        }
        return [
            *(f"output_dir={out}", f"seed={seed}", f"data.train={json.dumps([train])}"),
            *("data.eval=[]", *self._common(), "train.epochs=10"),
            *(f"train.max_steps={self._stage1_steps}", "train.eval_every_steps=null"),
        ]

    def _common(self) -> list[str]:
        return [
            "model.vision_tower.name=demo/pieces/efficientnet-lite0",
            "model.language_model.name=demo/pieces/smollm2-135m-instruct",
            f"data.feature_cache={self._work}/features",
            "train.trackers=[]",
        ]

    def _images(self, split: str) -> str:
        return str(self._work / split / "scenes/images")

    def _folder(self, seed: int) -> Path:
        return self._work / f"seed{seed}-{self._stage1_steps}-{self._steps}"

    def _run(self, method: str, share: int, seed: int) -> Path:
        return self._folder(seed) / f"{method}-{share}"

    def _make_scenes(self, split: str, count: int) -> None:
        folder = self._work / split
        if (folder / "built/build.json").exists():
            return
        seed = str(81 + len(split))
        size = ["--count", str(count), "--seed", seed]
        run_python("-m", "data_tools.make_scenes", "--out", str(folder / "scenes"), *size, *SCENES)
        annotations = folder / "scenes/annotations"
        files = [
            *("--instances", str(annotations / f"instances_{ARTIST}.json")),
            *("--captions", str(annotations / f"captions_{ARTIST}.json")),
            *("--images", self._images(split), "--out", str(folder / "built")),
        ]
        form = ["--captions-from", "boxes", "--answers", "evidence", "--families", "existence"]
        run_python("-m", "data_tools.build_coco", *files, *form, "--probes", "2", "--seed", seed)


def questions(modules: Sequence[str], number: int) -> list[str]:
    """Return questions about documented public functions of Python modules, in a fixed order.

    Args:
        modules: Names of modules.
        number: Questions; fewer if there are not so many.
    """
    names = []
    for module in modules:
        for name, value in inspect.getmembers(importlib.import_module(module), callable):
            if not name.startswith("_") and name[0].islower() and inspect.getdoc(value):
                names.append(f"{module}.{name}")
    found = [prompt.format(name) for name in names for prompt in PROMPTS]
    random.Random(0).shuffle(found)
    return found[:number]


@torch.inference_mode()
def answered(asked: Sequence[str], name: str) -> list[dict[str, Any]]:
    """Return records of questions and the language model's own greedy answers.

    An answer that is not finished within 64 tokens ends with its last full sentence, or is left
    out.

    Args:
        asked: The questions.
        name: What the ids begin with.
    """
    folder = "demo/pieces/smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    batches = [asked[start : start + 16] for start in range(0, len(asked), 16)]
    answers: list[str] = []
    for batch in track(batches, description=f"answering questions of {name}"):
        chats = [[{"role": "user", "content": question}] for question in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        new = made[:, inputs["input_ids"].shape[1] :]
        for row in new.tolist():
            text = tokenizer.decode(row, skip_special_tokens=True).strip()
            ended = tokenizer.eos_token_id in row
            answers.append(text if ended else text[: text.rfind(".") + 1])
    turns = zip(asked, answers, strict=True)
    return [
        {
            "id": f"{name}-{number}",
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": answer},
            ],
        }
        for number, (question, answer) in enumerate(turns)
        if answer
    ]


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmarks/study_forgetting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shares", type=int, nargs="+", default=[0, 5, 10, 20], help="percent")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["lora"])
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[75, 170], help="of stage 1 and stage 2 (75 170)"
    )
    parser.add_argument("--work", default="demo/forgetting", help="data and runs")
    parser.add_argument("--output", default=None, help="folder for a page of results")
    parser.add_argument("--only-report", action="store_true", help="train nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
