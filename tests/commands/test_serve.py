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
from vlm_sft.serve import main, parser

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from vlm_sft.commands.serve import served_names
from vlm_sft.utils.addresses import is_loopback


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


@pytest.mark.parametrize("hosts", ["http://example.org", "a b", "*.*.org", "example.org/x"])
def test_a_list_of_hosts_with_anything_else_is_refused(hosts: str) -> None:
    with pytest.raises(UserError, match="expected hosts like example"):
        parser().read(["final", "--allow-remote-images", hosts])


def test_models_are_named_by_their_folders_with_parents_that_differ(tmp_path: Path) -> None:
    assert served_names([tmp_path / "a" / "final"]) == ["final"]
    two = [tmp_path / "a" / "final", tmp_path / "b" / "final"]
    assert served_names(two) == ["a/final", "b/final"]
    with pytest.raises(UserError, match="this is the same checkpoint"):
        served_names([two[0], tmp_path / "b" / ".." / "a" / "final"])


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_only_loopback_addresses_are_local(host: str, expected: bool) -> None:
    assert is_loopback(host) == expected


def test_after_sigterm_the_answer_in_flight_is_finished(full_run: Path) -> None:
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "vlm_sft.serve", str(full_run / "final"), "--port", str(port),
         "--device", "cpu", "--ui"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
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
        assert server.stderr is not None
        lines = server.stderr.read()
        assert f"as 'final' at http://127.0.0.1:{port}/v1" in lines
        assert f"chat page: http://127.0.0.1:{port}/" in lines
    finally:
        server.kill()
        server.communicate()
