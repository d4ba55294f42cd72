"""Check that runs that are killed and resumed end like the undisturbed run."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from tests.tools.reliability.kill_places import PLACES, kill_at
from tests.tools.reliability.lab import Ended, Lab, Running

HITS = (1, 1, 2, 3)
"""Number of kills of a run, drawn at random from these."""


@dataclass
class Tally:
    """The results of a series of trials.

    Attributes:
        trials: Runs that were resumed to their end.
        kills: Processes killed.
        several: Trials with two or more kills.
        faults: A sentence for each failure.
        places: The named places that were hit.
    """

    trials: int = 0
    kills: int = 0
    several: int = 0
    faults: list[str] = field(default_factory=list)
    places: Counter[str] = field(default_factory=Counter)


def untouched(lab: Lab) -> tuple[dict[str, str], float]:
    """Return the result of an undisturbed run and its duration in seconds."""
    ended = lab.finish("untouched")
    if ended.code:
        raise RuntimeError(f"the untouched run ended with {ended.code}: {ended.output[-2000:]}")
    return lab.result("untouched"), ended.seconds


def random_kills(lab: Lab, count: int, *, seed: int) -> Iterator[Tally]:
    """Kill runs at random times until `count` processes died; yield the tally after every trial.

    Half of the trials have one kill, the others up to three.
    """
    expected, seconds = untouched(lab)
    draw = random.Random(seed)
    tally = Tally()
    while tally.kills < count:
        name = f"killed-{tally.trials}"
        died = 0
        for _ in range(draw.choice(HITS)):
            ended = strike(lab.start(name), draw, seconds)
            died += ended.code == -signal.SIGKILL
            if ended.code not in (0, -signal.SIGKILL):
                tally.faults.append(f"{name}: ended with {ended.code}: {ended.output[-500:]}")
        tally.kills += died
        tally.several += died > 1
        _resume_to_the_end(lab, name, expected, tally)
        yield tally


def strike(running: Running, draw: random.Random, seconds: float) -> Ended:
    """Kill a run at a random time within the `seconds` that an untouched one takes."""
    time.sleep(draw.uniform(0.02, 1.0) * seconds)
    running.send(signal.SIGKILL)
    return running.wait()


def named_kills(lab: Lab, *, every: int = 1) -> Iterator[Tally]:
    """Kill a run at every named place (or every `every`-th), and resume it to its end."""
    expected, _ = untouched(lab)
    tally = Tally()
    for place in list(PLACES)[::every]:
        name = f"at-{place}"
        _prepare(lab, name, place)
        ended = lab.start(name, before=partial(kill_at, place)).wait()
        if ended.code != -signal.SIGKILL:
            tally.faults.append(f"{lab.kind} never reached {place}: {_last_line(ended)}")
        tally.kills += 1
        tally.places[place] += 1
        _resume_to_the_end(lab, name, expected, tally)
        yield tally


def _prepare(lab: Lab, name: str, place: str) -> None:
    """Bring a run to where it can reach the place when it is started next."""
    if place.startswith("resume.") or place == "checkpoint.replaced":
        lab.start(name, before=partial(kill_at, "checkpoint.pruned", 2)).wait()
    if place == "checkpoint.replaced":  # only a damaged checkpoint is ever replaced
        newest = max((lab.out(name) / "checkpoints").glob("step-*"))
        os.truncate(newest / "projector.safetensors", 10)


def _resume_to_the_end(lab: Lab, name: str, expected: dict[str, str], tally: Tally) -> None:
    tally.trials += 1
    ended = lab.finish(name)
    if ended.code:
        tally.faults.append(f"{name}: could not be resumed: {_last_line(ended)}")
        return
    found = lab.result(name)
    if found != expected:
        differing = sorted(k for k in expected.keys() | found if expected.get(k) != found.get(k))
        tally.faults.append(f"{name}: differs from the untouched run in {', '.join(differing)}")
        return
    leftovers = [str(path) for path in lab.out(name).rglob("*.tmp")]
    if leftovers:
        tally.faults.append(f"{name}: left {leftovers}")
        return
    shutil.rmtree(lab.out(name))
    (lab.folder / f"{name}.log").unlink()


def _last_line(ended: Ended) -> str:
    lines = ended.output.strip().splitlines()
    return lines[-1] if lines else f"code {ended.code}"
