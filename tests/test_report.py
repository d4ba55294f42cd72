"""Reports: one file, everything escaped, every curve and answer in it."""

import json
from pathlib import Path

from PIL import Image

from vlm_sft.report import DemoReport, ShownPicture, write_demo_report, write_run_report

INTERVAL = {"estimate": 0.91, "low": 0.88, "high": 0.94}


def make_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"step": 1, "loss": 3.0, "samples_per_second": 2.0, "memory_bytes": 2**30},
        {"step": 2, "loss": 2.5, "samples_per_second": 4.0, "memory_bytes": 2**30},
        {"step": 2, "eval_loss": 2.75},
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
    assert "&lt;script&gt;" in page and "<script" not in page and "<i>" not in page
    assert "data:image/png;base64," in page and "seed: 42" in page
    assert "://" not in page


def test_a_run_without_a_step_says_so(tmp_path: Path) -> None:
    assert "No training step" in write_run_report(tmp_path).read_text()


def test_the_demo_report_is_one_page_with_its_pictures_inside(tmp_path: Path) -> None:
    Image.new("RGB", (900, 600), (200, 30, 30)).save(tmp_path / "a.png")
    found = {
        "questions": 300,
        "accuracy": INTERVAL,
        "balanced_accuracy": INTERVAL,
        "chance": 0.5,
    }
    report = DemoReport(
        title="A model that sees",
        lead="from nothing",
        pictures=[ShownPicture(tmp_path / "a.png", [("Is it <red>?", "No & yes.")], ["yes"])],
        runs={"Stage 1": make_run(tmp_path / "s1"), "Stage 2": make_run(tmp_path / "s2")},
        results={"unseen artist": {"answers": "spoken", "probes": {"existence": {"right": found}}}},
        seconds={"stage 1": 61.0, "stage 2": 59.0},
    )
    page = write_demo_report(report, tmp_path / "out" / "demo.html").read_text()
    assert "Is it &lt;red&gt;?" in page and "No &amp; yes." in page
    assert "91.0 % [88.0, 94.0]" in page and "88.0 to 94.0 %" in page and "2 min 00 s" in page
    assert "✓ right" in page and "✗ wrong" not in page
    assert "answers freely" in page and "likeliest" not in page
    assert "data:image/jpeg;base64," in page
    with Image.open(tmp_path / "out" / "demo.png") as curves:
        assert curves.width > 1000
