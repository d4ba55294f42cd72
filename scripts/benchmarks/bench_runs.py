"""Run a peer on a job file, in its own process and environment."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench_environments import PEERS, environment_python

from vlm_sft.errors import UserError
from vlm_sft.utils.progress import format_seconds

BATCH = 4
"""Default number of records per step."""

JobFields = Mapping[str, Any]

ONE_THREAD: Final = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Environment of a process that computes on one thread."""


@dataclass(frozen=True)
class Peer:
    """One row of the table.

    Attributes:
        name: Name in the table.
        script: Script in bench_peers.
        environment: Name of the pins in bench_peers; None for the current environment.
        micro_batch_size: Records per forward pass; gradients are accumulated over a step.
        weight: Approximate relative time of a step, to estimate the remaining time.
        config: Settings of vlm_sft that differ from the padded run's.
    """

    name: str
    script: str
    environment: str | None
    weight: float
    micro_batch_size: int = BATCH
    config: JobFields = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether the peer is vlm_sft itself."""
        return self.script == "ours.py"

    def work(self, steps: int) -> float:
        """Return the relative time of a run of `steps` steps; startup takes as long as three."""
        return self.weight * (steps + 3)


class Runs:
    """Runs peers one after the other, and logs an estimate of the remaining time."""

    def __init__(self, work: Path, arguments: argparse.Namespace) -> None:
        self.work, self.device = work, arguments.device
        self._root = Path(arguments.environments)
        self._number, self._start = 0, time.monotonic()
        self.planned, self.done = 0.0, 0.0
        """Planned and finished work: the sum of `Peer.work` over the runs."""

    def run(self, peer: Peer, job: JobFields, *, note: str) -> dict[str, Any]:
        """Return what the peer measured.

        Raises:
            PeerError: If its process failed; the message has the last line of its log.
        """
        say(f"{peer.name}, {note}{self._left()}")
        python = sys.executable
        if peer.environment is not None:
            python = str(environment_python(peer.environment, self._root))
        self._number += 1
        folder = self.work / f"run-{self._number}"
        folder.mkdir()
        result = folder / "result.json"
        options = {**job.get("options", {}), "config": peer.config}
        whole = {
            "model": str(self.work / "model"),
            "device": self.device,
            "batch_size": BATCH,
            "micro_batch_size": peer.micro_batch_size,
            **job,
            "options": options,
            "result": str(result),
            "work": str(folder / "work"),
        }
        (folder / "work").mkdir()
        (folder / "job.json").write_text(json.dumps(whole))
        command = [python, str(PEERS / peer.script), str(folder / "job.json")]
        with (folder / "log.txt").open("w") as log:
            code = subprocess.run(
                command, stdout=log, stderr=log, env=self._environ(peer), cwd=folder
            ).returncode
        self.done += peer.work(whole["steps"])
        if code != 0 or not result.is_file():
            raise PeerError(peer, (folder / "log.txt").read_text(errors="replace"))
        found: dict[str, Any] = json.loads(result.read_text())
        found["trained"] = _trained(folder / "work" / "run" / "trained.jsonl")
        return found

    def _environ(self, peer: Peer) -> dict[str, str]:
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.device == "cpu":
            environ |= ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""}
        if peer.is_ours:
            environ["PYTHONPATH"] = str(PEERS.parent.parent.parent)  # the root of the repository
        return environ

    def _left(self) -> str:
        if not self.done or not self.planned:
            return ""
        elapsed = time.monotonic() - self._start
        left = elapsed / self.done * (self.planned - self.done)
        return f" (about {format_seconds(max(0.0, left))} left)"


class PeerError(UserError):
    """A peer's process failed."""

    def __init__(self, peer: Peer, log: str) -> None:
        lines = [line for line in log.strip().splitlines() if line.strip()] or ["no output"]
        self.out_of_memory = "OutOfMemoryError" in log or "out of memory" in log.lower()
        self.log = log
        super().__init__(f"{peer.name}: the run failed with: {lines[-1].strip()[:300]}")


def _trained(path: Path) -> list[list[str]]:
    """Return the record ids of every step, if the run logged them."""
    if not path.is_file():
        return []
    return [json.loads(line)["records"] for line in path.read_text().splitlines()]


def say(text: str) -> None:
    """Log a line about the progress to stderr."""
    print(text, file=sys.stderr, flush=True)
