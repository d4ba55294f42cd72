"""Runs of peers: each a process of its own, in an environment of its own, given a job file."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_environments import PEERS, environment_python

from vlm_sft.errors import UserError
from vlm_sft.utils.progress import format_seconds

BATCH = 4
"""Records a step, where a job does not say otherwise."""

JobFields = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """One line of the table.

    Attributes:
        name: As the table has it.
        script: In bench_peers.
        environment: Its pins in bench_peers; None: this one.
        micro_batch_size: Records at once; fewer than a step's: gradients are accumulated.
        weight: About how long a step takes beside others, for the estimate of time left.
        config: Settings of vlm_sft that differ from the plain run's.
    """

    name: str
    script: str
    environment: str | None
    weight: float
    micro_batch_size: int = BATCH
    config: JobFields = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether it is vlm_sft itself."""
        return self.script == "ours.py"


class Runs:
    """Starts a peer's process for a job and reads what it measured, telling how long is left."""

    def __init__(self, work: Path, arguments: argparse.Namespace) -> None:
        self.work, self.device = work, arguments.device
        self._root = Path(arguments.environments)
        self._number, self._start = 0, time.monotonic()
        self.planned, self.done = 0.0, 0.0
        """Work planned and done, in the peers' weights times steps."""

    def run(self, peer: Peer, job: JobFields, *, note: str) -> dict[str, Any]:
        """What the peer measured.

        Raises:
            UserError: It did not get to the end, with the last line it said.
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
        self.done += peer.weight * (whole["steps"] + 3)
        if code != 0 or not result.is_file():
            raise PeerError(peer, (folder / "log.txt").read_text(errors="replace"))
        found: dict[str, Any] = json.loads(result.read_text())
        found["trained"] = _trained(folder / "work" / "run" / "trained.jsonl")
        return found

    def _environ(self, peer: Peer) -> dict[str, str]:
        environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.device == "cpu":
            environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
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
        lines = [line for line in log.strip().splitlines() if line.strip()] or ["it said nothing"]
        self.out_of_memory = "OutOfMemoryError" in log or "out of memory" in log.lower()
        self.log = log
        super().__init__(f"{peer.name}: the run failed with: {lines[-1].strip()[:300]}")


def _trained(path: Path) -> list[list[str]]:
    """The ids of the records of every step, where the run wrote them down."""
    if not path.is_file():
        return []
    return [json.loads(line)["records"] for line in path.read_text().splitlines()]


def say(text: str) -> None:
    """A line about how far it is."""
    print(text, file=sys.stderr, flush=True)
