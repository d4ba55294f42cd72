"""The check command finds everything that a run would stumble over."""

import json
from pathlib import Path

import pytest

from vlm_sft import check

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "configs" / "tiny" / "stage1.yaml")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def bad_data(tmp_path: Path, count: int) -> str:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "x"}]
    records = [
        {"id": f"r{i}", "image": f"gone-{i}.png", "conversations": turns} for i in range(count)
    ]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(records))
    return f"data.train.0.path={path}"


def test_a_good_configuration_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([CONFIG, f"output_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "24 of 24 records can be used" in out
    assert "was saved and read back" in out
    assert "the run can start" in out
    assert list(tmp_path.iterdir()) == []


def test_all_bad_records_are_counted_and_twenty_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main([CONFIG, "--no-model", bad_data(tmp_path, 23)]) == 2
    output = capsys.readouterr()
    assert output.err.count("bad record:") == 20
    assert "and 3 more bad records" in output.err
    assert "0 of 23 records can be used" in output.out


def test_records_that_are_too_long_are_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main([CONFIG, "data.max_length=25", f"output_dir={tmp_path}"]) == 2
    assert "takes 26 tokens" in capsys.readouterr().err
