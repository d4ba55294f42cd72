"""Samples a CPU-second and memory a sample of clean, export and mix.

    .venv/bin/python scripts/benchmarks/bench_cleaning.py --counts 10000 100000

Samples are made up in LLaVA-Instruct's proportions and lengths (four-turn conversations, 100-word
descriptions, 120-word reasoning), 1 % exact and 2 % near duplicates among them (one word in fifty
changed); images are not opened. Every size and stage runs in a process of its own: CPU time is
the process's, memory its peak above that of a run on ten samples.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct import export as exporting
from data_tools.instruct.clean import command as cleaning
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.index import write_images
from data_tools.instruct.lines import write_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Cost, ImageSource, Sample, Shown, Turn
from vlm_sft.commands.run_command import run_command
from vlm_sft.config.loading import parse
from vlm_sft.utils.atomic_files import write_json

CATEGORIES = ("person", "dog", "cat", "car", "bus", "cup", "chair", "bird", "boat", "clock")
STAGES = ("clean", "export", "mix")
BASE = 10
"""Samples of the run whose memory is taken off."""


def main(argv: Sequence[str]) -> int:
    """Print a line for every size and stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--one", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], Path(arguments.one[1]))))
        return 0
    print(f"{'samples':>9}  {'stage':<7} {'samples/CPU-s':>14} {'bytes a sample':>15}")
    with tempfile.TemporaryDirectory() as name:
        base = run_all(Path(name), BASE)
        for count in arguments.counts:
            for stage, found in run_all(Path(name), count).items():
                rate = count / found["cpu_seconds"]
                memory = (found["peak_bytes"] - base[stage]["peak_bytes"]) / count
                print(f"{count:>9,}  {stage:<7} {rate:>14,.0f} {memory:>15,.0f}  {found['told']}")
    return 0


def run_all(folder: Path, count: int) -> dict[str, Any]:
    """The measurements of all stages on that many samples, by stage."""
    run = folder / str(count)
    make_run(run, count)
    found = {}
    for stage in STAGES:
        command = [sys.executable, __file__, "--one", stage, str(run)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[stage] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(stage: str, run: Path) -> dict[str, Any]:
    """Run one stage in this process."""
    config = run_config(run)
    stages: dict[str, Callable[[], Any]] = {
        "clean": lambda: cleaning.command(config),
        "export": lambda: exporting.command(config),
        "mix": lambda: mix_export(run),
    }
    start = time.process_time()
    stages[stage]()
    seconds = time.process_time() - start
    told: Any = ""
    if stage == "clean":
        figures = json.loads((run / "cleaning.json").read_text())
        told = figures["dropped"]["samples_by_reason"]
        told["columns, bytes a sample"] = figures["bytes_per_sample"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"cpu_seconds": seconds, "peak_bytes": peak, "told": told}


def mix_export(run: Path) -> None:
    """Mix nine tenths of the export."""
    from data_tools.mix import __main__ as mix

    total = json.loads((run / "export" / "export.json").read_text())["samples"] * 9 // 10
    values = {
        "output_dir": str(run / "mix"),
        "total": max(1, total),
        "sources": [
            {
                "name": "own",
                "path": str(run / "export" / "llava.json"),
                "image_root": str(run / "images"),
            }
        ],
        "missing_images": "leave_out",
    }
    (run / "mix.yaml").write_text(json.dumps(values))
    mix.main([str(run / "mix.yaml")])


def run_config(run: Path) -> InstructConfig:
    """Everything on, but that no image is opened."""
    values = {
        "output_dir": str(run),
        "coco": {"captions": "captions.json", "images": str(run / "images")},
        "teacher": {"kind": "rules"},
        "clean": {"same_images": {"action": "keep"}},
    }
    return parse(InstructConfig, values, "bench")


def make_run(run: Path, count: int) -> None:
    """`images.jsonl` and `samples.jsonl` of a run."""
    rng = random.Random(count)
    images = []
    for number in range(1, count // 2 + 2):
        boxes = tuple(
            Box(name, 1, 1, 9, 9, False, i) for i, name in enumerate(rng.sample(CATEGORIES, 3), 1)
        )
        images.append(
            AnnotatedImage(
                id=number,
                file_name=f"{number:012d}.jpg",
                width=64,
                height=48,
                captions=("A dog.",),
                boxes=boxes,
                caption_ids=(1,),
            )
        )
    folder = RunFolder(run)
    write_images(folder, images)
    write_json(folder.index, {"categories": dict.fromkeys(CATEGORIES)})
    (run / "images").mkdir()
    for image in images:
        (run / "images" / image.file_name).touch()
    write_lines(folder.samples, make_samples(rng, count, images))


def make_samples(rng: random.Random, count: int, images: list[AnnotatedImage]) -> Iterator[Sample]:
    """The samples, repeats among them."""
    words = [f"word{n}" for n in range(8000)]
    weights = [1 / (n + 5) for n in range(8000)]
    earlier = ""
    for number in range(count):
        image = images[number // 2]
        kind = rng.choices(("conversation", "detail", "reasoning"), (57, 23, 77))[0]
        if kind == "conversation":
            turns = [_yes_no(rng) for _ in range(2)]
            turns += [_turn(" ".join(rng.choices(words, weights, k=30))) for _ in range(2)]
        else:
            text = " ".join(rng.choices(words, weights, k=100 if kind == "detail" else 120))
            draw = rng.random()
            if earlier and draw < 0.03:
                text = earlier
                if draw < 0.02:
                    changed = text.split()
                    for _ in range(len(changed) // 50):
                        changed[rng.randrange(len(changed))] = "changed"
                    text = " ".join(changed)
            elif rng.random() < 0.1:
                earlier = text
            turns = [_turn(text)]
        yield _sample(number, image, kind, turns)


def _yes_no(rng: random.Random) -> Turn:
    answer = "Yes." if rng.random() < 0.7 else "No."
    return Turn(question=f"Is there a {rng.choice(CATEGORIES)}?", answer=answer, kind="existence")


def _turn(text: str) -> Turn:
    return Turn(question=f"What of {text[:12]}?", answer=text, kind="reasoning")


def _sample(number: int, image: AnnotatedImage, kind: Any, turns: list[Turn]) -> Sample:
    return Sample(
        id=f"{image.id:012d}-{kind}-{number}",
        type=kind,
        origin="llm",
        image=ImageSource(id=image.id, file_name=image.file_name, width=64, height=48, license=4),
        turns=tuple(turns),
        shown=Shown(captions=(1,), boxes=(1, 2, 3)),
        request=f"{number:064x}",
        template="bench",
        template_sha256="0" * 64,
        model="bench",
        parameters={"temperature": 0.7},
        cost=Cost(tokens_in=1500, tokens_out=200),
        tool="bench",
        status="accepted",
    )


if __name__ == "__main__":
    run_command(main)
