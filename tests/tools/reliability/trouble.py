"""Signals, full disks, second runs, lost workers and lost ranks."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.tools.reliability.kill_places import kill_at
from tests.tools.reliability.kills import Tally, untouched
from tests.tools.reliability.lab import Lab, Running, children_of


def terminations(lab: Lab, count: int, *, seed: int) -> Iterator[Tally]:
    """Send SIGTERM at random times after the first step: exit code 143, saved, identical result."""
    expected, seconds = untouched(lab)
    draw = random.Random(seed)
    tally = Tally()
    while tally.kills < count:
        name = f"terminated-{tally.trials}"
        running = lab.start(name)
        wait_for_step(lab, name, running, 1)
        time.sleep(draw.uniform(0, 0.7) * seconds)
        running.send(signal.SIGTERM)
        ended = running.wait(60)
        tally.trials += 1
        done = ended.code in (0, -signal.SIGTERM) and "finished:" in ended.output
        tally.kills += not done
        asked = ended.code == 143 and "run the same command to resume" in ended.output
        if not (done or asked):
            tally.faults.append(f"{name}: ended with {ended.code}: {ended.output[-500:]}")
        elif lab.finish(name).code or lab.result(name) != expected:
            tally.faults.append(f"{name}: did not end like the undisturbed run")
        shutil.rmtree(lab.out(name))
        yield tally


def full_disks(lab: Lab, place: Path, *, tenths: Sequence[int] = range(10)) -> Iterator[Tally]:
    """Let the disk fill up at every tenth of a save; then free space and resume.

    Args:
        lab: Gives the kind and settings of the runs, and the undisturbed run.
        place: An empty directory on a small disk of its own (see `small_disk`).
        tenths: The tenths to try.
    """
    expected, _ = untouched(lab)
    tally = Tally()
    small = Lab(place, lab.kind, lab.overrides, logs=lab.folder)
    size = _size(max((lab.out("untouched") / "checkpoints").glob("step-*")))
    for tenth in tenths:
        name = f"full-{tenth}"
        small.start(name, before=partial(kill_at, "checkpoint.pruned")).wait()
        ballast = place / "ballast"
        room = int(size * (tenth + 0.5) / 10)
        with ballast.open("wb") as file:
            file.write(b"x" * max(0, shutil.disk_usage(place).free - room))
        ended = small.start(name, before=_claim_endless_space).wait()
        tally.trials += 1
        tally.kills += 1
        if ended.code != 2 or "No space left" not in ended.output:
            tally.faults.append(f"{name}: ended with {ended.code}: {ended.output[-500:]}")
        ballast.unlink()
        if (again := small.finish(name)).code:
            tally.faults.append(f"{name}: could not be resumed: {again.output[-500:]}")
        elif small.result(name) != expected:
            tally.faults.append(f"{name}: did not end like the undisturbed run")
        shutil.rmtree(small.out(name), ignore_errors=True)
        yield tally


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[Path | None]:
    """Mount a file system of `num_bytes` in memory; None if this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def second_run(lab: Lab) -> str | None:
    """Start a second run in a directory; return what is wrong with the outcome, or None."""
    first = lab.start("shared", "train.max_steps=100000", "train.epochs=100000")
    wait_for_step(lab, "shared", first, 12)  # by then it has a checkpoint
    second = lab.start("shared", "train.max_steps=100000", "train.epochs=100000").wait()
    first.send(signal.SIGKILL)
    first.wait()
    if second.code != 2 or f"process {first.pid} on" not in second.output:
        return f"the second run ended with {second.code}: {second.output[-300:]}"
    third = lab.finish("shared", "train.max_steps=100000", "train.epochs=100000", "seed=1")
    if "seed cannot change" not in third.output:  # past the lock, and refused for another reason
        return f"after the first was killed: {third.output[-300:]}"
    return None


def lost_worker(lab: Lab) -> str | None:
    """Kill a data-loader worker; return what is wrong with the outcome, or None."""
    endless = ("train.max_steps=100000", "train.epochs=100000", "data.num_workers=2")
    running = lab.start("worker", *endless)
    wait_for_step(lab, "worker", running, 3)
    workers = children_of(running.pid)
    if not workers:
        running.send(signal.SIGKILL)
        return "there was no loader process to kill"
    Running(workers[0], running.log, 0.0).send(signal.SIGKILL)
    began = time.monotonic()
    ended = running.wait(90)
    took = time.monotonic() - began
    if ended.code != 2 or "a data loader process died" not in ended.output or took > 60:
        return f"ended with {ended.code} after {took:.0f} s: {ended.output[-500:]}"
    return None


def wait_for_step(lab: Lab, name: str, running: Running, step: int) -> None:
    """Wait until a run has recorded a step, or has ended."""
    path = lab.out(name) / "trained.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= step:
            return
        if Path(f"/proc/{running.pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.005)
    raise TimeoutError(f"{name} did not come to step {step}: {running.log.read_text()[-1000:]}")


def _claim_endless_space() -> None:
    """Report endless free space, so that the write itself fails and not the check before it."""
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda path: usage._replace(free=1 << 60)  # type: ignore[assignment]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
