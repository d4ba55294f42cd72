"""The trial of `kill_generation --grown`: grown samples, and what is grown from these, with kills.

Every operator of `grow` makes samples from the accepted ones of a run, and again from those that
are kept of these, with a server that also fails, cuts connections and answers with nonsense. The
commands run once without a kill and once, in other folders, with kills: `generate` after a random
number of requests and milliseconds, the others after random milliseconds or a random number of
changes in their folder. A killed command is started again. Afterwards all commands are repeated.

Each start is a process forked from one that has imported everything, so that kills hit the work.
"""

import contextlib
import json
import multiprocessing
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from data_tools.instruct.__main__ import main
from data_tools.instruct.generate.answers import read_answers
from data_tools.instruct.grow.operators import GROUPS, OPERATORS
from data_tools.instruct.plan.command import read_requests
from data_tools.instruct.run_folder import RunFolder
from tests.data_tools.grown_runs import FIRST, configured, good_reply, turn, turns
from tests.data_tools.teacher_server import (
    Act,
    Received,
    Script,
    TeacherServer,
    after,
    drop,
    fail,
    say,
    send,
    served,
)

CONCURRENCY = 8
ATTEMPTS = 4
MOST_A_LIFE = 6
"""Requests that a start of `generate` gets through before it is killed, at most."""
STAGES = ("grow", "generate", "verify", "clean", "export")
OTHERS = ("grow", "verify", "clean", "export", "grow")
"""Commands that two of five kills hit, in turn; the others hit `generate`."""
MOST_CHANGES = 16
"""Changes in a run's folder that a start of another command makes before it is killed, at most."""
NO_JSON = ['{"turns": [{"question": "Wh', "", "I'm sorry, but I cannot see images.", turns(),
           turns(*[turn("What is under the animals?", "A lawn.")] * 9)]  # fmt: skip
"""Texts that are no samples: they are answers all the same, recorded and paid."""
FAULTS: Sequence[Act] = (
    fail(429, retry_after=0), fail(500), fail(503), drop, send(200, b'{"choices": [{"mess'),
    send(200, {"choices": []}),
)  # fmt: skip
PRELOADED = (
    "__main__", "data_tools.instruct.grow.command", "data_tools.instruct.verify.command",
    "data_tools.instruct.generate.command", "data_tools.instruct.generate.teachers.chat",
    "data_tools.instruct.clean.command", "data_tools.instruct.export", "data_tools.instruct.config",
    "openai", "httpx2", "pyarrow.parquet", "langdetect",
)  # fmt: skip
"""Modules that every start has."""
NOT_COMPARED = ("answers", "cache", "spending.jsonl", "failures.jsonl", "config.yaml")
"""Files in the order of arrival, with times, or with the name of the folder."""
EVOLVED = [name for name in OPERATORS if name not in GROUPS["evolve"]]
GENERATIONS = {
    "first": ("--operators", ",".join(OPERATORS), "--language", "German"),
    "second": ("--operators", ",".join([*EVOLVED, *GROUPS]), "--language", "English"),
}
"""Options of `grow`, by the folder: of all samples, and of what was kept of the grown ones."""


@dataclass
class Killed:
    """The commands that are killed, and what is counted meanwhile.

    Attributes:
        root: The folder of both generations.
        parents: The configuration of the run that the first one is grown from.
        seconds: What each command of each generation takes without a kill.
        kills: By command.
        answered: Requests with a record when a start of `generate` had ended, by the start's key.
        were_killed: The keys of those that were killed.
    """

    root: Path
    parents: Path
    server: TeacherServer
    rng: random.Random
    seconds: dict[tuple[str, str], float]
    kills: Counter[str] = field(default_factory=Counter)
    answered: dict[str, set[str]] = field(default_factory=dict)
    were_killed: set[str] = field(default_factory=set)
    starts: int = 0

    def generation(self, name: str, kills: int) -> None:
        """Run all commands of a generation, and kill them `kills` times."""
        of = Counter(OTHERS[n % len(OTHERS)] for n in range(kills - _of_generate(kills)))
        first = of["grow"] // 2
        mixed = ["generate"] * _of_generate(kills) + ["grow"] * (of["grow"] - first)
        self.rng.shuffle(mixed)
        before = {"grow": ["grow"] * first, "generate": mixed}
        for stage in STAGES:
            for killed in before.get(stage, [stage] * of[stage]):
                self.kill(name, killed)
            self.finish(name, stage)

    def kill(self, name: str, stage: str) -> None:
        """Start a command and kill it at a random place; again, if it ends before."""
        process = self.start(name, stage)
        while not self.is_reached(name, stage, process):
            _end(process)
            assert stage != "generate", "fewer requests than kills need; lower --kills"
            process = self.start(name, stage)
        process.kill()
        process.join()
        self.kills[stage] += 1
        if stage == "generate":
            self.were_killed.add(self.key)
            self.note(name)
        if (total := self.kills.total()) % 20 == 0:
            print(f"{total} kills, the {name} generation", flush=True)

    def is_reached(self, name: str, stage: str, process: ForkServerProcess) -> bool:
        """Wait for a random place; return False if the command has ended before."""
        rng = self.rng
        if stage == "generate":
            begun, most = len(self.server.received), rng.randint(1, MOST_A_LIFE)
            _wait(process, lambda: len(self.server.received) >= begun + most)
            time.sleep(rng.random() * 0.03)
        elif rng.random() < 0.5:
            time.sleep(rng.random() * self.seconds[name, stage])
        else:
            changes = _changes(self.root / name)
            most = rng.randint(1, MOST_CHANGES)
            _wait(process, lambda: next(changes) >= most)
        return process.is_alive()

    def finish(self, name: str, stage: str) -> None:
        """Run a command to its end."""
        _end(self.start(name, stage))
        if stage == "generate":
            self.note(name)

    def start(self, name: str, stage: str) -> ForkServerProcess:
        """Start a command; the server knows the start by its key."""
        self.starts += 1
        return _start(command(self.root, self.parents, name, stage), self.key)

    @property
    def key(self) -> str:
        return f"k{self.starts}"

    def note(self, name: str) -> None:
        """Note which requests have a record now that a start has ended."""
        self.answered[self.key] = set(read_answers(self.root / name / "answers"))


def trial(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """What was counted over `kills` kills and a repetition of everything after them."""
    kills_of = dict(zip(GENERATIONS, (kills // 2, kills - kills // 2), strict=True))
    least = _of_generate(kills_of["second"]) * (MOST_A_LIFE + CONCURRENCY // 2)
    with served(script()) as server:
        parents = configured(
            folder, server.url, least // len(OPERATORS) + 2, concurrency=CONCURRENCY,
            attempts=ATTEMPTS,
        )  # fmt: skip
        for stage in ("plan", "generate", "verify"):
            _run([stage, str(parents)], "p0")
        whole, seconds = folder / "whole", {}
        for name, stage in _commands():
            begun = time.monotonic()
            _run(command(whole, parents, name, stage), "w0")
            seconds[name, stage] = time.monotonic() - begun
        killed = Killed(folder / "killed", parents, server, random.Random(seed), seconds)
        for name in GENERATIONS:
            killed.generation(name, kills_of[name])
        for name, stage in _commands():
            _run(command(killed.root, parents, name, stage), "r0")
        time.sleep(0.2)  # what a killed process had sent last may still be read
        received = [(_key(one), one.id) for one in server.received]
    return counted(killed, whole, received)


def counted(killed: Killed, whole: Path, received: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The figures: what was lost, doubled, sent again, or is not as without kills."""
    sent: dict[str, Counter[str]] = {}
    for key, request in received:
        sent.setdefault(key, Counter())[request] += 1
    again, open_at, recorded = 0, [], set()
    for key in killed.answered:  # in the order of the starts
        asked = set(sent.get(key, ()))
        again += len(asked & recorded)
        if key in killed.were_killed:
            open_at.append(len(asked - killed.answered[key]))
        recorded |= killed.answered[key]
    folders = [RunFolder(killed.root / name) for name in GENERATIONS]
    planned = Counter(request.id for run in folders for request in read_requests(run))
    lines = Counter(
        json.loads(line)["request"]
        for run in folders
        for file in run.answers.glob("part-*.jsonl")
        for line in file.read_bytes().splitlines()
    )
    starts = Counter(request for key in killed.answered for request in sent.get(key, ()))
    attempts = sum((sent.get(key, Counter()) for key in killed.answered), Counter[str]())
    spent = Counter[str]()
    for run in folders:
        for line in map(json.loads, run.spending.read_bytes().splitlines()):
            spent[line["request"]] += line["requests"]
    accepted = [line for run in folders for line in _lines(run.samples)]
    rejected = [line for run in folders for line in _lines(run.rejected)]
    return {
        "kills": dict(sorted(killed.kills.items())),
        "operators": len(_operators([*accepted, *rejected])),
        "operators_with_accepted_samples": len(_operators(accepted)),
        "requests": planned.total(),
        "in_both_generations": planned.total() - len(planned),
        "records": lines.total(),
        "lost": len(set(planned) - set(lines)),
        "doubled": sum((lines - planned).values()),
        "accepted": len(accepted),
        "rejected": len(rejected),
        "attempts": attempts.total(),
        "attempts_not_in_spending": sum(
            max(0, count - spent[request[:16]]) for request, count in attempts.items()
        ),
        "sent_in_several_starts": sum(starts.values()) - len(starts),
        "in_flight_at_kills": sum(open_at),
        "most_in_flight_at_a_kill": max(open_at, default=0),
        "concurrency": CONCURRENCY,
        "sent_although_recorded": again,
        "sent_by_repeating": sum(sent.get("r0", {}).values()),
        "temporary_files_left": len([*killed.root.rglob(".*.tmp")]),
        "files_compared": len(_compared(whole)),
        "files_that_differ": _differing(whole, killed.root),
    }


def is_good(found: dict[str, Any]) -> bool:
    """Whether nothing was lost, doubled, or sent without need, and all files are the same."""
    zero = ("lost", "doubled", "in_both_generations", "sent_although_recorded",
            "sent_by_repeating", "attempts_not_in_spending")  # fmt: skip
    return (
        all(found[name] == 0 for name in zero)
        and found["records"] == found["requests"]
        and found["sent_in_several_starts"] <= found["in_flight_at_kills"]
        and found["most_in_flight_at_a_kill"] <= found["concurrency"]
        and found["operators"] == len(OPERATORS)
        and not found["files_that_differ"]
    )


def command(root: Path, parents: Path, name: str, stage: str) -> list[str]:
    """The words of a command of a generation."""
    if stage != "grow":
        return [stage, str(root / name / "config.yaml")]
    given = parents if name == "first" else root / "first" / "config.yaml"
    return ["grow", str(given), "--out", str(root / name), *GENERATIONS[name]]


def script() -> Script:
    """A server that fails up to three times in each start of the command, then answers.

    What a request meets depends on its id alone, so that neither its answer nor the number of
    attempts before it depends on the kills.
    """
    times: Counter[tuple[str, str]] = Counter()

    def act(received: Received) -> Act:
        text = received.body["messages"][-1]["content"]
        if "QUESTIONS" not in text and "TASKS" not in text:
            return say(turns(*FIRST))
        rng = random.Random(received.id)
        faults = [rng.choice(FAULTS) for _ in range(rng.choice((0, 0, 0, 1, 2, ATTEMPTS - 1)))]
        answer = rng.choice(NO_JSON) if rng.random() < 0.15 else good_reply(text)
        slow = rng.choice((0.01, 0.02, 0.04, 0.2))
        start = _key(received), received.id
        times[start] += 1
        return faults[times[start] - 1] if times[start] <= len(faults) else after(slow, say(answer))

    return act


def _of_generate(kills: int) -> int:
    return round(kills * 0.6)


def _key(received: Received) -> str:
    return received.headers["authorization"].removeprefix("Bearer ")


def _commands() -> Iterator[tuple[str, str]]:
    return ((name, stage) for name in GENERATIONS for stage in STAGES)


def _run(words: Sequence[str], key: str) -> None:
    _end(_start(words, key))


def _end(process: ForkServerProcess) -> None:
    process.join()
    assert process.exitcode == 0, f"{process.name} ended with code {process.exitcode}"


def _start(words: Sequence[str], key: str) -> ForkServerProcess:
    """Start a command with a key of its own; it is too short to be removed from answers."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    process = context.Process(target=_command, args=(words, key), name=" ".join(words))
    process.start()
    return process


def _command(words: Sequence[str], key: str) -> None:
    os.environ["OPENAI_API_KEY"] = key
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(main(words))


def _wait(process: ForkServerProcess, reached: Callable[[], bool]) -> None:
    while not reached() and process.is_alive():
        time.sleep(0.0005)


def _changes(folder: Path) -> Iterator[int]:
    """Yield again and again how often the files of a folder have changed since the first time."""
    last, count = _state(folder), 0
    while True:
        state = _state(folder)
        count += state != last
        last = state
        yield count


def _state(folder: Path) -> set[tuple[str, int, int]]:
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            about = path.lstat()
            found.add((str(path), about.st_size, about.st_mtime_ns))
    return found


def _compared(root: Path) -> list[str]:
    """The files of all generations that must not depend on kills."""
    return sorted(
        path.relative_to(root).as_posix()
        for name in GENERATIONS
        for path in (root / name).rglob("*")
        if path.is_file()
        and path.relative_to(root / name).parts[0] not in NOT_COMPARED
        and not path.name.startswith(".")
    )


def _differing(whole: Path, killed: Path) -> list[str]:
    """The files that are only in one of two folders, or of other bytes."""
    names = {*_compared(whole), *_compared(killed)}
    return sorted(
        name
        for name in names
        if not (whole / name).is_file()
        or not (killed / name).is_file()
        or (whole / name).read_bytes() != (killed / name).read_bytes()
    )


def _operators(lines: Sequence[dict[str, Any]]) -> set[str]:
    return {line["grown"]["operator"] for line in lines}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]
