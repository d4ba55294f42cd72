"""Checkpoints are complete and proven, or they are not used."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn

from vlm_sft.errors import CheckpointError
from vlm_sft.train import checkpoint
from vlm_sft.train.checkpoint import (
    CheckpointStore,
    copy_tensors,
    load_tensors,
    plain_component,
    save_tensors,
    tensor_component,
    verify,
    write_checkpoint,
)
from vlm_sft.train.optimizer_state import optimizer_component


def store(folder: Path, said: list[str], *, keep: int = 2, model: nn.Module | None = None):  # type: ignore[no-untyped-def]
    model = model or nn.Linear(3, 2)
    weights = tensor_component(
        model.state_dict,
        lambda f, tensors: save_tensors(f / "weights.safetensors", tensors),
        lambda f: copy_tensors(load_tensors(f / "weights.safetensors"), model.state_dict(), f),
    )
    return CheckpointStore(
        folder, {"weights": weights}, facts={"stage": "stage1"}, keep=keep, say=said.append
    )


def test_the_newest_is_found_and_older_ones_are_dropped(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, [])
    for step in (5, 10, 15):
        checkpoints.save({"step": step})
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000015",
    ]
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 15


def test_a_damaged_newest_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = store(tmp_path, said)
    checkpoints.save({"step": 5})
    weights = checkpoints.save({"step": 10}).folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 5
    assert len(said) == 1 and "weights.safetensors has changed" in said[0]


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_a_flipped_bit_of_the_manifest_itself_is_seen(tmp_path: Path, place: int) -> None:
    manifest = store(tmp_path, []).save({"step": 10}).folder / "manifest.json"
    content = bytearray(manifest.read_bytes())
    content[place] ^= 1
    manifest.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(manifest.parent)


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_saved(tmp_path: Path) -> None:
    store(tmp_path, []).save({"step": 5})
    (store(tmp_path, []).save({"step": 10}).folder / "weights.safetensors").unlink()
    resumed = store(tmp_path, [], keep=1)
    newest = resumed.newest()
    assert newest is not None and newest.step == 5
    resumed.save({"step": 7})
    newest = store(tmp_path, []).newest()
    assert newest is not None and newest.step == 7


def test_a_kill_while_a_checkpoint_is_replaced_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(building: Path, folder: Path) -> None:
        os.rename(folder, folder.with_name(f".{folder.name}.replaced"))
        raise KeyboardInterrupt

    checkpoints = store(tmp_path, [], keep=1)
    checkpoints.save({"step": 5})
    monkeypatch.setattr(checkpoint, "_move_into_place", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save({"step": 5})
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 5
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over_silently(
    tmp_path: Path,
) -> None:
    checkpoints = store(tmp_path, [])
    (checkpoints.save({"step": 5}).folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints is complete"):
        checkpoints.newest()


def test_what_a_kill_leaves_is_swept_and_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, [])
    leftover = tmp_path / "checkpoints" / ".step-00000010.ab12.tmp"
    leftover.mkdir(parents=True)
    assert checkpoints.newest() is None
    assert not leftover.exists()


def test_a_full_disk_met_by_safetensors_is_an_os_error_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        store(tmp_path, []).save({"step": 1})
    assert caught.value.errno == 28
    assert str(tmp_path) in str(caught.value.filename)


def test_a_failed_write_leaves_the_older_checkpoint_and_no_temporary_folder(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, [])
    checkpoints.save({"step": 5})

    def disk_is_full(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    checkpoints.components = {"bad": plain_component(disk_is_full)}
    with pytest.raises(OSError, match="No space"):
        checkpoints.save({"step": 10})
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_too_little_space_is_told_before_writing(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, [])
    checkpoints.num_bytes = 10**18
    with pytest.raises(CheckpointError, match=r"takes about 1000000000\.0 GB"):
        checkpoints.save({"step": 1})


def test_final_is_a_complete_checkpoint_that_shares_the_bytes(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, [])
    last = checkpoints.save({"step": 5})
    final = checkpoints.finish(last)
    assert final.manifest == last.manifest
    assert os.path.samefile(
        final.folder / "weights.safetensors", last.folder / "weights.safetensors"
    )
    assert checkpoints.finished() is not None


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, [])
    checkpoint = checkpoints.save({"step": 5})
    checkpoints.facts = {"stage": "stage2"}
    with pytest.raises(CheckpointError, match='stage is "stage1", but this run\'s is "stage2"'):
        checkpoints.load(checkpoint)


def test_other_software_is_told_and_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    checkpoints = store(tmp_path, said)
    saved = checkpoints.save({"step": 5})
    checkpoints.load(saved)
    assert said == []
    assert len(saved.manifest["software"]["code"]) == 64
    now = {**checkpoint.software(), "torch": "9.9.9", "code": "f" * 64}
    monkeypatch.setattr(checkpoint, "software", lambda: now)
    checkpoints.load(saved)
    (line,) = said
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


def test_an_optimiser_goes_on_from_its_files_bit_for_bit(tmp_path: Path) -> None:
    layer, optimizer = stepped(0, 3)
    optimizer_component(optimizer).capture()(tmp_path)
    other, resumed = stepped(1, 0)
    other.load_state_dict(layer.state_dict())
    read = optimizer_component(resumed).read
    assert read is not None
    read(tmp_path)
    step_once(layer, optimizer, 3)
    step_once(other, resumed, 3)
    assert torch.equal(layer.weight, other.weight)


def test_an_optimiser_of_other_parameters_is_refused(tmp_path: Path) -> None:
    optimizer_component(stepped(0, 1)[1]).capture()(tmp_path)
    layer = nn.Linear(4, 3, bias=False)
    group = {"params": list(layer.parameters()), "names": ["weight"], "part": "projector"}
    read = optimizer_component(torch.optim.AdamW([group])).read
    assert read is not None
    with pytest.raises(CheckpointError, match="hold 2 tensors in 1 groups, this run's 1 in 1"):
        read(tmp_path)
