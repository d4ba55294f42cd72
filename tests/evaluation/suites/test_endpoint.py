"""A model behind an OpenAI-compatible server answers a suite."""

import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.data_tools.teacher_server import Act, fail, say, send, served
from vlm_sft import evaluate
from vlm_sft.errors import UserError
from vlm_sft.evaluation.endpoint import Endpoint, Reply
from vlm_sft.evaluation.suites.answering import EndpointAnswerer, model_identity
from vlm_sft.evaluation.suites.tasks import Ask, ImageAsks, Key, Shown


class Server(ThreadingHTTPServer):
    """Answers what it is told to; counts its requests by text."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.images: list[bytes] = []
        self.fail_after: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        parts = body["messages"][0]["content"]
        url, text = parts[0]["image_url"]["url"], parts[1]["text"]
        if self.server.fail_after == 0:
            return self._send(401, {"error": {"message": "no such key"}})
        if self.server.fail_after is not None:
            self.server.fail_after -= 1
        if "blue" in text:
            error = {"message": "not allowed", "code": "content_filter"}
            return self._send(400, {"error": error})
        self.server.asked[f"{url} {text}"] += 1
        self.server.images.append(base64.b64decode(url.partition(",")[2]))
        message = {"role": "assistant", "content": " Yes. "}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
        self._send(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m",
                         "choices": [choice], "usage": usage})  # fmt: skip

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_server_is_asked_once_and_a_failed_evaluation_goes_on(
    server: Server, suite_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [str(suite_file), "--base-url", server.url, "--model", "m", "--out", str(out)]
    command += ["--concurrency", "2"]
    server.fail_after = 10
    with pytest.raises(UserError, match=r"did not answer: .*no such key"):
        evaluate.main(command)
    saved = (out / "answers.jsonl").read_text().splitlines()
    assert 8 <= len(saved) < 64
    server.fail_after = None
    assert evaluate.main(command) == 0
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len({(row["task"], row["condition"], row["id"]) for row in rows}) == len(rows) == 64
    # A second request can only be one that was under way when the server failed.
    assert sum(server.asked.values()) - len(server.asked) <= 2
    assert all(image.startswith(b"\x89PNG") for image in server.images)
    answered = [row for row in rows if "problem" not in row]
    assert {(row["answer"], row["tokens"]) for row in answered} == {("Yes.", 2)}
    assert {row["answer"] for row in rows if "problem" in row} == {""}
    results = json.loads((out / "results.json").read_text())
    scores = results["tasks"]["exists"]["conditions"]["right"]
    assert results["model"] == "m" and scores["without_answer"] == 4
    assert scores["accuracy"] == 2 / 12  # red and green walls; refusals are wrong
    assert evaluate.main(command) == 0  # nothing is left to ask


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("ftp://host/v1", "", "expected http://HOST"),
        ("https://host/v1", "", "THE_KEY is not set"),
        ("http://host/v1", "secret", "would send the key in THE_KEY unencrypted"),
    ],
)
def test_addresses_and_keys_are_checked(
    monkeypatch: pytest.MonkeyPatch, url: str, key: str, message: str
) -> None:
    monkeypatch.setenv("THE_KEY", key)
    with pytest.raises(UserError, match=message):
        Endpoint(url, "m", "THE_KEY")


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (send(200, b"<html>"), "did not answer"),
        (send(200, b"<html>", content_type="text/html"), "no message with a text"),
        (send(200, []), "did not answer|no message"),
        (send(200, {"choices": [None]}), "no message"),
        (send(200, {"choices": {"a": 1}}), "no message"),
        (say("", message={"role": "assistant", "content": [{"type": "text"}]}), "with a text"),
        (fail(401, "no such key: sk-very-secret"), r"no such key: \(key\)"),
    ],
    ids=["no JSON", "HTML", "list", "null", "object", "parts", "key repeated"],
)
def test_a_wrong_response_is_one_sentence_without_the_key(
    act: Act, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THE_KEY", "sk-very-secret")
    with served(lambda _: act) as server, pytest.raises(UserError, match=message) as caught:
        Endpoint(server.url, "m", "THE_KEY").ask([{"role": "user", "content": "Hi"}], 4)
    assert "very-secret" not in str(caught.value)


def test_a_refusal_is_kept_without_the_key_and_a_text_as_utf8(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("THE_KEY", "sk-very-secret")
    refusal = fail(400, "not with sk-very-secret", code="content_filter")
    for act, expected in ((refusal, ""), (say("a\ud800b \ud83d\ude00"), "a\ufffdb \U0001f600")):
        with served(lambda _, act=act: act) as server:
            found = Endpoint(server.url, "m", "THE_KEY").ask([{"role": "user", "content": "?"}], 4)
        assert found.text == expected and "very-secret" not in str(found.problem)


def test_answers_under_way_are_kept_when_another_one_fails() -> None:
    sent: list[str] = []

    class Slow:
        def ask(self, messages: list[dict[str, Any]], max_tokens: int) -> Reply:
            text = messages[0]["content"]
            sent.append(text)
            if text == "0":
                raise UserError("the server fails")
            time.sleep(0.2)
            return Reply(text)

    asks = tuple(Ask(str(n), 4, (Key("t", "right", str(n)),)) for n in range(12))
    answerer = EndpointAnswerer(Slow(), concurrency=4)  # type: ignore[arg-type]
    kept = []
    with pytest.raises(UserError, match="the server fails"):
        for found in answerer.answer([ImageAsks(Shown(None, None), None, asks)], lambda _: False):
            kept += [answer.id for answer in found]
    assert sorted(["0", *kept]) == sorted(sent) and len(sent) < 12


def test_another_model_with_files_of_the_same_size_is_another_model(tmp_path: Path) -> None:
    found = []
    for value in (1.0, 1.0, 2.0):
        tensors = {"frozen": torch.ones(9000), "trained": torch.full((100, 3), value)}
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "old.bin").write_bytes(b"%d" % value)
        found.append(model_identity(str(tmp_path))["files"])
    assert found[0] == found[1]
    assert all(found[0][name] != found[2][name] for name in ("model.safetensors", "old.bin"))
