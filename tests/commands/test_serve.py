"""The command `serve`: what it refuses, and that requests in flight are finished after SIGTERM."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from vlm_sft.errors import UserError
from vlm_sft.serve import main

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_key_variable_that_is_not_set_is_refused(
    full_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="NO_SUCH_KEY: the environment variable is not set"):
        main([str(full_run / "final"), "--api-key-env", "NO_SUCH_KEY", "--device", "cpu"])


def test_a_port_that_is_in_use_is_refused(full_run: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(UserError, match=f"--port {port}: cannot listen on 127.0.0.1"):
            main([str(full_run / "final"), "--port", port, "--device", "cpu"])


def test_after_sigterm_the_answer_in_flight_is_finished(full_run: Path) -> None:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "vlm_sft.serve", str(full_run / "final"), "--port", str(port),
         "--device", "cpu"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
                assert server.poll() is None
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True,
                "temperature": 2, "max_tokens": 150}  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            first = answer.readline()
            server.send_signal(signal.SIGTERM)
            rest = answer.read()
        assert first.startswith(b"data: ")
        assert rest.rstrip().endswith(b"data: [DONE]")
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
