"""Nothing that the toolkit did not write is replaced, and no output is an input."""

import json
from pathlib import Path

import pytest

from vlm_sft.errors import UserError
from vlm_sft.ownership import (
    MARKER,
    has_mark,
    html_mark,
    own_directory,
    refuse_input,
    require_output_file,
)


def test_a_new_or_empty_directory_is_marked_and_accepted_again(tmp_path: Path) -> None:
    out = own_directory(tmp_path / "a" / "b", "training run")
    assert json.loads((out / MARKER).read_text())["kind"] == "training run"
    (out / "result.txt").write_text("ours")
    assert own_directory(out, "training run") == out


def test_a_directory_with_files_of_others_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty \('notes.txt'\)"):
        own_directory(tmp_path, "training run")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_files_that_a_file_manager_leaves_do_not_count(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_text("")
    (tmp_path / "._x").write_text("")
    assert own_directory(tmp_path, "training run") == tmp_path


def test_a_directory_of_another_kind_is_refused(tmp_path: Path) -> None:
    own_directory(tmp_path, "training run")
    with pytest.raises(UserError, match="holds a training run, but this command writes a mix"):
        own_directory(tmp_path, "mix")


def test_a_marker_written_by_someone_else_is_no_mark(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text('{"kind": "training run"}')
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="was not created by vlm_sft"):
        own_directory(tmp_path, "training run")


def test_a_file_of_others_is_replaced_only_when_the_user_says_so(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="--overwrite"):
        require_output_file(path)
    assert require_output_file(path, overwrite=True) == path
    path.write_text('{\n  "made_by": "vlm_sft evaluate"}')
    assert require_output_file(path) == path


def test_a_page_is_known_by_its_generator(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(f"<html><head>{html_mark('show')}</head></html>")
    assert has_mark(page)
    page.write_text("<html><head>about vlm_sft</head></html>")
    assert not has_mark(page)


@pytest.mark.parametrize("link", ["same", "symlink", "hard link"])
def test_an_input_is_never_an_output_under_whatever_name(tmp_path: Path, link: str) -> None:
    source = tmp_path / "data.json"
    source.write_text('{"made_by": "vlm_sft"}')
    output = source if link == "same" else tmp_path / "other.json"
    if link == "symlink":
        output.symlink_to(source)
    elif link == "hard link":
        output.hardlink_to(source)
    with pytest.raises(UserError, match="is read by this command"):
        refuse_input(output, [source])
    with pytest.raises(UserError, match="is read by this command"):
        require_output_file(output, inputs=[source], overwrite=True)


def test_a_place_that_takes_no_file_is_named_before_the_work(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError) as caught:
        require_output_file(blocked / "out.json")
    assert str(blocked) in str(caught.value.filename)
