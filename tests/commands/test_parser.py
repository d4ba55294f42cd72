"""Commands answer before heavy imports, and describe all that they take."""

import argparse
import importlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlm_sft.commands.parser import NOISE, heavy_imports, silence_known_noise

ROOT = Path(__file__).parents[2]
CONFIG = "configs/tiny/stage1.yaml"
HEAVY = {
    "torch",
    "matplotlib",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "timm",
    "open_clip",
    "pandas",
}
COMMANDS = [
    "vlm_sft",
    "vlm_sft.config",
    "vlm_sft.report",
    "vlm_sft.stage1",
    "vlm_sft.stage2",
    "vlm_sft.check",
    "vlm_sft.plan",
    "vlm_sft.show",
    "vlm_sft.chat",
    "vlm_sft.evaluate",
    "vlm_sft.export",
    "vlm_sft.errors",
    "data_tools.build_coco",
    "data_tools.make_scenes",
    "data_tools.mix",
    "data_tools.overlap",
    "data_tools.pope",
    "data_tools.split",
    "data_tools.verify",
    "data_tools.instruct",
]
WITH_CONFIG = ["vlm_sft.stage1", "vlm_sft.stage2", "vlm_sft.check", "vlm_sft.plan", "vlm_sft.show"]


def start(*words: str) -> tuple[int, str, str, set[str]]:
    """Run a module; its exit code, stdout, stderr, and the top-level packages it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    timing = re.compile(r"^import time:.*\| *(?:imported package|(\S+))$\n?", re.MULTILINE)
    imported = {name.split(".")[0] for name in timing.findall(done.stderr)}
    return done.returncode, done.stdout, timing.sub("", done.stderr), imported


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy_and_shows_examples(command: str) -> None:
    code, out, err, imported = start(command, "--help")
    assert (code, err) == (0, "")
    assert "example" in out and "--version" in out
    assert not imported & HEAVY


@pytest.mark.parametrize("command", COMMANDS)
def test_the_version_is_printed(command: str) -> None:
    code, out, err, imported = start(command, "--version")
    assert (code, err) == (0, "") and re.fullmatch(r"vlm_sft \d+\.\d+\.\d+\n", out)
    assert not imported & HEAVY


NOT_READ = [
    ("vlm_sft.show", ["data.eval=[{path: nowhere.json}]"]),
    ("vlm_sft.show", ["projector=nowhere/final"]),
    ("vlm_sft.plan", ["projector=nowhere/final"]),
]
"""Commands that work without the file of a setting, since they do not read it."""


@pytest.mark.parametrize("command", WITH_CONFIG)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such configuration file"),
        ([CONFIG, "data.max_lenght=3"], "did you mean 'data.max_length'?"),
        ([CONFIG, "data.train.0.path=nowhere.json"], "nowhere.json: no such data file"),
        ([CONFIG, "data.eval=[{path: nowhere.json}]"], "nowhere.json: no such data file"),
        ([CONFIG, "data.template=chatmll"], "data.template: no template 'chatmll'"),
        (
            [CONFIG, "model.language_model.tokenizer=./nowhere"],
            "model.language_model.tokenizer: no such folder './nowhere'",
        ),
        (
            [CONFIG, "projector=nowhere/final"],
            "projector: nowhere/final: no such folder; train stage 1 first",
        ),
        ([CONFIG, "--limmit", "3"], "--limmit"),
    ],
)
def test_a_wrong_input_is_refused_before_heavy_imports(
    command: str, words: list[str], message: str
) -> None:
    if (command, words[1:2]) in NOT_READ:
        pytest.skip("the command does not read this")
    rate = ["optim.learning_rate.language_model=1e-5"] if command == "vlm_sft.stage2" else []
    code, out, err, imported = start(command, *words, *rate)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert not imported & HEAVY


@pytest.mark.parametrize(
    "words",
    [
        ["vlm_sft.chat", "nowhere"],
        ["vlm_sft.report", "nowhere"],
        ["vlm_sft.config", "show", "nowhere.yaml"],
        ["vlm_sft", "stage1", "nowhere.yaml"],
        ["vlm_sft.chat", str(ROOT), "--image", "nowhere.jpg"],
        ["vlm_sft.export", "nowhere", "out"],
        ["vlm_sft.evaluate", "nowhere", "--probes", CONFIG, "--images", "."],
        ["vlm_sft.evaluate", ".", "--probes", "nowhere.json", "--images", "."],
        ["vlm_sft.evaluate", ".", "--probes", CONFIG, "--images", "nowhere"],
        ["vlm_sft.check", "--tokenizer", "./nowhere"],
        ["vlm_sft.check", "--tokenizer", "bytes", "--template", "nowhere"],
        ["vlm_sft.show", "--tokenizer", "bytes", "--records", "nowhere.json"],
        ["data_tools.mix", "nowhere.yaml"],
        ["data_tools.instruct", "plan", "nowhere.yaml"],
    ],
)
def test_a_missing_file_or_folder_is_named_before_heavy_imports(words: list[str]) -> None:
    code, out, err, imported = start(*words)
    assert (code, out) == (2, "") and "nowhere" in err and err.count("\n") == 1
    assert not imported & HEAVY


def test_ctrl_c_during_heavy_imports_is_one_line() -> None:
    code = (
        "import os, signal\n"
        # A process that was started in the background ignores the signal.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from vlm_sft.commands.parser import heavy_imports\n"
        "with heavy_imports():\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        import this\n"
        "    except BaseException: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 130 and done.stdout == ""
    assert done.stderr == "stopped by Ctrl-C before the command started\n"


def test_ctrl_c_works_as_before_after_heavy_imports() -> None:
    from vlm_sft.commands.parser import heavy_imports

    before = signal.getsignal(signal.SIGINT)
    with heavy_imports():
        pass
    assert signal.getsignal(signal.SIGINT) is before


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    yield from parser._actions


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "vlm_sft.errors"])
def test_every_option_has_a_description(command: str) -> None:
    package = command.rpartition(".")[2] in (
        "vlm_sft",
        "config",
        "export",
        "instruct",
        "mix",
        "select",
    )
    name = f"{command}.__main__" if package else command
    parser = importlib.import_module(name).parser()
    unexplained = [a.option_strings or a.dest for a in actions_of(parser) if not a.help]
    assert unexplained == []


def test_known_noise_is_dropped_and_real_warnings_of_the_same_logger_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    silence_known_noise()
    [(name, beginning)] = NOISE.items()
    logging.getLogger(name).warning(f"{beginning}: No module named 'kernels'")
    logging.getLogger(name).warning("the weights are corrupt")
    assert [record.getMessage() for record in caplog.records] == ["the weights are corrupt"]


@pytest.mark.slow
def test_a_plan_prints_nothing_of_other_libraries() -> None:
    code, _, err, _ = start("vlm_sft.plan", "configs/tiny/stage2_lora.yaml", "--sample", "5")
    assert code == 0 and "kernels-community" not in err


def test_loading_bars_of_libraries_stay_out_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging as library

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    library.enable_progress_bar()
    try:
        with heavy_imports():
            pass
        assert not library.is_progress_bar_enabled()
    finally:
        library.enable_progress_bar()
