"""A command that needs a package of an extra says which extra to install, and exits with 2."""

import builtins
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from vlm_sft import show
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.utils import libraries
from vlm_sft.utils.libraries import missing_extra, require_extra

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = ROOT / "configs/tiny/stage1.yaml"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes packages absent, as in an environment without extras."""

    def hide(*names: str) -> None:
        found, imported = importlib.util.find_spec, builtins.__import__

        def find_spec(name: str, package: str | None = None) -> Any:
            return None if name.split(".")[0] in names else found(name, package)

        def import_module(name: str, *others: Any, **named: Any) -> Any:
            if name.split(".")[0] in names:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return imported(name, *others, **named)

        monkeypatch.setattr(libraries, "find_spec", find_spec)
        monkeypatch.setattr(builtins, "__import__", import_module)

    return hide


def test_every_extra_that_a_message_names_exists_and_installs_the_package() -> None:
    named = {"imagehash": "ImageHash"}
    for package, extra in libraries._EXTRAS.items():
        requirements = " ".join(PROJECT["optional-dependencies"][extra])
        assert named.get(package, package) in requirements, (package, extra)


def test_the_core_has_none_of_them() -> None:
    core = " ".join(PROJECT["dependencies"])
    assert not [package for package in libraries._EXTRAS if package in core]


def test_show_html_without_matplotlib_is_refused_before_any_record_is_read(
    without: Any, tmp_path: Path
) -> None:
    without("matplotlib")
    with pytest.raises(
        UserError, match=r"--html: .*'matplotlib'.*`pip install 'vlm-sft\[plots\]'`"
    ):
        show.main([str(CORE), "--html", str(tmp_path / "page.html")])


def test_a_missing_package_of_an_extra_ends_a_command_with_one_sentence(
    without: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    without("pandas")

    def main(_: Any) -> int:
        import pandas  # noqa: F401

        return 0

    with pytest.raises(SystemExit) as caught:
        run_command(main, [])
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        "error VS002: this needs the package 'pandas', which is not installed; install it with "
        "`pip install 'vlm-sft[instruct]'`\n"
    )


def test_a_missing_package_of_the_core_is_a_bug_and_keeps_its_traceback() -> None:
    assert missing_extra(ModuleNotFoundError("no", name="torch")) is None
    assert missing_extra(ModuleNotFoundError("no", name="pandas.core")) is not None
    require_extra("matplotlib", "--html")  # installed here


def test_help_imports_no_slow_library() -> None:
    """A slow import in one of the modules that `--help` needs would be noticed in every shell."""
    slow = "torch transformers accelerate peft datasets matplotlib pandas numpy pyarrow rich"
    code = (
        "import sys; sys.argv = ['vlm-sft', '--help']\n"
        "from vlm_sft.__main__ import main\n"
        "try: main(['--help'])\n"
        f"except SystemExit: print([n for n in {slow.split()} if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
