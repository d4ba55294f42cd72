"""Scores by a judge: a scripted server that is biased, garbled, refusing, slow and limited."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data_tools.teacher_server import Act, Received, after, drop, fail, say, served
from vlm_sft.errors import UserError
from vlm_sft.evaluation.judges.asking import JudgeOptions, ask, fill, request_for
from vlm_sft.evaluation.scores.files import Answers, Row, read_answers
from vlm_sft.evaluation.scores.judged import read_grade, read_verdict
from vlm_sft.evaluation.scores.registry import score
from vlm_sft.evaluation.scores.results import Options, Results

ROOT = Path(__file__).parents[2]

pytest.importorskip("openai")
pytest.importorskip("sklearn")


def questions(count: int) -> list[Row]:
    return [
        Row(f"t:{n}", {"id": n, "instruction": f"Question {n}?", "category": "ab"[n % 2]})
        for n in range(count)
    ]


def said(count: int, quality: int, name: str = "m") -> Answers:
    """Answers whose quality the scripted judge can read."""
    return Answers(
        Path(f"{name}.json"), {str(n): f"{name}{n} quality={quality}" for n in range(count)}
    )


def qualities(received: Received) -> list[int]:
    content = received.body["messages"][0]["content"]
    return [int(value) for value in re.findall(r"quality=(\d+)", content)]


def fair(received: Received) -> Act:
    first, second = qualities(received)
    return say("[[A]]" if first > second else "[[B]]" if second > first else "Equal. [[C]]")


def judge(url: str, log: Path, **changes: object) -> JudgeOptions:
    values = {"base_url": url, "model": "judge-1", "log": log, "backoff": 0.01, **changes}
    return JudgeOptions(**values)  # type: ignore[arg-type]


def alpaca(options: JudgeOptions, count: int, ours: int, theirs: int) -> Results:
    others = {"base": said(count, theirs, "b")}
    return score(
        "alpaca", said(count, ours), questions(count), Options(judge=options, others=others)
    )


def test_a_judge_that_prefers_the_first_answer_shows_as_such(tmp_path: Path) -> None:
    with served(lambda received: say("Fine. [[A]]")) as server:
        found = alpaca(judge(server.url, tmp_path / "log.jsonl"), 10, 5, 5).scores
    assert found["win_rate"] == 0.5
    assert (found["first_position_share"], found["always_first"]) == (1.0, 10)
    assert found["orders_agree_share"] == 0.0
    with served(fair) as server:
        found = alpaca(judge(server.url, tmp_path / "log2.jsonl"), 10, 6, 5).scores
    assert (found["win_rate"], found["orders_agree_share"], found["always_first"]) == (1.0, 1.0, 0)
    assert found["first_position_share"] == 0.5


def test_failures_of_every_kind_are_counted_and_are_in_no_mean(tmp_path: Path) -> None:
    """Question 0 is garbled, 1 refused, 2 slow, 3 rate-limited, 4 broken, 5 dropped once."""

    def script(received: Received) -> Act:
        content = received.body["messages"][0]["content"]
        number = int(re.findall(r"Question (\d+)", content)[0])
        act = fair(received)
        if number == 3 and received.times == 1:
            return fail(429, "slow down", retry_after=0.05)
        if number == 5 and received.times == 1:
            return drop
        special = {
            0: say("\x00]] A [[ is [[Z]] {{"), 1: say("I'm sorry, I can't compare these."),
            2: after(0.3, act), 4: fail(500, "broken"),
        }  # fmt: skip
        return special.get(number, act)

    with served(script) as server:
        options = judge(server.url, tmp_path / "log.jsonl", attempts=3, concurrency=3)
        found = alpaca(options, 10, 6, 5).scores
        assert server.most_busy <= 3
        before = len(server.received)
        again = alpaca(options, 10, 6, 5).scores
        # Only what brought no reply is asked again: both orders of question 4, three times.
        assert len(server.received) - before == 6
    assert (found["judged"], found["not_judged"], found["win_rate"]) == (7, 3, 1.0)
    assert (found["unparsed"], found["unparsed_refusals"]) == (4, 2)
    assert (found["failed_requests"], found["failures"]) == (2, {"server_error": 2})
    assert (found["replies"], found["new_replies"], again["new_replies"]) == (18, 18, 0)
    assert {k: again[k] for k in ("win_rate", "judged")} == {"win_rate": 1.0, "judged": 7}


def test_a_hanging_judge_ends_as_failures(tmp_path: Path) -> None:
    with served(lambda received: after(1.0, say("[[A]]"))) as server:
        options = judge(server.url, tmp_path / "log.jsonl", timeout=0.1, attempts=1)
        found = alpaca(options, 2, 5, 5).scores
    assert (found["failures"], found["win_rate"], found["judged"]) == ({"timeout": 4}, None, 0)


def test_missing_answers_lose_and_length_control_is_reported(tmp_path: Path) -> None:
    answers = said(20, 6)
    del answers.by_id["0"]
    for number in range(1, 20):
        answers.by_id[str(number)] += "." * (number * 7)
    with served(fair) as server:
        options = Options(
            judge=judge(server.url, tmp_path / "log.jsonl"), others={"base": said(20, 5, "b")}
        )
        found = score("alpaca", answers, questions(20), options).scores
    assert (found["unanswered"], found["judged"], found["win_rate"]) == (1, 20, 0.95)
    assert 0 < found["length_controlled_win_rate"] < 1
    assert found["mean_characters"] > found["baseline_mean_characters"]


def test_nothing_is_sent_beyond_the_budget(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    with served(fair) as server:
        # The server reports 100 and 20 tokens: 0.14 dollars a reply, less than is reserved.
        options = judge(server.url, log, usd_per_million=(1000, 2000), max_usd=8.0, concurrency=2)
        found = alpaca(options, 30, 6, 5).scores
        assert found["usd"] <= 8.0 and found["not_sent_for_max_usd"] > 0
        assert found["usd"] == pytest.approx(0.14 * len(server.received))
        assert found["replies"] + found["not_sent_for_max_usd"] == 60
        assert found["not_judged"] > 0
        richer = judge(server.url, log, usd_per_million=(1000, 2000), max_usd=100.0)
        assert alpaca(richer, 30, 6, 5).scores["replies"] == 60
        assert len(server.received) == 60
    with pytest.raises(UserError, match="--max-usd needs the prices"):
        ask([], judge("http://127.0.0.1:1/v1", log, max_usd=1.0))


def test_requests_that_waited_for_the_server_share_the_budget(tmp_path: Path) -> None:
    """While the server asks for a pause, four requests find money that is enough for two."""
    usage = {"prompt_tokens": 0, "completion_tokens": 900, "total_tokens": 900}

    def script(received: Received) -> Act:
        if received is server.received[0]:
            return after(0.1, fail(429, "slow down", retry_after=0.4))
        return after(0.2, say("[[A]]", usage=usage))

    with served(script) as server:
        options = judge(
            server.url, tmp_path / "log.jsonl", usd_per_million=(0, 1000), max_tokens=1000,
            max_usd=5.0, concurrency=4,
        )  # fmt: skip
        found = ask([request_for(f"prompt {number}", options) for number in range(12)], options)
    assert found.usd == pytest.approx(0.9 * found.new) and found.new == 5


def test_a_reply_that_cannot_be_written_is_not_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm_sft.evaluation.judges.verdict_log.VerdictLog.replied", full)
    with served(lambda received: say("[[A]]")) as server:
        options = judge(server.url, tmp_path / "log.jsonl", concurrency=1)
        with pytest.raises(OSError, match="No space left"):
            ask([request_for("prompt", options)], options)
    assert len(server.received) == 1


@pytest.mark.parametrize(
    "kills",
    [[15], pytest.param(list(range(2, 40, 2)), marks=pytest.mark.slow)],
    ids=["one", "many"],
)
def test_a_killed_run_goes_on_and_pays_for_no_reply_twice(tmp_path: Path, kills: list[int]) -> None:
    count, log = 20 * (1 + len(kills) // 10), tmp_path / "log.jsonl"
    files = {"m.json": said(count, 6), "b.json": said(count, 5, "b")}
    for name, answers in files.items():
        (tmp_path / name).write_text(json.dumps(answers.by_id))
    (tmp_path / "q.jsonl").write_text(
        "".join(json.dumps(dict(r.values)) + "\n" for r in questions(count))
    )
    with served(lambda received: after(0.05, fair(received))) as server:
        command = [
            sys.executable, "-m", "vlm_sft.score", "alpaca", "--answers", "m.json", "--others",
            "base=b.json", "--truth", "q.jsonl", "--judge-url", server.url, "--judge-model", "j",
            "--judge-log", str(log), "--concurrency", "2", "--json",
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        paid: dict[str, int] = {}
        for wanted in kills:
            process = subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
            )
            begun = len(server.received)
            while len(server.received) < begun + wanted and process.poll() is None:
                time.sleep(0.01)
            process.kill()
            process.wait()
            time.sleep(0.2)  # the server ends what it had begun
            assert all(server.counts[name] == times for name, times in paid.items())
            lines = log.read_bytes().split(b"\n")[:-1]
            events = [json.loads(line) for line in lines[1:]]
            paid = {e["id"]: server.counts[e["id"]] for e in events if e["event"] == "reply"}
        assert paid
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, check=True
        )
        assert all(server.counts[name] == times for name, times in paid.items())
        assert len(server.received) <= 2 * count + 2 * len(kills)  # those in flight at the kills
    found = json.loads(done.stdout)
    assert (found["replies"], found["win_rate"], found["judged"]) == (2 * count, 1.0, count)


def test_ratings_of_several_models(tmp_path: Path) -> None:
    others = {"good": said(12, 8, "g"), "bad": said(12, 2, "x"), "twin": said(12, 5, "t")}
    others["twin"].by_id["3"] = "quality=9"
    others["bad"].by_id.update({"4": "quality=9", "5": "quality=9"})
    with served(fair) as server:
        options = Options(judge=judge(server.url, tmp_path / "l.jsonl"), others=others, name="mine")
        found = score("arena", said(12, 5), questions(12), options)
    models = found.scores["by_model"]
    assert next(iter(models)) == "good" and list(models)[-1] == "bad"
    assert models["good"]["low"] <= models["good"]["rating"] <= models["good"]["high"]
    assert found.scores["unbounded_ratings"] is None
    assert (found.scores["battles"], models["mine"]["battles"]) == (72, 36)
    assert len(found.rows[0]["battles"]) == 6
    with pytest.raises(UserError, match="with other names"):
        score(
            "arena",
            said(2, 5),
            questions(2),
            Options(judge=options.judge, name="mine", others={"mine": said(2, 1)}),
        )


def test_a_model_that_loses_everything_has_no_finite_rating(tmp_path: Path) -> None:
    twin = said(5, 5, "t")
    twin.by_id.update({"0": "quality=6", "1": "quality=4"})
    with served(fair) as server:
        others = {"low": said(5, 1, "x"), "twin": twin}
        options = Options(judge=judge(server.url, tmp_path / "l"), others=others)
        found = score("arena", said(5, 5), questions(5), options).scores
    assert found["unbounded_ratings"] == "low"
    models = found["by_model"]
    assert (models["low"]["rating"], models["low"]["win_rate"]) == (None, 0.0)
    assert models["model"]["rating"] == pytest.approx(1000, abs=0.1)  # as good as its twin
    assert models["twin"]["rating"] == pytest.approx(1000, abs=0.1)


def test_conversations_are_graded_turn_by_turn(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    rows = [
        {"question_id": 81, "choices": [{"index": 0, "turns": ["first", "second"]}]},
        {"question_id": 82, "turns": ["only one"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    truth = [
        Row("t:1", {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorter."]}),
        Row("t:2", {"question_id": 82, "category": "math", "turns": ["1 + 1?", "And 2 + 2?"],
                    "reference": ["two", "four"]}),
    ]  # fmt: skip

    def script(received: Received) -> Act:
        content = received.body["messages"][0]["content"]
        if "reference answer" in content:
            assert "two" in content and "four" not in content
            return say("No grade")
        return say("Rating: [[4]] no, Rating: [[8]]" if "second" in content else "Rating: [[6]]")

    with served(script) as server:
        options = Options(judge=judge(server.url, tmp_path / "log.jsonl"))
        found = score("mt-bench", read_answers(path), truth, options)
        assert len(server.received) == 3
    assert [row["grade"] for row in found.rows] == [6.0, 8.0, None, 1.0]
    assert found.scores["score"] == pytest.approx((6 + 8 + 1) / 3)
    assert (found.scores["turn_1"], found.scores["turn_2"]) == (6.0, 4.5)
    assert (found.scores["unparsed"], found.scores["not_judged"]) == (1, 1)
    assert (found.scores["unanswered"], found.scores["unanswered_ids"]) == (1, ["82-2"])
    assert found.scores["by_category"]["writing"] == {"answers": 2, "score": 7.0}


def test_the_key_is_sent_to_the_server_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-secret-1")
    log = tmp_path / "log.jsonl"
    with served(lambda received: say(f"[[A]] {received.headers['authorization']}")) as server:
        alpaca(judge(server.url, log, key_variable="JUDGE_KEY"), 1, 5, 5)
        assert server.received[0].headers["authorization"] == "Bearer sk-secret-1"
    assert "sk-secret" not in log.read_text()
    with (
        served(lambda received: fail(401, "bad key sk-secret-1")) as server,
        pytest.raises(UserError, match=r"refuses requests .*\(key\)") as caught,
    ):
        alpaca(judge(server.url, tmp_path / "log2", key_variable="JUDGE_KEY"), 1, 5, 5)
    assert caught.value.code.name == "judge_refused" and "sk-secret" not in str(caught.value)
    with pytest.raises(UserError, match="would send the key unencrypted"):
        ask([], judge("http://judge.example/v1", log, key_variable="JUDGE_KEY"))
    with pytest.raises(UserError, match="NO_SUCH is not set"):
        ask([], judge("https://judge.example/v1", log, key_variable="NO_SUCH"))
    with pytest.raises(UserError, match="is not an address"):
        ask([], judge("judge", log))


def test_a_log_that_was_cut_is_continued_and_a_damaged_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log.jsonl"
    with served(fair) as server:
        alpaca(judge(server.url, log), 3, 6, 5)
        log.write_bytes(log.read_bytes()[:-10])
        found = alpaca(judge(server.url, log), 3, 6, 5).scores
    assert (found["replies"], found["new_replies"]) == (6, 1)
    assert "the last line was cut" in capsys.readouterr().err
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], "{broken", *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=r"log\.jsonl:2: is not a line of this file"):
        ask([], judge("http://127.0.0.1:1/v1", log))
    other = tmp_path / "answers.jsonl"
    other.write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="not a file of a judge's replies"):
        ask([], judge("http://127.0.0.1:1/v1", other))
    assert other.read_text() == '{"id": 1}\n'


def test_prompts_come_from_files_and_values_are_not_filled_again(tmp_path: Path) -> None:
    (tmp_path / "pair.txt").write_text("{question}|{answer_a}|{answer_b}")
    seen = []

    def script(received: Received) -> Act:
        seen.append(received.body["messages"][0]["content"])
        return say("[[C]]")

    with served(script) as server:
        options = judge(server.url, tmp_path / "log", prompts=tmp_path)
        tricky = Answers(Path("a"), {"0": "{answer_b} {x}"})
        score("alpaca", tricky, questions(1), Options(judge=options, others={"b": said(1, 5, "b")}))
    assert sorted(seen) == [
        "Question 0?|b0 quality=5|{answer_b} {x}", "Question 0?|{answer_b} {x}|b0 quality=5",
    ]  # fmt: skip
    with pytest.raises(UserError, match="has the places"):
        fill("{question}", {"question": "a", "answer_a": "b"})


def test_another_seed_or_model_is_another_request(tmp_path: Path) -> None:
    options = judge("http://127.0.0.1:1/v1", tmp_path / "log")
    same = judge("http://127.0.0.1:2/v1", tmp_path / "log", concurrency=9, attempts=1)
    other = judge("http://127.0.0.1:1/v1", tmp_path / "log", seed=1)
    assert request_for("p", options) == request_for("p", same) != request_for("p", other)


@pytest.mark.parametrize(
    ("reply", "grade", "verdict"),
    [
        ("Rating: [[7]]", 7.0, None), ("[[ 7.5 ]]", 7.5, None), ("[[11]]", None, None),
        ("[[0]]", None, None), ("[[A]] ... [[B]]", None, "B"), ("[A]", None, None),
        ("", None, None), ("[[C]]", None, "C"), ("rating 7", None, None),
    ],
)  # fmt: skip
def test_what_is_read_from_a_reply(reply: str, grade: float | None, verdict: str | None) -> None:
    assert (read_grade(reply), read_verdict(reply)) == (grade, verdict)
