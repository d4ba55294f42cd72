"""Speed and memory of `verify` on made-up images.

    python scripts/benchmarks/bench_verification.py [--samples 10000] [--images 1000]

Writes a run of so many answers, conversations of three turns and descriptions of four sentences,
verifies it in a process of its own, and prints samples a CPU second and that process's peak memory.
Run it with several numbers of samples: memory must not grow with them, beyond 16 bytes an answer.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.config import CocoConfig, InstructConfig, TeacherConfig
from data_tools.instruct.index import write_images
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Answer, Request, SampleType, Shown
from data_tools.instruct.verify import command as verifying
from vlm_sft.utils import words

NAMES = ("dog", "cat", "cup", "chair", "person", "car", "bus", "bird", "bottle", "umbrella")
ABSENT = ("zebra", "train", "pizza", "kite", "toilet")


def main(argv: Sequence[str]) -> int:
    """Write the run, verify it elsewhere, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.run:
        return verify(Path(arguments.run))
    with tempfile.TemporaryDirectory() as folder:
        write_run(RunFolder(Path(folder)), arguments.samples, arguments.images)
        command = [sys.executable, __file__, "--run", folder]
        measured = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    rate = arguments.samples / measured["cpu_seconds"]
    print(
        f"{arguments.samples:,} samples of {arguments.images:,} images: {rate:,.0f} a CPU "
        f"second, {measured['peak_mb']:.0f} MB at the most, {measured['before_mb']:.0f} MB before"
    )
    return 0


def verify(folder: Path) -> int:
    """Verify a written run; prints CPU seconds and memory as JSON."""
    teacher = TeacherConfig(kind="rules")
    coco = CocoConfig(instances="made up", images="made up")
    config = InstructConfig(output_dir=str(folder), coco=coco, teacher=teacher)
    before = _peak_mb()
    start = time.process_time()
    sys.stdout = sys.stderr
    verifying.command(config)
    measured = {
        "cpu_seconds": time.process_time() - start, "peak_mb": _peak_mb(), "before_mb": before,
    }  # fmt: skip
    print(json.dumps(measured), file=sys.__stdout__)
    return 0


def write_run(folder: RunFolder, num_samples: int, num_images: int) -> None:
    """Images, requests and answers; half of the answers are descriptions."""
    rng = random.Random(0)
    images = [make_image(number + 1, rng) for number in range(num_images)]
    write_images(folder, images)
    folder.index.write_text(json.dumps({"categories": dict.fromkeys((*NAMES, *ABSENT), 1)}))
    folder.answers.mkdir()
    with (
        folder.requests.open("w") as requests,
        (folder.answers / "part-00001.jsonl").open("w") as answers,
    ):
        for number in range(num_samples):
            image = images[number * num_images // num_samples]
            sample_type: SampleType = "detail" if number % 2 else "conversation"
            request = Request(
                id=f"{number:064x}", sample_id=f"sample-{number}", image=image.id,
                type=sample_type, number=0, template="t", template_sha256="0" * 64,
                question="Describe the picture." if number % 2 else None,
                context="c1: a caption\n" * 5, parameters={"model": "m", "seed": number},
                shown=Shown(captions=image.caption_ids),
            )  # fmt: skip
            said = description(image, rng) if number % 2 else conversation(image, rng)
            answer = Answer(
                request=request.id, teacher="openai", text=json.dumps(said), finish="stop"
            )
            requests.write(request.model_dump_json() + "\n")
            answers.write(answer.model_dump_json() + "\n")


def make_image(number: int, rng: random.Random) -> AnnotatedImage:
    """Three kinds of things, up to three of each, five captions."""
    names = rng.sample(NAMES, 3)
    boxes = [
        Box(name, 10.0 + 200 * i, 10.0 + 150 * j, 90, 90, False, 100 * number + 10 * i + j)
        for i, name in enumerate(names)
        for j in range(rng.randint(1, 3))
    ]
    captions = tuple(
        f"{words.capital(words.counted(names[i % 3], 1))} {text}."
        for i, text in enumerate(
            ("stands near a red wall", "beside a wooden table", "on a sunny day",
             "in a quiet street", "next to some trees")
        )
    )  # fmt: skip
    ids = tuple(10**9 + 10 * number + i for i in range(5))
    return AnnotatedImage(number, f"{number:012d}.jpg", 640, 480, captions, tuple(boxes), ids)


def conversation(image: AnnotatedImage, rng: random.Random) -> dict[str, Any]:
    """Three turns, about every tenth of them false."""
    one, two, _ = image.categories
    count = len(image.of(one)) + (rng.random() < 0.1)
    absent = rng.choice(ABSENT)
    asked = (
        (f"How many {words.plural(one)} are there in the picture?",
         f"There are {words.number(count)} {words.plural(one)} in the picture.", "count"),
        (f"Is the {one} standing next to a wall?",
         f"Yes, the {one} stands near a red wall, and a {two} is close to it.", "relation"),
        (f"Can you see a {absent}?", f"No, there is no {absent} in the picture.", "existence"),
    )  # fmt: skip
    keys = ("question", "answer", "kind", "evidence")
    return {"turns": [dict(zip(keys, (*turn, ["c1"]), strict=True)) for turn in asked]}


def description(image: AnnotatedImage, rng: random.Random) -> dict[str, Any]:
    """Four sentences of sixty words, about every tenth with a thing that is not there."""
    one, two, three = image.categories
    extra = rng.choice(ABSENT) if rng.random() < 0.1 else three
    text = (
        "The picture shows a quiet street on a sunny day, with a red wall and some trees behind. "
        f"On the left side of the picture there is a {one}, which stands near the wall. A {two} "
        f"can be seen further to the right, beside a wooden table. There is also a {extra} next "
        "to the trees, and the light makes long shadows on the ground."
    )
    return {"answer": text, "evidence": ["c1", "c2"]}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
