"""Samples grown from others: requests, comparison with parents, receipts, and what a kill costs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill_grown
import pytest

from data_tools.instruct.__main__ import main
from data_tools.instruct.grow.checks import GrowthChecks
from data_tools.instruct.grow.novelty import rouge_l
from data_tools.instruct.grow.operators import GROUPS, OPERATORS, grown_id
from data_tools.instruct.lines import read_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Request, Sample, Turn
from tests.data_tools.grown_runs import FIRST, configured, good_reply, turn, turns
from tests.data_tools.teacher_server import Act, Received, after, drop, fail, say, served
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.records import open_records
from vlm_sft.errors import UserError

ROOT = Path(__file__).parents[2]


def parents(root: Path, url: str, images: Any = 1) -> Path:
    """A verified run whose samples can be grown."""
    path = configured(root, url, images)
    for stage in ("plan", "generate", "verify"):
        assert main([stage, str(path)]) == 0
    return path


def grown(
    root: Path, reply: Callable[[str], str], *options: str, images: Any = 1
) -> tuple[list[Sample], list[Sample]]:
    """Accepted and rejected samples that a teacher made; `reply` gets the last message."""

    def script(received: Received) -> Act:
        text = received.body["messages"][-1]["content"]
        grows = "QUESTIONS" in text or "TASKS" in text
        if received.times == 1 and grows and not received.is_probe:
            return fail(500)  # once each: an attempt more
        return say(reply(text) if grows else turns(*FIRST))

    with served(script) as server:
        path = parents(root, server.url, images)
        out = root / "grown"
        assert main(["grow", str(path), "--out", str(out), *options]) == 0
        for stage in ("generate", "verify", "clean", "export", "report"):
            assert main([stage, str(out / "config.yaml")]) == 0
    folder = RunFolder(out)
    return list(read_lines(folder.samples, Sample)), list(read_lines(folder.rejected, Sample))


def test_every_operator_is_asked_checked_and_named_in_the_receipt(tmp_path: Path) -> None:
    names = [name for name in OPERATORS if name not in ("constraints", "multi-image")]
    accepted, rejected = grown(
        tmp_path, good_reply, "--operators", ",".join(names), "--language", "german"
    )
    assert {sample.id: sample.reasons for sample in rejected} == {}
    by_operator = {sample.grown.operator: sample for sample in accepted if sample.grown}
    parent = "000000000001-conversation-0"
    assert set(by_operator) == set(names)
    longer = by_operator["continue"]
    assert [t.question for t in longer.turns][:2] == [t["question"] for t in FIRST]
    assert len(longer.turns) == 3
    receipts = [
        json.loads(line)
        for line in (tmp_path / "grown" / "export" / "receipts.jsonl").read_text().splitlines()
    ]
    of_samples = [r for r in receipts if OPERATORS[r["operator"]].source == "sample"]
    assert of_samples and all(found["parents"] == [parent] for found in of_samples)
    seeded = by_operator["self-instruct"].grown
    assert seeded is not None and len([p for p in seeded.parents if p.startswith("seed:")]) == 6
    requests = list(read_lines(RunFolder(tmp_path / "grown").requests, Request))
    shown = {request.template: request.context for request in requests}
    assert "a1:" not in shown["distill"] and 'a1: "Two."' in shown["steps"]
    translated = by_operator["translate"]
    assert translated.id == f"{parent}~translate-german-0"
    assert any("not checked in german" in check.claim for check in translated.checks)
    assert any(check.claim.startswith("parent: ") for check in translated.checks)
    assert {turn.kind for turn in translated.turns} == {"count", "existence"}


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


def test_a_misbehaving_server_costs_samples_but_no_answer_twice_and_no_crash(
    tmp_path: Path,
) -> None:
    good = turn("What is under the animals?", "A lawn.")
    texts = [
        '{"turns": [{"question": "Wh', "", "I'm sorry, but I cannot see images.",
        turns(), turns(*[good] * 9), turns(good), json.dumps({"answer": "A lawn.", "evidence": []}),
    ]  # fmt: skip
    paid: Counter[str] = Counter()

    def script(received: Received) -> Act:
        text = received.body["messages"][-1]["content"]
        if "QUESTIONS" not in text and "TASKS" not in text:
            return say(turns(*FIRST))
        place = int(received.id[:8], 16) if not received.is_probe else 0
        if received.times == 1 and place % 3:
            return [fail(429, retry_after=0), fail(500), drop][place % 7 % 3]
        paid[received.id] += 1
        return say(texts[place % len(texts)])

    with served(script) as server:
        path = parents(tmp_path, server.url, images=3)
        out = tmp_path / "grown"
        grow = ["grow", str(path), "--out", str(out), "--operators", ",".join(OPERATORS),
                "--language", "German"]  # fmt: skip
        assert main(grow) == 0
        for stage in ("generate", "generate", "verify"):
            assert main([stage, str(out / "config.yaml")]) == 0
    folder = RunFolder(out)
    rejected = list(read_lines(folder.rejected, Sample))
    requests = list(read_lines(folder.requests, Request))
    assert len({request.sample_id for request in requests}) == len(requests)
    assert set(paid) == {request.id for request in requests} and set(paid.values()) == {1}
    assert {sample.grown.operator for sample in rejected if sample.grown} == set(OPERATORS)
    codes = {code for sample in rejected for code in sample.reasons}
    assert {"NOT_JSON", "ANSWER_EMPTY", "REFUSAL", "WRONG_SCHEMA", "TURN_REPEATED"} <= codes
    of = {sample.grown.operator: sample for sample in rejected if sample.grown and sample.turns}
    assert "GROWN_OTHER_QUESTION" in of["refuse"].reasons if "refuse" in of else True


def test_a_conversation_about_several_images_is_exported_as_training_reads_it(
    tmp_path: Path,
) -> None:
    boxes = [("dog", [10.0, 10, 40, 40], 0), ("dog", [60, 10, 40, 40], 0)]
    accepted, rejected = grown(
        tmp_path, good_reply, "--operators", "multi-image,constraints",
        images={n: [*boxes, ("car", [110.0 + n, 10, 3.0 * n, 30], 0)] for n in range(1, 5)},
    )  # fmt: skip
    assert {sample.grown.operator for sample in rejected if sample.grown} <= {"constraints"}
    several = [sample for sample in accepted if len(sample.images) > 1]
    assert several and all(2 <= len(sample.images) <= 4 for sample in several)
    exports = tmp_path / "grown" / "export"
    for name in ("llava.json", "messages.jsonl", "train.parquet"):
        records = list(open_records(DataFile(path=str(exports / name))).conversations)
        by_id = {r.id: r for r in records if isinstance(r, Conversation)}
        for sample in several:
            record = by_id[sample.id]
            assert len(record.images) == len(sample.images)
            assert record.turns[0].text.endswith(sample.turns[0].question)
    (receipt,) = [r for r in map(json.loads, (exports / "receipts.jsonl").read_text().splitlines())
                  if r["id"] == several[0].id]  # fmt: skip
    assert len(receipt["parents"]) == len(several[0].images)
    assert [image["id"] for image in receipt["images"]] == [i.id for i in several[0].images[1:]]
    (tmp_path / "images" / several[0].images[1].file_name).unlink()
    clean = ["clean", str(tmp_path / "grown" / "config.yaml"), "clean.same_images.action=drop"]
    assert main(clean) == 0
    dropped = {s.id: s.reasons for s in read_lines(RunFolder(tmp_path / "grown").dropped, Sample)}
    assert dropped[several[0].id] == ("IMAGE_UNREADABLE",)


def test_evolve_draws_one_operator_for_each_sample_by_the_seed(tmp_path: Path) -> None:
    with served(lambda received: say(turns(*FIRST))) as server:
        path = parents(tmp_path, server.url, images=6)
        words = ["grow", str(path), "--operators", "evolve,rare", "--number", "3"]
        drawn = []
        for name in ("a", "b"):
            assert main([*words, "--out", str(tmp_path / name)]) == 0
            requests = list(read_lines(RunFolder(tmp_path / name).requests, Request))
            drawn.append([request.id for request in requests])
        assert drawn[0] == drawn[1] and len(set(drawn[0])) == 36
    by_operator = Counter(request.template for request in requests)
    assert by_operator["rare"] == 18  # named, so that evolve draws one of the others
    assert set(by_operator) <= {*GROUPS["evolve"]} and len(by_operator) > 3


def test_a_translation_can_be_translated_back_and_grows_nothing_else(tmp_path: Path) -> None:
    german = turns(turn("Wie viele Hunde sind auf dem Bild zu sehen?", "Es sind 2."),
                   turn("Ist auf dem Bild eine Katze zu sehen?", "Nein, keine."))  # fmt: skip

    def script(received: Received) -> Act:
        text = received.body["messages"][-1]["content"]
        return say(german if "into German" in text else turns(*FIRST))

    with served(script) as server:
        path = parents(tmp_path, server.url)
        words = ["--operators", "translate", "--language"]
        assert main(["grow", str(path), "--out", str(tmp_path / "de"), *words, "German"]) == 0
        config = str(tmp_path / "de" / "config.yaml")
        for stage in ("generate", "verify"):
            assert main([stage, config]) == 0
        with pytest.raises(UserError, match="nothing to grow by deepen"):
            main(["grow", config, "--out", str(tmp_path / "x"), "--operators", "deepen"])
        assert main(["grow", config, "--out", str(tmp_path / "en"), *words, "english"]) == 0
        for stage in ("generate", "verify"):
            assert main([stage, str(tmp_path / "en" / "config.yaml")]) == 0
    (back,) = read_lines(RunFolder(tmp_path / "en").samples, Sample)
    assert back.id.endswith("~translate-german-0~translate-english-0")
    assert any(check.rule == "count" and check.verdict == "supported" for check in back.checks)


def test_growing_the_grown_asks_nothing_about_an_image_again(tmp_path: Path) -> None:
    def script(received: Received) -> Act:
        text = received.body["messages"][-1]["content"]
        return say(good_reply(text) if "QUESTIONS" in text else turns(*FIRST))

    with served(script) as server:
        given, asked = parents(tmp_path, server.url, images=2), []
        for name, operators in (("a", "refuse,deepen"), ("b", "deepen,rare"), ("c", "refuse")):
            folder = RunFolder(tmp_path / name)
            grow = ["grow", str(given), "--out", str(folder.root), "--operators", operators]
            assert main(grow) == 0
            for stage in ("generate", "verify"):
                assert main([stage, str(folder.config)]) == 0
            asked += read_lines(folder.requests, Request)
            given = folder.config
    refused = [request.sample_id for request in asked if request.template == "refuse"]
    assert len({request.id for request in asked}) == len(asked)
    assert len({*refused}) == 4 and all(name.endswith(("-0", "-1")) for name in refused)


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


def test_without_samples_or_a_server_nothing_is_grown(tmp_path: Path) -> None:
    with served(lambda received: say(turns(*FIRST))) as server:
        path = configured(tmp_path, server.url)
        assert main(["plan", str(path)]) == 0
        words = ["grow", str(path), "--out", str(tmp_path / "grown"), "--operators", "deepen"]
        with pytest.raises(UserError, match=r"samples\.jsonl"):
            main(words)
        with pytest.raises(UserError, match="rules write no new samples"):
            main([*words, "teacher.kind=rules", "teacher.base_url=null"])
        with pytest.raises(UserError, match="'evolution' is not one of paraphrase, deepen"):
            main([*words, "--operators", "evolution"])
        with pytest.raises(UserError, match="--language is needed by translate: one of Arabic"):
            main([*words, "--operators", "translate"])
        with pytest.raises(UserError, match="--language: is an option of the operator translate"):
            main([*words, "--language", "German"])
        with pytest.raises(UserError, match="no operator left"):
            main([*words, "--operators", ",".join(["evolve", *GROUPS["evolve"]])])
        with pytest.raises(UserError, match="not a share from 0 to 1"):
            main([*words, "--operators", "refuse", "--unanswerable", "2"])


def test_ids_name_parents_over_generations() -> None:
    first = grown_id("000000000001-conversation-0", "deepen", 0)
    assert grown_id(first, "steps", 2) == "000000000001-conversation-0~deepen-0~steps-2"


@pytest.mark.slow
def test_grown_runs_killed_at_random_places_are_as_without_kills(tmp_path: Path) -> None:
    found = kill_grown.trial(tmp_path, kills=3, seed=1)
    assert kill_grown.is_good(found), found
    assert sum(found["kills"].values()) == 3 and found["accepted"] > 20
