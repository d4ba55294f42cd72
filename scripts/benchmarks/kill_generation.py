"""Kill generation again and again with SIGKILL, and count what was lost, doubled, or sent twice.

    scripts/benchmarks/kill_generation --kills 200

A server on loopback counts what it receives and answers after a random time. The same command is
started, killed after a random number of requests and milliseconds, and started again, as often as
asked; the last start runs to its end. Then every request must have exactly one record, and no more
requests may have been sent twice than were under way at the kills.

With `--grown`, the commands that are killed are those of two generations of grown samples: see
`kill_grown.py`.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]

import kill_grown  # noqa: E402

from data_tools.instruct.generate.answers import read_answers  # noqa: E402
from data_tools.instruct.plan.command import read_requests  # noqa: E402
from data_tools.instruct.run_folder import RunFolder  # noqa: E402
from tests.data_tools.asked import planned  # noqa: E402
from tests.data_tools.teacher_server import Act, Received, after, say, served  # noqa: E402
from vlm_sft.config import loading as settings  # noqa: E402

CONCURRENCY = 8
MOST_A_LIFE = 16
"""Requests that a start gets through before it is killed, at most."""


def main() -> int:
    """Run the trial; 0 if nothing was lost, doubled or sent again without need."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grown", action="store_true", help="kill the commands of grown runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills, seed = arguments.kills, arguments.seed
        if arguments.grown:
            found = kill_grown.trial(Path(folder), kills, seed)
            good = kill_grown.is_good(found)
        else:
            found = trial(Path(folder), kills, seed)
            nothing_lost = found["lost"] == found["doubled"] == 0
            good = nothing_lost and found["resent"] <= found["in_flight_at_kills"]
    print(json.dumps(found, indent=2))
    print("PASS" if good else "FAIL")
    return 0 if good else 1


def trial(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """What was counted over `kills` kills and one whole run after them."""
    rng = random.Random(seed)
    images = kills * MOST_A_LIFE // 3 + 1  # so that no start but the last reaches the end
    with served(_script(seed)) as server:
        config, run = planned(
            folder / "run", images, kind="openai", base_url=server.url, structured="none",
            concurrency=CONCURRENCY,
        )  # fmt: skip
        path = folder / "config.yaml"
        path.write_text(settings.dump(config))
        in_flight, torn, most = 0, 0, 0
        for number in range(kills):
            before = len(server.received)
            process = _start(path)
            _wait_for(process, server.received, before + rng.randint(1, MOST_A_LIFE))
            time.sleep(rng.random() * 0.03)
            process.send_signal(signal.SIGKILL)
            _, told = process.communicate()
            torn += "was cut" in told
            open_now = _unrecorded(run, [r.id for r in server.received[before:]])
            in_flight, most = in_flight + open_now, max(most, open_now)
            if (number + 1) % 20 == 0:
                print(f"{number + 1} kills, {len(read_answers(run.answers)):,} answers", flush=True)
        process = _start(path)
        _, told = process.communicate()
        assert process.returncode == 0, told
        counts = Counter(received.id for received in server.received)
    asked = {request.id for request in read_requests(run)}
    lines = Counter(
        json.loads(line)["request"]
        for file in run.answers.glob("part-*.jsonl")
        for line in file.read_bytes().splitlines()
    )
    return {
        "kills": kills,
        "requests": len(asked),
        "records": sum(lines.values()),
        "lost": len(asked - set(lines)),
        "doubled": sum(count - 1 for count in lines.values()),
        "sent": sum(counts.values()),
        "resent": sum(count - 1 for count in counts.values()),
        "in_flight_at_kills": in_flight,
        "most_in_flight_at_a_kill": most,
        "concurrency": CONCURRENCY,
        "torn_lines_mended": torn,
    }


def _script(seed: int):  # type: ignore[no-untyped-def]
    rng = random.Random(seed + 1)
    text = json.dumps({"answer": "There are two dogs. " * 400, "evidence": ["b1", "b2"]})

    def script(received: Received) -> Act:
        return after(rng.random() * 0.04, say(text))

    return script


def _start(path: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-m", "data_tools.instruct", "generate", str(path)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def _wait_for(process: "subprocess.Popen[str]", received: list[Received], count: int) -> None:
    while len(received) < count and process.poll() is None:
        time.sleep(0.001)


def _unrecorded(run: RunFolder, sent: list[str]) -> int:
    """How many of these requests have no record."""
    answers = read_answers(run.answers)
    return sum(request not in answers for request in sent)


if __name__ == "__main__":
    sys.exit(main())
