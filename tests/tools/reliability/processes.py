"""Check runs on several ranks: same order and losses for any world size, no rank left hanging."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.tools.reliability.kills import untouched
from tests.tools.reliability.lab import ROOT, Lab, free_port


@dataclass(frozen=True)
class Elastic:
    """A run whose world size changed, compared with one whose world size did not.

    Attributes:
        sizes: The world size of each start.
        same_order: Whether every step trained on the same records.
        loss_difference: The largest relative difference of a step's loss.
    """

    sizes: tuple[int, ...]
    same_order: bool
    loss_difference: float


def elastic(lab: Lab, sizes: Sequence[int]) -> Elastic:
    """Train on `sizes[0]` ranks, resume on `sizes[1]`, and so on to the end."""
    untouched(lab)
    steps = len(_rows(lab, "untouched", "trained.jsonl"))
    for number, size in enumerate(sizes):
        last = number == len(sizes) - 1
        stop_after = (number + 1) * steps // len(sizes)
        ranks = lab.start_ranks("elastic", size)
        if not last:
            _wait_for_step(lab, "elastic", stop_after)
            ranks[0].send(signal.SIGTERM)
        for rank in ranks:
            ended = rank.wait(180)
            if ended.code not in (0, 143):
                raise RuntimeError(
                    f"{size} processes ended with {ended.code}: {ended.output[-2000:]}"
                )
    ours, theirs = (_losses(lab, name) for name in ("elastic", "untouched"))
    difference = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True))
    orders = [_rows(lab, name, "trained.jsonl") for name in ("elastic", "untouched")]
    return Elastic(tuple(sizes), orders[0] == orders[1], difference)


def lost_rank(folder: Path) -> tuple[float, list[str]]:
    """Kill rank 1 under torchrun; return the seconds until all ranks ended, and what was wrong."""
    config = str(ROOT / "configs/tiny/stage1.yaml")
    endless = ["train.max_steps=100000", "train.epochs=100000", "train.trackers=[]"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    port = ["--master-port", str(free_port())]
    stage = ["-m", "vlm_sft.stage1", config, f"output_dir={folder / 'run'}", *endless]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "ranks.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*launcher, *port, *stage], cwd=ROOT, env=environment, stdout=file, stderr=file
        )
    _wait_for(folder / "run" / "trained.jsonl", 3)
    ranks = _ranks_of(process.pid)
    began = time.monotonic()
    subprocess.run(["kill", "-KILL", str(ranks[1])], check=True)
    code = process.wait(120)
    seconds = time.monotonic() - began
    output = log.read_text()
    wrong = []
    if code == 0:
        wrong.append("the launcher ended with 0")
    if "rank      : 1" not in output and "rank: 1" not in output:
        wrong.append(f"the rank is not named: {output[-1500:]}")
    if left := [pid for pid in ranks if Path(f"/proc/{pid}").exists()]:
        wrong.append(f"processes {left} are left")
    return seconds, wrong


def failed_rank(folder: Path) -> tuple[float, list[str]]:
    """Break an image that only one rank reads; return the seconds and what was wrong."""
    data = folder / "data"
    shutil.copytree(ROOT / "configs/tiny/data", data)
    records = json.loads((data / "captions.json").read_text())
    (data / "images" / Path(records[-1]["image"]).name).write_bytes(b"no image")
    config = str(ROOT / "configs/tiny/stage1.yaml")
    paths = [f"data.train.0.path={data / 'captions.json'}", "data.eval=[]"]
    options = [f"output_dir={folder / 'run'}", "train.max_steps=50", "train.trackers=[]"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    stage = ["--master-port", str(free_port()), "-m", "vlm_sft.stage1", config]
    began = time.monotonic()
    ended = subprocess.run(
        [*launcher, *stage, *paths, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    wrong = []
    if ended.returncode == 0:
        wrong.append("the launcher ended with 0")
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error VS2")]
    if not any(" of 2: " in line and repr(records[-1]["id"]) in line for line in errors):
        wrong.append(f"rank and record are not named: {ended.stderr[-1500:]}")
    return time.monotonic() - began, wrong


def _ranks_of(launcher: int) -> list[int]:
    """Return the launcher's processes, ordered by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = dict(
                item.split("=", 1) for item in path.read_text().split("\0") if "=" in item
            )
            parent = int((path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError, UnicodeDecodeError):
            continue
        if parent == launcher and "LOCAL_RANK" in variables:
            found[int(variables["LOCAL_RANK"])] = int(path.parent.name)
    return [found[rank] for rank in sorted(found)]


def _wait_for_step(lab: Lab, name: str, step: int) -> None:
    _wait_for(lab.out(name) / "trained.jsonl", step)


def _wait_for(path: Path, rows: int) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= rows):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not come to {rows} rows")
        time.sleep(0.005)


def _rows(lab: Lab, name: str, file: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (lab.out(name) / file).read_text().splitlines()]


def _losses(lab: Lab, name: str) -> list[float]:
    rows = _rows(lab, name, "metrics.jsonl")
    return [float(str(row["loss"])) for row in rows if row.get("loss") is not None]
