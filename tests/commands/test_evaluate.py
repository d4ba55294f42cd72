"""A checkpoint is evaluated, from the command to the file of results."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from tests.train.tiny import reset_accelerate
from vlm_sft import evaluate, stage1
from vlm_sft.commands.evaluate import one_sided
from vlm_sft.commands.run_command import run_command
from vlm_sft.utils.atomic_files import write_json

ROOT = Path(__file__).parents[2]
DATA = ROOT / "configs" / "tiny" / "data"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    with contextlib.chdir(ROOT):
        reset_accelerate()
        options = ["train.trackers=[]", "train.max_steps=2", "train.eval_samples=0"]
        options.append("data.template=chatml")
        assert stage1.main(["configs/tiny/stage1.yaml", f"output_dir={out}", *options]) == 0
        reset_accelerate()
    return out


@pytest.fixture
def probes(tmp_path: Path) -> Path:
    path = tmp_path / "existence.json"
    rows = [
        {
            "id": f"{color}-{asked}",
            "image": f"images/{color}-circle-2.png",
            "question": f"Is it {asked}?",
            "answer": "yes" if asked == color else "no",
            "kind": "random",
        }
        for color in ("red", "blue")
        for asked in ("red", "blue")
    ]
    write_json(path, rows)
    return path


def test_a_checkpoint_is_evaluated_into_one_file(
    trained: Path, probes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = probes.parent / "results.json"
    files = ["--probes", str(probes), "--captions", str(DATA / "captions_eval.json")]
    command = [str(trained / "final"), *files, "--images", str(DATA), "--out", str(out)]
    assert evaluate.main([*command, "--device", "cpu"]) == 0
    results = json.loads(out.read_text())
    assert (results["step"], results["seed"]) == (2, 0)
    assert list(results["probes"]["existence"]) == ["right", "blank", "shuffled"]
    blank = results["probes"]["existence"]["blank"]
    assert (blank["questions"], blank["images"], blank["chance"]) == (4, 2, 0.5)
    assert blank["accuracy"]["estimate"] == 0.5
    assert results["captions"]["records"] == 12
    found = results["captions"]
    difference = found["shuffled"]["estimate"] - found["right"]["estimate"]
    assert found["difference"]["estimate"] == pytest.approx(difference)
    lines = capsys.readouterr().out.splitlines()
    assert any("existence" in line and "50.0%" in line for line in lines)
    table = [line for line in lines[:-1] if not line.startswith("note: ")]
    assert max(map(len, table)) <= 80
    assert lines[-1] == f"results: {out}" and not any("eld-out" in line for line in lines)


def test_one_sided_predictions_are_noted_with_their_balanced_accuracy() -> None:
    found = {"chosen": {"no": 1.0}, "balanced_accuracy": {"estimate": 0.5}}
    mixed = {"chosen": {"no": 0.6, "yes": 0.4}, "balanced_accuracy": {"estimate": 0.5}}
    results = {"probes": {"pope": {"right": found, "blank": mixed}}}
    assert list(one_sided(results)) == [
        "note: pope (right): 100% of the answers are 'no'; balanced accuracy 50.0%"
    ]


def test_images_and_conditions_can_be_limited(trained: Path, probes: Path) -> None:
    out = probes.parent / "results.json"
    options = ["--conditions", "blank,right", "--max-images", "1", "--out", str(out)]
    where = ["--probes", str(probes), "--images", str(DATA), "--device", "cpu"]
    assert evaluate.main([str(trained), *where, *options]) == 0
    found = json.loads(out.read_text())["probes"]["existence"]
    assert {name: by["questions"] for name, by in found.items()} == {"right": 2, "blank": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--probes", "{p}", "--conditions", "left"], "--conditions left: expected some of right"),
        (["--probes", "missing.json"], "missing.json: no such file"),
        (["--captions", "missing.json"], "missing.json"),
        (["--probes", "{p}", "--max-images", "0"], "--max-images 0: expected 1 or more"),
        (["--probes", "{p}", "{p}"], "two files are named existence"),
        ([], "nothing to evaluate"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_exit_code_2(
    probes: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(p=probes) for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        run_command(evaluate.main, ["no-checkpoint", "--images", str(DATA), *given])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_a_missing_checkpoint_is_named(probes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        where = ["--probes", str(probes), "--images", str(DATA)]
        run_command(evaluate.main, [f"no{os.sep}checkpoint", *where])
    assert ended.value.code == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_run_writes_the_table_of_its_parts_and_reports_it(trained: Path) -> None:
    rows = json.loads((trained / "parts.json").read_text())
    states = {row["part"]: (row["state"], row["peak learning rate"]) for row in rows}
    assert states == {
        "vision_tower": ("frozen", "-"),
        "projector": ("trainable", "1.00e-03"),
        "language_model": ("frozen", "-"),
    }
    page = (trained / "report.html").read_text()
    assert "vision_tower" in page and "1.00e-03" in page
