"""Batches are handed in once, found again after a restart, and taken in whole or in part."""

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
from tests.data_tools.teacher_server import TeacherServer, completion, say, served

GOOD = json.dumps({"answer": "There are two dogs.", "evidence": ["b1"]})


def answered(custom_id: str, body: Any) -> dict[str, Any]:
    return {"response": {"status_code": 200, "body": completion(GOOD)}}


def batched(
    folder: Path, server: TeacherServer, images: int = 2, **teacher: Any
) -> tuple[Any, RunFolder]:
    settings = {"structured": "json_object", "poll_seconds": 0.02, "batch_size": 4}
    return planned(folder, images, kind="batch", base_url=server.url, **(settings | teacher))


def test_requests_are_handed_in_as_files_and_results_taken_in(tmp_path: Path) -> None:
    with served(lambda received: say(GOOD)) as server:
        server.batch_script = answered
        config, run = batched(tmp_path, server)
        generating.command(config)
        generating.command(config)
    assert len(server.batches) == 2 and len(read_answers(run.answers)) == 6
    lines = [json.loads(line) for line in server.files["file-1"].splitlines()]
    assert len(lines) == 4 and lines[0]["url"] == "/v1/chat/completions"
    assert lines[0]["body"]["response_format"] == {"type": "json_object"}
    assert {answer.teacher for answer in read_answers(run.answers).values()} == {"batch"}


def test_a_batch_is_found_again_by_its_recorded_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(lambda received: say(GOOD)) as server:
        server.batch_script = answered
        server.batch_status = ["in_progress"] * 8 + ["completed"]
        config, run = batched(tmp_path, server)
        with monkeypatch.context() as patch:
            patch.setattr(
                "data_tools.instruct.generate.teachers.batch.BatchTeacher._look_at", _killed
            )
            with pytest.raises(KeyboardInterrupt):
                generating.command(config)
        assert len(read_answers(run.answers)) == 0
        generating.command(config)
    assert len(server.batches) == 2 and len(read_answers(run.answers)) == 6


def test_a_batch_created_just_before_a_kill_is_found_by_its_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(lambda received: say(GOOD)) as server:
        server.batch_script = answered
        config, run = batched(tmp_path, server, batch_size=10)
        with monkeypatch.context() as patch:
            patch.setattr(
                "data_tools.instruct.generate.teachers.batch_log.BatchLog.created", _killed
            )
            with pytest.raises(KeyboardInterrupt):
                generating.command(config)
        generating.command(config)
    assert len(server.batches) == 1 and len(read_answers(run.answers)) == 6


def test_a_batch_that_was_never_created_is_handed_in_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(lambda received: say(GOOD)) as server:
        server.batch_script = answered
        config, run = batched(tmp_path, server, batch_size=10, limits={"requests": 6})
        with monkeypatch.context() as patch:
            patch.setattr("data_tools.instruct.generate.teachers.batch.BatchTeacher._call", _killed)
            with pytest.raises(KeyboardInterrupt):
                generating.command(config)
        generating.command(config)
    assert len(server.batches) == 1 and len(read_answers(run.answers)) == 6


def test_partial_and_refused_results_are_told_and_asked_again(tmp_path: Path) -> None:
    config, run = planned(tmp_path, 2)
    expired, refused, lost, *_ = [request.id for request in read_requests(run)]

    def partly(custom_id: str, body: Any) -> dict[str, Any] | None:
        if custom_id == expired:
            return {"error": {"code": "batch_expired", "message": "not in time"}}
        if custom_id == refused:
            error = {"error": {"message": "bad \x1b[31mparameter"}}
            return {"response": {"status_code": 400, "body": error}}
        return None if custom_id == lost else answered(custom_id, body)

    with served(lambda received: say(GOOD)) as server:
        server.batch_script, server.batch_status = partly, ["expired"]
        config, run = batched(tmp_path, server, batch_size=10)
        with pytest.raises(SystemExit) as ended:
            generating.command(config)
        assert ended.value.code == 3
        told = {failure.request: failure for failure in read_lines(run.failures, Failure)}
        assert {request: failure.reason for request, failure in told.items()} == {
            expired: "expired", refused: "refused", lost: "expired",
        }  # fmt: skip
        assert "\x1b" not in told[refused].message
        server.batch_script = answered
        generating.command(config)
    assert len(server.batches) == 2 and len(read_answers(run.answers)) == 6


def test_caps_hold_for_batches(tmp_path: Path) -> None:
    with served(lambda received: say(GOOD)) as server:
        server.batch_script = answered
        config, run = batched(tmp_path, server, batch_size=2, limits={"requests": 5})
        with pytest.raises(SystemExit) as ended:
            generating.command(config)
    assert ended.value.code == 4
    assert len(read_answers(run.answers)) == 5


def _killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
