"""File systems that lack a call: the same commands work, warn, or name the place."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_tools.instruct.generate.answers import AnswerWriter, Claims
from data_tools.instruct.generate.append_only import SharedLog
from vlm_sft.checkpoint import tensor_files
from vlm_sft.checkpoint.run_dir import locked
from vlm_sft.checkpoint.snapshot import tensor_component
from vlm_sft.checkpoint.store import CheckpointStore, require_space
from vlm_sft.checkpoint.tensor_files import load_tensors, save_tensors
from vlm_sft.data.record_store import RecordStore
from vlm_sft.errors import UserError
from vlm_sft.export.folder import atomic_folder
from vlm_sft.train.preflight import dry_run_save
from vlm_sft.utils import atomic_files as atomic
from vlm_sft.utils import filesystem

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO]


def refusing(number: int) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.fixture(autouse=True)
def _no_warnings_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_warned", set())


def store(folder: Path, model: nn.Module) -> CheckpointStore:
    def read(place: Path) -> None:
        model.load_state_dict(load_tensors(place / "weights.safetensors"))

    weights = tensor_component(
        model.state_dict, lambda f, tensors: save_tensors(f / "weights.safetensors", tensors), read
    )
    return CheckpointStore(folder, {"weights": weights}, log=lambda text: None)


def save_and_finish(folder: Path) -> None:
    """Rehearse, save three times with pruning, finish and find everything again."""
    model = nn.Linear(3, 2)
    checkpoints = store(folder, model)
    dry_run_save(folder, checkpoints.components, list(model.named_parameters()))
    for step in (1, 2, 3):
        checkpoints.save({"step": step})
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 3
    checkpoints.finish(newest)
    final = checkpoints.finish(newest)  # replaces the first one
    assert torch.equal(load_tensors(final.folder / "weights.safetensors")["weight"], model.weight)
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "final"]
    assert len(list((folder / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("number", NO_LOCKS)
def test_a_run_starts_with_a_warning_where_files_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    for _ in range(2):
        with locked(tmp_path / "run", enabled=True):
            pass
    warning = capsys.readouterr().err
    assert f"{tmp_path / 'run'}: the file system has no file locks" in warning
    assert warning.count("warning") == 1


def test_a_run_folder_that_is_locked_is_still_refused(tmp_path: Path) -> None:
    with (
        locked(tmp_path, enabled=True),
        pytest.raises(UserError, match=f"process {os.getpid()}"),
        locked(tmp_path, enabled=True),
    ):
        pass


@pytest.mark.parametrize("number", NO_LOCKS)
def test_the_logs_of_instruct_work_where_files_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    monkeypatch.setattr(fcntl, "lockf", refusing(number))
    log = SharedLog(tmp_path / "spending.jsonl", b"{")
    with log.locked():
        log.append("a line")
    assert log.news() == ["a line"]
    log.close()
    first, second = AnswerWriter(tmp_path / "answers"), AnswerWriter(tmp_path / "answers")
    assert first.path != second.path
    claims = Claims(tmp_path / "answers")
    assert claims.take("r1")
    claims.release("r1")
    assert f"{tmp_path}: the file system has no file locks" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EROFS])
def test_checkpoints_need_no_modes_times_or_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    for name in ("chmod", "fchmod", "lchmod", "utime", "chown", "fchown", "setxattr", "listxattr"):
        monkeypatch.setattr(os, name, refusing(number), raising=False)
    save_and_finish(tmp_path)


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV])
def test_final_is_a_copy_where_hard_links_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", refusing(number))
    save_and_finish(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EXDEV, errno.EOPNOTSUPP])
def test_checkpoints_are_moved_file_by_file_where_directories_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    rename = os.rename

    def files_only(source: Any, target: Any, **more: Any) -> None:
        if os.path.isdir(source):
            raise OSError(number, os.strerror(number))
        rename(source, target, **more)

    monkeypatch.setattr(os, "rename", files_only)
    save_and_finish(tmp_path)
    with atomic_folder(tmp_path / "exported") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_bytes(b"x")
        (folder / "export.json").write_bytes(b"{}")
    assert (tmp_path / "exported" / "sub" / "weights").read_bytes() == b"x"


def test_a_move_that_is_cut_off_leaves_no_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    rename = os.rename

    def dies_at_the_manifest(source: Any, target: Any) -> None:
        if os.path.isdir(source):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        moved.append(Path(source).name)
        if moved[-1] == "manifest.json":
            raise KeyboardInterrupt
        rename(source, target)

    checkpoints = store(tmp_path, nn.Linear(3, 2))
    monkeypatch.setattr(os, "rename", dies_at_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save({"step": 1})
    assert moved == ["weights.safetensors", "manifest.json"]
    monkeypatch.setattr(os, "rename", rename)
    checkpoints.save({"step": 2})
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 2


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP])
def test_where_files_cannot_be_synced_a_warning_names_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(number))
    save_and_finish(tmp_path / "run")
    atomic.write_text(tmp_path / "text", "x")
    log = SharedLog(tmp_path / "failures.jsonl", b"{")
    log.append("x")
    log.close()
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {tmp_path / 'run'}: the file system cannot sync files")
    assert warning.count("\n") == 1  # one for a whole disk


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_while_syncing_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", refusing(number))
    with pytest.raises(OSError) as caught:
        atomic.write_text(tmp_path / "text", "x")
    assert caught.value.errno == number and caught.value.filename == str(tmp_path / "text")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("found", [OSError(errno.ENOSYS, "none"), (0, 0, 0)])
def test_unknown_free_space_does_not_stop_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Any
) -> None:
    usage = type(shutil.disk_usage(tmp_path))

    def report(_: Path) -> Any:
        if isinstance(found, OSError):
            raise found
        return usage(*found)

    monkeypatch.setattr(shutil, "disk_usage", report)
    require_space(tmp_path, 10**9)
    assert filesystem.free_bytes(tmp_path) is None


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_every_new_file_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_and_finish(tmp_path)
        atomic.write_text(tmp_path / "text", "x")
        AnswerWriter(tmp_path / "answers").close()
        Claims(tmp_path / "answers").close()
        SharedLog(tmp_path / "failures.jsonl", b"{").close()
        with atomic_folder(tmp_path / "exported") as folder:
            save_tensors(folder / "model.safetensors", {"w": torch.zeros(1)})
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_name_as_long_as_file_systems_allow_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "字" * 85):
        atomic.write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    with pytest.raises(OSError) as caught:
        atomic.write_text(tmp_path / ("x" * 256), "text")
    assert caught.value.filename == str(tmp_path / ("x" * 256))


def test_weights_are_read_where_files_cannot_be_mapped_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors(tmp_path / "w.safetensors", {"w": torch.arange(3)})
    monkeypatch.setattr(tensor_files, "load_file", refusing(errno.ENODEV))
    assert load_tensors(tmp_path / "w.safetensors")["w"].tolist() == [0, 1, 2]


FULL = """
import errno, os, resource, signal, sys
from pathlib import Path
import torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # EFBIG stands for a full disk
here = Path(sys.argv[1])
from vlm_sft.utils import atomic_files as atomic
from vlm_sft.data.record_store import RecordStore
from vlm_sft.utils.filesystem import naming
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.tokenize import TokenizedRecord
from vlm_sft.checkpoint.tensor_files import save_tensors
from vlm_sft.train.metrics import MetricsFile
from data_tools.instruct.generate.append_only import SharedLog
store = RecordStore()
metrics = MetricsFile(here / "metrics.jsonl", last_step=0)
log = SharedLog(here / "log.jsonl", b"{")
text = "x" * 10000
turns = (Turn("user", (ImagePart(0),)), Turn("assistant", (TextPart("a"),)))
big = Conversation("big", turns, (bytes(2_000_000),))

def tokenizer():
    with naming(here / "tokenizer"):
        byte_tokenizer().save_pretrained(here / "tokenizer")

for name, write in {
    "atomic": lambda: atomic.write_text(here / "text", text),
    "tensors": lambda: save_tensors(here / "w.safetensors", {"w": torch.zeros(10000)}),
    "records": lambda: store.append(big, TokenizedRecord([1], [1])),
    "metrics": lambda: metrics.write({"step": 1, "text": text}),
    "log": lambda: log.append(text),
    "tokenizer": tokenizer,
}.items():
    try:
        write()
        print(name, "nothing")
    except OSError as error:
        print(name, error.errno == errno.EFBIG, error.filename, error.strerror)
"""


def test_every_writer_names_its_file_when_the_disk_is_full(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 0, done.stderr
    for name in ("atomic", "tensors", "records", "metrics", "log", "tokenizer"):
        found, file, _ = lines[name].split(" ", 2)
        assert found == "True", lines[name]
        assert name == "records" or Path(file).is_relative_to(tmp_path), lines[name]
    assert "TMPDIR" in lines["records"]


def test_no_temporary_directory_is_a_sentence_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.mkstemp", refusing(errno.ENOENT))
    with pytest.raises(OSError, match="TMPDIR") as caught:
        RecordStore()
    assert caught.value.filename == "the temporary directory"


def test_an_export_whose_place_was_filled_meanwhile_is_kept_and_nothing_else_is_lost(
    tmp_path: Path,
) -> None:
    out = tmp_path / "exported"
    (out / "lost+found").mkdir(parents=True)
    for name in ("._budget.xlsx", ".DS_Store", "lost+found/inode7"):
        (out / name).write_text(name)
    with (
        pytest.raises(UserError, match=r"finished export is now .*exported\.kept-1$"),
        atomic_folder(out) as folder,
    ):
        (folder / "export.json").write_text("{}")
        (out / "notes.txt").write_text("mine")
    assert {p.name: p.read_text() for p in out.rglob("*") if p.is_file()} == {
        "._budget.xlsx": "._budget.xlsx",
        ".DS_Store": ".DS_Store",
        "inode7": "lost+found/inode7",
        "notes.txt": "mine",
    }
    assert (tmp_path / "exported.kept-1" / "export.json").read_text() == "{}"
    assert sorted(os.listdir(tmp_path)) == ["exported", "exported.kept-1"]


def test_an_export_takes_the_place_of_a_directory_with_system_files(tmp_path: Path) -> None:
    out = tmp_path / "exported"
    out.mkdir()
    (out / ".DS_Store").write_text("x")
    with atomic_folder(out) as folder:
        (folder / "export.json").write_text("{}")
    assert sorted(os.listdir(out)) == [".DS_Store", "export.json"]
    assert os.listdir(tmp_path) == ["exported"]
