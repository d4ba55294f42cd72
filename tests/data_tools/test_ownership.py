"""Data commands replace and delete nothing but what they wrote themselves."""

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools import build_coco, make_scenes
from data_tools.instruct.__main__ import main as instruct
from data_tools.mix import __main__ as mix
from data_tools.scenes import files
from tests.data_tools.coco_files import arguments, write_coco
from vlm_sft.errors import UserError

DOG: tuple[str, list[float], int] = ("dog", [10, 10, 40, 30], 0)
CAT: tuple[str, list[float], int] = ("cat", [120, 60, 30, 30], 0)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_refused(folder: Path, command: Any, line: list[str], message: str) -> None:
    """Assert that the command ends with this message and leaves every file as it was."""
    before = everything(folder)
    with pytest.raises(UserError, match=message):
        command(line)
    assert everything(folder) == before


# --- build_coco


def test_build_coco_keeps_a_folder_of_others_and_edited_files(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    line = arguments(files)
    files["out"].mkdir()
    (files["out"] / "stage2.json").write_text("[]")
    assert_refused(
        tmp_path, build_coco.main, line, "not empty .'stage2.json'. and was not created by"
    )
    (files["out"] / "stage2.json").unlink()
    assert build_coco.main(line) == 0
    built = everything(files["out"])
    assert build_coco.main(line) == 0, "its own unchanged files are replaced"
    assert everything(files["out"]) == built
    (files["out"] / "stage2.json").write_text("[1]")
    (files["out"] / "notes.txt").write_text("mine")
    assert_refused(tmp_path, build_coco.main, line, r"stage2.json: the file was changed after")
    assert build_coco.main([*line, "--overwrite"]) == 0
    assert everything(files["out"]) == built | {"notes.txt": b"mine"}


@pytest.mark.parametrize("name", ["instances.json", "soft.json", "hard.json", "x/../captions.json"])
def test_build_coco_never_writes_over_its_input(tmp_path: Path, name: str) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    (tmp_path / "x").mkdir()
    (tmp_path / "soft.json").symlink_to(files["instances"])
    (tmp_path / "hard.json").hardlink_to(files["captions"])
    del files["out"]
    line = arguments(files, "--only", "existence", "--out-file", str(tmp_path / name))
    assert_refused(tmp_path, build_coco.main, [*line, "--overwrite"], "is read by this command")


@pytest.mark.parametrize("name", ["000000000001.jpg", "link.json", "without-suffix", "away.jpg"])
def test_build_coco_never_writes_over_one_of_its_images(tmp_path: Path, name: str) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    images, image = files["images"], files["images"] / "000000000001.jpg"
    (tmp_path / "outside.jpg").write_bytes(image.read_bytes())
    (images / "away.jpg").symlink_to(tmp_path / "outside.jpg")
    (images / "link.json").symlink_to(image)
    (images / "without-suffix").write_bytes(image.read_bytes())
    del files["out"]
    line = arguments(files, "--only", "existence", "--overwrite")
    line += ["--out-file", str(images / name)]
    assert_refused(tmp_path, build_coco.main, line, "inside .*images, which this command reads")


def test_build_coco_never_writes_over_what_an_image_links_to(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    image = files["images"] / "000000000001.jpg"
    image.rename(tmp_path / "outside.jpg")
    image.symlink_to(tmp_path / "outside.jpg")
    del files["out"]
    line = arguments(files, "--only", "existence", "--overwrite", "--follow-symlinks")
    line += ["--out-file", str(tmp_path / "outside.jpg")]
    assert_refused(tmp_path, build_coco.main, line, "is read by this command")


def test_build_coco_refuses_its_image_folder_as_the_output(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    del files["out"]
    line = arguments(files, "--only", "existence", "--out-file", str(files["images"]))
    assert_refused(tmp_path, build_coco.main, [*line, "--overwrite"], "is read by this command")
    line = arguments(files, "--out", str(files["images"]), "--overwrite")
    assert_refused(tmp_path, build_coco.main, line, "is read by this command")


@pytest.mark.parametrize("option", ["--out", "--out-file", "--images", "--instances"])
def test_build_coco_refuses_an_empty_name(tmp_path: Path, option: str) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    if option != "--out":
        files["out-file"] = files.pop("out")
    line = arguments(files, *(["--only", "stage1"] if option != "--out" else []), option, "")
    assert_refused(tmp_path, build_coco.main, line, f"{option}: the name is empty")


def test_no_output_folder_replaces_an_image_of_its_own_inputs(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    image = (files["images"] / "000000000001.jpg").read_bytes()
    for name in ("stage1.json", "train.jsonl", "report/claims.png"):
        place = files["images"] / "below" / name
        place.parent.mkdir(exist_ok=True, parents=True)
        place.write_bytes(image)
    below, message = str(files["images"] / "below"), "inside .*, which this command reads"
    files.pop("out")
    build = arguments(files, "--out", below, "--overwrite")
    mixing = [*mixture(files["images"], output_dir=below), "--overwrite"]
    mixing[1:1] = [f"sources.0.image_root={files['images']}"]
    report = [*instruct_line(tmp_path, "report"), f"coco.images={files['images']}"]
    lines: list[tuple[Any, list[str]]] = [
        (build_coco.main, build),
        (mix.main, mixing),
        (instruct, [*report, f"output_dir={below}", "--overwrite"]),
    ]
    for command, line in lines:
        assert_refused(tmp_path, command, line, message)


def test_build_coco_writes_one_file_again_if_equal_and_refuses_another(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    del files["out"]
    out = tmp_path / "probes.json"
    line = arguments(files, "--only", "existence", "--out-file", str(out))
    assert build_coco.main(line) == 0
    assert build_coco.main(line) == 0
    out.write_text("[]")
    assert_refused(tmp_path, build_coco.main, line, "was not written by vlm_sft")
    assert build_coco.main([*line, "--overwrite"]) == 0
    assert json.loads(out.read_text())


def test_build_coco_refuses_its_own_files_in_a_folder_without_a_mark(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    build_coco.main(arguments(files))
    (files["out"] / ".vlm_sft.json").unlink()
    assert_refused(tmp_path, build_coco.main, arguments(files), "and was not created by")


# --- mix


def mixture(folder: Path, **changes: Any) -> list[str]:
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (folder / "source").mkdir(exist_ok=True)
    source = folder / "source" / "train.jsonl"
    if not source.exists():
        source.write_text(json.dumps({"id": "1", **record}) + "\n")
    values = {"output_dir": str(folder / "mix"), "sources": [{"name": "s", "path": str(source)}]}
    (folder / "mix.yaml").write_text(yaml.safe_dump(values | changes))
    return [str(folder / "mix.yaml")]


def test_mix_never_writes_into_the_folder_of_a_source(tmp_path: Path) -> None:
    line = mixture(tmp_path, output_dir=str(tmp_path / "source"))
    assert_refused(tmp_path, mix.main, line, "is read by this command")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "card.md").write_text("mine")
    line = mixture(tmp_path, output_dir=str(tmp_path / "other"))
    assert_refused(tmp_path, mix.main, line, "was not created by vlm_sft as a mixture")
    (tmp_path / "link").symlink_to(tmp_path / "source")
    line = mixture(tmp_path, output_dir=str(tmp_path / "link"))
    assert_refused(tmp_path, mix.main, [*line, "--overwrite"], "is read by this command")


def test_mix_refuses_its_own_output_as_a_source_and_edited_files(tmp_path: Path) -> None:
    line = mixture(tmp_path)
    assert mix.main(line) == 0
    assert mix.main(line) == 0
    own = [{"name": "s", "path": str(tmp_path / "mix" / "train.jsonl")}]
    assert_refused(tmp_path, mix.main, mixture(tmp_path, sources=own), "is read by this command")
    (tmp_path / "mix" / "card.md").write_text("mine")
    assert_refused(tmp_path, mix.main, mixture(tmp_path), "card.md: the file was changed")
    assert mix.main([*line, "--overwrite"]) == 0


def test_mix_refuses_the_output_of_an_older_version_in_one_sentence(tmp_path: Path) -> None:
    mix.main(mixture(tmp_path))
    (tmp_path / "mix" / ".vlm_sft.json").unlink()
    assert_refused(tmp_path, mix.main, mixture(tmp_path), "was written by an older version")


def test_mix_refuses_an_output_folder_inside_a_source_folder(tmp_path: Path) -> None:
    mixture(tmp_path)
    folder = [{"name": "s", "path": str(tmp_path / "source")}]
    line = mixture(tmp_path, sources=folder, output_dir=str(tmp_path / "source" / "mix"))
    assert_refused(tmp_path, mix.main, line, "lies in the folder of source s")


# --- instruct


def instruct_line(folder: Path, command: str = "run", **changes: Any) -> list[str]:
    files = write_coco(folder, {1: [DOG, CAT], 2: [CAT]}) if not (folder / "images").exists() else {
        name: folder / f"{name}.json" for name in ("instances", "captions")
    }  # fmt: skip
    coco = {name: str(files[name]) for name in ("instances", "captions")}
    values = {
        "output_dir": str(folder / "run"),
        "coco": coco | {"images": str(folder / "images")},
        "teacher": {"kind": "rules"},
        "clean": {"same_images": {"action": "keep"}},
        "export": {"formats": ["llava", "messages"]},
    }
    (folder / "given.yaml").write_text(yaml.safe_dump(values | changes))
    return [command, str(folder / "given.yaml")]


def made(folder: Path, *stages: str, **changes: Any) -> str:
    """Run some stages, and return the configuration file."""
    config = instruct_line(folder, **changes)[1]
    for stage in stages:
        assert instruct([stage, config]) == 0
    return config


@pytest.mark.parametrize(
    "name", ["config.yaml", "report/mine.png", "export/llava.json", "answers/part-00001.jsonl"]
)
def test_instruct_refuses_a_folder_with_files_of_others(tmp_path: Path, name: str) -> None:
    line = instruct_line(tmp_path)
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("mine")
    assert_refused(tmp_path, instruct, line, "was not created by vlm_sft as a instruction-data run")


def test_instruct_keeps_what_others_put_into_its_folder_and_refuses_edited_files(
    tmp_path: Path,
) -> None:
    line = instruct_line(tmp_path)
    assert instruct(line) == 0
    mine = {"run/report/mine.png": b"1", "run/export/notes.txt": b"2", "run/plan.txt": b"3"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    before = everything(tmp_path)
    assert instruct(["export", line[1]]) == instruct(["report", line[1]]) == 0
    assert everything(tmp_path).keys() == before.keys()
    assert mine.items() <= everything(tmp_path).items()
    (tmp_path / "run" / "export" / "llava.json").write_text("[]")
    assert_refused(tmp_path, instruct, line, "export/llava.json: the file was changed")
    assert_refused(
        tmp_path, instruct, ["export", line[1]], "export/llava.json: the file was changed"
    )
    assert instruct(["export", line[1], "--overwrite"]) == 0
    assert json.loads((tmp_path / "run" / "export" / "llava.json").read_text())


def test_instruct_accepts_a_run_that_an_older_version_made(tmp_path: Path) -> None:
    config = made(tmp_path, "plan", "generate", "verify")
    (tmp_path / "run" / ".vlm_sft.json").unlink()
    assert instruct(["verify", config]) == 0
    (tmp_path / "run" / "samples.jsonl").write_text("")
    (tmp_path / "run" / "rejected.jsonl").write_text("{}\n")
    assert_refused(tmp_path, instruct, ["verify", config], "rejected.jsonl: the file was changed")


def test_instruct_leaves_the_configuration_that_was_given(tmp_path: Path) -> None:
    made(tmp_path, "plan")
    own = str(tmp_path / "run" / "config.yaml")
    assert instruct(["plan", own]) == 0
    (tmp_path / "link.yaml").symlink_to(own)
    assert_refused(
        tmp_path, instruct, ["plan", str(tmp_path / "link.yaml"), "seed=5"], "would be rewritt"
    )


def test_instruct_refuses_an_output_that_is_an_input(tmp_path: Path) -> None:
    config = made(tmp_path, "plan")
    checked = tmp_path / "run" / "checked" / "samples" / "samples.jsonl"
    checked.parent.mkdir(parents=True)
    checked.write_text("")
    assert_refused(
        tmp_path, instruct, ["verify", config, "--file", str(checked)], "is read by this"
    )


def test_explain_replaces_no_file_of_others(tmp_path: Path) -> None:
    config = made(tmp_path, "plan", "generate", "verify")
    explain = ["explain", config, "000000000001-reasoning-0"]
    (tmp_path / "mine.html").write_text("mine")
    assert_refused(
        tmp_path, instruct, [*explain, "--html", str(tmp_path / "mine.html")], "--overwrite"
    )
    for name in ("instances.json", "run/samples.jsonl", "images/000000000001.jpg"):
        given = [*explain, "--png", str(tmp_path / name), "--overwrite"]
        assert_refused(tmp_path, instruct, given, "is read by this command")
    assert instruct([*explain, "--png", str(tmp_path / "a.png")]) == 0
    assert instruct([*explain, "--png", str(tmp_path / "a.png")]) == 0


# --- make_scenes


def scenes(out: Path, *extra: str) -> list[str]:
    size = ["--count", "2", "--max-side", "96", "--workers", "1", "--seed", "0"]
    return ["--out", str(out), "--artist", "twemoji", *size, *extra]


def test_make_scenes_keeps_files_of_others_and_edited_ones(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    out.mkdir()
    (out / "settings.json").write_text('{"mine": 1}')
    assert_refused(tmp_path, make_scenes.main, scenes(out), "was not written by this command")
    (out / "settings.json").unlink()
    assert make_scenes.main(scenes(out)) == 0
    image, annotations = out / "images" / "000000000001.jpg", out / "annotations"
    (out / "images" / "000000000002.jpg").unlink()
    (annotations / "captions_twemoji.json").write_text("{}")
    assert_refused(
        tmp_path, make_scenes.main, scenes(out), "captions_twemoji.json: the file was changed"
    )
    made = image.read_bytes()
    image.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists and is not the image"):
        (annotations / "captions_twemoji.json").unlink()
        make_scenes.main(scenes(out))
    assert image.read_bytes() == b"mine"
    assert make_scenes.main(scenes(out, "--overwrite")) == 0
    assert image.read_bytes() == made


def test_make_scenes_accepts_a_folder_that_an_older_version_made(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    make_scenes.main(scenes(out))
    (out / ".vlm_sft.json").unlink()
    assert make_scenes.main(scenes(out)) == 0
    (out / "images" / "000000000002.jpg").unlink()
    assert make_scenes.main(scenes(out)) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images/000000000001.jpg", b"other", "exists and is not the image"),
        ("annotations/instances_twemoji.json", b"{}", "instances_twemoji.json: the file was chang"),
        ("annotations/captions_twemoji.json", b"{}", "captions_twemoji.json: the file was changed"),
    ],
)
def test_scenes_that_were_changed_are_not_done_and_are_made_again_on_request(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    out = tmp_path / "scenes"
    assert make_scenes.main(scenes(out)) == 0
    made = everything(out)
    (out / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        make_scenes.main(scenes(out))
    assert (out / name).read_bytes() == content
    assert make_scenes.main(scenes(out, "--overwrite")) == 0
    (out / name).write_bytes(b"")
    assert make_scenes.main(scenes(out)) == 0, "an empty file has nothing to lose"
    again = everything(out)
    assert again.pop(".vlm_sft.json") and made.pop(".vlm_sft.json")
    assert again == made


@pytest.mark.parametrize("overwrite", [False, True])
def test_make_scenes_keeps_links_and_folders_under_the_names_of_images(
    tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "scenes"
    assert make_scenes.main(scenes(out)) == 0
    image, folder = (out / "images" / f"00000000000{number}.jpg" for number in (1, 2))
    folder.unlink()
    folder.mkdir()
    with pytest.raises(
        UserError, match=r"2\.jpg: is a directory, but this command writes an image"
    ):
        make_scenes.main(scenes(out, *(["--overwrite"] if overwrite else [])))
    folder.rmdir()
    image.unlink()
    image.symlink_to(tmp_path / "missing")
    with pytest.raises(UserError, match="exists and is not the image"):
        make_scenes.main(scenes(out))
    assert image.is_symlink()
    assert not list((out / "images").glob(".*"))


def test_make_scenes_removes_what_is_left_of_its_own_images_only(tmp_path: Path) -> None:
    out = tmp_path / "scenes"
    assert make_scenes.main(scenes(out)) == 0
    image = out / "images" / "000000000001.jpg"
    content = {
        f".{image.name}.999999999.part": image.read_bytes()[:100],
        f".{image.name}.999999998.part": b"of others",
        f".{image.name}.1.part": image.read_bytes(),
    }
    for name, data in content.items():
        image.with_name(name).write_bytes(data)
    image.unlink()
    assert make_scenes.main(scenes(out)) == 0
    left = {path.name for path in image.parent.glob(".*")}
    assert left == {f".{image.name}.999999998.part", f".{image.name}.1.part"}


def test_make_scenes_leaves_no_part_of_an_image_when_the_disk_is_full(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            files._write_image(tmp_path / "1.jpg", b"x" * 4096, overwrite=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["nested", "pipe", "list", "folder"])
def test_make_scenes_refuses_settings_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "scenes"
    out.mkdir()
    path = out / "settings.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("[" * 200_000 if kind == "nested" else "[]")
    assert_refused(tmp_path, make_scenes.main, scenes(out), "settings.json: is damaged or was not")


def test_a_foreign_file_among_the_answers_is_refused_before_it_is_cut(tmp_path: Path) -> None:
    line = instruct_line(tmp_path, "generate", teacher={"kind": "rules", "answers_dir": "mine"})
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "part-00001.jsonl").write_text('{"my": 1}\n{"own": "line without an end"}')
    instruct(["plan", line[1], f"teacher.answers_dir={shared}"])
    with pytest.raises(UserError, match="is not a file of recorded answers"):
        instruct([*line, f"teacher.answers_dir={shared}"])
    assert (shared / "part-00001.jsonl").read_text().endswith('an end"}')


def test_the_last_line_of_a_file_of_others_is_not_cut(tmp_path: Path) -> None:
    stages = ("plan", "generate", "verify", "clean")
    config = made(tmp_path, *stages, clean={"same_images": {"action": "drop"}})
    for name in ("failures.jsonl", "spending.jsonl", "cache/image_hashes.jsonl"):
        path, stage = tmp_path / "run" / name, "clean" if name.startswith("cache") else "generate"
        before = path.read_bytes()
        path.write_text("line 1\nmy last line without an end")
        with pytest.raises(UserError, match=f"{name}: a line begins with b'"):
            instruct([stage, config])
        assert path.read_text() == "line 1\nmy last line without an end"
        path.write_bytes(before)


def test_the_cut_last_line_of_a_log_is_removed_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = made(tmp_path, "plan", "generate")
    path = tmp_path / "run" / "failures.jsonl"
    path.write_text('{"request":"ab')
    assert instruct(["generate", config]) == 0
    assert "failures.jsonl: the last line was cut when a process was" in capsys.readouterr().err


def test_answers_are_not_recorded_among_other_files(tmp_path: Path) -> None:
    other = made(tmp_path, "plan", "generate", output_dir=str(tmp_path / "other"))
    config = made(tmp_path, "plan")
    assert config == other
    message = "answers_dir .*: has other files of vlm_sft|is read by this command"
    for name in ("images", "run", "run/report", "run/export/x", "other", "given.yaml"):
        line = ["generate", config, f"teacher.answers_dir={tmp_path / name}"]
        assert_refused(tmp_path, instruct, line, message)
    shared = f"teacher.answers_dir={tmp_path / 'other' / 'answers'}"
    assert instruct(["generate", config, shared]) == 0, "the answers of another run may be shared"


def test_mix_names_the_source_whose_file_is_missing(tmp_path: Path) -> None:
    missing = [{"name": "photos", "path": str(tmp_path / "source" / "Train.jsonl")}]
    mixture(tmp_path)
    with pytest.raises(UserError, match=r"source photos: .*no such file.*upper and lower case"):
        mix.main(mixture(tmp_path, sources=missing))
