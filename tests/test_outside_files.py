"""What a command reads is a bounded regular file, and its images lie where they should."""

import json
import os
from pathlib import Path

import pytest
import yaml

from vlm_sft.checkpoint.format import read_manifest
from vlm_sft.config.schema import load_config
from vlm_sft.config.yaml_text import parse_yaml
from vlm_sft.data.chat_template import load_template
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.errors import UserError
from vlm_sft.evaluation.questions import Question, read_questions, require_images_inside
from vlm_sft.utils.ownership import MANIFEST

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: &a [*a]", "an alias is inside the value"),
        ("[" * 5000, "nested too deeply"),
        ("a: " + "1" * 5000, "Exceeds the limit"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("a: !!python/object/apply:os.mkdir [x]", "tag .* is not supported"),
    ],
)
def test_yaml_bombs_and_impossible_values_are_one_sentence(
    tmp_path: Path, text: str, problem: str
) -> None:
    with pytest.raises(yaml.YAMLError, match=problem):
        parse_yaml(text)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    for use in (
        lambda: load_config(path),
        lambda: load_template(str(path), byte_tokenizer()),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            use()
        assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_aliases_of_an_ordinary_file_are_read() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
@pytest.mark.parametrize("reader", ["configuration", "template", "probes", "manifest"])
def test_pipes_and_devices_never_hold_a_command_up(tmp_path: Path, reader: str, kind: str) -> None:
    name = MANIFEST if reader == "manifest" else "file.yaml"
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    readers = {
        "configuration": lambda: load_config(path),
        "template": lambda: load_template(str(path), byte_tokenizer()),
        "probes": lambda: read_questions(path),
        "manifest": lambda: read_manifest(tmp_path),
    }
    with pytest.raises(UserError):
        readers[reader]()


@pytest.mark.parametrize("image", ["../secret.png", "/etc/hostname", "link.png", "http://a/b"])
def test_questions_may_not_leave_the_folder_of_images(tmp_path: Path, image: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "link.png").symlink_to("/etc/hostname")
    question = Question("p1", image, "?", "yes", "kind", ("yes", "no"))
    with pytest.raises(UserError, match=r"probes\.json: question 'p1': ") as caught:
        require_images_inside(Path("probes.json"), [question], tmp_path / "images")
    assert caught.value.reason == "image_path"
    if image == "link.png":
        assert "--follow-symlinks" in str(caught.value)
        require_images_inside(Path("p.json"), [question], tmp_path / "images", follow_symlinks=True)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", "null", "[1]", '[{"id": 1}]', '["\\ud800"]', "[NaN]", "[" * 99999,
     '[{"id": "a", "image": null, "question": "?", "answer": "yes", "kind": "k"}]'],
)  # fmt: skip
def test_a_wrong_file_of_probes_or_manifest_is_one_sentence(tmp_path: Path, content: str) -> None:
    for name in ("probes.json", MANIFEST):
        (tmp_path / name).write_text(content)
    for use in (lambda: read_questions(tmp_path / "probes.json"), lambda: read_manifest(tmp_path)):
        with pytest.raises(UserError) as caught:
            use()
        assert len(str(caught.value)) < 1000


def test_a_checkpoint_with_a_pipe_in_it_is_refused_without_waiting(tmp_path: Path) -> None:
    from vlm_sft.checkpoint.format import FORMAT, verify, with_checksum

    os.mkfifo(tmp_path / "projector.safetensors")
    manifest = {"format": FORMAT, "files": {"projector.safetensors": "0" * 64}}
    (tmp_path / MANIFEST).write_text(with_checksum(manifest))
    assert json.loads((tmp_path / MANIFEST).read_text())["format"] == FORMAT
    with pytest.raises(UserError):
        verify(tmp_path)
