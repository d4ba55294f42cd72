"""The check command finds everything that would stop a run later."""

import json
import tracemalloc
from pathlib import Path

import pytest

from vlm_sft import check
from vlm_sft.checkpoint.run_dir import own_run_dir
from vlm_sft.checks.results import CheckResults
from vlm_sft.commands import check as command
from vlm_sft.config.schema import dump_config, load_config
from vlm_sft.data.build import load_chat_tokenizer

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


def empty_answers(tmp_path: Path, count: int) -> str:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": " "}]
    path = tmp_path / "empty.json"
    path.write_text(json.dumps([{"id": f"r{i}", "conversations": turns} for i in range(count)]))
    return f"data.train.0.path={path}"


def test_a_good_configuration_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([CONFIG, f"output_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "24 of 24 records can be used" in out
    assert "was saved and read back" in out
    assert "on this machine for 30 steps, by this batch's time" in out
    assert "the run can start" in out
    assert list(tmp_path.iterdir()) == []
    assert "consumers" not in out and "would load the exported folder" not in out
    assert "about other programs not shown; --all prints them" in out
    assert check.main([CONFIG, f"output_dir={tmp_path}", "--all"]) == 0
    out = capsys.readouterr().out
    assert "consumers" in out and "not shown" not in out


def test_fewer_records_than_a_batch_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main([CONFIG, f"output_dir={tmp_path}", "train.global_batch_size=100"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "an epoch has 24 records and train.global_batch_size is 100" in out


def test_few_steps_of_a_new_projector_are_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [CONFIG, f"output_dir={tmp_path}", "train.epochs=1"]
    assert check.main([*words, "train.global_batch_size=24"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "tokens; 1 step │" in out and "1 step teach" not in out
    assert "with 1 step a projector that begins with random weights learns little" in out
    assert check.main([*words, "train.epochs=10", "train.global_batch_size=8"]) == 0
    assert "learns little" not in capsys.readouterr().out


def test_validation_images_in_the_training_data_are_warnings_and_fail_with_strict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alike = "data.eval=[{path: configs/tiny/data/captions.json}]"
    assert check.main([CONFIG, "--no-model", alike]) == 0
    out = capsys.readouterr().out
    assert "24 held-out records show an image that is trained on too" in " ".join(out.split())
    assert check.main([CONFIG, "--no-model", "--strict", alike]) == 2


def test_all_bad_records_are_counted_and_twenty_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main([CONFIG, "--no-model", empty_answers(tmp_path, 23)]) == 2
    output = capsys.readouterr()
    assert output.err.count("bad record:") == 20
    assert "and 3 more bad records" in output.err
    assert "0 of 23 records can be used" in output.out


def test_many_missing_images_are_one_sentence_with_the_folder_and_the_nearest_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    root = f"data.train.0.image_root={tmp_path / 'image'}"
    assert check.main([CONFIG, "--no-model", bad_data(tmp_path, 23), root]) == 2
    output = capsys.readouterr()
    (line,) = [line for line in output.err.splitlines() if line.startswith("bad record")]
    assert "23 of 23 records name an image that does not exist" in line
    assert "e.g. 'gone-0.png', 'gone-1.png', 'gone-2.png'; searched in the folder" in line
    assert f"{tmp_path / 'image'}, which does not exist; 'images' exists" in line
    assert "more bad records" not in output.err


def test_few_missing_images_are_told_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main([CONFIG, "--no-model", bad_data(tmp_path, 3)]) == 2
    assert capsys.readouterr().err.count("bad record: VS201: ") == 3


def test_a_bad_output_dir_is_said_first_and_last_and_with_another_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    started = load_config(CONFIG, [f"output_dir={run}"])
    own_run_dir(started)
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(started))
    (tmp_path / "run-2").mkdir()
    given = [CONFIG, "--no-model", f"output_dir={run}", "optim.weight_decay=0.5"]
    assert check.main(given) == 2
    output = capsys.readouterr()
    assert output.err.startswith("BAD output_dir: ")
    assert f"choose another output_dir, e.g. output_dir={tmp_path / 'run-3'}" in output.err
    rows = output.out.splitlines()
    bad = next(number for number, row in enumerate(rows) if "BAD" in row)
    assert "output_dir" in rows[bad]
    assert not any(" good " in row or " note " in row for row in rows[bad:])


def test_every_bad_record_is_in_the_file_of_bad_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "lists" / "bad.jsonl"
    assert check.main([CONFIG, "--no-model", "--bad", str(listed), bad_data(tmp_path, 23)]) == 2
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(23)]
    assert {row["reason"] for row in rows} == {"image_missing"}
    assert rows[22]["where"] == f"{tmp_path / 'bad.json'}[22]"
    assert "gone-22.png" in rows[22]["message"]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_memory_does_not_grow_with_the_text_of_the_records(tmp_path: Path, ending: str) -> None:
    def peak(count: int) -> int:
        turns = [{"from": "human", "value": "Why? " * 1000}, {"from": "gpt", "value": ""}]
        rows = [json.dumps({"id": f"r{i}", "conversations": turns}) for i in range(count)]
        path = tmp_path / f"{count}.{ending}"
        path.write_text("\n".join(rows) if ending == "jsonl" else f"[{','.join(rows)}]")
        config = load_config(CONFIG, [f"data.train.0.path={path}", "data.eval=[]"])
        chat_tokenizer = load_chat_tokenizer(config)
        with command.open_bad_list(str(tmp_path / "bad.jsonl")) as listed:
            tracemalloc.start()
            assert command.check_records(config, chat_tokenizer, CheckResults(), listed) == count
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        return most

    peak(50)  # loads what is loaded once
    # The items of a JSON list are located first, which takes a small object for each.
    assert peak(1600) - peak(200) < 1400 * 600 < 1400 * 5000


def test_records_that_are_too_long_are_bad(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main([CONFIG, "data.max_length=25", f"output_dir={tmp_path}"]) == 2
    assert "takes 26 tokens" in capsys.readouterr().err
