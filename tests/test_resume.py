"""A run resumes where it was, reports what differs, and records every record and step."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rounding import rounding, terms_of_a_run
from tests.tiny_runs import ROOT, TINY, rows, run
from tests.train.tiny import reset_accelerate
from vlm_sft.checkpoint import store
from vlm_sft.checkpoint.format import verify
from vlm_sft.checkpoint.run_dir import locked
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.checkpoint.tensor_files import load_tensors
from vlm_sft.commands import train as stage
from vlm_sft.errors import CheckpointError, ConfigError, UserError


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="module")
def two_steps_done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was cut off after its second step, on its own copy of the data."""
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(TINY / "data", folder / "data")
    here = Path.cwd()
    os.chdir(ROOT)
    assert run("stage1", folder / "run", *own_data(folder)) == 0
    os.chdir(here)
    for lost in ("final", "checkpoints/step-00000004"):
        shutil.rmtree(folder / "run" / lost)
    return folder


def own_data(folder: Path) -> list[str]:
    return [f"data.train.0.path={folder}/data/captions.json", "data.eval=[]"]


@pytest.fixture
def cut(two_steps_done: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may do anything to."""
    shutil.copytree(two_steps_done, tmp_path / "copy")
    allowed = "--allow-change=data.train"
    assert run("stage1", tmp_path / "copy" / "run", *own_data(tmp_path / "copy"), allowed) == 0
    shutil.rmtree(tmp_path / "copy")
    shutil.copytree(two_steps_done, tmp_path / "copy")
    return tmp_path / "copy"


def go_on(cut: Path, *overrides: str) -> int:
    moved = "--allow-change=data.train"  # the copy lies elsewhere, its content is the same
    return run("stage1", cut / "run", *own_data(cut), *overrides, moved)


def captions(cut: Path) -> list[dict[str, object]]:
    return list(json.loads((cut / "data/captions.json").read_text()))


def test_a_moved_data_folder_is_the_same_data(cut: Path) -> None:
    assert go_on(cut) == 0


def test_a_record_more_is_named_with_its_file_and_both_counts(cut: Path) -> None:
    records = captions(cut)
    (cut / "data/captions.json").write_text(json.dumps([*records, records[0]]))
    counts = f"gave {len(records)} records, now it gives {len(records) + 1}"
    with pytest.raises(CheckpointError, match=rf"captions\.json {counts}"):
        go_on(cut)


def test_two_records_that_changed_places_are_noticed(cut: Path) -> None:
    first, second, *others = captions(cut)
    (cut / "data/captions.json").write_text(json.dumps([second, first, *others]))
    with pytest.raises(CheckpointError, match="as before, but their texts, their order"):
        go_on(cut)


def test_a_rewritten_file_of_the_same_content_is_the_same_data(cut: Path) -> None:
    (cut / "data/captions.json").write_text(json.dumps(captions(cut)))
    assert go_on(cut) == 0


def test_an_allowed_change_is_reported_and_made(
    cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = "optim.learning_rate.projector=0.5"
    with pytest.raises(ConfigError, match=r"--allow-change optim\.learning_rate\.projector"):
        go_on(cut, changed)
    assert go_on(cut, changed, "--allow-change", "optim.learning_rate") == 0
    assert "  + optim.learning_rate.projector: 0.5" in capsys.readouterr().err
    rates = [row["learning_rate"]["projector"] for row in rows(cut / "run/metrics.jsonl")]
    assert max(rates[:2]) <= 1e-3 and max(rates[2:]) > 1e-3


def test_a_finished_run_can_be_made_longer_but_not_shorter(cut: Path) -> None:
    assert go_on(cut) == 0
    longer = ("train.max_steps=6", "--allow-change=train.max_steps")
    assert go_on(cut, *longer) == 0
    assert verify(cut / "run/final").step == 6
    with pytest.raises(ConfigError, match="already at step 6"):
        go_on(cut, "train.max_steps=5", "--allow-change=train.max_steps")


def test_a_longer_run_that_was_interrupted_resumes_without_a_changed_setting(
    cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert go_on(cut) == 0
    longer = ("train.max_steps=6", "--allow-change=train.max_steps")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "train", interrupted)
        go_on(cut, *longer)
    assert go_on(cut, *longer) == 0
    assert verify(cut / "run/final").step == 6


def interrupted(*_arguments: Any) -> None:
    raise KeyboardInterrupt


def test_a_frozen_part_that_is_another_now_is_refused(
    cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model = stage.load_model

    def with_another_tower(*arguments: Any) -> Any:
        model, identity = load_model(*arguments)
        with torch.no_grad():
            next(model.vision_tower.parameters()).add_(1e-3)
        return model, identity

    monkeypatch.setattr(stage, "load_model", with_another_tower)
    with pytest.raises(UserError, match="vision_tower is frozen but its weights changed"):
        go_on(cut)


def test_another_template_is_refused(cut: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.template cannot change within a run"):
        go_on(cut, "data.template=chatml")


def test_every_step_names_its_records_and_an_epoch_has_each_once(tmp_path: Path) -> None:
    assert run("stage1", tmp_path, "train.max_steps=4", "train.epochs=1") == 0
    steps = rows(tmp_path / "trained.jsonl")
    assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
    seen = [name for row in steps for name in row["records"]]
    trained = [row["id"] for row in rows(tmp_path / "ledger.jsonl")[1:]]
    assert sorted(seen) == sorted(trained)


def break_an_image(folder: Path, name: str = "red-circle-1.png") -> None:
    path = folder / "data/images" / name
    path.write_bytes(path.read_bytes()[:40])


QUARANTINE = ("data.on_error=quarantine", "train.epochs=2", "train.max_steps=null")


def with_a_broken_image(folder: Path) -> list[str]:
    shutil.copytree(TINY / "data", folder / "data")
    break_an_image(folder)
    return [*own_data(folder), *QUARANTINE]


def test_an_image_found_broken_during_training_is_skipped_and_recorded(tmp_path: Path) -> None:
    assert run("stage1", tmp_path / "run", *with_a_broken_image(tmp_path)) == 0
    head, *entries = rows(tmp_path / "run/ledger.jsonl")
    broken = [row for row in entries if row["bucket"] == "quarantined"]
    assert [row["id"] for row in broken] == ["red-circle-1"] and head["quarantined"] == 1
    seen = [name for row in rows(tmp_path / "run/trained.jsonl") for name in row["records"]]
    assert "red-circle-1" not in seen
    assert len(seen) == 2 * head["trained"]
    manifest = verify(tmp_path / "run/final").manifest
    assert [fault["reason"] for fault in manifest["quarantined"]] == [broken[0]["reason"]]


def test_a_skipped_record_stays_skipped_when_its_image_is_fixed(tmp_path: Path) -> None:
    options = [*with_a_broken_image(tmp_path), "train.epochs=3", "train.keep_last_checkpoints=9"]
    assert run("stage1", tmp_path / "run", *options) == 0
    weights = (tmp_path / "run/final/projector.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run/final")
    *newer, before, _ = CheckpointStore(tmp_path / "run", {}).step_folders()
    for folder in newer:
        shutil.rmtree(folder)
    manifest = verify(before).manifest
    assert manifest["quarantined"] and manifest["epoch"] <= 2  # so its turn comes once more
    shutil.copy(TINY / "data/images/red-circle-1.png", tmp_path / "data/images")
    assert run("stage1", tmp_path / "run", *options) == 0
    assert (tmp_path / "run/final/projector.safetensors").read_bytes() == weights


def test_more_broken_images_than_allowed_stop_the_run(tmp_path: Path) -> None:
    options = [*with_a_broken_image(tmp_path), "data.max_quarantined=0"]
    with pytest.raises(UserError, match=r"1 records could not be loaded.*red-circle-1"):
        run("stage1", tmp_path / "run", *options)


SKIP = ("train.on_nonfinite_loss=skip", "optim.max_grad_norm=null", "train.max_steps=8")


def test_a_step_with_a_nonfinite_loss_can_be_skipped_and_is_recorded(tmp_path: Path) -> None:
    # Each update multiplies the weights by about -1e12, until they overflow.
    huge = (
        "optim.learning_rate.projector=1e6",
        "optim.weight_decay=1e6",
        "optim.schedule=constant",
    )
    assert run("stage1", tmp_path, *SKIP, *huge, "data.eval=[]") == 0
    left_out = [row for row in rows(tmp_path / "trained.jsonl") if "update_left_out" in row]
    assert left_out and "not finite" in left_out[0]["update_left_out"]
    final = verify(tmp_path / "final")
    assert final.manifest["skipped_steps"] == len(left_out)
    weights = load_tensors(final.folder / "projector.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    with pytest.raises(UserError, match="1 updates were skipped before"):
        run("stage1", tmp_path / "capped", *SKIP, *huge, "train.max_skipped_steps=1")


def during(path: Path, rows_there: int, act: Callable[[], None]) -> threading.Thread:
    """Do something once a file has so many lines."""

    def wait_and_act() -> None:
        deadline = time.monotonic() + 60
        while not (path.exists() and path.read_bytes().count(b"\n") >= rows_there):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait_and_act)
    thread.start()
    return thread


def test_sigusr1_saves_and_the_run_continues(tmp_path: Path) -> None:
    steps = 60
    options = (
        f"train.max_steps={steps}",
        "train.save_every_steps=1000",
        "train.keep_last_checkpoints=9",
    )
    sender = during(tmp_path / "trained.jsonl", 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert run("stage1", tmp_path, *options, "train.epochs=1000", "train.eval_samples=0") == 0
    sender.join()
    saved = sorted(int(f.name[5:]) for f in (tmp_path / "checkpoints").iterdir())
    assert len(saved) == 2 and 3 <= saved[0] < saved[1] == steps


def test_a_run_that_is_stopped_saves_and_resumes_to_the_same_result(
    tmp_path: Path,
) -> None:
    options = ("train.max_steps=60", "train.epochs=1000", "train.save_every_steps=20")
    options = (*options, "data.eval=[]")
    path = tmp_path / "asked" / "trained.jsonl"
    sender = during(path, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run("stage1", tmp_path / "asked", *options) == 143
    sender.join()
    newest = CheckpointStore(tmp_path / "asked", {}).newest()
    assert newest is not None and 3 <= newest.step == len(rows(path)) < 60
    for name in ("asked", "untouched"):
        assert run("stage1", tmp_path / name, *options) == 0
    asked, untouched = (verify(tmp_path / name / "final") for name in ("asked", "untouched"))
    file = "projector.safetensors"
    assert asked.manifest["files"][file] == untouched.manifest["files"][file]


def test_time_passing_saves_too(tmp_path: Path) -> None:
    options = ("train.save_every_steps=1000", "train.save_every_minutes=0.000001")
    assert run("stage1", tmp_path, *options, "train.keep_last_checkpoints=9") == 0
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_save_that_fails_ends_the_run_and_leaves_the_one_before(
    background: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = store.write_folder
    written: list[Path] = []

    def third_fails(folder: Path, *rest: object) -> None:
        written.append(folder)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(folder))
        write(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(store, "write_folder", third_fails)
    options = ("train.max_steps=40", "train.epochs=1000", f"train.async_checkpointing={background}")
    with pytest.raises((CheckpointError, OSError), match="No space left"):
        run("stage1", tmp_path, *options)
    assert not (tmp_path / "final").exists()
    newest = CheckpointStore(tmp_path, {}).newest()
    assert newest is not None and newest.step == 2 * (len(written) - 1)


def test_a_loader_worker_that_outlives_its_run_does_not_keep_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path, enabled=True):
        end, done = os.pipe()
        begun, begin = os.pipe()
        child = os.fork()
        if not child:  # as a worker of a loader whose parent is killed
            os.write(begin, b"x")
            os.read(end, 1)
            os._exit(0)
        os.read(begun, 1)
    try:
        with locked(tmp_path, enabled=True):
            assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.write(done, b"x")
        os.waitpid(child, 0)


PACKED = ["train.micro_batch_size=null", "train.packing.max_tokens=300"]


def multiplied(folder: Path, times: int = 3) -> list[str]:
    """The tiny captions with every image shown by several records."""
    source = json.loads((TINY / "data" / "captions.json").read_text())
    records = [{**r, "id": f"{r['id']}-{i}"} for i in range(times) for r in source]
    (folder / "many.json").write_text(json.dumps(records))
    root = f"data.train.0.image_root={TINY / 'data'}"
    return [f"data.train.0.path={folder / 'many.json'}", root, "data.eval=[]"]


def trained_records(out: Path) -> list[list[str]]:
    return [row["records"] for row in rows(out / "trained.jsonl")]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in rows(out / "metrics.jsonl") if "loss" in row]


def test_packed_runs_take_the_same_records_in_the_same_order_to_the_same_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = multiplied(tmp_path)
    assert run("stage1", tmp_path / "padded", *data) == 0
    capsys.readouterr()
    assert run("stage1", tmp_path / "packed", *data, *PACKED) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "activation checkpointing: none (a step of 8 records in" in said
    assert "rows of up to 300 tokens per step" in said and "save 0.0% of all tokens" in said
    assert trained_records(tmp_path / "packed") == trained_records(tmp_path / "padded")
    bound = rounding(terms_of_a_run())
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=bound)


def test_an_interrupted_packed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    ways = [*multiplied(tmp_path), *PACKED, "train.share_image_prefix=true"]
    assert run("stage1", tmp_path / "whole", *ways) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for lost in ("final", "checkpoints/step-00000004"):
        shutil.rmtree(tmp_path / "cut" / lost)
    assert run("stage1", tmp_path / "cut", *ways) == 0
    weights = [tmp_path / name / "final" / "projector.safetensors" for name in ("whole", "cut")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert trained_records(tmp_path / "cut") == trained_records(tmp_path / "whole")
    # records of one image stand together
    first = [name.rsplit("-", 1)[0] for name in trained_records(tmp_path / "whole")[0]]
    assert len(set(first)) < len(first) / 2


def test_padded_may_become_packed_on_request_but_shared_prefixes_are_another_order(
    tmp_path: Path,
) -> None:
    data = multiplied(tmp_path)
    assert run("stage1", tmp_path / "run", *data, "train.max_steps=2") == 0
    more = [*data, *PACKED, "--allow-change=train.max_steps"]
    with pytest.raises(ConfigError, match=r"add .*--allow-change train\.packing\.max_tokens"):
        run("stage1", tmp_path / "run", *more)
    packing = ["--allow-change=train.packing", "--allow-change=train.micro_batch_size"]
    with pytest.raises(ConfigError, match=r"train\.share_image_prefix cannot change within a run"):
        run("stage1", tmp_path / "run", *more, *packing, "train.share_image_prefix=true")
    assert run("stage1", tmp_path / "run", *more, *packing) == 0
    assert len(trained_records(tmp_path / "run")) == 4
