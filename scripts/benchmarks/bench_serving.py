"""Many clients at once against `vlm-sft serve`: right answers, memory, tokens per second.

    scripts/benchmarks/bench_serving runs/tiny/stage2/final
    scripts/benchmarks/bench_serving demo/stage2_lora/final --seconds 60 --max-tokens 16

Starts the server on loopback and

  1. asks every question alone; each has its own marker in the text and its own image. The answers
     (most likely tokens) are the reference.
  2. asks one after another for some seconds: tokens per second one by one.
  3. asks with one client per question at the same time: tokens per second batched, the memory of
     the server, and each answer compared with the reference. An answer that differs is "swapped"
     if it is the reference of another question; "rounded" if it leaves the reference at a token
     whose two best candidates were closer than 0.001 in log-probability, which the rounding of
     batched kernels can turn round; and otherwise "wrong".
  4. the same again for a third of the time, among clients that send half a request and wait, leave
     without reading, read slowly, or send garbage.

Fails if an answer is lost, swapped or wrong. Use the ratio of 2 and 3, not the figures themselves,
if the machine has other work to do.
"""

import argparse
import base64
import colorsys
import http.client
import io
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import psutil
from bench_results import print_table
from PIL import Image

NEAR_TIE: Final = 1e-3
"""Difference of log-probabilities that the rounding of batched kernels can turn round."""
START_SECONDS: Final = 900


@dataclass
class Reference:
    """The answer to a question that was asked alone.

    Attributes:
        text: The answer.
        tokens: Text of each token.
        margins: Difference between the two best log-probabilities at each token.
    """

    text: str
    tokens: list[str]
    margins: list[float]


@dataclass
class Load:
    """What was counted while clients asked.

    Attributes:
        outcomes: Number of answers by outcome.
        tokens: Generated tokens of all answers.
        seconds: Duration.
        memory: Memory of the server in MiB, once a second.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    seconds: float = 0.0
    memory: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all clients per second."""
        return self.tokens / self.seconds


def main() -> int:
    """Run the load; return 0 if every answer was right."""
    arguments = read_arguments()
    with started(arguments) as (port, process):
        questions = [question(number) for number in range(arguments.clients)]

        def ask(number: int, **options: Any) -> Any:
            body = {**questions[number], "max_tokens": arguments.max_tokens, **options}
            return post(port, body)

        print(f"{len(questions)} reference answers", file=sys.stderr)
        references = [
            reference(ask(n, logprobs=True, top_logprobs=2)) for n in range(len(questions))
        ]
        alone = load(ask, references, clients=1, seconds=arguments.seconds / 3, process=process)
        print(f"{arguments.clients} clients at once", file=sys.stderr)
        many = load(
            ask, references, clients=arguments.clients, seconds=arguments.seconds, process=process
        )
        print("with rude clients", file=sys.stderr)
        with rude_clients(port):
            among = load(ask, references, clients=8, seconds=arguments.seconds / 3, process=process)
        alive = get_health(port)
    show(arguments, {"one by one": alone, "all at once": many, "among rude clients": among}, alive)
    bad = sum(
        part.outcomes[name]
        for part in (alone, many, among)
        for name in ("lost", "swapped", "wrong")
    )
    print("PASS" if not bad and alive == {"status": "ok", "waiting": 0, "running": 0} else "FAIL")
    return 1 if bad else 0


def read_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--clients", type=int, default=64, metavar="N")
    parser.add_argument("--seconds", type=float, default=60, metavar="S")
    parser.add_argument("--max-tokens", type=int, default=24, metavar="N")
    parser.add_argument("--max-batch", type=int, default=16, metavar="N")
    parser.add_argument("--device", default="cpu", metavar="NAME")
    parser.add_argument("--base", action="append", default=[], metavar="KEY=PATH")
    return parser.parse_args()


@contextmanager
def started(arguments: argparse.Namespace) -> Iterator[tuple[int, psutil.Process]]:
    """Start the server; return its port and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vlm_sft.serve", arguments.checkpoint, "--port", str(port),
        "--device", arguments.device, "--max-batch", str(arguments.max_batch),
        *(word for base in arguments.base for word in ("--base", base)),
    ]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError):
                get_health(port)
                break
            if process.poll() is not None:
                sys.exit(f"the server ended with exit code {process.returncode}")
            time.sleep(0.5)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(120)


def question(number: int) -> dict[str, Any]:
    """Return a request with its own marker and an image of its own color."""
    rgb = colorsys.hsv_to_rgb(number * 0.618 % 1, 0.9, 0.9)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), tuple(int(255 * value) for value in rgb)).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    marker = random.Random(number).randbytes(3).hex()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f"Marker {marker}: repeat it, and say what you see."},
    ]
    return {"messages": [{"role": "user", "content": content}]}


def post(port: int, body: dict[str, Any]) -> Any:
    """Return the answer to a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        content = json.loads(response.read())
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"status {response.status}: {content}")
    return content


def get_health(port: int) -> Any:
    """Return the state of the server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def reference(answer: Any) -> Reference:
    """Return the answer to a question that was asked alone."""
    choice = answer["choices"][0]
    content = choice["logprobs"]["content"]
    margins = [
        entry["top_logprobs"][0]["logprob"] - entry["top_logprobs"][1]["logprob"]
        for entry in content
    ]
    return Reference(choice["message"]["content"], [entry["token"] for entry in content], margins)


def outcome(text: str, number: int, references: Sequence[Reference]) -> str:
    """Return how an answer compares with the references."""
    own = references[number]
    if text == own.text:
        return "right"
    if any(text == other.text for other in references):
        return "swapped"
    found = ""
    for token, margin in zip(own.tokens, own.margins, strict=True):
        found += token
        if not text.startswith(found.strip()):
            return "rounded" if margin < NEAR_TIE else "wrong"
    return "rounded" if own.margins and min(own.margins) < NEAR_TIE else "wrong"


def load(
    ask: Callable[..., Any],
    references: Sequence[Reference],
    *,
    clients: int,
    seconds: float,
    process: psutil.Process,
) -> Load:
    """Ask for some seconds; client k asks question k (one client: all of them in turn)."""
    found = Load()
    lock = threading.Lock()
    begun = time.monotonic()
    end = begun + seconds

    def client(first: int) -> None:
        number = first
        while time.monotonic() < end:
            try:
                answer = ask(number)
                kind = outcome(answer["choices"][0]["message"]["content"], number, references)
                tokens = answer["usage"]["completion_tokens"]
            except Exception as error:
                print(f"question {number}: {error}", file=sys.stderr)
                kind, tokens = "lost", 0
            with lock:
                found.outcomes[kind] += 1
                found.tokens += tokens
            number = number if clients > 1 else (number + 1) % len(references)

    with ThreadPoolExecutor(clients) as pool:
        waiting = [pool.submit(client, number) for number in range(clients)]
        while not all(future.done() for future in waiting):
            found.memory.append(process.memory_info().rss / 2**20)
            time.sleep(1)
    found.seconds = time.monotonic() - begun
    return found


@contextmanager
def rude_clients(port: int) -> Iterator[None]:
    """Keep slow and broken clients busy within the block."""
    end = threading.Event()
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\n"
    )
    body = json.dumps({**question(0), "stream": True, "temperature": 2, "max_tokens": 200}).encode()
    whole = head + b"Content-Length: %d\r\n\r\n" % len(body) + body

    def repeat(data: bytes, then: Callable[[socket.socket], None]) -> None:
        while not end.is_set():
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as connection:
                connection.sendall(data)
                then(connection)
            end.wait(0.1)

    def wait(_: socket.socket) -> None:
        end.wait(5)

    def read_slowly(connection: socket.socket) -> None:
        for _ in range(50):
            if not connection.recv(20) or end.wait(0.1):
                return

    kinds: list[tuple[bytes, Callable[[socket.socket], None]]] = [
        (head, wait),
        (head + b"Content-Length: 1000000\r\n\r\n" + body[:100], wait),
        (whole, lambda _: None),
        (whole, read_slowly),
        (b"\x16\x03\x01garbage\r\n\r\n", wait),
        (head + b"Content-Length: 5\r\n\r\n{]{]{", wait),
    ]
    threads = [threading.Thread(target=repeat, args=kind) for kind in kinds for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()
        for _ in range(240):  # the server notices within half a second of the next token
            if get_health(port)["running"] == 0:
                break
            time.sleep(0.5)


def show(arguments: argparse.Namespace, parts: dict[str, Load], alive: Any) -> None:
    """Print the results."""
    kinds = ("right", "rounded", "lost", "swapped", "wrong")
    columns = {
        "part": "", "answers": "answers", **dict(zip(kinds, kinds, strict=True)),
        "speed": "tokens/s", "first": "RSS begin, MiB", "last": "end", "most": "most",
    }  # fmt: skip
    rows = [
        {
            "part": name, "answers": part.outcomes.total(),
            **{kind: part.outcomes[kind] for kind in kinds}, "speed": part.tokens_per_second,
            "first": part.memory[0], "last": part.memory[-1], "most": max(part.memory),
        }
        for name, part in parts.items()
    ]  # fmt: skip
    print_table(f"{arguments.checkpoint}: {arguments.clients} clients", columns, rows)
    alone, many = parts["one by one"], parts["all at once"]
    print(f"batched / one by one: {many.tokens_per_second / alone.tokens_per_second:.2f}")
    print(f"afterwards: {alive}")


if __name__ == "__main__":
    raise SystemExit(main())
