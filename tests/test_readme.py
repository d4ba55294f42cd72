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
    if words[0] == "vlm-sft":
        module = f"vlm_sft.{words[1]}"
        arguments = words[2:]
        text = help_of(module)
        for flag in (word for word in arguments if word.startswith("--")):
            assert flag in text, f"{module} has no {flag}"
    elif "-m" in words:
        module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
        text = help_of(module)
        for flag in (word for word in arguments if word.startswith("--")):
            assert flag in text, f"{module} has no {flag}"
    else:
        arguments = words[1:]
        assert words[0] in ("cp", "pip") or (ROOT / words[0]).is_file(), f"no {words[0]}"
    for word in arguments:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{word} does not exist"


def test_every_link_leads_to_a_file() -> None:
    documents = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    documents += [ROOT / f"{name}.md" for name in ("ARCHITECTURE", "CONTRIBUTING", "SECURITY")]
    for document in documents:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 150
