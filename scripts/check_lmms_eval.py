"""Answer a suite with lmms-eval and with vlm_sft, and compare: check_lmms_eval.py DIR.

    python scripts/check_lmms_eval.py side          # a tiny model, trained here
    python scripts/check_lmms_eval.py side --checkpoint runs/stage2/final --suite suite.yaml

Makes an environment in DIR, from the package index: lmms-eval and what it needs for these
models, in front of everything that is installed here. Exports the suite
(`evaluate export --to lmms-eval`) and the checkpoint (`export --to hf`), lets lmms-eval answer
twice, by `llava_hf` with the folder and by `openai` with `vlm_sft.serve`, and compares every answer
and score with those of `python -m vlm_sft.evaluate`. Exit code 1 on a difference.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import yaml

from vlm_sft.commands.run_command import run_command
from vlm_sft.evaluation.suites.bridges import METRICS

ROOT: Final = Path(__file__).parent.parent
PACKAGES: Final = [
    *("lmms-eval==0.7.3", "decord==0.6.0", "loguru", "pytablewriter", "DataProperty", "tabledata"),
    *("typepy", "mbstrdecoder", "pathvalidate", "tcolorpy", "sacrebleu", "portalocker", "tabulate"),
    *("colorama", "evaluate", "jsonlines", "tqdm-multiprocess", "python-dotenv", "tenacity"),
    *("qwen-vl-utils", "chardet"),
    *("lxml", "pytz", "aiohttp", "multidict", "yarl", "propcache", "aiohappyeyeballs"),
    *("aiosignal", "frozenlist"),
]
"""lmms-eval without what only its other models and tasks import; `llava_hf` imports decord."""
INSTALLED_HERE: Final = f"{sysconfig.get_path('purelib')}\n{ROOT.absolute()}\n"
SERVER_SECONDS: Final = 300


def main(argv: Sequence[str]) -> int:
    """Answer three times, print the table; returns the exit code."""
    arguments = _parse(argv)
    python = environment(arguments.directory)
    with tempfile.TemporaryDirectory(prefix="vlm_sft-lmms-") as name:
        scratch = Path(name)
        checkpoint, suite = arguments.checkpoint, arguments.suite
        if checkpoint is None:
            checkpoint, suite = train_tiny(scratch), tiny_suite(scratch)
        tasks, folder = scratch / "tasks", scratch / "hf"
        ours("evaluate", str(checkpoint), str(suite), "--out", str(scratch / "evaluation"))
        ours("evaluate", "export", str(suite), "--to", "lmms-eval", "--out", str(tasks))
        ours("export", str(checkpoint), str(folder), "--to", "hf")
        kinds = {row["name"]: row["kind"] for row in yaml.safe_load(suite.read_text())["tasks"]}
        expected = evaluated(scratch / "evaluation")
        model = f"pretrained={folder},device_map=cpu"
        lmms_eval(python, tasks, kinds, "llava_hf", model, scratch / "llava_hf")
        with server(checkpoint) as url:
            model = f"model=checked,base_url={url},api_key=none,timeout=600,num_concurrent=1"
            lmms_eval(python, tasks, kinds, "openai", model, scratch / "openai")
        differences = sum(
            compared(route, kinds, expected, scratch / route, tasks)
            for route in ("llava_hf", "openai")
        )
    print(f"{differences} differences")
    return 1 if differences else 0


def environment(directory: Path) -> str:
    """Return the interpreter that has lmms-eval; made if it is not there."""
    home = directory / PACKAGES[0].replace("==", "-")
    python = home / "bin" / "python"
    if not (home / "ready.json").exists():
        venv.create(home, with_pip=False, clear=True)
        packages = next((home / "lib").glob("python3*")) / "site-packages"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*command, str(packages), *PACKAGES], check=True)
        (packages / "zz_installed_here.pth").write_text(INSTALLED_HERE)
        (home / "ready.json").write_text(json.dumps(PACKAGES))
    return str(python.absolute())


def train_tiny(scratch: Path) -> Path:
    """Train configs/tiny and return the checkpoint."""
    first, second = scratch / "stage1", scratch / "stage2"
    ours("stage1", "configs/tiny/stage1.yaml", f"output_dir={first}")
    projector = f"projector={first / 'final'}"
    ours("stage2", "configs/tiny/stage2.yaml", f"output_dir={second}", projector)
    return second / "final"


def tiny_suite(scratch: Path) -> Path:
    """Write a suite about the images of configs/tiny: two questions on each, and yes or no."""
    data = ROOT / "configs" / "tiny" / "data"
    records = [
        record
        for name in ("instructions.json", "instructions_eval.json")
        for record in json.loads((data / name).read_text())
    ]
    figures, exists = [], []
    for record in records:
        color, shape, _ = record["id"].split("-")
        for asked, answer in (("Which colour?", color), ("Which shape?", shape)):
            row = {"id": f"{record['id']} {asked}", "image": record["image"]}
            figures.append({**row, "question": asked, "answer": answer})
        row = {"id": record["id"], "image": record["image"]}
        label = "yes" if color == "red" else "no"
        exists.append({**row, "question": "Is it red?", "label": label})
    tasks = []
    for name, kind, rows in (("figures", "gqa", figures), ("exists", "pope", exists)):
        (scratch / f"{name}.json").write_text(json.dumps(rows))
        files = [str(scratch / f"{name}.json")]
        task = {"name": name, "kind": kind, "files": files, "images": str(data), "max_tokens": 16}
        tasks.append(task)
    (scratch / "suite.yaml").write_text(yaml.safe_dump({"tasks": tasks}))
    return scratch / "suite.yaml"


def ours(command: str, *arguments: str) -> None:
    """Run a command of vlm_sft."""
    subprocess.run([sys.executable, "-m", f"vlm_sft.{command}", *arguments], check=True, cwd=ROOT)


def lmms_eval(
    python: str, tasks: Path, kinds: dict[str, str], model: str, arguments: str, out: Path
) -> None:
    """Let lmms-eval answer, without the hub."""
    names = ",".join(f"suite_{name}" for name in kinds)
    command = [python, "-m", "lmms_eval", "--model", model, "--model_args", arguments]
    command += ["--device", "cpu", "--batch_size", "1", "--include_path", str(tasks)]
    command += ["--tasks", names, "--log_samples", "--output_path", str(out)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "cache")}
    subprocess.run(command, check=True, env={**os.environ, **offline})


@contextmanager
def server(checkpoint: Path) -> Iterator[str]:
    """Serve a checkpoint; yields the address of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vlm_sft.serve", str(checkpoint), "--port", str(port)]
    process = subprocess.Popen([*command, "--served-name", "checked"])
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + SERVER_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def evaluated(out: Path) -> dict[tuple[str, str], str]:
    """Return the answers of `vlm_sft.evaluate` by task and id."""
    lines = (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        (row["task"], row["id"]): row["answer"] for row in rows if row.get("condition") == "right"
    }


def compared(
    route: str,
    kinds: dict[str, str],
    expected: dict[tuple[str, str], str],
    out: Path,
    tasks: Path,
) -> int:
    """Print a row for each task and score; return the number of differences."""
    from datasets import Dataset

    scores = json.loads(only(out, "*_results.json").read_text())["results"]
    ours_scores = json.loads((out.parent / "evaluation" / "results.json").read_text())["tasks"]
    differences = 0
    for name, kind in kinds.items():
        stem = f"suite_{name}"
        ids = Dataset.from_parquet(str(tasks / f"{stem}.parquet"), cache_dir=str(out / "parquet"))[
            "question_id"
        ]
        lines = only(out, f"*_samples_{stem}.jsonl").read_text(encoding="utf-8").splitlines()
        found = {ids[row["doc_id"]]: row["filtered_resps"] for row in map(json.loads, lines)}
        same = 0
        for number in ids:
            answer = str(found.get(number)).strip()
            same += answer == expected[name, number].strip()
            if answer != expected[name, number].strip():
                print(f"{route} {name} {number}: {answer!r}, expected {expected[name, number]!r}")
        differences += len(ids) - same
        for metric in METRICS.get(kind, ("accuracy",)):
            theirs = scores[stem][f"{metric},none"]
            own = own_score(ours_scores, name, metric)
            differences += abs(theirs - own) > 1e-9
            print(f"{route:<9} {name:<10} {same}/{len(ids)} answers  {metric:<10} lmms-eval "
                  f"{theirs:.4f}  vlm_sft {own:.4f}", flush=True)  # fmt: skip
    return differences


def own_score(tasks: Any, name: str, metric: str) -> float:
    """Return a score of results.json."""
    return float(tasks[name]["conditions"]["right"][metric])


def only(folder: Path, pattern: str) -> Path:
    """Return the one file of this name."""
    (path,) = folder.rglob(pattern)
    return path


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="check_lmms_eval.py",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the environment is kept")
    parser.add_argument("--checkpoint", type=Path, help="instead of a tiny model; needs --suite")
    parser.add_argument("--suite", type=Path, metavar="SUITE.yaml", help="its questions")
    arguments = parser.parse_args(argv)
    if (arguments.checkpoint is None) != (arguments.suite is None):
        parser.error("--checkpoint and --suite go together")
    return arguments


if __name__ == "__main__":
    run_command(main)
