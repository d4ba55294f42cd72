"""The key goes to the named host alone and is written nowhere; captions and servers are foreign."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.coco import Picture
from data_tools.instruct import generating
from data_tools.instruct.answers import read_answers
from data_tools.instruct.config import InstructConfig
from data_tools.instruct.context import describe
from data_tools.instruct.planning import read_requests
from data_tools.instruct.prompting import closing, messages
from data_tools.instruct.schema import Answer
from data_tools.instruct.verification import Policy
from data_tools.instruct.verifying import make_sample
from tests.data_tools.asked import picture, planned, request_of
from tests.data_tools.teacher_server import Act, Received, drop, fail, say, send, served
from vlm_sft import settings

ROOT = Path(__file__).parent.parent.parent
KEY = "sk-canary-0123456789-do-not-show"
GOOD = json.dumps({"answer": "There are two dogs.", "evidence": ["b1"]})
INJECTIONS: list[str] = json.loads((Path(__file__).parent / "injections.json").read_text())
CANARY = "CANARY-7F31"


def run_with_key(folder: Path, config: InstructConfig, **environment: str) -> str:
    """Run `generate` in a process of its own; all that it said, with its exit code."""
    path = folder / "config.yaml"
    path.write_text(settings.dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "data_tools.instruct", "generate", str(path)],
        env=os.environ | {"TEACHER_KEY": KEY, "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    return f"{done.stdout}{done.stderr}exit code {done.returncode}"


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


@pytest.mark.parametrize("log", ["", "debug"])
def test_the_key_is_found_in_nothing_that_is_written_or_said(tmp_path: Path, log: str) -> None:
    with served(echo_everything) as server:
        config, run = planned(
            tmp_path / "run", 2, kind="openai", base_url=server.url, structured="none",
            api_key_env="TEACHER_KEY", attempts=5, backoff_seconds=0.01,
        )  # fmt: skip
        said = run_with_key(tmp_path, config, OPENAI_LOG=log, PYTHONASYNCIODEBUG="1")
    assert server.received[0].headers["authorization"] == f"Bearer {KEY}"
    assert len(read_answers(run.answers)) == 6 and "exit code 0" in said
    assert "[key removed]" in next(iter(read_answers(run.answers).values())).text
    assert KEY not in said and "\x1b" not in said
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("status", [401, 400, 307])
def test_the_key_is_not_in_the_sentence_of_a_refusal(tmp_path: Path, status: int) -> None:
    with served(lambda r: fail(status, f"wrong key {KEY} \x1b[2J")) as server:
        config, _ = planned(
            tmp_path / "run", 1, kind="openai", base_url=server.url, structured="none",
            api_key_env="TEACHER_KEY",
        )  # fmt: skip
        said = run_with_key(tmp_path, config)
    assert "exit code 2" in said and "Traceback" not in said
    assert KEY not in said and "\x1b" not in said and f"the server says {status}" in said


def test_the_key_follows_no_redirect(tmp_path: Path) -> None:
    with served(lambda r: say(GOOD)) as thief:
        away = send(307, {}, {"Location": f"{thief.url}/chat/completions"})
        with served(lambda r: away) as server:
            config, _ = planned(
                tmp_path / "run", 1, kind="openai", base_url=server.url, structured="none",
                api_key_env="TEACHER_KEY",
            )  # fmt: skip
            said = run_with_key(tmp_path, config)
    assert not thief.received and "points elsewhere" in said


def test_nothing_of_the_environment_reaches_the_server_but_the_key(tmp_path: Path) -> None:
    with served(lambda r: say(GOOD)) as proxy, served(lambda r: say(GOOD)) as server:
        config, _run = planned(
            tmp_path / "run", 1, kind="openai", base_url=server.url, structured="none",
            api_key_env="TEACHER_KEY",
        )  # fmt: skip
        said = run_with_key(
            tmp_path, config, HTTP_PROXY=proxy.url, ALL_PROXY=proxy.url, http_proxy=proxy.url,
            OPENAI_BASE_URL=proxy.url, OPENAI_ORG_ID="org-other", OPENAI_PROJECT_ID="other",
            OPENAI_ADMIN_KEY="sk-admin-other", OPENAI_API_KEY="sk-other",
            OPENAI_CUSTOM_HEADERS="Authorization: Bearer sk-other\nX-Other: sk-other",
        )  # fmt: skip
    assert not proxy.received and "exit code 0" in said
    for received in server.received:
        assert "other" not in json.dumps(received.headers)
        assert received.headers["authorization"] == f"Bearer {KEY}"
        assert not any(name.startswith("x-stainless") for name in received.headers)


def test_a_server_on_this_machine_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with served(lambda r: say(GOOD)) as server:
        config, run = planned(
            tmp_path, 1, kind="openai", base_url=server.url, structured="none",
            api_key_env="TEACHER_KEY",
        )  # fmt: skip
        generating.command(config, [])
    assert len(read_answers(run.answers)) == 3
    assert server.received[0].headers["authorization"] == "Bearer none"


def hostile(caption: str) -> Picture:
    """The usual picture with one caption of an attacker's, as the index would keep it."""
    return replace(picture(1), captions=(" ".join(caption.split()), "A cat and a cup."))


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
    assert sample.status == "rejected", sample


def test_messages_keep_roles_whatever_a_caption_says(tmp_path: Path) -> None:
    _config, run = planned(tmp_path, 1)
    templates = json.loads(run.templates.read_text())
    request = next(iter(read_requests(run)))
    for caption in INJECTIONS:
        told = messages(request.model_copy(update={"context": caption}), templates)
        assert [message["role"] for message in told] == ["system", "user"]
