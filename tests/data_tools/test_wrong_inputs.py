"""Whatever stands in an input or in a damaged file of a run, a command ends in one sentence."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools import build_coco
from data_tools.instruct.__main__ import main as instruct
from data_tools.mix import __main__ as mix
from tests.data_tools.coco_files import arguments, write_coco
from tests.data_tools.test_ownership import CAT, DOG, instruct_line
from vlm_sft.errors import UserError

LONG = "x" * 5_000_000

VALUES: list[tuple[str, Any]] = [
    ("annotations.0.bbox", [1, 2, 3, float("nan")]),
    ("annotations.0.bbox", [1, 2, 3, 10**400]),
    ("annotations.0.bbox", [True, 0, 5, 5]),
    ("annotations.0.bbox", LONG),
    ("annotations.0.category_id", []),
    ("annotations.0.category_id", 10**30),
    ("annotations.0.id", -1),
    ("annotations.0.image_id", 1.5),
    ("annotations.0", None),
    ("images.0.id", -5),
    ("images.0.id", 2**63),
    ("images.0.width", 10**400),
    ("images.0.height", 0),
    ("images.0.file_name", LONG),
    ("images.0.file_name", "a\0b"),
    ("images.0.file_name", "\x1b[31m.jpg"),
    ("images.0.file_name", "train\\a.jpg"),
    ("images.0.license", "x"),
    ("images.0", LONG),
    ("images", {}),
    ("categories.0.name", LONG),
    ("categories.0.name", "\u202e"),
    ("categories", None),
]


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_a_wrong_value_in_annotations_is_one_short_sentence(tmp_path: Path, number: int) -> None:
    path, value = VALUES[number]
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    document = json.loads(files["instances"].read_text())
    node, *rest = document, *path.split(".")
    for part in rest[:-1]:
        node = node[int(part) if part.isdigit() else part]
    node[int(rest[-1]) if rest[-1].isdigit() else rest[-1]] = value
    files["instances"].write_text(json.dumps(document))
    with pytest.raises(UserError) as told:
        build_coco.main(arguments(files, "--max-faulty", "1"))
    message = str(told.value)
    assert len(message) < 1000 and "\x1b" not in message and "\u202e" not in message
    assert not files["out"].exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"null", b"[]", b"\xff\xfe", b"\0" * 9, b"[" * 100_000, b'{"images": ' + b"[" * 99_999,
        b'{"images": [{"id": ' + b"9" * 6000,
    ],
)  # fmt: skip
@pytest.mark.parametrize("which", ["instances", "captions"])
def test_a_file_that_is_no_annotations_is_one_short_sentence(
    tmp_path: Path, content: bytes, which: str
) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    files[which].write_bytes(content)
    with pytest.raises(UserError) as told:
        build_coco.main(arguments(files))
    assert len(str(told.value)) < 1000


def test_a_pipe_a_device_and_a_folder_are_no_annotations(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    os.mkfifo(tmp_path / "pipe")
    for special in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="regular file"):
            build_coco.main(arguments(files | {"instances": special}))


DAMAGE = {"garbage": b"x\n", "a list": b"[]\n", "an object": b"{}\n", "deep": b"[" * 100_000}


def test_damaged_files_of_a_run_end_every_stage_in_one_sentence(tmp_path: Path) -> None:
    line = instruct_line(tmp_path)
    for stage in ("plan", "generate", "verify", "clean", "export"):
        assert instruct([stage, line[1]]) == 0
    read_by = {
        "index.json": ["verify", "clean", "export"],
        "images.jsonl": ["verify", "clean"],
        "templates.json": ["explain"],
        "requests.jsonl": ["verify", "explain"],
        "samples.jsonl": ["clean"],
        "kept.jsonl": ["export"],
        "spending.jsonl": ["generate"],
        "failures.jsonl": ["generate"],
        ".vlm_sft.json": ["verify"],
    }
    for name, stages in read_by.items():
        path = tmp_path / "run" / name
        before = path.read_bytes()
        for content in DAMAGE.values():
            for stage in stages:
                path.write_bytes(content)
                extra = ["000000000001-reasoning-0"] if stage == "explain" else ["--overwrite"]
                try:
                    instruct([stage, line[1], *extra])
                except UserError as error:
                    assert len(str(error)) < 1000, (name, stage)
        path.write_bytes(before)


@pytest.mark.parametrize("value", [7, None, "x", [], {"lists": {"x": {"status": 7}}}])
def test_an_edited_plan_ends_the_report_in_one_sentence(tmp_path: Path, value: Any) -> None:
    line = instruct_line(tmp_path)
    assert instruct(line) == 0
    plan = tmp_path / "run" / "plan.json"
    written = json.loads(plan.read_text())
    for key in written:
        plan.write_text(json.dumps(written | {key: value}))
        try:
            instruct(["report", line[1]])
        except UserError as error:
            assert "plan.json: was changed after its stage wrote it" in str(error)
            assert len(str(error)) < 1000


@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_text_that_no_file_can_hold_is_refused_wherever_it_stands_in_a_configuration(
    tmp_path: Path, value: str
) -> None:
    base = yaml.safe_load(Path(instruct_line(tmp_path)[1]).read_text())
    cases: list[tuple[Any, str]] = [
        (instruct, key)
        for key in (
            "output_dir", "coco.instances", "coco.captions", "coco.images", "guard.lists.val2014",
            "requests.prompts", "teacher.answers_dir", "teacher.model",
            "teacher.base_url", "teacher.api_key_env", "export.image_prefix",
        )
    ]  # fmt: skip
    cases += [
        (mix.main, key)
        for key in (
            "output_dir", "image_root", "sources.0.path", "sources.0.image_root",
            "sources.0.license", "sources.0.receipts", "sources.0.terms",
            "guard.lists.val2014", "cannot_tell_pattern",
        )
    ]  # fmt: skip
    for command, key in cases:
        path = tmp_path / "wrong.json"
        mixing = {"output_dir": "out", "sources": [{"name": "a", "path": "a.json"}]}
        tree = copy.deepcopy(base if command is instruct else mixing)
        node, *parts = tree, *key.split(".")
        for part in parts[:-1]:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[parts[-1]] = value
        path.write_text(json.dumps(tree))
        with pytest.raises(UserError) as raised:
            command([*(["plan"] if command is instruct else []), str(path)])
        message = str(raised.value)
        assert key.split(".")[-1] in message and len(message) < 1000
        assert "\0" not in message and "\ud800" not in message


def test_annotations_without_an_image_are_refused(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [DOG, CAT]})
    for name in ("instances", "captions"):
        files[name].write_text('{"images": [], "annotations": [], "categories": []}')
    with pytest.raises(UserError, match="not one of the 0 annotated images can be used"):
        build_coco.main(arguments(files))
