"""Every module that `python -m` runs is a documented command; other modules are refused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_sft.__main__ import COMMANDS as SCRIPT_COMMANDS
from vlm_sft.commands.registry import COMMANDS

ROOT = Path(__file__).parents[2]


def test_the_modules_that_run_are_the_commands() -> None:
    guarded = set()
    for path in [*ROOT.glob("vlm_sft/**/*.py"), *ROOT.glob("data_tools/**/*.py")]:
        if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            guarded.add(name.removesuffix(".__main__"))
    assert guarded == set(COMMANDS)


def test_every_command_of_the_script_that_the_documents_name_is_one() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("vlm_sft/**/*.py")]
    texts = [path.read_text(encoding="utf-8") for path in documents]
    named = {name for text in texts for name in re.findall(r"(?:^ +|`)vlm-sft (\w+)", text, re.M)}
    named -= {"COMMAND", "NAME"}  # placeholders
    assert named <= SCRIPT_COMMANDS.keys()
    assert len(named) > 8


def test_every_command_that_the_documents_name_is_one() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/**/*.yaml")]
    documents += [path for path in ROOT.glob("scripts/*") if path.is_file()]
    texts = [path.read_text(encoding="utf-8") for path in documents]
    for folder in ("vlm_sft", "data_tools", "scripts", "tests"):
        texts += [path.read_text(encoding="utf-8") for path in ROOT.glob(f"{folder}/**/*.py")]
    named = {
        name for text in texts for name in re.findall(r"-m ((?:vlm_sft|data_tools)[\w.]+)", text)
    }
    wrong = {name.rstrip(".") for name in named} - {*COMMANDS, "data_tools"}
    assert wrong <= {"vlm_sft.utils.html", "vlm_sft.checks.tokenizer.check"}  # of the test below
    assert len(named) > 10


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["-m", "vlm_sft.utils.html"], "vlm_sft.utils.html"),
        (["-mvlm_sft.checks.tokenizer.check"], "vlm_sft.checks.tokenizer.check"),
        (["-X", "utf8", "-m", "vlm_sft.data.images"], "vlm_sft.data.images"),
        (["-m", "vlm_sft.stage_1", "c.yaml"], "vlm_sft.stage_1"),
        (["-m", "data_tools.coco"], "data_tools.coco"),
    ],
)
def test_a_module_that_is_no_command_says_so(arguments: list[str], name: str) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {name} is not a command; the commands are ")
    assert done.stderr.count("\n") == 1


def test_a_program_that_imports_the_package_runs(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import vlm_sft.utils.html, data_tools\nprint('ran')\n")
    for arguments in (["-m", "program"], ["program.py"], ["-c", "import program"]):
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"},
        )
        assert done.stdout == "ran\n", done.stderr


INTERRUPTED = """
import os, runpy, signal, sys

# A process that was started in the background ignores the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)

class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == {during!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, CtrlC())
sys.argv = ["-m"]
sys.orig_argv = ["python", "-m", {command!r}]
runpy.run_module({command!r}, run_name="__main__", alter_sys=False)
"""


@pytest.mark.parametrize(
    ("command", "during"),
    [
        ("vlm_sft.stage1", "argparse"),
        ("vlm_sft.stage1", "vlm_sft.errors"),
        ("vlm_sft.chat", "vlm_sft.commands.parser"),
        ("data_tools.make_scenes", "vlm_sft.commands.parser"),
        ("data_tools.instruct", "vlm_sft.errors"),
    ],
)
def test_ctrl_c_during_the_first_imports_is_one_line(command: str, during: str) -> None:
    code = INTERRUPTED.format(command=command, during=during)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "stopped by Ctrl-C before the command started\n"


FAILING = """
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
def main(argv):
    raise {error}
run_command(main, [])
"""


@pytest.mark.parametrize(
    ("error", "code"),
    [("UserError('x')", 2), ("OSError(28, 'full', 'f')", 2), ("KeyboardInterrupt", 130)],
)
def test_the_exit_code_does_not_depend_on_room_for_the_message(error: str, code: int) -> None:
    with open("/dev/full", "w") as full:
        script = FAILING.format(error=error)
        done = subprocess.run([sys.executable, "-c", script], stderr=full, cwd=ROOT)
    assert done.returncode == code


def test_a_deleted_current_directory_is_one_sentence(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "import os\nos.rmdir(os.getcwd())\n" + FAILING.format(error="0")],
        capture_output=True,
        text=True,
        cwd=gone,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "the current directory was deleted; change to one that exists" in done.stderr


ENDS = """
import atexit, sys, threading
sys.argv = ["vlm-sft", *{arguments!r}]
import vlm_sft
class Kept:
    def __del__(self):
        print("freed")
kept = Kept()
atexit.register(print, "closed")
threading.Thread(target=lambda: (threading.main_thread().join(), print("joined"))).start()
import runpy
runpy.run_module("vlm_sft", run_name="__main__")
"""


@pytest.mark.parametrize(("arguments", "code"), [(["errors"], 0), (["errors", "nonsense"], 2)])
def test_a_command_ends_its_threads_and_handlers_and_frees_nothing(
    arguments: list[str], code: int
) -> None:
    program = ENDS.format(arguments=arguments)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("joined\nclosed\n")
