"""An OpenAI-compatible server on loopback that does what a script says, and counts what it gets.

A script is a function of what was received to what is done: `Script = Callable[[Received], Act]`.
Acts write to the connection themselves, so that they can be as wrong as a server can be.
"""

import contextlib
import json
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Received:
    """One request as it came.

    `id` is the request's (`X-Client-Request-Id`), `times` how often it has come, this one counted.
    """

    id: str
    times: int
    path: str
    headers: dict[str, str]
    body: Any
    at: float

    @property
    def is_probe(self) -> bool:
        return self.id.startswith("probe-")


Act = Callable[["Handler"], None]
Script = Callable[[Received], Act]


def completion(text: str, **changes: Any) -> dict[str, Any]:
    """What a server answers with; `changes` replace keys of the document, `finish` the reason."""
    finish, message = changes.pop("finish", "stop"), changes.pop("message", None)
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "scripted-1",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "message": message or {"role": "assistant", "content": text},
                "finish_reason": finish,
            }
        ],
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": 20,
            "total_tokens": 120,
            "prompt_tokens_details": {"cached_tokens": 60},
        },
    } | changes


def say(text: str, **changes: Any) -> Act:
    """Answer with a completion."""
    return send(200, completion(text, **changes))


def send(
    status: int,
    document: Any,
    headers: dict[str, str] | None = None,
    content_type: str = "application/json",
) -> Act:
    """Answer with a status and a body (JSON, or bytes as they are)."""

    def act(handler: "Handler") -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", content_type)
        handler.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return act


def fail(status: int, message: str = "no", **more: Any) -> Act:
    """An error as OpenAI words it; `retry_after` becomes the header, the rest joins the body."""
    wait = more.pop("retry_after", None)
    headers = {} if wait is None else {"Retry-After": str(wait)}
    return send(status, {"error": {"message": message, "type": "error", **more}}, headers)


def drip(seconds: float, every: float = 0.05) -> Act:
    """A body that comes letter by letter, each well within a read's time limit."""

    def act(handler: "Handler") -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(every)

    return act


def endless(most: int = 1 << 26) -> Act:
    """A body that does not end before the reader has had enough."""

    def act(handler: "Handler") -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.end_headers()
        sent = 0
        while sent < most:
            handler.wfile.write(b'{"a":' * 4096)
            sent += 5 * 4096
        handler.close_connection = True

    return act


def drop(handler: "Handler") -> None:
    """Close the connection in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices":')
    handler.close_connection = True


def after(seconds: float, act: Act) -> Act:
    """Do it later."""

    def waiting(handler: "Handler") -> None:
        time.sleep(seconds)
        act(handler)

    return waiting


def fenced(text: str) -> str:
    """As a model that likes markdown says it."""
    return f"Here you go:\n```json\n{text}\n```\n"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "TeacherServer"

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        body = json.loads(raw) if "json" in self.headers.get("Content-Type", "") else raw
        self._answer(body)

    def do_GET(self) -> None:
        self._answer(None)

    def _answer(self, body: Any) -> None:
        received = self.server.note(self.path, dict(self.headers), body)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.server.act(received)(self)

    def log_message(self, *_: Any) -> None:
        pass


@dataclass
class Batch:
    """A batch as the server keeps it."""

    id: str
    input_file_id: str
    metadata: dict[str, str]
    looks: int = 0


class TeacherServer(ThreadingHTTPServer):
    """Use as a context manager; `url` ends in `/v1`.

    Attributes:
        received: Everything that came, in order.
        counts: How often each request id came.
        batch_script: What to answer a line of a batch with (`None`: nothing, it expired); by
            default a completion with the script's own text is not known, so tests set it.
        batch_status: Statuses of a batch, look by look; the last one stays.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.received: list[Received] = []
        self.counts: Counter[str] = Counter()
        self.busy = 0
        self.most_busy = 0
        self._lock = threading.Lock()
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, Batch] = {}
        self.batch_script: Callable[[str, Any], dict[str, Any] | None] | None = None
        self.batch_status = ["validating", "in_progress", "completed"]
        self.calls: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> "TeacherServer":
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A reader that has left is part of the play."""

    def note(self, path: str, headers: dict[str, str], body: Any) -> Received:
        lowered = {name.lower(): value for name, value in headers.items()}
        name = lowered.get("x-client-request-id", "")
        with self._lock:
            self.counts[name] += 1
            received = Received(name, self.counts[name], path, lowered, body, time.monotonic())
            self.received.append(received)
        return received

    def act(self, received: Received) -> Act:
        if received.path.startswith(("/v1/files", "/v1/batches")):
            return self._batch_act(received)
        act = self.script(received)

        def counted(handler: Handler) -> None:
            with self._lock:
                self.busy += 1
                self.most_busy = max(self.most_busy, self.busy)
            try:
                act(handler)
            finally:
                with self._lock:
                    self.busy -= 1

        return counted

    def _batch_act(self, received: Received) -> Act:
        path = received.path.split("?")[0].removeprefix("/v1")
        with self._lock:
            if received.body is None:
                return self._look(path)
            self.calls[path] += 1
            if path == "/files":
                name = f"file-{len(self.files) + 1}"
                self.files[name] = _uploaded(received.body)
                return send(200, _file(name, len(self.files[name])))
            name = f"batch_{len(self.batches) + 1}"
            metadata = received.body.get("metadata") or {}
            self.batches[name] = Batch(name, received.body["input_file_id"], metadata)
            return send(200, self._document(self.batches[name]))

    def _look(self, path: str) -> Act:
        parts = path.strip("/").split("/")
        if parts[0] == "files":
            return send(200, self.files[parts[1]], content_type="application/octet-stream")
        if len(parts) == 1:
            documents = [self._document(batch) for batch in self.batches.values()]
            return send(200, {"object": "list", "data": documents, "has_more": False})
        batch = self.batches[parts[1]]
        batch.looks += 1
        return send(200, self._document(batch))

    def _document(self, batch: Batch) -> dict[str, Any]:
        last = len(self.batch_status) - 1
        status = self.batch_status[min(batch.looks, last)]
        document = {
            "id": batch.id, "object": "batch", "endpoint": "/v1/chat/completions",
            "input_file_id": batch.input_file_id, "completion_window": "24h", "created_at": 1,
            "status": status, "metadata": batch.metadata,
        }  # fmt: skip
        if status in ("completed", "expired", "cancelled"):
            document |= self._results(batch)
        return document

    def _results(self, batch: Batch) -> dict[str, str]:
        good, bad = [], []
        for line in self.files[batch.input_file_id].splitlines():
            asked = json.loads(line)
            assert self.batch_script is not None, "set batch_script"
            result = self.batch_script(asked["custom_id"], asked["body"])
            if result is not None:
                entry = {"id": "r", "custom_id": asked["custom_id"], "error": None} | result
                (good if result.get("response") else bad).append(json.dumps(entry))
        names = {}
        for name, lines in (("output", good), ("error", bad)):
            if lines:
                names[f"{name}_file_id"] = f"{batch.id}-{name}"
                self.files[f"{batch.id}-{name}"] = ("\n".join(lines) + "\n").encode()
        return names


def _file(name: str, size: int) -> dict[str, Any]:
    return {
        "id": name, "object": "file", "bytes": size, "created_at": 1, "filename": "requests.jsonl",
        "purpose": "batch", "status": "processed",
    }  # fmt: skip


def _uploaded(form: bytes) -> bytes:
    """The file in a multipart form."""
    for part in form.split(b"\r\n--"):
        head, _, content = part.partition(b"\r\n\r\n")
        if b"filename=" in head:
            return content
    raise AssertionError("no file in the form")


@dataclass
class Scenes:
    """Answers by request id, and the acts of a script that goes through them in order."""

    acts: dict[str, list[Act]] = field(default_factory=lambda: defaultdict(list))
    otherwise: Act | None = None

    def __call__(self, received: Received) -> Act:
        acts = self.acts.get(received.id, [])
        if received.times <= len(acts):
            return acts[received.times - 1]
        assert self.otherwise is not None
        return acts[-1] if acts and self.otherwise is None else self.otherwise


@contextlib.contextmanager
def served(script: Script) -> Iterator[TeacherServer]:
    """A running server."""
    with TeacherServer(script) as server:
        yield server
