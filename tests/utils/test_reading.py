"""Files from outside are read as regular files, with a limit on all that they may demand."""

import os
import time
from pathlib import Path

import pytest

from vlm_sft.errors import UserError
from vlm_sft.utils.reading import (
    StrictJsonError,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_text,
)


@pytest.mark.parametrize("kind", ["fifo", "device", "directory", "link to a fifo"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "manifest.json"
    os.mkfifo(tmp_path / "pipe")
    if kind == "directory":
        path.mkdir()
    else:
        targets = {"fifo": tmp_path / "pipe", "device": "/dev/zero"}
        path.symlink_to(targets.get(kind, tmp_path / "pipe"))
    with pytest.raises(UserError) as caught:
        open_regular(path)
    assert caught.value.reason == "not_a_file"


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_a_name_that_no_file_can_have_is_the_system_s_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match="no file has such a name"):
        open_regular(tmp_path / name)


def test_a_file_beyond_the_limit_is_refused_and_one_at_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(UserError, match="larger than 4 bytes"):
        read_bytes(path, 4)


def test_text_that_is_not_utf8_names_the_byte_and_a_missing_file_stays_missing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="not UTF-8 \\(byte 2\\)"):
        read_text(path)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "b")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "json_duplicate_key"),
        ('{"a": NaN}', "json_nan"),
        ('{"a": -Infinity}', "json_nan"),
        ('{"a": 1e999}', "json_nan"),
        ("[" * 100_000, "json_depth"),
        ('{"a":' * 100_000, "json_depth"),
        ("1" * 5000, "json_syntax"),
        ("{", "json_syntax"),
        ("", "json_syntax"),
    ],
)
def test_json_beyond_the_standard_is_a_named_fault(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(StrictJsonError) as caught:
        parse_json(text)
    assert caught.value.reason == reason
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError) as error:
        read_json(tmp_path / "a.json")
    assert error.value.reason == reason and len(str(error.value)) < 500


def test_many_keys_of_one_object_are_compared_in_linear_time() -> None:
    keys = ",".join(f'"{number}":0' for number in range(100_000))
    start = time.process_time()
    with pytest.raises(StrictJsonError, match="'99999' appears twice"):
        parse_json("{" + keys + ',"99999":1}')
    assert time.process_time() - start < 5
