"""Every way in which a checkpoint cannot be used or written has its own code."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vlm_sft.checkpoint.async_save import CheckpointSaver
from vlm_sft.checkpoint.format import Checkpoint, verify
from vlm_sft.checkpoint.snapshot import plain_component
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.checkpoint.tensor_files import check_tensors
from vlm_sft.errors import CheckpointError, UserError
from vlm_sft.errors.codes import CODE_OF_FINGERPRINT


def write_weights(folder: Path) -> None:
    (folder / "weights").write_bytes(b"weights")


def store(folder: Path, write: Callable[[Path], None] | None = None) -> CheckpointStore:
    parts = {"weights": plain_component(write or write_weights)}
    return CheckpointStore(folder, parts, fingerprint={"stage": "stage1"}, log=lambda _: None)


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


def add(path: Path) -> None:
    path.parent.mkdir()
    path.touch()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "file missing": (lambda f: (f / "weights").unlink(), "VS111"),
    "file changed": (lambda f: (f / "weights").write_bytes(b"weightz"), "VS111"),
    "file cut": (lambda f: (f / "weights").write_bytes(b"wei"), "VS111"),
    "file too many": (lambda f: add(f / "language_model" / "adapter_config.json"), "VS111"),
    "file renamed": (lambda f: (f / "weights").rename(f / "weightz"), "VS111"),
    "manifest missing": (lambda f: (f / "manifest.json").unlink(), "VS113"),
    "manifest cut": (lambda f: (f / "manifest.json").write_text("{"), "VS112"),
    "manifest emptied": (lambda f: (f / "manifest.json").write_text("{}"), "VS112"),
    "manifest changed": (lambda f: rewrite(f / "manifest.json", b"stage1", b"stage2"), "VS112"),
    "format changed": (
        lambda f: rewrite(f / "manifest.json", b'format": ', b'format": 9'),
        "VS114",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_told_by_what_is_damaged(kind: str, tmp_path: Path) -> None:
    damage, code = DAMAGE[kind]
    checkpoints = store(tmp_path)
    folder = checkpoints.save({"step": 1}).folder
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        verify(folder)
    assert str(caught.value.code) == code
    with pytest.raises(CheckpointError) as caught:
        checkpoints.newest()
    assert str(caught.value.code) == "VS110"


@pytest.mark.parametrize("fact", CODE_OF_FINGERPRINT)
def test_a_checkpoint_of_another_run_is_told_by_what_differs(fact: str, tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    manifest = {**checkpoints.save({"step": 1}).manifest, fact: "then"}
    checkpoints.fingerprint = {fact: "now"}
    with pytest.raises(CheckpointError) as caught:
        checkpoints.load(Checkpoint(tmp_path, manifest))
    assert caught.value.reason == CODE_OF_FINGERPRINT[fact]


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ({"b": torch.zeros(2)}, "VS406"),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "VS406"),
        ({"a": torch.zeros(3)}, "VS403"),
    ],
)
def test_tensors_of_another_model_are_told(found: dict[str, torch.Tensor], code: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_tensors(found, {"a": torch.zeros(2)}, "here")
    assert str(caught.value.code) == code


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "VS101"), (errno.EIO, "VS115")])
def test_a_save_that_fails_beside_training_is_told_by_its_cause(
    number: int, code: str, tmp_path: Path
) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(number, "refused", str(folder))

    saver = CheckpointSaver(store(tmp_path, refuse), asynchronous=True)
    saver.save({"step": 1})
    with pytest.raises(CheckpointError, match="step 1 could not be saved") as caught:
        saver.wait()
    assert str(caught.value.code) == code


def test_too_little_room_has_the_code_of_a_full_disk(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.num_bytes = 10**18
    with pytest.raises(UserError) as caught:
        checkpoints.save({"step": 1})
    assert str(caught.value.code) == "VS101"
