"""Sizes of image files are read once and kept for later runs, while a file is the same."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from vlm_sft.data.image_size_cache import FILE_NAME, CachedImageSizes
from vlm_sft.errors import ImageError, UserError
from vlm_sft.utils.ownership import CACHE, own_directory


def image(path: Path, width: int, height: int, orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height)).save(path, "JPEG", exif=exif)
    return path


def test_a_later_run_finds_the_size_and_reads_no_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [image(tmp_path / "a.jpg", 40, 30), image(tmp_path / "b.jpg", 40, 30, orientation=6)]
    first = CachedImageSizes(tmp_path / "cache")
    assert [first.size_of(path) for path in paths] == [(40, 30), (30, 40)]
    assert first.size_of(paths[0].read_bytes()) == (40, 30)
    first.flush()
    assert (first.hits, first.misses) == (0, 2)
    monkeypatch.setattr("vlm_sft.data.images.upright_size", None)
    monkeypatch.chdir(tmp_path)
    second = CachedImageSizes("cache")
    assert [second.size_of(Path(path.name)) for path in paths] == [(40, 30), (30, 40)]
    assert (second.hits, second.misses) == (2, 0)


def test_a_file_with_another_time_or_length_is_read_again(tmp_path: Path) -> None:
    path = image(tmp_path / "a.jpg", 40, 30)
    first = CachedImageSizes(tmp_path / "cache")
    first.size_of(path)
    first.flush()
    image(path, 31, 41)
    assert CachedImageSizes(tmp_path / "cache").size_of(path) == (31, 41)
    os.utime(path, ns=(0, 0))
    again = CachedImageSizes(tmp_path / "cache")
    assert (again.size_of(path), again.misses) == ((31, 41), 1)


def test_an_image_that_cannot_be_read_is_the_same_error_and_not_cached(tmp_path: Path) -> None:
    sizes = CachedImageSizes(tmp_path / "cache")
    (tmp_path / "a.jpg").write_bytes(b"none")
    for name, reason in (("a.jpg", "image_format"), ("gone.jpg", "image_missing")):
        with pytest.raises(ImageError) as refused:
            sizes.size_of(tmp_path / name)
        assert refused.value.reason == reason
    sizes.flush()
    with closing(sqlite3.connect(tmp_path / "cache" / FILE_NAME)) as table:
        assert table.execute("SELECT * FROM sizes").fetchall() == []


def test_a_file_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    own_directory(tmp_path / "cache", CACHE)
    path = tmp_path / "cache" / FILE_NAME
    with closing(sqlite3.connect(path)) as table, table:
        table.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(UserError, match="is a database that vlm_sft did not write"):
        CachedImageSizes(tmp_path / "cache")
    assert path.read_bytes() == before
    path.write_bytes(b"no database at all")
    with pytest.raises(UserError, match="cannot be used"):
        CachedImageSizes(tmp_path / "cache")
