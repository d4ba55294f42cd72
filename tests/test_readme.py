"""What the README tells a newcomer to type exists, with the options that it shows."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    blocks += re.findall(r"   ```bash\n(.*?)   ```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(python -m [^`]+)`", README)
    return sorted({line.split("   #")[0].strip() for line in lines if line.strip()})


@cache
def help_of(module: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout, f"{module} --help shows no example"
    return done.stdout


def test_the_readme_has_commands() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_exists_with_its_options(command: str) -> None:
    words = shlex.split(command, comments=True)
    if "-m" in words:
        module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        text = help_of(module)
        for flag in (word for word in arguments if word.startswith("--")):
            assert flag in text, f"{module} has no {flag}"
    else:
        arguments = words[1:]
        assert (ROOT / words[0]).is_file(), f"{words[0]} does not exist"
    for word in arguments:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{word} does not exist"


def test_every_file_of_the_tree_exists() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"(\w+\.py)\b", tree):
        assert (ROOT / "vlm_sft" / name).is_file(), name
    for name in re.findall(r"^(?:  )?(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / name).is_dir() or (ROOT / "vlm_sft" / name).is_dir(), name
