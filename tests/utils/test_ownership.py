"""Nothing that the toolkit did not write is replaced, and no output is an input."""

import errno
import fcntl
import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_json, write_text
from vlm_sft.utils.output_files import has_mark, html_mark, require_output_file, write_result
from vlm_sft.utils.owned_files import OwnedFiles, owned_open, remove_owned, write_owned
from vlm_sft.utils.ownership import (
    MADE_BY,
    MARKER,
    TRAINING_RUN,
    made_by,
    own_directory,
    refuse_input,
    require_new_directory,
    set_aside,
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


@pytest.mark.parametrize(
    "content",
    [
        '[{"made_by": "vlm_sft evaluate"}]',
        '{"all": [{"made_by": "vlm_sft evaluate"}]}',
        '{"text": "\\"made_by\\": \\"vlm_sft evaluate"}',
        '{"made_by": "vlm_sft show"}',
        '<meta name="generator" content="vlm_sft evaluate">',
    ],
)
def test_what_only_mentions_the_mark_is_not_the_commands_own(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    assert not has_mark(path, "evaluate")
    write_json(path, {MADE_BY: made_by("evaluate")})
    assert has_mark(path, "evaluate") and has_mark(path) and not has_mark(path, "show")


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


def checkpoint_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", {"format": 2, "step": 1, "files": {}})
    return folder


@pytest.mark.parametrize(
    "place",
    [
        "run/final/manifest.json",
        "run/final/page.html",
        "run/final/tokenizer/page.html",
        "run/checkpoints/page.html",
        "run/checkpoints/step-00000001/x",
        "link/page.html",
    ],
)
def test_no_output_is_inside_a_checkpoint(tmp_path: Path, place: str) -> None:
    checkpoint_in(tmp_path / "run" / "final")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "final")
    with pytest.raises(UserError, match="where a training run keeps checkpoints"):
        require_output_file(tmp_path / place, overwrite=True)
    with pytest.raises(UserError, match="where a training run keeps checkpoints"):
        own_directory(tmp_path / place, "mix")
    assert require_output_file(tmp_path / "run" / "page.html")


def test_a_run_without_a_checkpoint_keeps_its_place_for_them(tmp_path: Path) -> None:
    own_directory(tmp_path, TRAINING_RUN)
    with pytest.raises(UserError, match="where a training run keeps checkpoints"):
        own_directory(tmp_path / "final", "mix")


def test_a_file_of_an_input_directory_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    path = tmp_path / "tokenizer" / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="which this command reads"):
        require_output_file(path, inputs=[path.parent], overwrite=True)
    assert require_output_file(path.with_name("page.html"), inputs=[path.parent])


def test_an_image_of_the_records_is_never_replaced(tmp_path: Path) -> None:
    image, notes = tmp_path / "dog.jpg", tmp_path / "notes.txt"
    for path in (image, notes):
        path.write_text("x")
    with pytest.raises(UserError, match="which this command reads"):
        require_output_file(image, image_roots=[tmp_path], overwrite=True)
    assert require_output_file(notes, image_roots=[tmp_path], overwrite=True) == notes


def test_the_marker_is_no_output(tmp_path: Path) -> None:
    own_directory(tmp_path, "mix")
    with pytest.raises(UserError, match="marks a directory"):
        require_output_file(tmp_path / MARKER, overwrite=True)


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    link = tmp_path / "results.json"
    link.symlink_to(tmp_path / "target" / "results.json")
    write_text(require_output_file(link), "new")
    assert link.is_symlink() and link.read_text() == "new"
    with pytest.raises(UserError, match="--overwrite"):
        require_output_file(link)


def test_a_device_is_written_and_stays_a_device(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(require_output_file(pipe), "hello")
    assert os.read(reader, 10) == b"hello"
    os.close(reader)
    assert pipe.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_what_is_set_aside_takes_the_first_free_name(tmp_path: Path) -> None:
    for text in ("first", "second"):
        (tmp_path / "a").write_text(text)
        set_aside(tmp_path / "a")
    assert [(tmp_path / f"a.kept-{n}").read_text() for n in (1, 2)] == ["first", "second"]


def test_a_directory_that_another_process_is_marking_is_accepted(tmp_path: Path) -> None:
    (tmp_path / f".{MARKER}.1a2b3c4d5e6f.tmp").write_text("")
    assert own_directory(tmp_path, "mix") == tmp_path


def test_a_directory_of_an_older_version_is_adopted(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    own_directory(tmp_path, "mix", adopt=True)
    assert (tmp_path / MARKER).exists()


def record_files(directory: Path, own: int, barrier: Any, kind: str = "training run") -> None:
    """Mark a directory and write files into it, as soon as all others do."""
    barrier.wait()
    own_directory(directory, kind, adopt=True)
    for number in range(20):
        write_owned(directory / f"{own}-{number}.txt", b"ours")


def test_processes_that_write_into_one_directory_lose_no_record(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [
        context.Process(target=record_files, args=(tmp_path, own, barrier)) for own in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    names = {f"{own}-{number}.txt" for own in range(4) for number in range(20)}
    assert set(os.listdir(tmp_path)) == {MARKER, *names}
    OwnedFiles(tmp_path).require_unchanged(names)


def test_files_are_recorded_where_the_file_system_has_no_locks_and_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(os, "link", unsupported)
    record_files(tmp_path, 0, threading.Barrier(1))
    OwnedFiles(tmp_path).require_unchanged([f"0-{number}.txt" for number in range(20)])
    assert capsys.readouterr().err.count("the file system has no file locks") == 1
    assert len(os.listdir(tmp_path)) == 21


@pytest.mark.parametrize("content", ["my notes", '{"made_by": "othertool"}', "[]"])
@pytest.mark.parametrize("adopt", [False, True])
def test_a_file_of_others_with_the_markers_name_is_never_replaced(
    tmp_path: Path, content: str, adopt: bool
) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(UserError, match="was not written by vlm_sft, or is damaged"):
        own_directory(tmp_path, "mixture", adopt=adopt)
    assert (tmp_path / MARKER).read_text() == content
    (tmp_path / MARKER).write_text("")
    own_directory(tmp_path, "mixture", adopt=adopt)


def test_a_pipe_with_the_markers_name_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MARKER)
    with pytest.raises(UserError, match="was not written by vlm_sft"):
        own_directory(tmp_path, "mixture", adopt=True)


def test_a_marked_directory_is_no_place_for_one_that_is_renamed_to_it(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").write_text("x")
    assert require_new_directory(tmp_path) == tmp_path
    own_directory(tmp_path, "cache")
    with pytest.raises(UserError, match="not an empty directory"):
        require_new_directory(tmp_path)


@pytest.mark.parametrize(
    "left",
    ["..vlm_sft.json.1154f6c307ad.tmp", "...vlm_sft.json.1154f6c307ad.tmp.61468d6e1f53.tmp"],
)
def test_a_directory_whose_marking_was_killed_is_marked_again(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("")
    own_directory(tmp_path, "evaluation")
    assert (tmp_path / MARKER).is_file()
