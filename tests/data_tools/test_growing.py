"""Samples grown from others: requests, comparison with parents, receipts, and what a kill costs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.instruct.__main__ import main
from data_tools.instruct.grow.operators import (
    OPERATORS,
    GrowthChecks,
    grown_id,
    parent_of,
    rouge_l,
)
from data_tools.instruct.lines import read_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Request, Sample, Turn
from data_tools.instruct.stages import OPERATOR_NAMES
from tests.data_tools.coco_files import write_coco
from tests.data_tools.teacher_server import Act, Received, after, fail, say, served
from vlm_sft.errors import UserError

ROOT = Path(__file__).parents[2]

FIRST = [
    {"question": "How many dogs are there?", "answer": "Two.", "kind": "count", "evidence": []},
    {"question": "Is there a cat?", "answer": "No, there is no cat.", "kind": "existence",
     "evidence": []},
]  # fmt: skip
"""What the teacher says of each image; the rules accept it."""


def turn(question: str, answer: str, kind: str = "object") -> dict[str, Any]:
    return {"question": question, "answer": answer, "kind": kind, "evidence": []}


def turns(*given: dict[str, Any]) -> str:
    return json.dumps({"turns": list(given)})


def configured(root: Path, url: str, images: int = 1) -> Path:
    """A configuration of a run about images of two dogs on a lawn."""
    boxes = [("dog", [10.0, 10, 40, 40], 0), ("dog", [60, 10, 40, 40], 0)]
    numbers = range(1, images + 1)
    files = write_coco(
        root, {n: boxes for n in numbers}, {n: ["Two dogs on a lawn."] for n in numbers}
    )
    config = {
        "output_dir": str(root / "run"),
        "coco": {name: str(files[name]) for name in ("instances", "captions", "images")},
        "requests": {"shares": {"conversation": 1, "detail": 0, "reasoning": 0}},
        "teacher": {"kind": "openai", "model": "m", "base_url": url, "structured": "none",
                    "backoff_seconds": 0.02, "attempts": 3, "concurrency": 2},
    }  # fmt: skip
    (root / "run.yaml").write_text(json.dumps(config))
    return root / "run.yaml"


def parents(root: Path, url: str, images: int = 1) -> Path:
    """A verified run whose samples can be grown."""
    path = configured(root, url, images)
    for stage in ("plan", "generate", "verify"):
        assert main([stage, str(path)]) == 0
    return path


def grown(
    root: Path, reply: Callable[[str], str], *options: str
) -> tuple[list[Sample], list[Sample]]:
    """Accepted and rejected samples that a teacher made; `reply` gets the last message."""

    def script(received: Received) -> Act:
        text = received.body["messages"][-1]["content"]
        grows = "QUESTIONS" in text
        if received.times == 1 and grows and not received.is_probe:
            return fail(500)  # once each: an attempt more
        return say(reply(text) if grows else turns(*FIRST))

    with served(script) as server:
        path = parents(root, server.url)
        out = root / "grown"
        assert main(["grow", str(path), "--out", str(out), *options]) == 0
        for stage in ("generate", "verify", "clean", "export", "report"):
            assert main([stage, str(out / "config.yaml")]) == 0
    folder = RunFolder(out)
    return list(read_lines(folder.samples, Sample)), list(read_lines(folder.rejected, Sample))


def test_every_operator_is_asked_checked_and_named_in_the_receipt(tmp_path: Path) -> None:
    replies = {
        "in other words": turns(turn("What number of dogs can be seen?", "There are two.", "count"),
                                turn("Can you see a cat?", "No, there is none.", "existence")),
        "harder": turns(turn("What are the two animals on the lawn?", "They are dogs.")),
        "new conversation": turns(turn("What is under the animals?", "A lawn.")),
        "reasons": turns(
            turn("How many dogs are there?", "A dog is on the left. Answer: 2", "count"),
            turn("Is there a cat?", "Only dogs are on the lawn. Answer: No", "existence")),
        "next turns": turns(turn("Where are they?", "They are on a lawn.")),
        "Answer the questions": turns(FIRST[0], turn("Is there a cat?", "No.", "existence")),
    }  # fmt: skip

    def reply(text: str) -> str:
        return next(said for words, said in replies.items() if words in text.splitlines()[-1])

    accepted, rejected = grown(tmp_path, reply, "--operators", ",".join(OPERATORS))
    assert {sample.id: sample.reasons for sample in rejected} == {}
    by_operator = {parent_of(sample.id): sample for sample in accepted}
    parent = "000000000001-conversation-0"
    assert set(by_operator) == {(parent, name) for name in OPERATORS}
    longer = by_operator[parent, "continue"]
    assert [t.question for t in longer.turns][:2] == [t["question"] for t in FIRST]
    assert len(longer.turns) == 3
    receipts = (tmp_path / "grown" / "export" / "receipts.jsonl").read_text().splitlines()
    named = [(r["parents"], r["operator"]) for r in map(json.loads, receipts)]
    assert all(found == [parent] and name in OPERATORS for found, name in named) and named
    requests = list(read_lines(RunFolder(tmp_path / "grown").requests, Request))
    shown = {request.template: request.context for request in requests}
    assert "a1:" not in shown["distill"] and 'a1: "Two."' in shown["steps"]


@pytest.mark.parametrize(
    ("operator", "said", "code"),
    [
        ("deepen", turn("How many dogs are there here?", "Two."), "GROWN_NOT_NEW"),
        ("breadth", turn("Is there a bus?", "Yes, there is a bus."), "OBJECT_NOT_FOUND"),
        ("steps", turn("How many dogs are there?", "They sit. Answer: 3"), "GROWN_OTHER_ANSWER"),
        ("steps", turn("How many pets are there?", "Answer: two"), "GROWN_OTHER_QUESTION"),
        ("distill", turn("What is that?", "A dog."), "GROWN_OTHER_QUESTION"),
    ],
)
def test_what_a_misbehaving_teacher_writes_is_rejected_with_a_code(
    tmp_path: Path,
    operator: str,
    said: dict[str, Any],
    code: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    accepted, rejected = grown_without_export(tmp_path, turns(said), operator)
    assert accepted == [] and code in rejected[0].reasons
    assert "0 of 1 verified now are accepted" in capsys.readouterr().out


def grown_without_export(root: Path, text: str, operator: str) -> tuple[list[Sample], list[Sample]]:
    def script(received: Received) -> Act:
        return say(
            text if "QUESTIONS" in received.body["messages"][-1]["content"] else turns(*FIRST)
        )

    with served(script) as server:
        path = parents(root, server.url)
        out = root / "grown"
        assert main(["grow", str(path), "--out", str(out), "--operators", operator]) == 0
        for stage in ("generate", "verify"):
            assert main([stage, str(out / "config.yaml")]) == 0
    folder = RunFolder(out)
    return list(read_lines(folder.samples, Sample)), list(read_lines(folder.rejected, Sample))


def test_a_killed_generation_of_grown_samples_pays_nothing_twice(tmp_path: Path) -> None:
    def script(received: Received) -> Act:
        text = received.body["messages"][-1]["content"]
        return (
            after(0.1, say(turns(turn("What is under them?", "A lawn."))))
            if ("QUESTIONS" in text)
            else say(turns(*FIRST))
        )

    with served(script) as server:
        path = parents(tmp_path, server.url, images=6)
        out = tmp_path / "grown"
        grow = ["grow", str(path), "--out", str(out), "--operators", "breadth", "--number", "2"]
        assert main(grow) == 0
        command = [sys.executable, "-m", "data_tools", "generate", str(out / "config.yaml")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        before = len(server.received)
        while len(server.received) < before + 5 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.3)  # the server ends what it had begun
        answers = [
            json.loads(line)["request"]
            for file in (out / "answers").glob("*.jsonl")
            for line in file.read_text().splitlines()
        ]
        paid = {name: server.counts[name] for name in answers}
        assert main(["generate", str(out / "config.yaml")]) == 0
        assert paid and all(server.counts[name] == times for name, times in paid.items())
        assert main(grow) == 0  # the same requests
        assert main(["generate", str(out / "config.yaml")]) == 0
        assert all(server.counts[name] == times for name, times in paid.items())


def test_questions_are_new_by_the_longest_common_subsequence() -> None:
    assert rouge_l("How many dogs?", "how many DOGS") == 1
    assert rouge_l("a b c d", "a x c y") == pytest.approx(0.5)
    assert rouge_l("", "a") == 0
    checks = GrowthChecks()
    new = Turn(question="What is under them?", answer="A lawn.", kind="object")
    checks.keep(1, [new])
    parent = Sample.model_construct(turns=(), image=type("I", (), {"id": 1})())
    (found,) = checks.check(OPERATORS["breadth"], [new], parent)
    assert found.code == "GROWN_NOT_NEW"


def test_ids_name_parents_over_generations() -> None:
    first = grown_id("000000000001-conversation-0", "deepen", 0)
    assert parent_of(grown_id(first, "steps", 2)) == (first, "steps")
    assert parent_of("000000000001-conversation-0") is None


def test_without_samples_or_a_server_nothing_is_grown(tmp_path: Path) -> None:
    with served(lambda received: say(turns(*FIRST))) as server:
        path = configured(tmp_path, server.url)
        assert main(["plan", str(path)]) == 0
        words = ["grow", str(path), "--out", str(tmp_path / "grown"), "--operators", "deepen"]
        with pytest.raises(UserError, match=r"samples\.jsonl"):
            main(words)
        with pytest.raises(UserError, match="rules write no new samples"):
            main([*words, "teacher.kind=rules", "teacher.base_url=null"])
        with pytest.raises(UserError, match="'evolve' is not one of paraphrase, deepen"):
            main([*words, "--operators", "evolve"])
        assert tuple(OPERATORS) == OPERATOR_NAMES
