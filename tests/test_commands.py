"""Every module that `python -m` runs is a documented command; the others say that they are none."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_sft.commands import COMMANDS

ROOT = Path(__file__).parent.parent


def test_the_modules_that_run_are_the_commands() -> None:
    guarded = set()
    for path in [*ROOT.glob("vlm_sft/**/*.py"), *ROOT.glob("data_tools/**/*.py")]:
        if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            guarded.add(name.removesuffix(".__main__"))
    assert guarded == set(COMMANDS)


def test_every_command_that_the_documents_name_is_one() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("configs/**/*.yaml")]
    documents += [path for path in ROOT.glob("scripts/*") if path.is_file()]
    texts = [path.read_text(encoding="utf-8") for path in documents]
    texts += [path.read_text(encoding="utf-8") for path in ROOT.glob("*/**/*.py")]
    named = {
        name for text in texts for name in re.findall(r"-m ((?:vlm_sft|data_tools)[\w.]+)", text)
    }
    wrong = {name.rstrip(".") for name in named} - {*COMMANDS, "vlm_sft", "data_tools"}
    assert wrong <= {"vlm_sft.page", "vlm_sft.doctor"}  # of the test below
    assert len(named) > 10


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["-m", "vlm_sft.page"], "vlm_sft.page"),
        (["-mvlm_sft.doctor"], "vlm_sft.doctor"),
        (["-m", "vlm_sft", "--help"], "vlm_sft"),
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
    (tmp_path / "program.py").write_text("import vlm_sft.page, data_tools\nprint('ran')\n")
    for arguments in (["-m", "program"], ["program.py"], ["-c", "import program"]):
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": "/usr/bin:/bin"},
        )
        assert done.stdout == "ran\n", done.stderr
