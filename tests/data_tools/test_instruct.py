"""The stages in turn, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools import make_scenes
from data_tools.instruct.__main__ import STAGES, main
from tests.tiny_runs import run as run_stage
from vlm_sft.config import DataFile
from vlm_sft.data.formats import read_records
from vlm_sft.errors import UserError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes.main(["--out", str(folder), "--artist", "twemoji", "--count", "12", "--seed", "3"])
    return folder


def config_file(folder: Path, scenes: Path, **sections: Any) -> Path:
    annotations = scenes / "annotations"
    values = {
        "output_dir": str(folder / "run"),
        "seed": 1,
        "coco": {
            "instances": str(annotations / "instances_twemoji.json"),
            "captions": str(annotations / "captions_twemoji.json"),
            "images": str(scenes / "images"),
        },
        "teacher": {"kind": "rules"},
        **sections,
    }
    path = folder / "instruct.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    names = ("samples.jsonl", "rejected.jsonl", "kept.jsonl", "export/llava.json")
    names += ("export/messages.jsonl", "export/train.parquet", "report/report.html")
    return {name: (folder / name).read_bytes() for name in names}


def test_run_makes_training_files_and_a_second_run_changes_no_byte(
    tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_file(tmp_path, scenes)
    assert main(["run", str(config)]) == 0
    before = files_of(tmp_path / "run")
    assert main(["run", str(config)]) == 0
    assert files_of(tmp_path / "run") == before
    samples = (tmp_path / "run/samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(samples) > 12 and before["rejected.jsonl"] == b""
    found = list(
        read_records(
            DataFile(
                path=str(tmp_path / "run/export/llava.json"), image_root=str(scenes / "images")
            )
        )
    )
    kept = (tmp_path / "run/kept.jsonl").read_text(encoding="utf-8").splitlines()
    assert [getattr(record, "id", None) for record in found] == [json.loads(k)["id"] for k in kept]


def test_the_order_of_answers_and_the_number_of_workers_change_no_byte(
    tmp_path: Path, scenes: Path
) -> None:
    results = []
    for name, overrides in (("one", ["teacher.concurrency=1"]), ("many", [])):
        folder = tmp_path / name
        folder.mkdir()
        config = config_file(folder, scenes, output_dir=str(tmp_path / "run"))
        for command in ("index", "plan"):
            main([command, str(config), *overrides])
        if name == "one":
            main(["generate", str(config), *overrides])
        else:  # in three shards, the last first
            for shard in (3, 1, 2):
                main(["generate", str(config), "--shard", f"{shard}/3"])
        for command in ("verify", "clean", "export", "report"):
            main([command, str(config), *overrides])
        results.append(files_of(tmp_path / "run"))
        (tmp_path / "run").rename(tmp_path / f"run-{name}")
    assert results[0] == results[1]


def test_stage_2_trains_on_the_exported_file(tmp_path: Path, scenes: Path) -> None:
    config = config_file(tmp_path, scenes)
    main(["run", str(config)])
    run_stage(
        "stage2",
        tmp_path / "trained",
        f"data.train=[{{path: {tmp_path / 'run/export/llava.json'}, "
        f"image_root: {scenes / 'images'}}}]",
        "data.eval=[]",
        "data.max_length=1024",
        "projector=null",
        "train.max_steps=2",
    )
    assert (tmp_path / "trained/final/manifest.json").is_file()


@pytest.mark.parametrize("command", [*STAGES, "explain"])
def test_every_stage_says_what_it_takes(command: str, tmp_path: Path, scenes: Path) -> None:
    config = config_file(tmp_path, scenes)
    with pytest.raises(SystemExit) as end:
        main([command, str(config), "--help"])
    assert end.value.code == 0


def test_options_belong_to_a_stage(tmp_path: Path, scenes: Path) -> None:
    config = config_file(tmp_path, scenes)
    with pytest.raises(UserError, match="run takes no options, found '--shard'"):
        main(["run", str(config), "--shard", "1/2"])


def test_a_misspelt_setting_is_one_sentence_and_code_2(tmp_path: Path, scenes: Path) -> None:
    config = config_file(tmp_path, scenes, teachr={})
    done = subprocess.run(
        [sys.executable, "-m", "data_tools.instruct", "plan", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "did you mean 'teacher'?" in done.stderr and done.stderr.count("\n") == 1
