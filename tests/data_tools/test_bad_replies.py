"""One bad reply is one failed request; a damaged record of spending is not believed."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.instruct.config import LimitsConfig
from data_tools.instruct.generate import command as generating
from data_tools.instruct.generate.answers import read_answers
from data_tools.instruct.generate.teachers.batch_log import BatchLog
from data_tools.instruct.generate.teachers.cancellation import Cancellation
from data_tools.instruct.generate.teachers.faults import retry_after
from data_tools.instruct.generate.teachers.spending import Spending, Usage
from data_tools.instruct.report import command as reporting
from tests.data_tools.asked import planned
from tests.data_tools.teacher_server import completion, say, send, served
from vlm_sft.errors import UserError

GOOD = json.dumps({"answer": "There are two dogs.", "evidence": ["b1"]})


def raw(usage: str) -> bytes:
    """A completion whose usage is this text."""
    return json.dumps(completion(GOOD, usage="USAGE")).replace('"USAGE"', usage).encode()


def tokens(count: str) -> bytes:
    return raw(f'{{"prompt_tokens": {count}, "completion_tokens": 20}}')


BODIES: dict[str, Any] = {
    "thousands of digits": tokens("9" * 4000),
    "more digits than Python reads": tokens("9" * 5000),
    "negative": tokens("-5"),
    "NaN": tokens("NaN"),
    "infinite": tokens("1e400"),
    "true": tokens("true"),
    "a text": tokens('"12"'),
    "a million tokens of a short prompt": tokens("1000000"),
    "deep": b"[" * 100_000,
    "a long model name": json.dumps(completion(GOOD, model="m" * 5000)).encode(),
    "a number for a text": json.dumps(completion(GOOD, model=5)).encode(),
    "half a surrogate pair": json.dumps(completion("\ud800")).encode(),
    "UTF-16": json.dumps(completion(GOOD)).encode("utf-16")[:-1],
}
KINDS = {
    "an unknown charset": "application/json; charset=klingon",
    "a codec that is no charset": "application/json; charset=zip",
    "a charset of a kilobyte": "application/json; charset=" + "x" * 1000,
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_reply_is_one_failed_request_and_the_next_start_asks_again(
    tmp_path: Path, name: str
) -> None:
    bad = send(200, BODIES[name])
    with served(lambda r: bad if int(r.id[:2], 16) % 2 else say(GOOD)) as server:
        config, run = planned(
            tmp_path, 3, kind="openai", base_url=server.url, structured="none", attempts=1,
            max_tokens=64, limits={"tokens": 200_000},
        )  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            generating.command(config)
        assert ended.value.code == 3
        answered = len(read_answers(run.answers))
        assert 0 < answered < 9
        server.script = lambda r: say(GOOD)
        generating.command(config)
        reporting.read_report(config, run)
    assert len(read_answers(run.answers)) == 9


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_odd_charsets_end_no_run(tmp_path: Path, name: str, status: int) -> None:
    document = completion(GOOD) if status == 200 else {"error": {"message": "no"}}
    with served(lambda r: send(status, document, content_type=KINDS[name])) as server:
        config, run = planned(
            tmp_path, 1, kind="openai", base_url=server.url, structured="none", attempts=1
        )
        if status == 200:
            generating.command(config)
            assert len(read_answers(run.answers)) == 3
        else:
            with pytest.raises((SystemExit, UserError)):
                generating.command(config)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("5", 5.0), ("-5", 0.0), ("nan", None), ("1e999", None), ("x" * 9999, None), ("1e300", 1e300),
     ("Wed, 99 Foo 99999 99:99:99 GMT", None), ("9" * 5000, 1e100)],
)  # fmt: skip
def test_waits_that_a_server_asks_for_are_read_without_fail(
    value: str, seconds: float | None
) -> None:
    found = retry_after({"retry-after": value})
    assert found == pytest.approx(seconds) if seconds is not None else found is None


def test_a_server_that_asks_for_an_endless_wait_is_not_waited_for(tmp_path: Path) -> None:
    slow = send(429, {"error": {"message": "slow"}}, {"Retry-After": "1e300"})
    with served(lambda r: slow) as server:
        config, _ = planned(tmp_path, 1, kind="openai", base_url=server.url, structured="none")
        with pytest.raises(SystemExit):
            generating.command(config)
    assert len(server.received) == 3


def spent(path: Path) -> Usage:
    account = Spending(path, LimitsConfig(), Cancellation())
    try:
        return account.total
    finally:
        account.close()


LINE = '{"request": "a", "requests": 1, "tokens": 100, "usd": 0.5}'


@pytest.mark.parametrize(
    "line",
    [
        '{"request": "b", "requests": 0, "tokens": -1000, "usd": -5}',
        '{"request": "a", "requests": 0, "tokens": -101, "usd": 0}',
        '{"request": "a", "requests": 0, "tokens": 0, "usd": -0.6}',
        '{"request": "a", "requests": -2, "tokens": 0, "usd": 0}',
        '{"request": "a", "requests": 1, "tokens": NaN, "usd": 0}',
        '{"request": "a", "requests": 1, "tokens": 1, "usd": -Infinity}',
        '{"request": "a", "requests": true, "tokens": 1, "usd": 0}',
        '{"request": "a", "requests": 1, "tokens": 1}',
        '{"request": "a", "requests": 1, "tokens": ' + "9" * 5000 + ', "usd": 0}',
        '{"request": "a", "requests": 1, "tokens": 1, "usd": 1e300}',
        "[1]", "null", "not json", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        "[" * 100_000,
    ],
)  # fmt: skip
def test_an_edited_or_damaged_record_of_spending_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "spending.jsonl"
    path.write_text(f"{LINE}\n{line}\n", encoding="latin-1")
    with pytest.raises(UserError, match=r"spending.jsonl:2: .*the file was damaged or edited"):
        spent(path)


def test_corrections_of_what_was_reserved_are_believed(tmp_path: Path) -> None:
    path = tmp_path / "spending.jsonl"
    correction = '{"request": "a", "requests": 0, "tokens": -60, "usd": -0.3}'
    path.write_text(f"{LINE}\n{LINE}\n{correction}\n{correction}\n")
    assert spent(path) == Usage(2, 80, pytest.approx(0.4))


@pytest.mark.parametrize(
    "line", ["{}", "[]", '{"event": "created", "key": "x", "batch": "b"}', "\udcff", "x"]
)
def test_a_damaged_record_of_batches_is_refused_in_a_sentence(tmp_path: Path, line: str) -> None:
    path = tmp_path / "batches.jsonl"
    path.write_text(line + "\n", errors="surrogateescape")
    with pytest.raises(UserError, match=r"batches.jsonl:1: is not a line of this file"):
        BatchLog(path)


def test_a_damaged_line_of_failures_is_ignored_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(lambda r: say(GOOD)) as server:
        config, run = planned(tmp_path, 1, kind="openai", base_url=server.url, structured="none")
        run.failures.write_text("damaged\n")
        generating.command(config)
    assert "failures.jsonl:1: is not a failure record and is ignored" in capsys.readouterr().err
