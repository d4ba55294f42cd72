"""Compare the training results of two versions of the code, bit for bit.

  python scripts/compare_runs.py BASE_COMMIT [--quick | --only NAME ...]

Runs small fp32 training runs on the CPU with the code of BASE_COMMIT (in a temporary git worktree)
and with the code of this working tree, and compares what they leave behind: every loss and gradient
norm of metrics.jsonl, the records of every step (trained.jsonl), generated samples, the ledger's
counts, and every tensor of final/, the optimizer's state included. Every run is stopped after half
of its steps and resumed from its checkpoint. Exit code 1 if anything differs.

With --resume-across, the first half is trained by BASE_COMMIT and the second by the working tree;
the result must equal BASE_COMMIT's uninterrupted run, or be refused with exit code 2.

Both sides read the same data and BASE_COMMIT's configuration files. When a change renames something
on purpose, add the new name to the tables of compare_runs_cases.py.
"""

import argparse
import hashlib
import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

import yaml
from compare_runs_cases import (
    CASES,
    COMMON,
    HALF,
    QUICK,
    RENAMED_FIELDS,
    RENAMED_FILES,
    RENAMED_KEYS,
    RENAMED_TENSORS,
    STEPS,
    VOLATILE,
    Case,
    write_data,
)

ROOT = Path(__file__).resolve().parent.parent

TIMEOUT = 240
"""Seconds after which a run has failed."""
HEADER = ["configuration", "steps", "losses", "norms", "trained", "tensors", "other", "verdict"]
LIBRARIES = [
    "accelerate",
    "bitsandbytes",
    "matplotlib.figure",
    "peft",
    "PIL.ImageCms",
    "pydantic.json_schema",
    "rich.live",
    "rich.progress",
    "sqlite3",
    "timm",
    "torch._dynamo",
    "torchvision.models",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
]
"""Imported once, before the runs are forked: they take most of the seconds of a short run."""


@dataclass
class Side:
    """One version of the code: its name, its tree, and its configuration's JSON schema."""

    name: str
    tree: Path
    schema: str = ""

    def knows(self, setting: str) -> bool:
        """Return whether the configuration has this `key` or `key=value`."""
        key, _, value = setting.partition("=")
        names = [key.rpartition(".")[2], *([value] if value else [])]
        return all(f'"{name}"' in self.schema for name in names)

    def rename(self, config: dict[str, Any]) -> None:
        """Give the settings that this side does not know their new names."""
        for old, new in RENAMED_KEYS.items():
            (key, _, old_value), (new_key, _, new_value) = old.partition("="), new.partition("=")
            *parents, last = key.split(".")
            section: Any = config
            for parent in parents:
                section = section.get(parent, {}) if isinstance(section, dict) else {}
            if self.knows(old) or last not in (section or {}):
                continue
            if old_value in ("", str(section[last])):
                value = section.pop(last)
                put(config, new_key, new_value or value)


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of a nested mapping."""
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(config.get(parent), dict):
            config[parent] = {}
        config = config[parent]
    config[last] = value


def config_schema(tree: Path) -> str:
    """Return the JSON schema of the tree's `RunConfig`, wherever that class is defined."""
    files = (tree / "vlm_sft").rglob("*.py")
    holder = next(path for path in files if "class RunConfig(" in path.read_text())
    module = ".".join(holder.relative_to(tree).with_suffix("").parts)
    code = f"import json, {module} as m; print(json.dumps(m.RunConfig.model_json_schema()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,  # `python -c` looks for modules here before PYTHONPATH
        env=environment(tree),
        check=True,
        stdout=PIPE,
        text=True,
    )
    return done.stdout


def environment(tree: Path) -> dict[str, str]:
    """Return the variables under which both sides run: one thread, no network, the tree's code."""
    fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed, **offline, "PYTHONPATH": str(tree)}


def write_config(case: Case, side: Side, base: Side, work: Path, settings: list[str]) -> Path:
    """Write the case's configuration file under the names that `side` knows."""
    config = yaml.safe_load((base.tree / f"configs/tiny/{case.config}.yaml").read_text())
    images = str(base.tree / "configs/tiny/data/images")
    for key, file in (("train", case.stage), ("eval", f"{case.stage}_eval")):
        records = str(work.parent / f"{file}.json")
        put(config, f"data.{key}", [{"path": records, "image_root": images}])
    for setting in [*COMMON, *case.overrides, *settings]:
        key, _, value = setting.partition("=")
        put(config, key, yaml.safe_load(value))
    side.rename(config)
    path = work / f"{side.name}-config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def train(case: Case, side: Side, out: Path, config: Path) -> tuple[int, str]:
    """Start or resume a run with the code of `side`; returns exit code and log."""
    max_steps = "train.max_steps"
    changeable = max_steps if side.knows(max_steps) else RENAMED_KEYS[max_steps]
    arguments = [str(config), f"output_dir={out}", "--allow-change", changeable]
    module = f"vlm_sft.{case.stage}"
    log = config.with_suffix(".log")
    with log.open("a") as file:
        if case.world_size == 1:
            return run_forked(module, arguments, side.tree, file.fileno()), log.read_text()
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={case.world_size}"]
        command = [sys.executable, "-m", *launcher, "-m", module, *arguments]
        setting: dict[str, Any] = {"cwd": side.tree, "env": environment(side.tree)}
        done = subprocess.run(command, stdout=file, stderr=file, timeout=TIMEOUT, **setting)
    return done.returncode, log.read_text()


def run_forked(module: str, arguments: list[str], tree: Path, output: int) -> int:
    """Run `python -m module arguments` in a fork of this process and return its exit code.

    The fork inherits the imported libraries but no module of the project, which is imported from
    `tree` alone.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        signal.alarm(TIMEOUT)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        os.environ.update(environment(tree))
        sys.path[:] = [str(tree), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        sys.argv = [module, *arguments]
        import vlm_sft

        if not Path(vlm_sft.__file__).is_relative_to(tree):
            raise RuntimeError(f"imported {vlm_sft.__file__}, expected it below {tree}")
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def rows(out: Path, name: str) -> list[Any]:
    """Return the rows of a JSON-lines file under the base's field names; none if it is missing."""
    old_names = {new: old for old, new in RENAMED_FIELDS.items()}

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {old_names.get(k, k): restore(v) for k, v in value.items()}
        if isinstance(value, list):
            return [restore(child) for child in value]
        return old_names.get(value, value) if isinstance(value, str) else value

    paths = [out / name, out / RENAMED_FILES.get(name, name)]
    path = next((path for path in paths if path.exists()), None)
    return [restore(json.loads(line)) for line in path.read_text().splitlines()] if path else []


def tensors(final: Path) -> dict[str, str]:
    """Return a digest of dtype, shape and bytes of every tensor below final/, by its base name."""
    import torch
    from safetensors import safe_open

    old_files = {new: old for old, new in RENAMED_FILES.items()}
    digests: dict[str, str] = {}
    for path in sorted(final.rglob("*.safetensors")):
        file = path.relative_to(final).as_posix()
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not iterable)
                tensor = opened.get_tensor(name).contiguous()
                content = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                for old, new in RENAMED_TENSORS.items():
                    name = name.replace(new, old)
                described = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
                key = f"{old_files.get(file, file)}: {name}"
                digests[key] = hashlib.sha256(described + content).hexdigest()
    return digests


def results(out: Path) -> dict[str, dict[str, Any]]:
    """Return what a run left behind, by kind; each kind maps a place to a value."""
    metrics = rows(out, "metrics.jsonl")
    found: dict[str, dict[str, Any]] = {"losses": {}, "norms": {}}
    for row in metrics:
        place = f"step {row['step']}" + ("" if "grad_norm" in row else " (evaluation)")
        if "grad_norm" in row:
            found["norms"][place] = row.pop("grad_norm")
        found["losses"][place] = {k: v for k, v in row.items() if k not in VOLATILE}
    found["trained"] = {f"row {i}": row for i, row in enumerate(rows(out, "trained.jsonl"))}
    samples = rows(out, "samples.jsonl")
    for row in samples:
        row.pop("images", None)  # earlier versions kept none
    found["samples"] = {f"row {i}": row for i, row in enumerate(samples)}
    found["ledger"] = {}
    for name in ("ledger.jsonl", "ledger_eval.jsonl"):
        for row in rows(out, name):
            found["ledger"].setdefault(name, Counter())[row.get("bucket", json.dumps(row))] += 1
    found["tensors"] = tensors(out / "final")
    return found


def differences(base: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[str]:
    """Return one line for each kind of result that differs, naming its first difference."""
    lines = []
    for kind, ours in base.items():
        theirs = new[kind]
        if not ours:
            lines.append(f"{kind}: the base run left none, so nothing was compared")
        places = {**ours, **theirs}
        unequal = [place for place in places if ours.get(place) != theirs.get(place)]
        if unequal:
            first = unequal[0]
            values = f"{ours.get(first, 'missing')} != {theirs.get(first, 'missing')}"
            lines.append(f"{kind}: {len(unequal)} differ, the first at {first}: {values}")
    return lines


def run_case(
    case: Case, base: Side, new: Side, work: Path, across: bool
) -> tuple[list[str], list[str]]:
    """Train a case on both sides; returns the table's cells and the differences."""
    work.mkdir()
    first, second = work / base.name, work / new.name
    plan = [(base, first, HALF), (base, first, STEPS), (new, second, HALF), (new, second, STEPS)]
    constant = []
    if across:  # a schedule that does not depend on the number of steps
        plan = [(base, first, STEPS), (base, second, HALF), (new, second, STEPS)]
        constant = ["optim.schedule=constant", "optim.warmup_ratio=0"]
    for position, (side, out, steps) in enumerate(plan, 1):
        settings = [*constant, f"train.max_steps={steps}"]
        code, log = train(case, side, out, write_config(case, side, base, work, settings))
        last = (log.strip().splitlines() or ["no output"])[-1]
        if across and code == 2 and position == len(plan):
            return ["-"] * 6 + ["refused"], [last]
        if code != 0:
            return ["-"] * 6 + ["FAILED"], [f"{side.name}, {steps} steps: exit code {code}: {last}"]
    ours, theirs = results(first), results(second)
    found = differences(ours, theirs)
    if len(ours["norms"]) != STEPS:
        found.append(f"the base run logged {len(ours['norms'])} of {STEPS} steps")
    cells = [str(len(ours["norms"]))]
    for kind in ("losses", "norms", "trained", "tensors"):
        equal = sum(theirs[kind].get(place) == value for place, value in ours[kind].items())
        cells.append(f"{equal} of {len(ours[kind])}")
    rest = all(ours[kind] == theirs[kind] for kind in ("samples", "ledger"))
    return [*cells, "equal" if rest else "differ", "DIFFERENT" if found else "equal"], found


def main() -> int:
    """Compare the chosen cases and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE_COMMIT")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs in a new directory")
    parser.add_argument("--resume-across", action="store_true", help="resume BASE_COMMIT's runs")
    arguments = parser.parse_args()
    names = arguments.only or (QUICK if arguments.quick else list(CASES))
    began = time.monotonic()
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True)
    work = (arguments.keep or Path(tempfile.mkdtemp(prefix="compare-runs-"))).resolve()
    base, new = Side("base", work / "base-tree"), Side("new", ROOT)
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(base.tree), arguments.base], check=True)
    try:
        os.environ.update(environment(ROOT))
        for library in LIBRARIES:
            importlib.import_module(library)
        base.schema, new.schema = config_schema(base.tree), config_schema(new.tree)
        write_data(work, base.tree / "configs/tiny/data/images")
        failed = 0
        print_row(HEADER)
        for name in names:
            cells, found = run_case(CASES[name], base, new, work / name, arguments.resume_across)
            print_row([name, *cells], found)
            failed += cells[-1] not in ("equal", "refused")
    finally:
        subprocess.run([*git, "remove", "--force", str(base.tree)], check=False)
        if arguments.keep is None:
            shutil.rmtree(work, ignore_errors=True)
    print(f"{len(names) - failed} of {len(names)} passed in {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def print_row(cells: list[str], notes: Sequence[str] = ()) -> None:
    """Print a row of the table, and below it what differs."""
    widths = (24, 5, 8, 8, 8, 12, 6, 9)
    print("  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)))
    for note in notes:
        print(f"    {note}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
