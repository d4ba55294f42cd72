"""What the server refuses, in OpenAI's form, and that slow and rude clients hold up nobody."""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from tests.serving.served import KEY, Served, ask, png, text, uri  # noqa: E402
from vlm_sft.serving import app as app_module  # noqa: E402
from vlm_sft.serving import listener, remote_images  # noqa: E402
from vlm_sft.serving.images import ImageLimits  # noqa: E402
from vlm_sft.serving.protocol import Limits  # noqa: E402

HEADERS = {"Authorization": f"Bearer {KEY}"}
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def loaded(full_run: Path) -> LoadedModel:
    return load_checkpoint(full_run / "final", device="cpu")


@pytest.fixture(scope="module")
def served(loaded: LoadedModel) -> Iterator[Served]:
    server = Served(
        loaded, Limits(max_tokens=200, max_body=1_000_000), local_only=True, max_queue=2
    )
    yield server
    server.close()


def error(response: Any, status: int) -> str:
    assert response.status_code == status
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return str(found["message"])


def post(served: Served, body: Any = HI, headers: dict[str, str] | None = None) -> Any:
    url = f"{served.url}/v1/chat/completions"
    return httpx.post(url, json=body, headers=HEADERS | (headers or {}), timeout=60)


def raw(served: Served, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    connection.sendall(data)
    return connection


def head(length: int) -> bytes:
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


def test_unknown_addresses_and_methods_are_errors_of_the_api(served: Served) -> None:
    assert "this server has" in error(httpx.get(f"{served.url}/v1/other"), 404)
    assert "Method Not Allowed" in error(httpx.get(f"{served.url}/v1/chat/completions"), 405)
    assert "there is no 'x'" in error(httpx.get(f"{served.url}/v1/models/x", headers=HEADERS), 404)
    assert served.client().models.retrieve("tiny").id == "tiny"


def test_other_web_pages_cannot_use_a_server_on_loopback(served: Served) -> None:
    assert error(post(served, headers={"Content-Type": "text/plain"}), 415)
    assert error(post(served, headers={"Host": "evil.org"}), 403)
    assert post(served, headers={"Host": f"localhost:{served.port}"}).status_code == 200


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_logprobs": 2}, "needs logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty: is not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort: is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format: is not supported"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "up to 4"),
        ({"stop": [""]}, "non-empty"),
        ({"n": 17}, "n: "),
        ({"max_tokens": 201}, "max_tokens"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "must be the user's"),
        ({"messages": [{"role": "user", "content": "x" * 500_000}]}, "500,000 characters"),
    ],
)
def test_parameters_that_are_not_implemented_are_refused(
    served: Served, change: dict[str, Any], message: str
) -> None:
    assert message in error(post(served, HI | change), 400)


def test_parameters_without_an_effect_are_accepted(served: Served) -> None:
    neutral = {
        "user": "me", "metadata": {}, "store": False, "presence_penalty": 0, "logit_bias": None,
        "response_format": {"type": "text"}, "top_p": 1, "seed": None, "stop": None, "tools": [],
    }  # fmt: skip
    assert post(served, HI | neutral).status_code == 200


def test_the_client_of_a_request_that_is_far_too_large_sees_why(served: Served) -> None:
    with pytest.raises(openai.APIStatusError, match="longer than 1,000,000 bytes"):
        ask(served.client(), "x" * 8_000_000)
    with pytest.raises(openai.AuthenticationError, match="wrong or missing API key"):
        ask(served.client("wrong"), "x" * 8_000_000)


def test_half_a_body_is_refused_after_some_time(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.3)
    with raw(served, head(1000) + b'{"messages": [') as connection:
        assert post(served).status_code == 200, "others are answered meanwhile"
        answer = http.client.HTTPResponse(connection)  # head and body may come in two packets
        answer.begin()
        assert answer.status == 408 and b"did not arrive" in answer.read()


def test_half_a_head_is_closed_after_some_time(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "IDLE_SECONDS", 0.3)
    for data in (b"", b"POST /v1/chat/comp", head(10)[:-2]):
        with raw(served, data) as connection:
            assert connection.recv(10_000) == b""
    assert post(served).status_code == 200


def test_a_client_that_leaves_before_or_while_its_answer_is_generated_frees_its_place(
    served: Served,
) -> None:
    long = HI | {"max_tokens": 150, "temperature": 2}
    for body in (long, long | {"stream": True}):
        content = json.dumps(body).encode()
        connections = [raw(served, head(len(content)) + content) for _ in range(2)]
        connections.append(raw(served, head(100)))
        for connection in connections:
            connection.close()
    deadline = time.monotonic() + 60
    while served.engine.running or served.engine.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert post(served).status_code == 200


def test_the_memory_of_all_requests_is_limited(loaded: LoadedModel) -> None:
    server = Served(loaded, Limits(max_tokens=20, max_memory=40_000))
    try:
        response = post(server, HI | {"user": "x" * 50_000})
        assert "too many large requests" in error(response, 429)
        assert response.headers["Retry-After"] == "1"
        with raw(server, head(30_000) + b" " * 29_000):
            time.sleep(0.1)
            assert error(post(server, HI | {"user": "x" * 20_000}), 429)
            assert post(server).status_code == 200
        for _ in range(3):
            assert post(server, HI | {"user": "x" * 30_000}).status_code == 200
    finally:
        server.close()


def test_a_second_model_is_chosen_by_its_name(loaded: LoadedModel) -> None:
    server = Served([loaded, loaded], Limits(max_tokens=40))
    try:
        client = server.client()
        assert [model.id for model in client.models.list()] == ["tiny", "other"]
        answers = {name: ask(client, "hi", model=name) for name in ("tiny", "other")}
        assert answers["other"].model == "other"
        texts = [answer.choices[0].message.content for answer in answers.values()]
        assert texts[0] == texts[1]
        with pytest.raises(openai.NotFoundError, match="'tiny' and 'other'"):
            ask(client, "hi", model="third")
    finally:
        server.close()


def test_remote_images_are_fetched_from_allowed_hosts(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(parts: Any, *_: Any) -> bytes:
        return png("red") if parts.path == "/red.png" else b"a page"

    monkeypatch.setattr(remote_images, "_get", get)
    limits = Limits(max_tokens=40, images=ImageLimits(remote_hosts=("example.org",)))
    server = Served(loaded, limits)

    def link(url: str) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": url}}

    try:
        client = server.client()
        found = ask(client, link("https://example.org/red.png"), text("What is it?"))
        same = ask(client, uri(png("red")), text("What is it?"))
        assert found.choices[0].message.content == same.choices[0].message.content
        for url, message in (
            ("https://example.org/page", "is not an image"),
            ("https://evil.org/red.png", "not in this server's list of allowed hosts"),
            ("file:///etc/passwd", "expected a data: URI or an address of an allowed host"),
        ):
            with pytest.raises(openai.BadRequestError, match=message):
                ask(client, link(url), text("What is it?"))
    finally:
        server.close()
