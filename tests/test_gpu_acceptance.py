"""The acceptance on a GPU keeps every figure, reports what is missing, and never invents one."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from acceptance import __main__ as driver
from acceptance import wheels
from acceptance.figures import BY_KEY, FIGURES, PARTS, Job, read_rows
from acceptance.page import make_page, verdict

ROOT = Path(__file__).parent.parent


def job(tmp_path: Path) -> Job:
    return Job("cpu", True, 60.0, str(tmp_path / "rows.jsonl"), {})


def results(**figures: float | None) -> dict[str, object]:
    return {
        "command": "scripts/gpu_acceptance",
        "date": "2026-11-29",
        "device": "cuda",
        "tiny": False,
        "seconds": 400.0,
        "parts": {"throughput": {"state": "finished", "seconds": 200.0}},
        "facts": {},
        "figures": {key: {"value": value, "note": ""} for key, value in figures.items()},
    }


def test_the_parts_fit_into_the_time_of_a_run() -> None:
    assert sum(part.seconds for part in PARTS) <= driver.TOTAL_SECONDS == 480
    assert {figure.part for figure in FIGURES} == {part.name for part in PARTS}
    for part in PARTS:
        assert (ROOT / "scripts/acceptance/parts" / f"{part.name}.py").is_file()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("lora_packed", 17.0, "pass"),
        ("lora_packed", 16.9, "MISSED"),
        ("planner_lora", 10.1, "MISSED"),
        ("resume", 1.0, "pass"),
        ("resume", 0.0, "MISSED"),
        ("gemm", 700.0, "recorded"),
        ("gemm", None, "not measured"),
    ],
)
def test_a_figure_is_judged_by_its_target(key: str, value: float | None, expected: str) -> None:
    assert verdict(BY_KEY[key], value) == expected


def test_the_page_shows_every_figure_and_invents_none() -> None:
    page = make_page(results(lora_packed=18.25, resume=0.0))
    assert "| LoRA, packed | >= 17 samples/s | 18.25 samples/s | pass |" in page
    assert "| a killed and resumed run ends in the same bits | yes | NO | MISSED |" in page
    assert page.count("not measured") == len(FIGURES) - 2
    empty = make_page(results())
    assert "Nothing has been measured on a GPU yet" in empty
    assert empty.count("| not measured |") == len(FIGURES)


def test_figures_survive_a_broken_measurement_and_a_line_that_was_cut(tmp_path: Path) -> None:
    found = job(tmp_path)
    with found.figures("gemm", "copy"):
        found.record("gemm", 3.5)
        raise RuntimeError("no\nkernel")
    with open(found.results, "a") as file:
        file.write('{"key": "sta')
    rows = read_rows(Path(found.results))
    assert [(row["key"], row["value"]) for row in rows] == [("gemm", 3.5), ("copy", None)]
    assert rows[1]["note"] == "RuntimeError: no kernel"


def test_a_part_at_its_time_limit_is_ended_and_keeps_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        import json, pathlib, sys, time
        job = json.loads(pathlib.Path(sys.argv[-1]).read_text())
        open(job["results"], "w").write('{"key": "gemm", "value": 2.0, "note": ""}\\n')
        time.sleep(600)
    """
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent(code))
    real = subprocess.Popen

    def started(command: list[str], **options: object) -> "subprocess.Popen[bytes]":
        return real([sys.executable, str(script), command[-1]], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(driver.subprocess, "Popen", started)
    monkeypatch.setattr(driver, "LEAST_SECONDS", 0)
    monkeypatch.setattr(driver, "WHEELS", tmp_path / "none")
    out = tmp_path / "out"
    given = ["--device", "cpu", "--tiny", "--out", str(out), "--only", "environment"]
    assert driver.main([*given, "--time-factor", "0.05"]) == 1
    kept = json.loads((out / "gpu.json").read_text())
    assert kept["figures"]["gemm"]["value"] == 2.0
    assert kept["parts"]["environment"]["state"] == "cut off at its time limit"
    assert "Cut off at its time limit" in (out / "gpu.md").read_text()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--device", "cpu"], "give --tiny with it"),
        (["--tiny"], "give --out"),
        (["--only", "nothing"], "invalid choice: 'nothing'"),
        (["--time-factor", "0"], "expected more than 0"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(given: list[str], expected: str) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(ROOT / "scripts/gpu_acceptance"), *given],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr


def test_the_committed_page_is_made_from_the_committed_figures() -> None:
    folder = ROOT / "docs/benchmarks"
    found = json.loads((folder / "gpu.json").read_text())
    assert (folder / "gpu.md").read_text() == make_page(found)
    assert set(found["figures"]) <= set(BY_KEY) and not found["tiny"]


def test_carried_packages_have_the_pinned_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def run(command: list[str], **options: object) -> "subprocess.CompletedProcess[str]":
        asked.append(command[-1])
        (tmp_path / f"{command[-1]}.whl").write_bytes(b"x" * 1000)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    size = wheels.prepare(tmp_path, python="3.12", constraints=ROOT / "constraints.txt")
    assert size == 1000 * len(wheels.MODULES) == 1000 * len(asked)
    pinned = {name.split("==")[0] for name in asked if "==" in name}
    assert {"pydantic", "pydantic-core", "simplejpeg", "bitsandbytes"} <= pinned
    monkeypatch.setattr(wheels, "LIMIT", 10)
    with pytest.raises(wheels.WheelError, match="more than the"):
        wheels.prepare(tmp_path, python="3.12", constraints=ROOT / "constraints.txt")
