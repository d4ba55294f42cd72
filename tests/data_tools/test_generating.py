"""Requests are asked once, within caps, whatever the server does."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.instruct.generate import command as generating
from data_tools.instruct.generate.answers import read_answers
from data_tools.instruct.lines import read_lines
from data_tools.instruct.plan.command import read_requests
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Failure
from tests.data_tools.asked import planned
from tests.data_tools.teacher_server import (
    Act,
    Received,
    drip,
    drop,
    endless,
    fail,
    say,
    send,
    served,
)
from vlm_sft.errors import UserError

GOOD = json.dumps({"answer": "There are two dogs.", "evidence": ["b1", "b2"]})


def texts(run: RunFolder) -> list[str]:
    answers = read_answers(run.answers)
    return [answers[request.id].text for request in read_requests(run)]


def failures(run: RunFolder) -> list[Failure]:
    return list(read_lines(run.failures, Failure))


def test_rules_answer_every_request_and_a_second_start_asks_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = planned(tmp_path)
    generating.command(config)
    first = (run.answers / "part-00001.jsonl").read_bytes()
    generating.command(config)
    assert (run.answers / "part-00001.jsonl").read_bytes() == first
    assert len(read_answers(run.answers)) == 6
    assert "6 requests: 6 answered before, 0 now" in capsys.readouterr().out


def test_a_server_is_asked_with_every_parameter_once(tmp_path: Path) -> None:
    with served(lambda received: say(GOOD)) as server:
        config, run = planned(
            tmp_path, kind="openai", base_url=server.url, structured="json_schema",
            prices={"input": 2.0, "cached": 1.0, "output": 10.0},
        )  # fmt: skip
        generating.command(config)
        generating.command(config)
    requests = list(read_requests(run))
    assert sorted(received.id for received in server.received) == sorted(r.id for r in requests)
    body = server.received[0].body
    sampling = {"model": "m", "temperature": 0.7, "top_p": 1.0, "max_tokens": 64, "seed": 0}
    assert {name: body[name] for name in sampling} == sampling
    assert body["response_format"]["json_schema"]["strict"] is True
    answer = read_answers(run.answers)[requests[0].id]
    assert (answer.teacher, answer.model, answer.fingerprint) == ("openai", "scripted-1", "fp_1")
    assert (answer.tokens_in, answer.tokens_cached, answer.tokens_out) == (100, 60, 20)
    assert answer.usd == pytest.approx((40 * 2 + 60 * 1 + 20 * 10) / 1e6)


MISBEHAVIOURS: dict[str, tuple[Act, str]] = {
    "429 with Retry-After": (fail(429, "slow down", retry_after=0.05), "rate_limited"),
    "500": (fail(500, "oops"), "server_error"),
    "slow drip": (drip(5.0), "timeout"),
    "endless body": (endless(), "too_long"),
    "connection drop": (drop, "connection"),
    "wrong content type": (send(200, b"<p>hi</p>", content_type="text/html"), "not_an_answer"),
    "broken JSON": (send(200, b'{"choices": ['), "not_an_answer"),
    "deep JSON": (send(200, b"[" * 90_000), "not_an_answer"),
    "no choice": (send(200, {"choices": []}), "not_an_answer"),
    "two choices": (say(GOOD, choices=[{"message": {"content": "a"}}] * 2), "not_an_answer"),
    "content is a number": (say(GOOD, message={"content": 3}), "not_an_answer"),
    "half a surrogate pair": (say("\ud800"), "not_an_answer"),
    "negative tokens": (say(GOOD, usage={"prompt_tokens": -5}), "not_an_answer"),
    "compressed": (send(200, b"x", {"Content-Encoding": "gzip"}), "too_long"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_misbehaviour_is_survived_once_and_told_if_it_stays(tmp_path: Path, name: str) -> None:
    act, reason = MISBEHAVIOURS[name]

    def once(received: Received) -> Act:
        return act if received.times == 1 else say(GOOD)

    def start(folder: Path, script: Any, **more: Any) -> RunFolder:
        with served(script) as server:
            config, run = planned(
                folder, images=1, kind="openai", base_url=server.url, structured="none",
                timeout_seconds=1.0, max_answer_bytes=100_000, attempts=2, **more,
            )  # fmt: skip
            generating.command(config)
        return run

    assert texts(start(tmp_path / "once", once)) == [GOOD] * 3
    with pytest.raises(SystemExit) as ended:
        start(tmp_path / "always", lambda received: act)
    assert ended.value.code == 3
    told = failures(RunFolder(tmp_path / "always"))
    assert [(failure.reason, failure.attempts) for failure in told] == [(reason, 2)] * 3


ODD_ANSWERS = {
    "cut": ({"finish": "length"}, GOOD[:20], "length"),
    "refusal": ({"message": {"content": None, "refusal": "I cannot."}}, "I cannot.", "refusal"),
    "filtered": ({"message": {"content": None}, "finish": "content_filter"}, "", "content_filter"),
    "fences": ({}, f"```json\n{GOOD}\n```", "stop"),
    "two objects": ({}, GOOD + GOOD, "stop"),
    "wrong schema": ({}, '{"reply": 1}', "stop"),
}


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_an_odd_answer_is_recorded_untouched_for_verification(tmp_path: Path, name: str) -> None:
    changes, text, finish = ODD_ANSWERS[name]
    with served(lambda received: say(text, **dict(changes))) as server:
        config, run = planned(
            tmp_path, images=1, kind="openai", base_url=server.url, structured="none"
        )
        generating.command(config)
    for answer in read_answers(run.answers).values():
        assert (answer.text, answer.finish) == (text, finish)


@pytest.mark.parametrize("status", [301, 401, 403, 404])
def test_what_every_request_would_meet_stops_the_run_at_once(tmp_path: Path, status: int) -> None:
    act = fail(status, "no such model")
    with served(lambda received: act) as server:
        config, _ = planned(
            tmp_path, images=20, kind="openai", base_url=server.url, structured="none"
        )
        with pytest.raises(UserError, match=f"the server returned {status}.*no such model") as told:
            generating.command(config)
    assert told.value.reason == "teacher_refused"
    assert len(server.received) <= config.teacher.concurrency


def test_a_refused_request_is_not_sent_again_and_others_go_on(tmp_path: Path) -> None:
    bad = {"000000000002-detail-0"}
    config, run = planned(tmp_path, images=3, kind="openai", base_url="http://127.0.0.1:1/v1")
    ids = {request.id for request in read_requests(run) if request.sample_id in bad}
    script = lambda r: fail(400, "too long") if r.id in ids else say(GOOD)  # noqa: E731
    with served(script) as server:
        config, run = planned(
            tmp_path, 3, kind="openai", base_url=server.url, structured="none", concurrency=1
        )
        with pytest.raises(SystemExit) as ended:
            generating.command(config)
    assert ended.value.code == 3
    assert len(read_answers(run.answers)) == 8 and set(server.counts.values()) == {1}
    assert [(f.sample_id, f.reason, f.status) for f in failures(run)] == [
        ("000000000002-detail-0", "refused", 400)
    ]


@pytest.mark.parametrize(("allowed", "code"), [(0.12, 0), (0.1, 3)])
def test_a_share_of_failed_requests_is_a_warning_and_a_larger_one_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], allowed: float, code: int
) -> None:
    config, run = planned(tmp_path, images=3, kind="openai", base_url="http://127.0.0.1:1/v1")
    bad = [request.id for request in read_requests(run)][-1]
    with served(lambda r: fail(400, "too long") if r.id == bad else say(GOOD)) as server:
        config, run = planned(
            tmp_path, 3, kind="openai", base_url=server.url, structured="none", concurrency=1,
            failures_allowed=allowed,
        )  # fmt: skip
        if code:
            with pytest.raises(SystemExit) as ended:
                generating.command(config)
            assert ended.value.code == code
        else:
            generating.command(config)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "1 of 9 requests failed (11.1%)" in last
    assert f"teacher.failures_allowed={allowed}" in last
    assert ("continuing without them" in last) == (code == 0)


def test_content_against_the_servers_rules_has_an_empty_answer(tmp_path: Path) -> None:
    act = fail(400, "our policy", code="content_filter")
    with served(lambda received: act) as server:
        config, run = planned(tmp_path, 1, kind="openai", base_url=server.url, structured="none")
        generating.command(config)
    answers = read_answers(run.answers).values()
    assert {(answer.text, answer.finish) for answer in answers} == {("", "content_filter")}
    assert set(server.counts.values()) == {1}


def test_a_server_that_is_down_ends_the_run_before_every_request_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = planned(
        tmp_path, images=40, kind="openai", base_url="http://127.0.0.1:1/v1", structured="none",
        attempts=1, failures_allowed=1.0,
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        generating.command(config)
    assert ended.value.code == 3
    told = capsys.readouterr()
    assert "the others were not asked, since the server is down" in told.out
    assert "20 requests in a row failed" in told.err and "cannot be reached" in told.out
