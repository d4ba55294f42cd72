"""Wrong files and values, one after the other: a sentence and exit code 2, never a traceback."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vlm_sft import chat, check, evaluate, show, stage1
from vlm_sft.commands.run_command import run_command

TINY = Path(__file__).parent.parent / "configs" / "tiny"
CONFIG = str(TINY / "stage1.yaml")
TURNS = '"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]'

SHOWN = (
    b', "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]}]'
)
HOSTILE_TURN = b'{"from": "\\u202e\\u009b", "value": 1}'

RECORDS = {
    "empty file": b"",
    "NUL bytes": bytes(1000),
    "a word": b"hello",
    "UTF-16": "[]".encode("utf-16"),
    "Latin-1": '[{"id": "é"}]'.encode("latin-1"),
    "gzip": b"\x1f\x8b\x08\x00",
    "zip": b"PK\x03\x04",
    "open list": b"[",
    "deep list": b"[" * 50_000,
    "deep object": b'{"a":' * 50_000,
    "number": b"1",
    "list of numbers": b"[1, 2]",
    "list of nulls": b"[null]",
    "huge integer": b'[{"id": ' + b"9" * 5000 + b"}]",
    "NaN": b'[{"id": NaN}]',
    "infinite": b'[{"id": 1e999}]',
    "lone surrogate": b'[{"id": "\\ud800", ' + TURNS.encode() + b"}]",
    "key twice": b'[{"id": 1, "id": 2}]',
    "turns as text": b'[{"conversations": "Hi"}]',
    "no turns": b'[{"conversations": []}]',
    "turns as objects": b'[{"conversations": {"a": 1}}]',
    "role as object": b'[{"conversations": [{"from": {}, "value": ""}]}]',
    "value as number": b'[{"conversations": [{"from": "human", "value": 3}]}]',
    "image as object": b'[{"image": {"x": 1}' + SHOWN,
    "image as bomb name": b'[{"image": "' + b"a" * 9000 + b'"' + SHOWN,
    "escape codes": b'[{"id": "\\u001b[2J", "conversations": [' + HOSTILE_TURN + b"]}]",
    "Parquet head": b"PAR1" + bytes(100),
    "Parquet frame": b"PAR1" + bytes(100) + b"PAR1",
}  # fmt: skip

CONFIGS = {
    "empty": b"",
    "a list": b"- a",
    "a word": b"hello",
    "binary": bytes(range(256)),
    "UTF-16": "a: 1".encode("utf-16"),
    "tab": b"a:\n\tb: 1",
    "alias bomb": b"a: &a [x,x]\nb: &b [*a,*a]\nc: *d",
    "own alias": b"a: &a [*a]",
    "huge integer": b"seed: " + b"9" * 5000,
    "impossible date": b"seed: 2024-99-99",
    "python tag": b"seed: !!python/name:os.system",
    "binary tag": b"seed: !!binary '%%'",
    "key as list": b"? [a]\n: 1",
    "two documents": b"a: 1\n---\nb: 2",
    "deep": b"[" * 3000,
    "NUL": b"a: \x00",
}

OVERRIDES = [
    "seed=" + "9" * 5000,
    "seed=-1",
    "seed=!!python/name:os.system",
    "data.train.9.path=x",
    "data.train.99999999999999999999.path=x",
    "data.train.-1.path=x",
    "data.train.0.path=a\0b",
    "data.train.0.path=\ud800",
    "data.train.0.image_root=5",
    "data.train.0.follow_symlinks=maybe",
    "train.global_batch_size=1e400",
    "optim.learning_rate.projector=.nan",
    "data.template=/dev/zero",
    "data.template=nowhere.yaml",
    "model.language_model.tokenizer=/dev",
    "model.language_model.tokenizer=/nowhere/x",
    "projector=/dev/null",
    "train.deepspeed=/dev/zero",
    "=",
    "a..b=1",
]


def sentence(
    main: Callable[[list[str]], int], argv: list[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a command that must fail; returns what it printed."""
    with pytest.raises(SystemExit) as caught:
        run_command(main, argv)
    shown = "".join(capsys.readouterr())
    assert caught.value.code == 2, shown
    assert "error" in shown and "Traceback" not in shown
    assert not {"\x1b", "\x9b", "\u202e", "\0"} & set(shown)
    assert len(shown) < 20_000
    return shown


@pytest.mark.parametrize("name", RECORDS)
def test_a_wrong_file_of_records_is_a_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--records", str(tmp_path / "data.json"), "--tokenizer", "bytes"]
    argv += ["--template", "chatml", "--json"]
    for suffix in (".json", ".jsonl"):
        path = (tmp_path / "data").with_suffix(suffix)
        path.write_bytes(RECORDS[name])
        argv[1] = str(path)
        if name == "empty file" or (name == "NUL bytes" and suffix == ".jsonl"):
            continue  # no record is no fault; a line of NUL bytes is one bad record
        sentence(show.main, argv, capsys)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_configuration_is_a_sentence(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(CONFIGS[name])
    assert "config.yaml" in sentence(stage1.main, [str(path)], capsys)


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: ascii(text[:40]))
def test_a_wrong_override_is_a_sentence(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [CONFIG, f"output_dir={tmp_path / 'run'}", override]
    sentence(check.main, argv, capsys)


@pytest.mark.parametrize("kind", ["file", "empty", "pipe", "list", "text", "numbers", "deep"])
def test_a_wrong_checkpoint_is_a_sentence(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "final"
    if kind == "file":
        folder.write_text("x")
    else:
        folder.mkdir()
        contents = {
            "list": "[]", "text": "\x1b[2J", "deep": "[" * 99_999,
            "numbers": json.dumps({"files": 1, "format": 10**400}),
        }  # fmt: skip
        if kind == "pipe":
            os.mkfifo(folder / "manifest.json")
        elif kind in contents:
            (folder / "manifest.json").write_text(contents[kind])
    sentence(chat.main, [str(folder), "--prompt", "Hi"], capsys)
    probes = tmp_path / "probes.json"
    probes.write_text('[{"id": "1", "image": "../a", "question": "?", "answer": "a", "kind": "k"}]')
    argv = [str(folder), "--probes", str(probes), "--images", str(tmp_path)]
    sentence(evaluate.main, argv, capsys)
