"""Checkpoints are complete and verified, or they are not used."""

import os
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn

from vlm_sft.checkpoint import folders, provenance, store, tensor_files
from vlm_sft.checkpoint.folders import write_checkpoint
from vlm_sft.checkpoint.format import verify
from vlm_sft.checkpoint.optimizer import optimizer_component
from vlm_sft.checkpoint.snapshot import plain_component, tensor_component
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.checkpoint.tensor_files import copy_tensors, load_tensors, save_tensors
from vlm_sft.errors import CheckpointError


def new_store(folder: Path, logged: list[str], *, keep: int = 2, model: nn.Module | None = None):  # type: ignore[no-untyped-def]
    model = model or nn.Linear(3, 2)
    weights = tensor_component(
        model.state_dict,
        lambda f, tensors: save_tensors(f / "weights.safetensors", tensors),
        lambda f: copy_tensors(load_tensors(f / "weights.safetensors"), model.state_dict(), f),
    )
    return CheckpointStore(
        folder, {"weights": weights}, fingerprint={"stage": "stage1"}, keep=keep, log=logged.append
    )


def damage(folder: Path) -> None:
    """Cut a file short, and only here: a hard link elsewhere keeps its content."""
    path = folder / "weights.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])


def test_the_newest_is_found_and_older_ones_are_dropped(tmp_path: Path) -> None:
    checkpoints = new_store(tmp_path, [])
    for step in (5, 10, 15):
        checkpoints.save({"step": step})
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000015",
    ]
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 15


def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    logged: list[str] = []
    checkpoints = new_store(tmp_path, logged)
    checkpoints.save({"step": 5})
    weights = checkpoints.save({"step": 10}).folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 5
    assert len(logged) == 1 and "weights.safetensors has changed" in logged[0]


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_a_flipped_bit_of_the_manifest_itself_is_seen(tmp_path: Path, place: int) -> None:
    manifest = new_store(tmp_path, []).save({"step": 10}).folder / "manifest.json"
    content = bytearray(manifest.read_bytes())
    content[place] ^= 1
    manifest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(manifest.parent)


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    new_store(tmp_path, []).save({"step": 5})
    (new_store(tmp_path, []).save({"step": 10}).folder / "weights.safetensors").unlink()
    resumed = new_store(tmp_path, [], keep=1)
    newest = resumed.newest()
    assert newest is not None and newest.step == 5
    resumed.save({"step": 7})
    newest = new_store(tmp_path, []).newest()
    assert newest is not None and newest.step == 7


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    for step in (5, 10):
        new_store(tmp_path, []).save({"step": step})
    damage(tmp_path / "checkpoints" / "step-00000010")
    resumed = new_store(tmp_path, [], keep=2)
    newest = resumed.newest()
    assert newest is not None and newest.step == 5
    damage(resumed.save({"step": 15}).folder)
    newest = new_store(tmp_path, []).newest()
    assert newest is not None and newest.step == 5


def test_a_save_that_does_not_read_back_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = new_store(tmp_path, [], keep=1)
    checkpoints.save({"step": 5})
    write_folder = folders.write_folder

    def on_a_bad_disk(folder: Path, *rest: Any, **more: Any) -> None:
        write_folder(folder, *rest, **more)
        damage(folder)

    monkeypatch.setattr(store, "write_folder", on_a_bad_disk)
    with pytest.raises(CheckpointError, match=r"step-00000010: weights\.safetensors has changed"):
        checkpoints.save({"step": 10})
    newest = new_store(tmp_path, []).newest()
    assert newest is not None and newest.step == 5


def test_all_of_a_checkpoint_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    named: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def recorded_rename(source: Path, target: Path) -> None:
        if target.name == "step-00000005":
            content = [source, *source.rglob("*")]
            assert {"weights.safetensors", "manifest.json"} <= {path.name for path in content}
            assert [p.name for p in content if p.stat().st_ino not in synced] == []
            named.append(target.name)
            synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    folder = new_store(tmp_path, []).save({"step": 5}).folder
    assert named == [folder.name]
    assert folder.parent.stat().st_ino in synced  # the name itself


def test_what_is_saved_is_what_was_when_the_save_began(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    checkpoints = new_store(tmp_path, [], model=layer)
    write = checkpoints.snapshot({"step": 5})
    with torch.no_grad():
        layer.weight.add_(1.0)
    saved = load_tensors(write().folder / "weights.safetensors")
    assert torch.equal(saved["weight"], before)


def test_a_trainable_tensor_that_is_not_saved_is_named_before_writing(tmp_path: Path) -> None:
    checkpoints = new_store(tmp_path, [])
    checkpoints.trainable = {"forgotten.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=r"forgotten\.weight is trainable but no part"):
        checkpoints.save({"step": 5})
    assert checkpoints.step_folders() == []


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "notes.txt", "language_model/._x.json"])
def test_a_file_that_no_library_loads_is_a_warning_and_stays_out_of_final(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = new_store(tmp_path, [])
    folder = checkpoints.save({"step": 5}).folder
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 5
    assert f"{folder}: {name} is not part of the checkpoint" in capsys.readouterr().err
    assert not (checkpoints.finish(newest).folder / name).exists()
    assert (folder / name).read_bytes() == b"x"


def test_when_every_checkpoint_is_damaged_the_advice_deletes_nothing(tmp_path: Path) -> None:
    damage(new_store(tmp_path, []).save({"step": 5}).folder)
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is complete") as caught:
        new_store(tmp_path, []).newest()
    assert "delete" not in str(caught.value) and "move that directory away" in str(caught.value)


def test_a_file_that_a_library_would_load_is_refused_unless_the_manifest_names_it(
    tmp_path: Path,
) -> None:
    folder = new_store(tmp_path, []).save({"step": 5}).folder
    (folder / "language_model").mkdir()
    (folder / "language_model" / "adapter_config.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not in its .* move that"):
        verify(folder)


def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(building: Path, folder: Path, log: object) -> None:
        os.rename(folder, folder.with_name(f".{folder.name}.replaced"))
        raise KeyboardInterrupt

    checkpoints = new_store(tmp_path, [], keep=1)
    checkpoints.save({"step": 5})
    monkeypatch.setattr(folders, "move_into_place", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save({"step": 5})
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 5
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_silently(
    tmp_path: Path,
) -> None:
    checkpoints = new_store(tmp_path, [])
    (checkpoints.save({"step": 5}).folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is complete"):
        checkpoints.newest()


def test_what_a_kill_leaves_is_swept_and_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = new_store(tmp_path, [])
    leftover = folders.begin_temporary(tmp_path / "checkpoints" / "step-00000010")
    (leftover / "weights.safetensors").write_bytes(b"half")
    assert checkpoints.newest() is None
    assert not leftover.exists()


def test_a_full_disk_met_by_safetensors_is_an_os_error_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensor_files, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        new_store(tmp_path, []).save({"step": 1})
    assert caught.value.errno == 28
    assert str(tmp_path) in str(caught.value.filename)


def test_a_failed_write_leaves_the_older_checkpoint_and_no_temporary_folder(tmp_path: Path) -> None:
    checkpoints = new_store(tmp_path, [])
    checkpoints.save({"step": 5})

    def disk_is_full(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    checkpoints.components = {"bad": plain_component(disk_is_full)}
    with pytest.raises(OSError, match="No space"):
        checkpoints.save({"step": 10})
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_too_little_space_is_reported_before_writing(tmp_path: Path) -> None:
    checkpoints = new_store(tmp_path, [])
    checkpoints.num_bytes = 10**18
    with pytest.raises(CheckpointError, match=r"takes about 1000000000\.0 GB"):
        checkpoints.save({"step": 1})


def test_final_is_a_complete_checkpoint_that_shares_the_bytes(tmp_path: Path) -> None:
    checkpoints = new_store(tmp_path, [])
    last = checkpoints.save({"step": 5})
    final = checkpoints.finish(last)
    assert final.manifest == last.manifest
    assert os.path.samefile(
        final.folder / "weights.safetensors", last.folder / "weights.safetensors"
    )
    assert checkpoints.finished() is not None


def test_a_damaged_final_does_not_count_as_finished(tmp_path: Path) -> None:
    logged: list[str] = []
    checkpoints = new_store(tmp_path, logged)
    damage(checkpoints.finish(checkpoints.save({"step": 5})).folder)
    assert checkpoints.finished() is None
    assert len(logged) == 1 and "final: weights.safetensors has changed" in logged[0]


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    checkpoints = new_store(tmp_path, [])
    checkpoint = checkpoints.save({"step": 5})
    checkpoints.fingerprint = {"stage": "stage2"}
    with pytest.raises(CheckpointError, match='stage is "stage1", but this run\'s is "stage2"'):
        checkpoints.load(checkpoint)


def test_a_checkpoint_is_written_by_a_package_that_runs_from_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("vlm_sft.utils.libraries.version", version)
    saved = new_store(tmp_path, []).save({"step": 5})
    assert saved.manifest["software"]["vlm-sft"] == "not installed"


def test_other_software_is_reported_and_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    checkpoints = new_store(tmp_path, logged)
    saved = checkpoints.save({"step": 5})
    checkpoints.load(saved)
    assert logged == []
    assert len(saved.manifest["software"]["code"]) == 64
    now = {**provenance.software(), "torch": "9.9.9", "code": "f" * 64}
    monkeypatch.setattr(store, "software", lambda: now)
    checkpoints.load(saved)
    (line,) = logged
    assert "torch " in line and "now 9.9.9" in line
    assert "code" in line and "now ffffffffffff" in line


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ({"a": torch.zeros(2)}, "tensor 'b' is missing"),
        ({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}, "tensor 'c' is not in"),
        ({"a": torch.zeros(2), "b": torch.zeros(3, 4)}, "tensor 'b' is 3x4, but this model's is 3"),
    ],
)
def test_loading_is_strict_both_ways(found: dict[str, torch.Tensor], sentence: str) -> None:
    live = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(CheckpointError, match=sentence):
        copy_tensors(found, live, "somewhere")
    assert live["a"].tolist() == [1, 1]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_flipped_bit_and_every_cut_is_detected(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("rot") / "step-00000001"
    weights = {"w": torch.arange(12.0)}
    write_checkpoint(
        folder,
        {"w": plain_component(lambda f: save_tensors(f / "w.safetensors", weights))},
        {"step": 1},
    )
    content = bytearray((folder / "w.safetensors").read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (folder / "w.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError):
        verify(folder)


def stepped(seed: int, steps: int) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(seed)
    layer = nn.Linear(4, 3)
    names = [name for name, _ in layer.named_parameters()]
    group = {"params": list(layer.parameters()), "names": names, "part": "projector"}
    optimizer = torch.optim.AdamW([group], lr=0.1)
    for step in range(steps):
        step_once(layer, optimizer, step)
    return layer, optimizer


def step_once(layer: nn.Linear, optimizer: torch.optim.AdamW, step: int) -> None:
    optimizer.zero_grad()
    layer(torch.full((1, 4), float(step))).square().sum().backward()
    optimizer.step()


def test_an_optimizer_resumes_from_its_files_bit_for_bit(tmp_path: Path) -> None:
    layer, optimizer = stepped(0, 3)
    optimizer_component(optimizer).snapshot()(tmp_path)
    other, resumed = stepped(1, 0)
    other.load_state_dict(layer.state_dict())
    load = optimizer_component(resumed).load
    assert load is not None
    load(tmp_path)
    step_once(layer, optimizer, 3)
    step_once(other, resumed, 3)
    assert torch.equal(layer.weight, other.weight)


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    optimizer_component(stepped(0, 1)[1]).snapshot()(tmp_path)
    layer = nn.Linear(4, 3, bias=False)
    group = {"params": list(layer.parameters()), "names": ["weight"], "part": "projector"}
    load = optimizer_component(torch.optim.AdamW([group])).load
    assert load is not None
    with pytest.raises(CheckpointError, match="hold 2 tensors in 1 groups, this run's 1 in 1"):
        load(tmp_path)


# --- what others put into a run's folder


def test_a_leftover_is_deleted_only_by_name_and_content(tmp_path: Path) -> None:
    checkpoints = new_store(tmp_path, [])
    names = (".mywork.tmp", ".final.1a2b3c4d.tmp", "checkpoints/.step-00000001.1a2b3c4d.tmp")
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "notes.txt").write_text("mine")
    (tmp_path / ".rehearsal.tmp").write_text("mine")
    checkpoints.newest()
    assert all((tmp_path / name / "notes.txt").read_text() == "mine" for name in names)
    assert (tmp_path / ".rehearsal.tmp").read_text() == "mine"


def test_the_rest_of_a_deletion_that_was_killed_is_deleted(tmp_path: Path) -> None:
    checkpoints = new_store(tmp_path, [], keep=2)
    first = checkpoints.save({"step": 5}).folder
    checkpoints.save({"step": 10})
    trash = first.with_name(f".{first.name}.1a2b3c4d.tmp")
    os.rename(first, trash)
    (trash / "weights.safetensors").unlink()
    checkpoints.newest()
    assert not trash.exists()


@pytest.mark.parametrize("foreign", ["step-1", "step-00000001"])
def test_a_folder_of_others_among_the_checkpoints_stays(tmp_path: Path, foreign: str) -> None:
    logged: list[str] = []
    notes = tmp_path / "checkpoints" / foreign / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    checkpoints = new_store(tmp_path, logged, keep=1)
    for step in (5, 10, 15):
        checkpoints.save({"step": step})
    assert notes.read_text() == "mine"
    kept = {"step-1": [], "step-00000001": ["no valid manifest"]}[foreign]
    assert len(logged) == len(kept) and all(words in logged[0] for words in kept)
    assert [f.name for f in checkpoints.step_folders() if f != notes.parent] == ["step-00000015"]


def test_a_checkpoint_with_a_file_of_others_is_not_pruned(tmp_path: Path) -> None:
    logged: list[str] = []
    checkpoints = new_store(tmp_path, logged, keep=1)
    notes = checkpoints.save({"step": 5}).folder / "notes.txt"
    notes.write_text("mine")
    for step in (10, 15):
        checkpoints.save({"step": step})
    assert notes.read_text() == "mine"
    assert [f.name for f in checkpoints.step_folders()] == ["step-00000015", "step-00000005"]
    assert len(logged) == 1 and "notes.txt is not in its manifest" in logged[0]


def test_what_a_file_manager_left_in_a_checkpoint_does_not_keep_it(tmp_path: Path) -> None:
    checkpoints = new_store(tmp_path, [], keep=1)
    (checkpoints.save({"step": 5}).folder / ".DS_Store").write_text("")
    checkpoints.save({"step": 10})
    assert [f.name for f in checkpoints.step_folders()] == ["step-00000010"]


@pytest.mark.parametrize("what", ["file added", "file edited", "folder", "file", "link"])
def test_what_others_have_under_the_name_of_a_checkpoint_is_kept(tmp_path: Path, what: str) -> None:
    logged: list[str] = []
    checkpoints = new_store(tmp_path, logged)
    saved = checkpoints.save({"step": 5})
    final, mine = tmp_path / "final", tmp_path / "elsewhere"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    if what == "folder":
        shutil.copytree(mine, final)
    elif what == "file":
        final.write_text("mine")
    elif what == "link":
        final.symlink_to(mine)
    else:
        checkpoints.finish(saved)
        name = "notes.txt" if what == "file added" else "weights.safetensors"
        (final / name).unlink(missing_ok=True)  # a link into the step's checkpoint
        (final / name).write_text("mine")
    checkpoints.finish(saved)
    verify(final)
    kept = tmp_path / "final.kept-1"
    found = (
        kept
        if what == "file"
        else kept / ("weights.safetensors" if "edited" in what else "notes.txt")
    )
    assert found.read_text() == "mine" and (mine / "notes.txt").read_text() == "mine"
    assert len(logged) == 1 and str(kept) in logged[0]
    checkpoints.finish(saved)
    assert not (tmp_path / "final.kept-2").exists()


def test_final_holds_only_what_the_manifest_lists(tmp_path: Path) -> None:
    checkpoints = new_store(tmp_path, [])
    saved = checkpoints.save({"step": 5})
    (saved.folder / "notes.txt").write_text("mine")
    assert not (checkpoints.finish(saved).folder / "notes.txt").exists()
