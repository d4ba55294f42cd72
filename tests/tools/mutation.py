"""Bugs seeded one at a time into a copy of the sources, and whether the tests see each."""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("vlm_sft", "data_tools", "tests", "configs", "pyproject.toml")
PATIENCE_SECONDS = 900
"""Some bugs make a run wait for ever; no tests of one mutant take so long."""


@dataclass(frozen=True)
class Mutant:
    """A seeded bug: in `file`, `old`, which occurs once, becomes `new`.

    Attributes:
        tests: The test files, or single tests, that must see it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = ()

    def apply(self, root: Path) -> str:
        """Change the copy in `root`; returns what the file was."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise SystemExit(
                f"error: mutant {self.name!r}: its text occurs {text.count(self.old)} times in "
                f"{self.file}, expected once; write the mutant anew"
            )
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return text


def require_fit(mutant: Mutant, folder: Path) -> None:
    """Try the replacement on the sources as they are, in an empty folder; for the fast tests."""
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    copy = folder / mutant.file
    copy.parent.mkdir(parents=True)
    copy.write_text(text, encoding="utf-8")
    assert mutant.apply(folder) == text
    changed = copy.read_text(encoding="utf-8")
    assert changed != text
    if mutant.file.endswith(".py"):
        compile(changed, mutant.file, "exec")


@contextmanager
def copied_sources(mutants: Sequence[Mutant]) -> Iterator[Path]:
    """A copy of what the tests need, from which everything is imported afterwards.

    That all mutants still fit is known before the long wait.
    """
    with tempfile.TemporaryDirectory(prefix="vlm_sft-mutants-") as scratch:
        root = Path(scratch)
        _copy_sources(root)
        for name in [n for n in sys.modules if n.split(".")[0] in ("vlm_sft", "tests")]:
            del sys.modules[name]
        os.chdir(root)
        sys.path[:] = [str(root), *(p for p in sys.path if p not in ("", str(ROOT)))]
        for mutant in mutants:
            (root / mutant.file).write_text(mutant.apply(root), encoding="utf-8")
        yield root


def _copy_sources(where: Path) -> None:
    """What the tests need, without what git ignores."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, where / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, where / name)
    if (ROOT / "demo" / "pieces").exists():
        (where / "demo").mkdir()
        (where / "demo" / "pieces").symlink_to((ROOT / "demo" / "pieces").resolve())


def killer(
    root: Path,
    mutants: Sequence[Mutant],
    tests: Sequence[str],
    *,
    options: Sequence[str] = (),
    kept: Sequence[str] = (),
) -> str | None:
    """The first test that fails with these mutants in the copy; None when all pass.

    Args:
        root: The copy.
        mutants: Applied together, and taken back afterwards.
        tests: What pytest is given.
        options: More for pytest, e.g. a choice of tests.
        kept: Modules of the tests that need not be imported anew.
    """
    before = [(mutant, mutant.apply(root)) for mutant in mutants]
    try:
        log = root / "pytest.log"
        child = os.fork()
        if child == 0:
            _run_tests(root, log, [*options, *tests], kept)
        _, status = os.waitpid(child, 0)
        text = log.read_text(encoding="utf-8", errors="replace")
    finally:
        for mutant, original in reversed(before):
            (root / mutant.file).write_text(original, encoding="utf-8")
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return None
    if code < 0:
        return f"the tests were ended by {signal.Signals(-code).name}"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", text, flags=re.MULTILINE)
    if found is None:
        raise SystemExit(f"error: pytest ended with {code}:\n{text[-2000:]}")
    return found.group(1).removeprefix("tests/")


def _run_tests(root: Path, log: Path, arguments: Sequence[str], kept: Sequence[str]) -> None:
    """In the fork: forget our own modules, then let pytest import the mutated ones."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in list(sys.modules):
        if name.split(".")[0] in ("vlm_sft", "tests") and name not in kept:
            del sys.modules[name]
    os.chdir(root)
    signal.alarm(PATIENCE_SECONDS)
    import pytest

    code = 3
    try:
        sys.dont_write_bytecode = True
        quiet = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
        quiet += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
        code = int(pytest.main([*quiet, *arguments]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def try_mutants(argv: Sequence[str], mutants: Sequence[Mutant], *, prog: str, about: str) -> int:
    """A script's main: each mutant on the tests named with it; 1 when one survives."""
    parser = argparse.ArgumentParser(
        prog=prog, description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="WORD", help="mutants with this in the name")
    arguments = parser.parse_args(argv)
    chosen = [mutant for mutant in mutants if arguments.only in mutant.name]
    with copied_sources(chosen) as root:
        from vlm_sft.utils.progress import track

        _warm_up()
        start = time.monotonic()
        tests = sorted({test for mutant in chosen for test in mutant.tests})
        if (broken := killer(root, (), tests)) is not None:
            print(f"error: {broken} fails without any mutant; mend it first", file=sys.stderr)
            return 1
        print(f"without a mutant all tests pass ({time.monotonic() - start:.0f} s)", flush=True)
        seen_by = {
            mutant.name: killer(root, (mutant,), mutant.tests)
            for mutant in track(chosen, description="mutants")
        }
    return _report(seen_by)


def _warm_up() -> None:
    """Import what takes seconds; every trial is a fork of this."""
    import accelerate  # noqa: F401
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)


def _report(seen_by: dict[str, str | None]) -> int:
    """Print the table; 1 when a mutant survived."""
    width = max(map(len, seen_by))
    print(f"{'mutant'.ljust(width)}  {'':8}  seen by")
    for name, by in seen_by.items():
        print(f"{name.ljust(width)}  {'killed' if by else 'SURVIVED':8}  {by or ''}")
    survived = sum(by is None for by in seen_by.values())
    print(f"\n{len(seen_by)} mutants, {survived} survived")
    return int(survived > 0)
