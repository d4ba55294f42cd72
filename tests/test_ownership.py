"""Nothing that the toolkit did not write is replaced, and no output is an input."""

import json
from pathlib import Path

import pytest

from vlm_sft.errors import UserError
from vlm_sft.ownership import (
    MARKER,
    OwnedFiles,
    has_mark,
    html_mark,
    own_directory,
    owned_open,
    refuse_input,
    remove_owned,
    require_output_file,
    write_owned,
    write_result,
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


def test_a_file_that_was_edited_after_it_was_written_is_not_replaced(tmp_path: Path) -> None:
    out = own_directory(tmp_path / "out", "mixture")
    write_owned(out / "train.jsonl", b"ours")
    OwnedFiles(out).require_unchanged(["train.jsonl", "new.jsonl"])
    (out / "train.jsonl").write_bytes(b"edited")
    with pytest.raises(UserError, match=r"train.jsonl: the file was changed after vlm_sft wrote"):
        OwnedFiles(out).require_unchanged(["train.jsonl"])
    OwnedFiles(out).require_unchanged(["train.jsonl"], overwrite=True)
    OwnedFiles(out).accept(["train.jsonl"])
    OwnedFiles(out).require_unchanged(["train.jsonl"])


def test_a_file_is_known_as_ours_if_the_process_ends_before_or_after_its_renaming(
    tmp_path: Path,
) -> None:
    out = own_directory(tmp_path / "out", "mixture")
    write_owned(out / "a" / "b.json", b"first")
    write_owned(out / "a" / "b.json", b"second")
    for content in (b"first", b"second"):
        (out / "a" / "b.json").write_bytes(content)
        OwnedFiles(out).require_unchanged(["a/b.json"])
    with pytest.raises(RuntimeError), owned_open(out / "a" / "b.json") as file:
        file.write(b"third")
        raise RuntimeError
    assert (out / "a" / "b.json").read_bytes() == b"second"
    OwnedFiles(out).require_unchanged(["a/b.json"])


def test_an_owned_file_that_is_an_input_is_refused_under_every_name(tmp_path: Path) -> None:
    out = own_directory(tmp_path / "out", "mixture")
    write_owned(out / "train.jsonl", b"ours")
    (tmp_path / "soft.jsonl").symlink_to(out / "train.jsonl")
    (tmp_path / "hard.jsonl").hardlink_to(out / "train.jsonl")
    for name in ("out/train.jsonl", "out/../out/train.jsonl", "soft.jsonl", "hard.jsonl"):
        with pytest.raises(UserError, match="is read by this command"):
            OwnedFiles(out).require_unchanged(
                ["train.jsonl"], inputs=[tmp_path / name], overwrite=True
            )


def test_only_unchanged_files_of_ours_are_deleted(tmp_path: Path) -> None:
    out = own_directory(tmp_path / "out", "mixture")
    for name in ("a.txt", "b.txt"):
        write_owned(out / name, b"ours")
    (out / "b.txt").write_bytes(b"edited")
    (out / "c.txt").write_bytes(b"mine")
    assert [remove_owned(out / name) for name in ("a.txt", "b.txt", "c.txt", "d.txt")] == [
        True, False, False, False,
    ]  # fmt: skip
    assert sorted(path.name for path in out.glob("*.txt")) == ["b.txt", "c.txt"]


def test_a_result_without_a_mark_is_left_alone_if_equal_and_refused_if_not(tmp_path: Path) -> None:
    path = tmp_path / "probes.json"
    write_result(path, b"[1]")
    write_result(path, b"[1]")
    with pytest.raises(UserError, match="--overwrite"):
        write_result(path, b"[2]")
    assert path.read_bytes() == b"[1]"
    write_result(path, b"[2]", overwrite=True)
    assert path.read_bytes() == b"[2]"
    with pytest.raises(UserError, match="is read by this command"):
        write_result(path, b"[3]", inputs=[path], overwrite=True)
