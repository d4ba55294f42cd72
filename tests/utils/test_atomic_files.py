import json
import os
from pathlib import Path

import pytest

from vlm_sft.utils import atomic_files as atomic


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_text_bytes_and_json_are_written_as_given_and_leave_no_temporary_file(tmp_path):
    atomic.write_text(tmp_path / "a" / "text", "grün\r\n")
    atomic.write_bytes(tmp_path / "a" / "bytes", b"\x00\xff")
    atomic.write_json(tmp_path / "a" / "json", {"ü": [1, 2.5, None]})
    assert (tmp_path / "a" / "text").read_bytes() == b"gr\xc3\xbcn\r\n"
    assert (tmp_path / "a" / "bytes").read_bytes() == b"\x00\xff"
    assert json.loads((tmp_path / "a" / "json").read_bytes()) == {"ü": [1, 2.5, None]}
    assert names(tmp_path / "a") == ["bytes", "json", "text"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_disk_keeps_the_old_file_and_leaves_no_temporary_one(tmp_path, monkeypatch, call):
    atomic.write_text(tmp_path / "file", "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_text(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_an_interrupted_stream_keeps_the_old_file(tmp_path):
    atomic.write_text(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt), atomic.atomic_open(tmp_path / "file") as file:
        file.write(b"half of")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "old"


def test_json_refuses_numbers_that_json_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "file", float("nan"))
    assert names(tmp_path) == []


def test_a_replaced_file_keeps_its_mode_and_a_new_one_is_readable_by_others(tmp_path):
    atomic.write_text(tmp_path / "file", "old")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    (tmp_path / "file").chmod(0o600)
    atomic.write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
