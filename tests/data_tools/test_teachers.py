"""Rates, caps, signals, dialects, addresses: how a teacher is asked."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from kill_generation import trial

from data_tools.instruct.config import LimitsConfig, TeacherConfig
from data_tools.instruct.generate import command as generating
from data_tools.instruct.generate.answers import read_answers
from data_tools.instruct.generate.shard import Shard
from data_tools.instruct.generate.teachers.cancellation import Cancellation
from data_tools.instruct.generate.teachers.completions import printable, strict
from data_tools.instruct.generate.teachers.faults import retry_after
from data_tools.instruct.generate.teachers.rate_limit import RateLimiter, backoff
from data_tools.instruct.generate.teachers.spending import LimitReached, Spending, Usage
from data_tools.instruct.plan.command import read_requests
from data_tools.instruct.stages import parsers
from tests.data_tools.asked import planned
from tests.data_tools.teacher_server import Act, Received, after, fail, say, served
from vlm_sft.config import loading as settings
from vlm_sft.errors import UserError

GOOD = json.dumps({"answer": "There are two dogs.", "evidence": ["b1", "b2"]})
PRICES = {"input": 1.0, "output": 1.0}


@pytest.mark.parametrize(
    "limits", [{"requests": 7}, {"tokens": 1000}, {"usd": 0.001}], ids=["requests", "tokens", "usd"]
)
def test_no_cap_is_ever_passed_over_all_starts(
    tmp_path: Path, limits: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with served(lambda received: after(0.01, say(GOOD))) as server:
        config, run = planned(
            tmp_path, 10, kind="openai", base_url=server.url, structured="none", prices=PRICES,
            limits=limits,
        )  # fmt: skip
        for _ in range(2):
            with pytest.raises(SystemExit) as ended:
                generating.command(config)
            assert ended.value.code == 4
    answers = list(read_answers(run.answers).values())
    tokens = sum(answer.tokens_in + answer.tokens_out for answer in answers)
    assert 0 < len(server.received) <= limits.get("requests", 1e9)
    assert tokens <= limits.get("tokens", 1e9)
    assert sum(answer.usd or 0 for answer in answers) <= limits.get("usd", 1e9)
    assert "might exceed one of limits" in capsys.readouterr().out


def test_a_sending_whose_end_is_unknown_counts_at_the_most_it_can_cost(tmp_path: Path) -> None:
    async def start() -> Usage:
        spending = Spending(tmp_path / "spending.jsonl", LimitsConfig(tokens=100), Cancellation())
        await spending.reserve("a", Usage(1, 60, 0.5))  # and the process is killed
        return spending.total

    assert asyncio.run(start()) == Usage(1, 60, 0.5)

    async def again() -> Usage:
        spending = Spending(tmp_path / "spending.jsonl", LimitsConfig(tokens=100), Cancellation())
        with pytest.raises(LimitReached):
            await spending.reserve("a", Usage(1, 60, 0.5))
        await spending.reserve("a", Usage(1, 40, 0.25))
        spending.settle("a", Usage(1, 40, 0.25), Usage(1, 10, 0.125))
        return spending.total

    assert asyncio.run(again()) == Usage(2, 70, 0.625)


def test_a_cap_on_money_needs_prices(tmp_path: Path) -> None:
    config, _ = planned(tmp_path, limits={"usd": 1.0})
    with pytest.raises(UserError, match=r"limits\.usd needs teacher\.prices"):
        generating.command(config)


def test_retry_after_is_kept_to_by_all_requests(tmp_path: Path) -> None:
    def script(received: Received) -> Act:
        first = not any(other.times > 1 for other in server.received)
        return fail(429, retry_after=0.5) if first and received.times == 1 else say(GOOD)

    with served(script) as server:
        config, run = planned(
            tmp_path, 1, kind="openai", base_url=server.url, structured="none", concurrency=3
        )
        generating.command(config)
    times = [received.at for received in server.received]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(read_answers(run.answers)) == 3
    assert max(gaps) >= 0.3 and times[-1] - times[0] >= 0.45


def test_a_wait_of_hours_is_left_to_the_next_start(tmp_path: Path) -> None:
    with served(lambda received: fail(429, "tomorrow", retry_after=10_000)) as server:
        config, run = planned(tmp_path, 1, kind="openai", base_url=server.url, structured="none")
        with pytest.raises(SystemExit) as ended:
            generating.command(config)
    assert ended.value.code == 3 and set(server.counts.values()) == {1}
    assert run.failures.read_text().count('"rate_limited"') == 3


def test_a_used_up_quota_stops_the_run(tmp_path: Path) -> None:
    act = fail(429, "pay first", code="insufficient_quota")
    with served(lambda received: act) as server:
        config, _ = planned(tmp_path, 9, kind="openai", base_url=server.url, structured="none")
        with pytest.raises(UserError, match="pay first"):
            generating.command(config)
    assert len(server.received) <= config.teacher.concurrency


def test_retry_after_is_read_as_seconds_or_a_date() -> None:
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after": "-3"}) == 0.0
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0.0
    assert (
        retry_after({"retry-after": "soon"}) is None and retry_after({"retry-after": "inf"}) is None
    )
    assert retry_after({}) is None


def test_waits_double_and_are_the_same_for_the_same_seed() -> None:
    waits = [backoff(1.0, attempt, 7, "request") for attempt in (1, 2, 3, 20)]
    assert waits == [backoff(1.0, attempt, 7, "request") for attempt in (1, 2, 3, 20)]
    for wait, longest in zip(waits, (1, 2, 4, 60), strict=True):
        assert longest / 2 <= wait <= longest
    assert backoff(1.0, 1, 8, "request") != waits[0]


@pytest.mark.parametrize(
    "rate, tokens", [({"requests_per_minute": 1200}, 1), ({"tokens_per_minute": 120_000}, 100)]
)
def test_requests_and_tokens_keep_to_their_rates(rate: dict[str, int], tokens: int) -> None:
    async def turns() -> float:
        pace = RateLimiter(TeacherConfig(kind="openai", **rate), Cancellation())  # type: ignore[arg-type]
        begun = time.monotonic()
        for _ in range(70):  # three seconds' worth, 60 of them, may be sent at once
            await pace.acquire(tokens)
        return time.monotonic() - begun

    assert 0.4 < asyncio.run(turns()) < 3


def test_no_more_requests_are_under_way_than_allowed(tmp_path: Path) -> None:
    with served(lambda received: after(0.05, say(GOOD))) as server:
        config, _ = planned(
            tmp_path, 5, kind="openai", base_url=server.url, structured="none", concurrency=3
        )
        generating.command(config)
    assert server.most_busy == 3


def test_several_servers_share_the_requests(tmp_path: Path) -> None:
    with served(lambda r: say(GOOD)) as one, served(lambda r: fail(500)) as other:
        config, run = planned(
            tmp_path, 8, kind="openai", base_url=[one.url, other.url], structured="none"
        )
        generating.command(config)
    assert len(read_answers(run.answers)) == 24
    assert 4 < len(other.received) < 20 and len(one.received) == 24


DIALECTS: dict[str, tuple[Any, str, str, int]] = {
    "all of it": (lambda mode, body: say('{"greeting": "hi"}'), "json_schema", "max_tokens", 1),
    "takes and ignores": (
        lambda mode, body: say("Hello!" if mode == "json_schema" else "{}"),
        "json_object", "max_tokens", 2,
    ),
    "objects only": (
        lambda mode, body: fail(400, "schema?") if mode == "json_schema" else say("{}"),
        "json_object", "max_tokens", 2,
    ),
    "nothing": (
        lambda mode, body: say("Hello!") if mode == "none" else fail(422, "what?"),
        "none", "max_tokens", 3,
    ),
    "another name for the length": (
        lambda mode, body: fail(400, "use the other", param="max_tokens")
        if "max_tokens" in body else say('{"greeting": "hi"}'),
        "json_schema", "max_completion_tokens", 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_a_server_is_probed_once_and_remembered(tmp_path: Path, name: str) -> None:
    answer, structured, length, probes = DIALECTS[name]

    def script(received: Received) -> Act:
        mode = received.body.get("response_format", {"type": "none"})["type"]
        return answer(mode, received.body) if received.is_probe else say(GOOD)

    with served(script) as server:
        config, run = planned(tmp_path, 2, kind="openai", base_url=server.url)
        generating.command(config)
        (run.answers / "part-00001.jsonl").unlink()
        generating.command(config)
    found = json.loads(run.teacher.read_text())
    assert (found["structured"], found["length"]) == (structured, length)
    assert sum(received.is_probe for received in server.received) == probes
    sent = next(received.body for received in server.received if not received.is_probe)
    assert sent.get("response_format", {"type": "none"})["type"] == structured
    assert sent[length] == 64


def test_a_strict_schema_requires_every_key_and_allows_no_other() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "default": []}}}
    assert strict(schema) == {
        "type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"],
        "additionalProperties": False,
    }  # fmt: skip
    assert "required" not in schema


RUNNING = """
import sys
from pathlib import Path
from tests.data_tools.asked import planned
from data_tools.instruct.generate import command as generating
from vlm_sft.commands.run_command import run_command
def main(argv):
    config, _ = planned(Path(argv[0]), 30, kind="openai", base_url=argv[1], structured="none",
                        concurrency=2)
    generating.command(config)
    return 0
run_command(main)
"""


def start(folder: Path, url: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", RUNNING, str(folder), url]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_signal_lets_answers_under_way_come_in_and_sends_nothing_more(tmp_path: Path) -> None:
    number = signal.SIGTERM
    with served(lambda received: after(0.2, say(GOOD))) as server:
        process = start(tmp_path, server.url)
        while len(server.received) < 4:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        sent = len(server.received)
    assert process.returncode == 128 + number
    assert f"{number.name} received" in err and "Traceback" not in err
    assert len(read_answers(tmp_path / "answers")) == sent < 90
    assert f"{sent} now" in out
    assert "generate: stopped by SIGTERM; repeat the command to continue" in out


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with served(lambda received: after(8, say(GOOD))) as server:
        process = start(tmp_path, server.url)
        while len(server.received) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        process.communicate(timeout=20)
    assert process.returncode == 130 and time.monotonic() - begun < 4


def test_two_processes_share_a_folder_and_ask_nothing_twice(tmp_path: Path) -> None:
    with served(lambda received: after(0.02, say(GOOD))) as server:
        processes = [start(tmp_path, server.url) for _ in range(2)]
        codes = [process.wait(timeout=60) for process in processes]
        for process in processes:
            process.communicate()
    answers = read_answers(tmp_path / "answers")
    assert codes == [0, 0]
    assert len(answers) == answers.lines == 90 and set(server.counts.values()) == {1}


def test_shards_ask_each_request_once_and_merge_to_the_same_answers(tmp_path: Path) -> None:
    whole_config, whole = planned(tmp_path / "whole", 10)
    generating.command(whole_config)
    config, run = planned(tmp_path / "parts", 10)
    for part in (3, 1, 2):
        generating.command(config, Shard(part, 3))
    parts, answers = read_answers(run.answers), read_answers(whole.answers)
    assert parts.lines == 30
    for request in read_requests(run):
        assert parts[request.id].model_dump() == answers[request.id].model_dump()


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2", "1/0"])
def test_a_shard_is_one_of_n(text: str) -> None:
    with pytest.raises(UserError, match=f"^--shard {text}: expected i/n, with i from 1 to n$"):
        parsers()["generate"].read(["run.yaml", f"--shard={text}"])


def test_a_shared_folder_answers_the_same_requests_of_another_run(tmp_path: Path) -> None:
    with served(lambda received: say(GOOD)) as server:
        for name in ("one", "other"):
            config, _ = planned(
                tmp_path / name, 2, kind="openai", base_url=server.url, structured="none",
                answers_dir=str(tmp_path / "shared"),
            )  # fmt: skip
            generating.command(config)
        config, _ = planned(
            tmp_path / "third", 3, kind="openai", base_url=server.url, structured="none",
            answers_dir=str(tmp_path / "shared"),
        )  # fmt: skip
        generating.command(config)
    assert len(server.received) == 9  # six, none, and the three of one more image


def test_a_request_that_stands_twice_is_asked_once(tmp_path: Path) -> None:
    with served(lambda received: after(0.05, say(GOOD))) as server:
        config, run = planned(tmp_path, 1, kind="openai", base_url=server.url, structured="none")
        run.requests.write_bytes(run.requests.read_bytes() * 2)
        generating.command(config)
    assert set(server.counts.values()) == {1} and read_answers(run.answers).lines == 3


@pytest.mark.parametrize(
    "text, shown",
    [("a\x1b[31mb", "a�[31mb"), ("a\nb\tc", "a b c"), ("\u202eevil", "�evil"),
     ("x" * 301, "x" * 300 + "...")],
)  # fmt: skip
def test_foreign_text_commands_no_terminal(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    "url",
    ["http://example.com/v1", "https://user:secret-word@host/v1", "ftp://host/v1", "host/v1",
     "https://host/v1?key=1", "http://127.0.0.1.example.com/v1", "http://[::2]/v1", "https://",
     "http://host:99999/v1"],
)  # fmt: skip
def test_an_address_that_would_carry_the_key_in_the_open_is_refused(
    tmp_path: Path, url: str
) -> None:
    config, _ = planned(tmp_path, kind="openai", base_url=url)
    with pytest.raises(UserError) as told:
        generating.command(config)
    assert told.value.reason == "teacher_address" and "secret-word" not in str(told.value)


def test_this_machine_may_be_spoken_to_in_the_open() -> None:
    from data_tools.instruct.generate.teachers.client import addresses

    for host in ("127.0.0.1", "127.5.5.5", "localhost", "[::1]"):
        url = f"http://{host}:8000/v1"
        assert addresses(TeacherConfig(kind="openai", base_url=url)) == [url]


def test_a_key_given_where_its_variable_belongs_is_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "output_dir: out\ncoco: {images: i, captions: c}\n"
        "teacher: {kind: openai, api_key_env: sk-secret-word}\n"
    )
    from data_tools.instruct.config import InstructConfig

    with pytest.raises(UserError, match="not the name of an environment variable") as told:
        settings.load(InstructConfig, path)
    assert "secret-word" not in str(told.value)


@pytest.mark.parametrize("value", [None, "", "sk secret", "sk-secret\n", "sk-secr\u00e9t"])
def test_a_missing_or_broken_key_is_told_without_showing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEACHER_KEY", value)
    config, _ = planned(
        tmp_path, kind="openai", base_url="https://host.example/v1", api_key_env="TEACHER_KEY"
    )
    with pytest.raises(UserError, match="TEACHER_KEY") as told:
        generating.command(config)
    assert told.value.reason == "teacher_key" and "secr" not in str(told.value)


def test_kills_lose_nothing_and_double_nothing(tmp_path: Path) -> None:
    found = trial(tmp_path, kills=1, seed=1)
    assert (found["lost"], found["doubled"], found["records"]) == (0, 0, found["requests"])
    assert found["resent"] <= found["in_flight_at_kills"] <= found["concurrency"]
