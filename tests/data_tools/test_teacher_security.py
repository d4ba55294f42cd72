"""The key goes to the named host alone and is written nowhere; captions and servers are foreign."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import msgspec
import pytest

from data_tools.coco import AnnotatedImage
from data_tools.instruct.config import InstructConfig, TeacherConfig
from data_tools.instruct.generate import command as generating
from data_tools.instruct.generate.answers import read_answers
from data_tools.instruct.generate.teachers.client import Key, addresses
from data_tools.instruct.plan.command import read_requests
from data_tools.instruct.plan.context import describe
from data_tools.instruct.plan.prompts import closing, messages
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Answer
from data_tools.instruct.verify import Policy
from data_tools.instruct.verify.command import make_sample
from tests.data_tools.asked import image, planned, request_of
from tests.data_tools.teacher_server import Act, Received, drop, fail, say, send, served
from vlm_sft.config import loading as settings
from vlm_sft.errors import UserError

ROOT = Path(__file__).parent.parent.parent
KEY = "sk-canary-0123456789-do-not-show"
GOOD = json.dumps({"answer": "There are two dogs.", "evidence": ["b1"]})
INJECTIONS: list[str] = json.loads((Path(__file__).parent / "injections.json").read_text())
CANARY = "CANARY-7F31"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    return KEY


def with_key(folder: Path, url: str, images: int = 1, **more: Any) -> tuple[Any, RunFolder]:
    return planned(
        folder, images, kind="openai", base_url=url, structured="none",
        api_key_env="TEACHER_KEY", **more,
    )  # fmt: skip


def echo_everything(received: Received) -> Act:
    """A server that repeats the key wherever it can, and misbehaves in turn."""
    told = received.headers["authorization"]
    filtered = fail(400, f"bad {told} \x1b[31mred\x1b[0m", code="content_filter")
    echoed = say(f"You sent {told}", model=told, system_fingerprint=told, finish=told)
    acts = [
        fail(500, f"header was {told}", code=told),
        drop,
        send(200, f"<html>{told}</html>".encode(), content_type=f"text/html; x={KEY}"),
        send(200, {"choices": [], "authorization": told}),
        filtered if sum(received.id.encode()) % 2 else echoed,
    ]
    return acts[min(received.times - 1, len(acts) - 1)]


def test_the_key_is_found_in_nothing_that_is_written_or_said(tmp_path: Path, key: str) -> None:
    with served(echo_everything) as server:
        config, run = with_key(tmp_path / "run", server.url, 2, backoff_seconds=0.01)
        path = tmp_path / "config.yaml"
        path.write_text(settings.dump(config))
        done = subprocess.run(
            [sys.executable, "-m", "data_tools.instruct", "generate", str(path)],
            env=os.environ | {"OPENAI_LOG": "debug", "PYTHONASYNCIODEBUG": "1"},
            capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
    assert server.received[0].headers["authorization"] == f"Bearer {key}"
    texts = [answer.text for answer in read_answers(run.answers).values()]
    assert len(texts) == 6 and done.returncode == 0
    assert "You sent Bearer [key removed]" in texts
    assert "DEBUG" in done.stderr and key not in done.stdout + done.stderr
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("status", [401, 400, 307])
def test_the_key_is_not_in_a_refusal_nor_behind_it(tmp_path: Path, key: str, status: int) -> None:
    with served(lambda r: fail(status, f"wrong key {key} \x1b[2J")) as server:
        config, _ = with_key(tmp_path, server.url)
        with pytest.raises(UserError, match=f"the server returned {status}") as told:
            generating.command(config)
    shown = "".join(traceback.format_exception(told.value))
    assert key not in shown and "\x1b" not in shown and "[key removed]" in shown


def test_the_key_follows_no_redirect(tmp_path: Path, key: str) -> None:
    with served(lambda r: say(GOOD)) as thief:
        away = send(307, {}, {"Location": f"{thief.url}/chat/completions"})
        with served(lambda r: away) as server:
            config, _ = with_key(tmp_path, server.url)
            with pytest.raises(UserError, match="redirects are not followed"):
                generating.command(config)
    assert not thief.received


def test_nothing_of_the_environment_reaches_the_server_but_the_key(
    tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(lambda r: say(GOOD)) as proxy, served(lambda r: say(GOOD)) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "OPENAI_BASE_URL"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY", "OPENAI_API_KEY"):
            monkeypatch.setenv(name, "sk-other")
        custom = "Authorization: Bearer sk-other\nX-Other: sk-other"
        monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", custom)
        config, run = with_key(tmp_path, server.url)
        generating.command(config)
    assert not proxy.received and len(read_answers(run.answers)) == 3
    for received in server.received:
        assert "other" not in json.dumps(received.headers)
        assert received.headers["authorization"] == f"Bearer {key}"
        assert not any(name.startswith("x-stainless") for name in received.headers)


def test_the_objects_that_hold_the_key_do_not_show_it(tmp_path: Path, key: str) -> None:
    config = TeacherConfig(kind="openai", api_key_env="TEACHER_KEY")
    held = Key(config, addresses(config))
    assert key not in repr(held) and key not in str(held) and key not in f"{vars(config)}"
    assert held.reveal() == key


def test_a_server_on_this_machine_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with served(lambda r: say(GOOD)) as server:
        config, run = planned(
            tmp_path, 1, kind="openai", base_url=server.url, structured="none",
            api_key_env="TEACHER_KEY",
        )  # fmt: skip
        generating.command(config)
    assert len(read_answers(run.answers)) == 3
    assert server.received[0].headers["authorization"] == "Bearer none"


def hostile(caption: str) -> AnnotatedImage:
    """The usual image with one caption of an attacker's, as the index would keep it."""
    return msgspec.structs.replace(
        image(1), captions=(" ".join(caption.split()), "A cat and a cup.")
    )


@pytest.mark.parametrize("caption", INJECTIONS)
def test_a_hostile_caption_stays_one_quoted_line_of_the_context(caption: str) -> None:
    about, plain = hostile(caption), hostile("A dog.")
    text = closing(describe(about, 2, 30, 0.002).text, "Write.", "")
    usual = closing(describe(plain, 2, 30, 0.002).text, "Write.", "")
    lines, expected = text.split("\n"), usual.split("\n")
    differing = [i for i, (a, b) in enumerate(zip(lines, expected, strict=True)) if a != b]
    assert len(differing) == 1 and lines[differing[0]].startswith("c1")
    assert not [letter for letter in text if letter != "\n" and not letter.isprintable()]


@pytest.mark.parametrize("kind", ["detail", "conversation"])
def test_an_answer_that_obeys_a_caption_is_rejected(kind: str) -> None:
    about = hostile(INJECTIONS[0])
    request = request_of(about, "detail" if kind == "detail" else "conversation")
    turn = {"question": "What is there?", "answer": CANARY, "kind": "object", "evidence": ["c1"]}
    obeying = {"answer": f"There are two dogs. {CANARY}", "evidence": ["c1", "b1"]}
    text = json.dumps(obeying if kind == "detail" else {"turns": [turn]})
    config = InstructConfig.model_validate(
        {"output_dir": "o", "coco": {"images": "i", "captions": "c"}, "teacher": {"kind": "rules"}}
    )
    policy = Policy(config.verify, ("dog", "cat", "cup"))
    answer = Answer(request=request.id, teacher="openai", text=text, finish="stop")
    sample = make_sample(request, answer, about, policy)
    assert sample.reasons == ("INJECTION",)


def test_messages_keep_roles_whatever_a_caption_says(tmp_path: Path) -> None:
    _config, run = planned(tmp_path, 1)
    templates = json.loads(run.templates.read_text())
    request = next(iter(read_requests(run)))
    for caption in INJECTIONS:
        told = messages(request.model_copy(update={"context": caption}), templates)
        assert [message["role"] for message in told] == ["system", "user"]
