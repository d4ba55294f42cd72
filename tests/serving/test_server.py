"""The server, asked by the real `openai` client over HTTP."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from tests.finished_models import released_folder  # noqa: E402
from tests.serving.served import KEY, Served, ask, png, text, uri  # noqa: E402
from vlm_sft.serving.images import ImageLimits  # noqa: E402
from vlm_sft.serving.protocol import Limits  # noqa: E402


@pytest.fixture(scope="module")
def loaded(full_run: Path) -> LoadedModel:
    return load_checkpoint(full_run / "final", device="cpu")


@pytest.fixture(scope="module")
def served(loaded: LoadedModel) -> Iterator[Served]:
    server = Served(
        loaded, Limits(max_tokens=40, max_body=200_000, images=ImageLimits(max_pixels=100_000))
    )
    yield server
    server.close()


def test_answers_are_those_of_chat(loaded: LoadedModel, served: Served) -> None:
    client = served.client()
    for content, prompt, images in (
        (("What is it?",), "What is it?", []),
        ((uri(png("red")), text("What is it?")), "What is it?", [png("red")]),
        ((uri(png("red")), uri(png("blue")), text("Same?")), "Same?", [png("red"), png("blue")]),
    ):
        found = ask(client, *content)
        assert found.choices[0].message.content.strip() == loaded.generate(
            prompt, images, max_new_tokens=24
        )
        assert found.usage.completion_tokens <= 24
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_folder_of_another_program_is_served(tmp_path: Path) -> None:
    model = released_folder(tmp_path / "llava", template="chatml")
    found = load_checkpoint(tmp_path / "llava", device="cpu")
    assert all(map(torch.equal, model.state_dict().values(), found.model.state_dict().values()))
    server = Served(found, Limits(max_tokens=8))
    try:
        answer = ask(server.client(), uri(png("red")), text("What is it?"), max_tokens=8)
    finally:
        server.close()
    expected = found.generate("What is it?", [png("red")], max_new_tokens=8)
    assert answer.choices[0].message.content.strip() == expected


def test_a_stream_has_the_same_text_and_ends_with_usage(served: Served) -> None:
    client = served.client()
    content = uri(png("green")), text("Describe it.")
    whole = ask(client, *content)
    events = list(ask(client, *content, stream=True, stream_options={"include_usage": True}))
    pieces = [event.choices[0] for event in events if event.choices]
    assert "".join(p.delta.content or "" for p in pieces) == whole.choices[0].message.content
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage == whole.usage


def test_earlier_turns_and_a_system_message_are_part_of_the_prompt(served: Served) -> None:
    client = served.client()
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [uri(png("red")), text("What is it?")]},
        {"role": "assistant", "content": "A square."},
        {"role": "user", "content": "Which color?"},
    ]
    long = client.chat.completions.create(model="tiny", messages=turns, max_tokens=4)
    short = client.chat.completions.create(model="tiny", messages=turns[1:2], max_tokens=4)
    assert long.usage.prompt_tokens > short.usage.prompt_tokens + 10


def test_stop_texts_end_the_answer_and_are_not_part_of_it(served: Served) -> None:
    client = served.client()
    whole = ask(client, "Tell me something.").choices[0].message.content
    assert len(whole) > 4
    stop = whole[2:4]
    found = ask(client, "Tell me something.", stop=[stop]).choices[0]
    assert found.message.content == whole[: whole.find(stop)]
    assert found.finish_reason == "stop"
    events = ask(client, "Tell me something.", stop=[stop], stream=True)
    streamed = "".join(e.choices[0].delta.content or "" for e in events)
    assert streamed == found.message.content


def test_a_seed_repeats_samples_and_choices_differ(served: Served) -> None:
    client = served.client()
    options = {"temperature": 1.5, "seed": 7, "n": 3, "max_tokens": 12}
    first = [c.message.content for c in ask(client, "Hello", **options).choices]
    again = [c.message.content for c in ask(client, "Hello", **options).choices]
    assert first == again
    assert len(set(first)) > 1
    nucleus = ask(client, "Hello", temperature=1.5, top_p=1e-6, max_tokens=12)
    assert (
        nucleus.choices[0].message.content
        == ask(client, "Hello", max_tokens=12).choices[0].message.content
    )


def test_logprobs_are_those_of_the_model(loaded: LoadedModel, served: Served) -> None:
    found = ask(served.client(), "Hi", max_tokens=3, logprobs=True, top_logprobs=2)
    content = found.choices[0].logprobs.content
    assert len(content) == found.usage.completion_tokens
    from vlm_sft.inference.prompts import as_conversation

    ids = torch.tensor([loaded.prompt_ids(as_conversation("Hi"))])
    with torch.no_grad():
        embeds = loaded.model.embed(ids, None)
        hidden, _ = loaded.model.decode(embeds, None)
        from vlm_sft.model.language_model import head_logits

        values = torch.log_softmax(head_logits(loaded.model.language_model, hidden[0, -1]), -1)
    assert content[0].logprob == pytest.approx(float(values.max()), abs=1e-4)
    assert [t.logprob for t in content[0].top_logprobs] == pytest.approx(
        values.topk(2).values.tolist(), abs=1e-4
    )


@pytest.mark.parametrize(
    ("content", "options", "status", "message"),
    [
        ([uri(b"no image"), text("x")], {}, 400, "is not an image file of"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}], {}, 400,
         "not valid base64"),
        ([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/x"}}], {}, 400,
         "does not fetch"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], {}, 400,
         "does not fetch"),
        ([uri(png("red", (1000, 1000))), text("x")], {}, 413, "1,000,000 pixels"),
        ([uri(png("red"))] * 9 + [text("x")], {}, 400, "more than 8 images"),
        ("x" * 300_000, {}, 413, "longer than 200,000 bytes"),
        ("hi", {"max_tokens": 41}, 400, "more than this server allows"),
        ("hi", {"temperature": 3}, 400, "temperature"),
        ("hi", {"n": 0}, 400, "n: "),
        ("hi", {"seed": 2**70}, 400, "seed"),
        ("hi", {"logit_bias": {"1": 5}}, 400, "logit_bias: is not supported"),
        ("hi", {"extra_body": {"min_p": 0.1}}, 400, "min_p: is not supported"),
        ("hi", {"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "not supported"),
        ("hi", {"model": "other"}, 404, "there is no 'other'"),
        ("word " * 2000, {}, 400, "positions"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_a_clear_error(
    served: Served, content: Any, options: dict[str, Any], status: int, message: str
) -> None:
    parts = (content,) if isinstance(content, str) else tuple(content)
    with pytest.raises(openai.APIStatusError) as raised:
        ask(served.client(), *parts, **options)
    assert raised.value.status_code == status
    assert message in raised.value.body["message"]
    assert ask(served.client(), "hi").choices, "the server goes on"


def test_a_body_that_is_not_json_and_a_wrong_key_are_refused(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        ask(served.client("wrong"), "hi")
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    url = f"{served.url}/v1/chat/completions"
    for body in (b"{", b"[]", b'{"messages": []}', b'{"messages": [{"role": "robot"}]}'):
        found = httpx.post(url, content=body, headers=headers)
        assert found.status_code == 400 and found.json()["error"]["code"] == "invalid_request"


@pytest.mark.parametrize("temperature", [1.5e-38, 1e-40, 1e-320])
def test_the_smallest_temperatures_take_the_most_likely_token(
    served: Served, temperature: float
) -> None:
    greedy = ask(served.client(), "Hello").choices[0].message.content
    options = {"temperature": temperature, "top_p": 1e-300}
    assert ask(served.client(), "Hello", **options).choices[0].message.content == greedy


def test_an_error_of_one_request_ends_no_other(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_sft.serving import engine

    choose = engine._choose
    count = 0

    def failing(logits: Any, sampling: Any, generator: Any) -> int:
        nonlocal count
        if sampling.top_p == 0.5:
            count += 1
            if count > 3:
                raise RuntimeError("no token")
        return choose(logits, sampling, generator)

    monkeypatch.setattr(engine, "_choose", failing)
    server = Served(loaded, Limits(max_tokens=60))
    try:
        with ThreadPoolExecutor(2) as pool:
            good = pool.submit(ask, server.client(), "hi", max_tokens=60, temperature=2, n=4)
            bad = pool.submit(ask, server.client(), "hi", temperature=2, top_p=0.5, n=2)
            assert isinstance(bad.exception(), openai.InternalServerError)
            assert len(good.result().choices) == 4
    finally:
        server.close()


def test_a_stopped_engine_is_503_at_once(loaded: LoadedModel) -> None:
    server = Served(loaded, Limits())
    try:
        server.engine.close()
        assert httpx.get(f"{server.url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            ask(server.client(), "hi")
    finally:
        server.close()


def test_models_and_health(served: Served) -> None:
    assert [model.id for model in served.client().models.list()] == ["tiny"]
    assert httpx.get(f"{served.url}/health").json()["status"] == "ok"
    assert httpx.get(f"{served.url}/v1/models").status_code == 401


def test_many_clients_get_their_own_answers(loaded: LoadedModel, served: Served) -> None:
    colors = ["red", "green", "blue", "white", "black", "yellow"]
    questions = [(colors[i % 6], f"Question {i}: what?") for i in range(48)]
    expected = [
        loaded.generate(question, [png(color)], max_new_tokens=10 + i % 7)
        for i, (color, question) in enumerate(questions)
    ]

    def one(index: int) -> str:
        color, question = questions[index]
        options = {"max_tokens": 10 + index % 7, "stream": index % 2 == 0}
        found = ask(served.client(), uri(png(color)), text(question), **options)
        if index % 2:
            return str(found.choices[0].message.content).strip()
        return "".join(e.choices[0].delta.content or "" for e in found).strip()

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(one, range(len(questions)))) == expected


def test_a_client_that_goes_away_leaves_the_batch(loaded: LoadedModel) -> None:
    server = Served(loaded, Limits(max_tokens=200), max_batch=1)
    try:
        stream = ask(server.client(), "hi", max_tokens=150, temperature=2, stream=True)
        next(iter(stream))
        stream.response.close()
        begun = time.monotonic()
        assert ask(server.client(), "hi", max_tokens=1).choices
        assert time.monotonic() - begun < 5
    finally:
        server.close()


def test_a_full_queue_is_refused_with_429(loaded: LoadedModel) -> None:
    server = Served(loaded, Limits(max_tokens=400), max_batch=1, max_queue=1)
    try:
        with ThreadPoolExecutor(12) as pool:
            calls = [
                pool.submit(ask, server.client(), f"{i}", max_tokens=60, temperature=2)
                for i in range(12)
            ]
            errors = [call.exception() for call in calls]
        refused = [error for error in errors if error is not None]
        assert refused and all(isinstance(error, openai.RateLimitError) for error in refused)
        assert len(refused) < 12
        assert ask(server.client(), "hi").choices
    finally:
        server.close()


def test_images_of_one_folder_can_be_allowed(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png("red"))
    (tmp_path / "secret.png").write_bytes(png("blue"))
    server = Served(loaded, Limits(images=ImageLimits(image_dir=(tmp_path / "images").resolve())))
    try:

        def named(name: str) -> Any:
            part = {"type": "image_url", "image_url": {"url": f"file://{name}"}}
            return ask(server.client(), part, text("What is it?"), max_tokens=8)

        expected = ask(server.client(), uri(png("red")), text("What is it?"), max_tokens=8)
        for name in ("a.png", str(tmp_path / "images" / "a.png")):
            assert named(name).choices[0].message.content == expected.choices[0].message.content
        for name in ("../secret.png", str(tmp_path / "secret.png"), "/etc/passwd", "none.png"):
            with pytest.raises(openai.BadRequestError, match="no such image"):
                named(name)
    finally:
        server.close()


def test_the_events_of_a_stream_are_json_lines(served: Served) -> None:
    body = {"model": "tiny", "stream": True, "max_tokens": 3,
            "messages": [{"role": "user", "content": "hi"}]}  # fmt: skip
    found = httpx.post(
        f"{served.url}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=30,
    )
    lines = [line for line in found.text.split("\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["id"] for line in lines[:-1])
