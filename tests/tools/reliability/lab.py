"""Start whole training runs in forked processes that can be killed.

Each run is `vlm_sft.stage1` or `vlm_sft.stage2` as the command line calls it. Its process is forked
from one that has imported everything, which saves the time of the imports.
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlm_sft import stage1, stage2
from vlm_sft.checkpoint.format import verify
from vlm_sft.commands.run_command import run_command

ROOT = Path(__file__).parents[3]
KINDS = ("stage1", "stage2", "stage2_lora")
SAME = ("projector.safetensors", "adapter/adapter_model.safetensors", "optimizer.safetensors")
"""Files of a final checkpoint that must be identical, besides those of the language model."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Its exit code, or minus the signal that killed it.
        output: Its stderr and stdout.
        seconds: How long it ran.
    """

    code: int
    output: str
    seconds: float


@dataclass
class Running:
    """A running process."""

    pid: int
    log: Path
    began: float

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def poll(self) -> Ended | None:
        """Return how the process ended; None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return self._ended(status) if pid else None

    def wait(self, seconds: float = 300.0) -> Ended:
        """Wait until the process ends.

        Raises:
            TimeoutError: It was still running after `seconds` and was killed.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            ended = self.poll()
            if ended is not None:
                return ended
            time.sleep(0.005)
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"still running after {seconds:.0f} s: {self.log.read_text()[-2000:]}")

    def _ended(self, status: int) -> Ended:
        code = os.waitstatus_to_exitcode(status)
        output = self.log.read_text(errors="replace")
        return Ended(code, output, time.monotonic() - self.began)


@dataclass
class Lab:
    """A folder of runs of one kind.

    Args:
        folder: The directory of the runs.
        kind: One of `KINDS`; stage 2 starts from a fresh projector.
        overrides: Settings of every run.
        logs: The directory of their output; None: `folder`.
    """

    folder: Path
    kind: str
    overrides: Sequence[str] = ()
    logs: Path | None = None

    def arguments(self, name: str, *more: str) -> list[str]:
        """Return the command line of the run `name`, without the program."""
        config = ROOT / "configs" / "tiny" / f"{self.kind}.yaml"
        fixed = ["train.trackers=[]", "projector=null", f"output_dir={self.out(name)}"]
        return [str(config), *fixed, *self.overrides, *more]

    def out(self, name: str) -> Path:
        """Return the directory of the run `name`."""
        return self.folder / name

    def start(
        self,
        name: str,
        *more: str,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> Running:
        """Start or resume the run `name`; `before` is called in its process first."""
        main = stage1.main if self.kind == "stage1" else stage2.main
        arguments = self.arguments(name, *more)

        def work() -> None:
            if before is not None:
                before()
            run_command(main, arguments)

        return forked(work, (self.logs or self.folder) / f"{name}.log", environment)

    def start_ranks(self, name: str, count: int, *more: str) -> list[Running]:
        """Start or resume the run `name` on `count` ranks."""
        port = free_port()
        shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        main = stage1.main if self.kind == "stage1" else stage2.main
        arguments = self.arguments(name, *more)
        return [
            forked(
                lambda: run_command(main, arguments),
                self.folder / f"{name}-rank{rank}.log",
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(count)
        ]

    def finish(self, name: str, *more: str) -> Ended:
        """Start or resume a run and wait until it ends."""
        return self.start(name, *more).wait()

    def result(self, name: str) -> dict[str, str]:
        """Return the sha256 of a finished run's weights, optimizer and list of trained records."""
        files = verify(self.out(name) / "final").manifest["files"]
        found = {
            file: digest
            for file, digest in files.items()
            if file in SAME or file.endswith(".safetensors")
        }
        trained = (self.out(name) / "trained.jsonl").read_bytes()
        return found | {"trained.jsonl": hashlib.sha256(trained).hexdigest()}

    def copy(self, name: str, to: str) -> None:
        """Copy a run's folder as it lies."""
        shutil.rmtree(self.out(to), ignore_errors=True)
        shutil.copytree(self.out(name), self.out(to))


def pack_shards(folder: Path) -> Path:
    """Pack the records of configs/tiny, each with its image, into two tar files of a new folder."""
    data = ROOT / "configs" / "tiny" / "data"
    records = json.loads((data / "instructions.json").read_text())
    folder.mkdir(parents=True)
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for record in records[number::2]:
                content = json.dumps(record).encode()
                info = tarfile.TarInfo(f"{record['id']}.json")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
                image = data / record["image"]
                archive.add(image, f"{record['id']}{image.suffix}")
    return folder


def forked(
    work: Callable[[], None], log: Path, environment: Mapping[str, str] | None = None
) -> Running:
    """Call `work` in a forked process, with its output in `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    pid = os.fork()
    if pid:
        return Running(pid, log, began)
    code = 1
    try:
        _become_a_command(log, environment or {})
        work()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code & 0xFF)


def _become_a_command(log: Path, environment: Mapping[str, str]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(ROOT)
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL)


def free_port() -> int:
    """Return an unused port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def children_of(pid: int) -> list[int]:
    """Return the child processes of a process, from /proc."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []
