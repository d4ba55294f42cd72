"""A run writes into a folder of its own and loses nothing that the user put there."""

import json
import os
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator

from tests.tiny_runs import TINY, run
from vlm_sft import check
from vlm_sft.checkpoint.run_dir import (
    WRITTEN,
    locked,
    own_run_dir,
    require_unlocked,
    set_foreign_files_aside,
    store_config,
)
from vlm_sft.config.schema import RunConfig, dump_config, load_config
from vlm_sft.errors import UserError
from vlm_sft.train.metrics import MetricsFile, RunMetrics
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.ownership import MARKER, own_directory

pytestmark = pytest.mark.usefixtures("in_the_repository")


def config_for(folder: Path, *overrides: str) -> RunConfig:
    return load_config(TINY / "stage1.yaml", [f"output_dir={folder}", *overrides])


def unmarked_run(folder: Path) -> Path:
    """A run's folder as versions without markers left it."""
    write_json(folder / "final" / "manifest.json", {"format": 2, "step": 1, "files": {}})
    (folder / "config.yaml").write_text(dump_config(config_for(folder)))
    return folder


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    "name", ["final/a.txt", "metrics.jsonl", "config.yaml", ".mywork.tmp/notes.txt", "notes.txt"]
)
def test_a_folder_with_files_of_others_is_refused_and_left_as_it_is(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = content(tmp_path)
    with pytest.raises(UserError, match=r"not empty .* nothing was changed") as caught:
        run("stage1", tmp_path)
    assert caught.value.reason == "not_ours" and "\n" not in str(caught.value)
    assert content(tmp_path) == before


def test_a_configuration_inside_an_unmarked_folder_is_no_reason_to_write_there(
    tmp_path: Path,
) -> None:
    text = "# my notes\n" + (TINY / "stage1.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"not empty \('config.yaml'\)"):
        own_run_dir(load_config(tmp_path / "config.yaml", [f"output_dir={tmp_path}"]))
    assert content(tmp_path) == {"config.yaml": text.encode()}


def test_a_run_of_a_version_without_markers_is_taken_over(tmp_path: Path) -> None:
    folder = unmarked_run(tmp_path / "run")
    own_run_dir(config_for(folder))
    assert (folder / MARKER).exists()
    own_run_dir(config_for(folder))


def test_a_copied_checkpoint_alone_makes_no_run(tmp_path: Path) -> None:
    folder = unmarked_run(tmp_path / "run")
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError, match="not empty"):
        own_run_dir(config_for(folder))


def test_a_run_does_not_write_into_what_it_reads(tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(TINY / "data", data)
    with pytest.raises(UserError, match="is read by this command"):
        own_run_dir(config_for(tmp_path / "p", f"projector={tmp_path}", f"output_dir={tmp_path}"))
    folder = unmarked_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"the run would replace .*final, which it reads"):
        own_run_dir(config_for(folder, f"projector={folder / 'final'}"))
    with pytest.raises(UserError, match="where a training run keeps checkpoints"):
        own_run_dir(config_for(folder / "final" / "x"))


def test_a_file_in_the_place_of_the_checkpoints_is_found_before_training(tmp_path: Path) -> None:
    own_run_dir(config_for(tmp_path))
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(UserError, match="keeps its checkpoints under this name"):
        own_run_dir(config_for(tmp_path))


def test_check_reports_that_the_folder_would_be_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert check.main([str(TINY / "stage1.yaml"), "--no-model", f"output_dir={tmp_path}"]) == 2
    assert "not empty" in " ".join(capsys.readouterr().out.split())
    assert list(content(tmp_path)) == ["notes.txt"]


def test_a_configuration_that_means_the_same_keeps_its_comments(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    text = "# my notes\n" + dump_config(config)
    (tmp_path / "config.yaml").write_text(text)
    for has_checkpoints in (False, True):
        store_config(config, has_checkpoints=has_checkpoints)
        assert (tmp_path / "config.yaml").read_text() == text


@pytest.mark.parametrize("text", ["# my notes\n{same}", "not: [yaml", "\x00", "{same}"])
def test_a_configuration_edited_by_hand_is_kept_when_another_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    config, path = config_for(tmp_path), tmp_path / "config.yaml"
    path.write_text(text.format(same=dump_config(config)))
    before = path.read_text()
    store_config(config.model_copy(update={"seed": 7}), has_checkpoints=False)
    assert load_config(path).seed == 7
    kept, logged = tmp_path / "config.yaml.kept-1", capsys.readouterr().err
    if text == "{same}":  # written by a run
        assert not kept.exists() and not logged
    else:
        assert kept.read_text() == before and str(kept) in logged


def test_a_linked_configuration_is_not_written_through(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(dump_config(config_for(tmp_path)))
    before = mine.read_text()
    own_directory(tmp_path / "run", "training run")
    (tmp_path / "run" / "config.yaml").symlink_to(mine)
    store_config(config_for(tmp_path / "run"), has_checkpoints=False)
    assert mine.read_text() == before
    assert not (tmp_path / "run" / "config.yaml").is_symlink()


def test_a_finished_run_that_is_repeated_keeps_every_file_of_the_user(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    one = "train.max_steps=1"
    assert run("stage1", folder, one) == 0
    assert {path.name for path in folder.iterdir()} <= {MARKER, *WRITTEN}
    names = ("final/a.txt", "checkpoints/step-1/a.txt", ".mywork.tmp/a.txt", "a.txt")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "report.html").write_text("mine")
    longer = ("train.max_steps=2", "--allow-change=train.max_steps")
    assert run("stage1", folder, *longer, "train.keep_last_checkpoints=1") == 0
    found = {path.read_text() for path in folder.rglob("a.txt")}
    assert found == set(names)
    assert (folder / "report.html.kept-1").read_text() == "mine"
    assert "generator" in (folder / "report.html").read_text()[:500]


def test_a_lock_that_no_run_wrote_is_refused_and_kept(tmp_path: Path) -> None:
    run_dir, notes = tmp_path / "run", tmp_path / "notes"
    run_dir.mkdir()
    notes.write_text("my thesis")
    lock = run_dir / ".lock"
    places = (lambda: lock.symlink_to(notes), lambda: os.link(notes, lock), lambda: os.mkfifo(lock))
    for place in places:
        place()
        for command in (lambda: require_unlocked(run_dir), lambda: enter_and_leave(run_dir)):
            with pytest.raises(UserError, match=r"\.lock: expected the lock file") as caught:
                command()
            assert caught.value.reason == "not_ours"
        lock.unlink()
    assert notes.read_text() == "my thesis"
    for _ in range(2):  # its own lock is taken again
        enter_and_leave(run_dir)
        require_unlocked(run_dir)
    lock.write_text("\0" * 40)
    enter_and_leave(run_dir)
    assert lock.read_text().startswith(f"process {os.getpid()} on ")


def enter_and_leave(run_dir: Path) -> None:
    with locked(run_dir, enabled=True):
        pass


FOREIGN = {
    "ledger.jsonl": '{"total": 1}\nmy notes\n',
    "ledger_eval.jsonl": "my thesis",
    "parts.json": '{"mine": 1}',
    "export_outlook.json": "[" * 100_000,
    "activation_checkpointing.json": "my notes",
}


def test_foreign_content_under_a_runs_names_is_kept_and_its_own_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("stage1", tmp_path, "train.max_steps=2") == 0
    before = sorted(os.listdir(tmp_path))
    set_foreign_files_aside(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    for name, text in FOREIGN.items():
        (tmp_path / name).write_text(text)
    for name in ("metrics.jsonl", "trained.jsonl"):
        (tmp_path / name).write_text("my thesis")
    longer = ["train.max_steps=3", "--allow-change", "train.max_steps"]
    capsys.readouterr()
    assert run("stage1", tmp_path, *longer) == 0
    printed = capsys.readouterr().err
    for name, text in (
        FOREIGN | dict.fromkeys(("metrics.jsonl", "trained.jsonl"), "my thesis")
    ).items():
        assert (tmp_path / f"{name}.kept-1").read_text() == text
        assert f"now {tmp_path / name}.kept-1" in printed


def test_rows_of_others_are_kept_although_the_run_starts_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("epoch,loss\n1,2.5")
    MetricsFile(tmp_path / "metrics.jsonl", last_step=0).write({"step": 1})
    assert (tmp_path / "metrics.jsonl.kept-1").read_text() == "epoch,loss\n1,2.5"
    MetricsFile(tmp_path / "metrics.jsonl", last_step=0)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "metrics.jsonl.kept-1"]


def test_steps_of_an_earlier_start_that_no_checkpoint_has_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accelerator = Accelerator(cpu=True)
    path = tmp_path / "metrics.jsonl"
    with caplog.at_level("INFO"):
        RunMetrics(tmp_path, accelerator, first_step=0, total_steps=9)
        assert caplog.text == ""
        path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 8)))
        RunMetrics(tmp_path, accelerator, first_step=5, total_steps=9)
        RunMetrics(tmp_path, accelerator, first_step=0, total_steps=9)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: steps {steps} of an earlier start were not saved in a checkpoint; starting from "
        f"step {first}"
        for steps, first in (("6 to 7", 5), ("1 to 5", 0))
    ]


@pytest.mark.parametrize("name", sorted(WRITTEN - {"checkpoints"}))
def test_a_pipe_with_the_name_of_a_runs_file_is_refused_without_waiting(
    tmp_path: Path, name: str
) -> None:
    own_run_dir(config_for(tmp_path))
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="expected a regular file, found a pipe"):
        own_run_dir(config_for(tmp_path))
