"""Measure and check everything that needs a GPU, in one command of at most eight minutes.

Examples:
  scripts/gpu_acceptance                          # all parts, on the GPU of this machine
  scripts/gpu_acceptance --only throughput        # one part; the others keep their figures
  scripts/gpu_acceptance --tiny --device cpu --out /tmp/tiny   # the same code in a minute, no GPU
  scripts/gpu_acceptance --wheels .wheels         # fetch what the GPU machine's image lacks

Every figure is written to gpu.json as soon as it is measured, so that a run that is cut off still
counts; gpu.md is made from that file. Parts are processes of their own, each with a time limit.
No network is used. Packages that this Python lacks are installed from the wheels in .wheels, if
that folder exists, into a temporary folder.
"""

import argparse
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from acceptance.figures import BY_KEY, PARTS, Job, Part, read_rows
from acceptance.page import make_page, verdict
from acceptance.wheels import WheelError, install, missing_modules, prepare

ROOT = Path(__file__).parent.parent.parent
WHEELS = ROOT / ".wheels"
TOTAL_SECONDS = 480
"""Time limit of a whole run on a GPU."""

WRITING = threading.Lock()
"""Held while the results are changed or written: parts of a tiny run go on at the same time."""

LEAST_SECONDS = 10
"""A part that would have less is not started."""


def main(argv: Sequence[str]) -> int:
    """Run the parts asked for, write both files, print a summary; return the exit code.

    0: every figure with a target was measured and reached it; 1: some did not; 2: wrong usage.
    """
    arguments = _parse(argv)
    if arguments.wheels is not None:
        return _prepare_wheels(arguments.wheels, arguments.python_version)
    out = Path(arguments.out)
    results = _read(out / "gpu.json", arguments)
    if arguments.page:
        _write(out, results)
        return 0
    environment, site = _environment(arguments.device)
    start = time.monotonic()
    try:
        parts = [part for part in PARTS if part.name in arguments.only]
        if not arguments.tiny:  # one after the other: they would disturb each other's figures
            for part in parts:
                _run_part(part, arguments, results, out, environment, start)
            return _summary(results, arguments, out)
        with ThreadPoolExecutor(len(parts)) as pool:
            jobs = [
                pool.submit(_run_part, part, arguments, results, out, environment, start)
                for part in parts
            ]
            for job in jobs:
                job.result()
    finally:
        if site is not None:
            shutil.rmtree(site, ignore_errors=True)
    return _summary(results, arguments, out)


def _run_part(
    part: Part,
    arguments: argparse.Namespace,
    results: dict[str, Any],
    out: Path,
    environment: dict[str, str],
    start: float,
) -> None:
    """Run one part in its own process group, and keep what it measured however it ends."""
    left = TOTAL_SECONDS * arguments.time_factor - (time.monotonic() - start)
    limit = min(part.seconds * arguments.time_factor, left)
    if limit < LEAST_SECONDS:
        results["parts"][part.name] = {"state": "skipped, no time was left", "seconds": 0}
        return
    with WRITING:
        for key in [key for key in results["figures"] if BY_KEY[key].part == part.name]:
            del results["figures"][key]
        known = {
            key: found["value"]
            for key, found in results["figures"].items()
            if found["value"] is not None
        }
    with tempfile.TemporaryDirectory(prefix="vlm-sft-acceptance-") as name:
        rows, job_file = Path(name, "rows.jsonl"), Path(name, "job.json")
        Job(arguments.device, arguments.tiny, limit, str(rows), known).write(job_file)
        print(f"== {part.title} (at most {limit:.0f} s)", file=sys.stderr, flush=True)
        began = time.monotonic()
        command = [sys.executable, "-m", f"acceptance.parts.{part.name}", str(job_file)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, stdout=sys.stderr
        )
        state = _wait(process, rows, limit, results, out)
        seconds = time.monotonic() - began
        results["parts"][part.name] = {"state": state, "seconds": round(seconds, 1)}
        results["seconds"] = round(time.monotonic() - start, 1)
        _collect(results, rows)
        _write(out, results)


def _wait(
    process: "subprocess.Popen[bytes]",
    rows: Path,
    limit: float,
    results: dict[str, Any],
    out: Path,
) -> str:
    """Wait for a part, writing its figures while it runs; return how it ended."""
    deadline = time.monotonic() + limit
    size = 0
    try:
        while True:
            try:
                code = process.wait(timeout=1)
                return "finished" if code == 0 else f"failed with exit code {code}"
            except subprocess.TimeoutExpired:
                pass
            if rows.exists() and rows.stat().st_size != size:
                size = rows.stat().st_size
                _collect(results, rows)
                _write(out, results)
            if time.monotonic() > deadline:
                return "cut off at its time limit"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _collect(results: dict[str, Any], rows: Path) -> None:
    with WRITING:
        for row in read_rows(rows):
            if "fact" in row:
                results["facts"][row["fact"]] = row["value"]
            else:
                results["figures"][row["key"]] = {"value": row["value"], "note": row["note"]}


def _read(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the results so far: those of the file if it is of the same shapes and device."""
    command = shlex.join(["scripts/gpu_acceptance", *arguments.given])
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    fresh: dict[str, Any] = {
        "made_by": "vlm_sft gpu_acceptance",
        "command": command,
        "date": today,
        "device": arguments.device,
        "tiny": arguments.tiny,
        "seconds": 0.0,
        "parts": {},
        "facts": {},
        "figures": {},
    }
    if not path.exists():
        return fresh
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if arguments.page:
        return found
    same = (found["device"], found["tiny"]) == (arguments.device, arguments.tiny)
    return {**found, "command": command, "date": today} if same else fresh


def _write(out: Path, results: dict[str, Any]) -> None:
    """Write both files, each complete or not at all."""
    with WRITING:
        _write_both(out, results)


def _write_both(out: Path, results: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    for name, content in (("gpu.json", text), ("gpu.md", make_page(results))):
        building = out / f".{name}.{os.getpid()}"
        building.write_text(content, encoding="utf-8")
        os.replace(building, out / name)


def _summary(results: dict[str, Any], arguments: argparse.Namespace, out: Path) -> int:
    """Print how many figures passed; return the exit code."""
    figures = [BY_KEY[key] for key in BY_KEY if BY_KEY[key].part in arguments.only]
    told = {
        figure.key: verdict(figure, results["figures"].get(figure.key, {}).get("value"))
        for figure in figures
    }
    for figure in figures:
        if told[figure.key] in ("MISSED", "not measured"):
            note = results["figures"].get(figure.key, {}).get("note", "")
            print(f"{told[figure.key]}: {figure.title}" + (f" ({note})" if note else ""))
    counts = [f"{sum(v == word for v in told.values())} {word}" for word in _WORDS]
    print(f"{', '.join(counts)}; {out / 'gpu.json'}, {out / 'gpu.md'}")
    if arguments.tiny:  # tiny shapes reach no target for speed; what must hold is correctness
        wrong = [f for f in figures if f.part == "correctness" and told[f.key] == "MISSED"]
        failed = [p for p in arguments.only if results["parts"][p]["state"] != "finished"]
        return 1 if wrong or failed else 0
    return 1 if any(v == "MISSED" for v in told.values()) else 0


_WORDS = ("pass", "MISSED", "recorded", "not measured")


def _environment(device: str) -> tuple[dict[str, str], Path | None]:
    """Return the environment of the parts, and the folder of carried packages if one was made."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    if device == "cpu":  # several processes at once, which would fight over the cores
        environment.setdefault("OMP_NUM_THREADS", "1")
    absent = missing_modules()
    if not absent or not list(WHEELS.glob("*.whl")):
        return environment, None
    print(f"== installing carried wheels ({', '.join(absent)} missing)", file=sys.stderr)
    site = install(WHEELS)
    environment["PYTHONPATH"] = f"{environment['PYTHONPATH']}:{site}"
    return environment, site


def _prepare_wheels(folder: str, python: str) -> int:
    size = prepare(Path(folder), python=python, constraints=ROOT / "constraints.txt")
    names = sorted(wheel.name for wheel in Path(folder).glob("*.whl"))
    print(f"{folder}: {len(names)} wheels, {size / 2**20:.1f} MiB")
    print("\n".join(names))
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_acceptance",
        description=summary,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tiny shapes: shows that the code works, measures nothing",
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names)
    )
    parser.add_argument(
        "--out", default=str(ROOT / "docs/benchmarks"), metavar="DIR", help="folder of both files"
    )
    parser.add_argument(
        "--time-factor", type=float, default=1.0, help="multiply every time limit (1.0)"
    )
    parser.add_argument(
        "--page", action="store_true", help="make gpu.md again from gpu.json, and measure nothing"
    )
    parser.add_argument(
        "--wheels", metavar="DIR", help="fetch the wheels to carry into DIR, and measure nothing"
    )
    parser.add_argument(
        "--python-version", default="3.12", help="Python of the GPU machine, for --wheels (3.12)"
    )
    arguments = parser.parse_args(argv)
    arguments.given = list(argv)
    if arguments.time_factor <= 0:
        parser.error(f"--time-factor {arguments.time_factor}: expected more than 0")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu measures nothing that counts; give --tiny with it")
    if arguments.tiny and Path(arguments.out).resolve() == ROOT / "docs/benchmarks":
        parser.error("--tiny: give --out, so that figures of a GPU are not replaced by tiny ones")
    return arguments


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except WheelError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(141)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; what was measured is in the files", file=sys.stderr)
        sys.exit(130)
