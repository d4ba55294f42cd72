"""Reports: one file, everything escaped, every curve and answer in it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_sft.checkpoint.run_dir import SAMPLE_IMAGES, WRITTEN, locked
from vlm_sft.errors import UserError
from vlm_sft.inspection.charts import MAX_POINTS, Chart, Series, thinned
from vlm_sft.inspection.demo_report import DemoReport, ShownImage, write_demo_report
from vlm_sft.inspection.run_data import read_run
from vlm_sft.inspection.run_report import write_run_report
from vlm_sft.report import main
from vlm_sft.train.run_history import RunHistory


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"step": 1, "loss": 3.0, "samples_per_second": 2.0, "memory_bytes": 2**30},
        {"step": 2, "loss": 2.5, "samples_per_second": 4.0, "memory_bytes": 2**30},
        {"step": 2, "eval_loss": 2.75, "eval_suite": {"pope.accuracy": 0.5, "pope.looks": None}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ledger.jsonl").write_text('{"id": "1", "bucket": "trained"}\n' * 3)
    (folder / "samples.jsonl").write_text(
        '{"step": 2, "id": "x", "question": "<b>?", "answer": "<script>", "expected": "cat"}\n'
    )
    (folder / "config.yaml").write_text("seed: 42 # <i>\n")
    return folder


def test_a_run_report_holds_loss_ledger_answers_and_settings_escaped(tmp_path: Path) -> None:
    path = write_run_report(make_run(tmp_path / "run"))
    page = path.read_text()
    assert path.name == "report.html"
    assert "2.5000" in page and "2.7500" in page and "3.0" in page
    assert "&lt;script&gt;" in page and page.count("<script>") == 1 and "<i>" not in page
    assert page.count('<svg class="chart"') == 3 and "seed: 42" in page
    assert "://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "export --to hf" not in page, "an older version did not note it"


def test_a_run_without_a_step_has_a_report(tmp_path: Path) -> None:
    assert "No training step" in write_run_report(tmp_path).read_text()


def test_the_demo_report_is_one_page_with_its_images_inside(tmp_path: Path) -> None:
    Image.new("RGB", (900, 600), (200, 30, 30)).save(tmp_path / "a.png")
    exists = {"questions": 300, "accuracy": 0.91, "accuracy_interval": [0.88, 0.94], "f1": 0.9}
    tasks = {"existence": {"conditions": {"right": exists}}}
    tasks["objects"] = {"conditions": {"right": {"questions": 80, "chair_i": 0.125}}}
    report = DemoReport(
        title="A model that sees",
        lead="from nothing",
        images=[ShownImage(tmp_path / "a.png", [("Is it <red>?", "No & yes.")], ["yes"])],
        runs={"Stage 1": make_run(tmp_path / "s1"), "Stage 2": make_run(tmp_path / "s2")},
        results={"unseen artist": {"tasks": tasks}},
        seconds={"stage 1": 61.0, "stage 2": 59.0},
        savings=["Packing: 30% fewer tokens."],
    )
    page = write_demo_report(report, tmp_path / "out" / "demo.html").read_text()
    assert "Is it &lt;red&gt;?" in page and "No &amp; yes." in page
    assert "91.0 % [88.0, 94.0]" in page and "88.0 to 94.0 %" in page and "2 min 00 s" in page
    assert "✓ right" in page and "✗ wrong" not in page
    assert "existence: F1" in page and "90.0 %" in page and "12.5 %" in page
    assert 'style="width: 96.7%"' in page and "30% fewer tokens" in page
    assert "data:image/jpeg;base64," in page
    with Image.open(tmp_path / "out" / "demo.png") as curves:
        assert curves.width > 1000


def test_a_run_with_several_starts_reports_the_peak_memory_of_all(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run")
    rows = [
        {"step": 1, "loss": 3.0, "samples_per_second": 1.0, "memory_bytes": 5 * 2**30},
        {"step": 2, "loss": 2.5, "samples_per_second": 9.0, "memory_bytes": 5 * 2**30},
        {"step": 3, "loss": 2.0, "samples_per_second": 2.0, "memory_bytes": 2**30},  # resumed
        {"step": 3, "eval_error": "no room"},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "ledger_eval.jsonl").write_text('{"id": "1", "bucket": "evaluated"}\n')
    (run / "trained.jsonl").write_text(
        '{"step": 1, "records": ["a", "b"]}\n'
        '{"step": 2, "records": ["a"], "update_left_out": "the loss is not finite"}\n'
    )
    page = write_run_report(run).read_text()
    assert "peak memory of rank 0 over all starts</dt><dd>5.0 GiB" in page
    assert "samples per second (median of the logged steps)</dt><dd>2.0" in page
    assert "training loss at step 3" in page and "not finished" in page
    assert "failed evaluations</dt><dd>1<" in page
    assert "2 logged steps trained on 2 different record ids, 3 times in total" in page
    assert "The update of 1 of these steps was skipped" in page
    assert "used completely" in page and ">trained<" not in page and ">evaluated<" not in page


def test_damaged_lines_are_counted_and_skipped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "samples.jsonl", "ledger.jsonl"):
        path = run / name
        path.write_text('{"step": 1, "lo\n[1]\n' + path.read_text() + '{"step": 9, "loss"')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('\n{"step": 3, "loss": "low", "memory_bytes": NaN, "eval_loss": [1]}\n')
    (run / "parts.json").write_text("[1]")
    (run / "export_outlook.json").write_text('{"hf": 1}')
    (run / "trained.jsonl").write_bytes(b'\xff\n{"step": 1, "records": 7}\n')
    (run / "config.yaml").write_bytes(b"seed: 42 # \xff\n")
    page = write_run_report(run).read_text()
    assert "Damaged lines, not used on this page" in page
    for name, count in (("metrics", 3), ("samples", 2), ("ledger", 2), ("trained", 1)):
        assert f"{name}.jsonl</td><td>{count}<" in page
    assert "export_outlook.json</td><td>1<" in page
    assert "training loss at step 2" in page and "seed: 42" in page


def test_the_command_writes_the_report_of_an_interrupted_run_again_and_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    for _ in range(2):  # its own page is replaced
        assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n" * 2
    assert main([str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "2.5000" in (tmp_path / "page.html").read_text()


def test_the_command_refuses_a_folder_of_no_run_and_a_file_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the output_dir of a training run"):
        main([str(tmp_path)])
    run = make_run(tmp_path / "run")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(UserError, match="was not written by"):
        main([str(run), "--out", str(tmp_path / "mine.html")])
    with pytest.raises(UserError, match="read"):
        main([str(run), "--out", str(run / "metrics.jsonl")])
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"


def test_the_report_names_the_software_of_the_run_and_not_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "Software of the checkpoint" not in write_run_report(run).read_text()
    step = run / "checkpoints" / "step-00000002"
    step.mkdir(parents=True)
    manifest = {"step": 2, "software": {"torch": "1.2.3", "code": "0" * 64}}
    (step / "manifest.json").write_text(json.dumps(manifest))
    page = write_run_report(run).read_text()
    assert "Software of the checkpoint of step 2" in page and "1.2.3" in page


def test_a_report_replaces_only_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").write_text("mine")
    path = write_run_report(tmp_path)
    assert (tmp_path / "report.html.kept-1").read_text() == "mine"
    assert "report.html.kept-1" in capsys.readouterr().err
    assert write_run_report(tmp_path) == path
    assert len(list(tmp_path.iterdir())) == 2


def test_the_demo_report_replaces_only_its_own_page_and_curves(tmp_path: Path) -> None:
    report = DemoReport("A model", "", [], {"Stage 1": make_run(tmp_path / "s1")})
    for name in ("demo.html", "demo.png"):
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        write_demo_report(report, tmp_path / "demo.html")
    kept = sorted(path.name for path in tmp_path.glob("*.kept-*"))
    assert kept == ["demo.html.kept-1", "demo.png.kept-1"]


@pytest.mark.parametrize("name", sorted(WRITTEN - {"report.html"}))
def test_the_report_replaces_no_other_file_of_its_run(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_text("kept")
    with pytest.raises(UserError, match=r"read|checkpoints"):
        main([str(run), "--out", str(run / name), "--overwrite"])
    assert (run / name).read_text() == "kept"


@pytest.mark.parametrize("name", ["parts.json", "export_outlook.json", "final/manifest.json"])
def test_a_deeply_nested_file_or_a_pipe_of_a_run_is_counted_as_damaged(
    tmp_path: Path, name: str
) -> None:
    run = make_run(tmp_path / "run")
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("[" * 200_000)
    assert main([str(run)]) == 0
    path.unlink()
    os.mkfifo(path)
    assert main([str(run)]) == 0


def test_the_starts_of_a_run_show_what_each_changed_and_how_it_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    now = [0.0]
    for settings, step in ({"seed": 1, "lr": 2}, 0), ({"seed": 1, "lr": 3}, 2):
        history = RunHistory(run / "starts.jsonl", clock=lambda: now[0])
        now[0] += 60
        with history.phase("training"):
            now[0] += 100
            history.start(step, 4, settings=settings, software={"torch": f"2.{step}"}, ranks=1)
            with history.phase("evaluation"):
                now[0] += 20
                with history.phase("saving"):
                    now[0] += 5
            history.saved(step + 2)
    history.end(None, "RuntimeError: <b>")
    found = read_run(run)
    assert found.seconds == {"setup": 120, "training": 200, "evaluation": 40, "saving": 10}
    assert [(start.step, start.last_step, start.how) for start in found.starts] == [
        (0, 2, ""),
        (2, 4, "RuntimeError: <b>"),
    ]
    assert found.starts[1].changed == [("lr", 2, 3)] and found.state == "interrupted"
    page = write_run_report(run).read_text()
    assert "changed: lr: 2 → 3\ntorch: 2.0 → 2.2" in page
    assert "killed (none was logged)" in page and "RuntimeError: &lt;b&gt;" in page
    assert "not finished: RuntimeError" in page and "6 min 10 s" in page


def test_a_run_is_running_while_it_is_locked_and_finished_when_final_is_its_last_step(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path / "run")
    with locked(run, enabled=True):
        assert read_run(run).state == "running"
        assert read_run(run, is_running=False).state == "interrupted"
        assert "<dd>running" in write_run_report(run).read_text()
    (run / "final").mkdir()
    manifest = {"step": 4, "total_steps": 4, "software": {}, "stage": "stage2"}
    (run / "final" / "manifest.json").write_text(json.dumps(manifest))
    assert read_run(run).state == "finished"
    assert (read_run(run).stage, read_run(run).total_steps) == ("stage2", 4)
    RunHistory(run / "starts.jsonl").start(4, 8)  # continued with more steps, and killed
    assert read_run(run).state == "interrupted"


def test_several_runs_have_curves_in_one_chart_and_the_settings_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")]
    (runs[0] / "config.yaml").write_text("seed: 1\noptim: {rate: 1, same: 2}\n")
    (runs[1] / "config.yaml").write_text("seed: 1\noptim: {rate: 3, same: 2}\nnew: 5\n")
    names = [str(run) for run in runs]
    out = tmp_path / "both.html"
    assert main([*names, "--out", str(out)]) == 0
    page = out.read_text()
    assert "<title>2 runs</title>" in page and "a/run" in page and "b/run" in page
    loss = page.split('aria-label="training loss')[1].split("</svg>")[0]
    assert loss.count("<polyline") == 2
    differing = page.split("Different settings")[1].split("</section>")[0]
    assert "optim.rate" in differing and "(not set)" in differing
    assert "optim.same" not in differing and "seed" not in differing
    capsys.readouterr()
    assert main([*names, "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["different_settings"] == {"new": ["(not set)", 5], "optim.rate": [1, 3]}
    assert numbers["runs"][0]["curves"]["loss"] == [[1, 3.0], [2, 2.5]]
    assert numbers["runs"][0]["curves"]["eval_suite.pope.accuracy"] == [[2, 0.5]]
    assert numbers["runs"][1]["records"]["training"][0]["records"] == 3
    with pytest.raises(UserError, match="is the same run as"):
        main([names[0], names[0] + "/."])


def test_what_is_no_run_is_refused_with_what_to_give_instead(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "final").mkdir()
    for name, message in (
        (run / "final", f"give {run.resolve()}, which it is a part of"),
        (run / "metrics.jsonl", "it is a file"),
        (tmp_path / "none", "there is no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            main([str(name)])


def test_only_images_that_the_run_kept_are_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    Image.new("RGB", (8, 8)).save(tmp_path / "0123456789abcdef.jpg")
    names = ["../../0123456789abcdef.jpg", str(tmp_path / "0123456789abcdef.jpg"), 7]
    row = {"step": 2, "id": "x", "question": "?", "answer": "", "expected": "a", "images": names}
    (run / "samples.jsonl").write_text(json.dumps(row) + "\n")
    page = write_run_report(run).read_text()
    assert "data:image" not in page and page.count("its image is not there") == 3
    (run / SAMPLE_IMAGES).mkdir()
    Image.new("RGB", (8, 8)).save(run / SAMPLE_IMAGES / "0123456789abcdef.jpg")
    (run / "samples.jsonl").write_text(json.dumps({**row, "images": names[0][6:].split()}) + "\n")
    assert write_run_report(run).read_text().count("data:image/jpeg") == 1


def test_results_of_a_suite_in_the_run_are_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    scores = {"questions": 9, "accuracy": 0.75, "accuracy_interval": [0.5, 0.9]}
    results = {
        "made_by": "vlm_sft evaluate",
        "tasks": {"pope": {"main": "accuracy", "conditions": {"blank": scores}}},
    }
    for name, text in ("good", json.dumps(results)), ("bad", '{"made_by": "vlm_sft evaluate"}'):
        (run / name).mkdir()
        (run / name / "results.json").write_text(text)
    page = write_run_report(run).read_text()
    assert "Evaluation in good" in page and "0.750 [0.500, 0.900]" in page
    assert "bad/results.json</td><td>1<" in page


def test_a_long_curve_is_thinned_to_means_and_the_page_says_so() -> None:
    points = [(float(step), float(step % 2)) for step in range(1, 10_001)]
    found = thinned(points)
    assert len(found) <= MAX_POINTS and (found[0], found[-1]) == (points[0], points[-1])
    assert all(0.4 < value < 0.6 for _, value in found[1:-2])
    chart = Chart("loss", [Series("a", points), Series("none", [])])
    assert "mean of up to 34 logged values" in chart.note and chart.svg.count("<polyline") == 1
    for values in ([(1.0, 0.0)], [(1.0, 5.0), (2.0, 5.0)], [(1.0, -1e-9), (1e6, 1e12)]):
        assert "nan" not in Chart("x", [Series("a", values)]).svg


def test_the_values_are_shown_at_the_pointer_and_the_page_fits_a_phone(
    tmp_path: Path, browser: Any
) -> None:
    page = browser.new_page(viewport={"width": 380, "height": 800}, color_scheme="dark")
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text))
    page.goto(write_run_report(make_run(tmp_path / "run")).as_uri())
    page.locator("svg.chart").first.hover(position={"x": 280, "y": 60})
    assert page.locator(".tip").inner_text().split("\n") == [
        "step 2",
        "training: 2.5",
        "validation: 2.75",
    ]
    assert page.evaluate("document.documentElement.scrollWidth") == 380
    assert not errors
    page.close()
