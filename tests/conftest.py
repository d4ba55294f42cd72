"""Tiny runs, trained once a session, for the tests of what is done with a finished run."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent

BROWSER_FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
]  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def trained(folder: Path, config: str, *overrides: str) -> Path:
    """`folder`, with a run of `configs/tiny/<config>.yaml` in it."""
    from tests.train.tiny import reset_accelerate
    from vlm_sft import stage1, stage2

    here = Path.cwd()
    os.chdir(ROOT)
    reset_accelerate()
    try:
        quiet = ["projector=null", "train.trackers=[]", "train.eval_samples=0", "data.eval=[]"]
        path = ROOT / "configs" / "tiny" / f"{config}.yaml"
        main = stage1.main if config == "stage1" else stage2.main
        assert main([str(path), f"output_dir={folder}", *quiet, *overrides]) == 0
    finally:
        reset_accelerate()
        os.chdir(here)
    return folder


@pytest.fixture(autouse=True)
def _unconfigured_logging() -> Iterator[None]:
    """Undo the logging configuration of commands that a test ran in this process."""
    from vlm_sft.utils.logs import reset_logging

    yield
    reset_logging()


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-2 run in full, long enough for its answers to end by themselves."""
    folder = tmp_path_factory.mktemp("full") / "run"
    return trained(folder, "stage2", "train.max_steps=40")


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage-2 run with adapters, four steps long."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    return trained(folder, "stage2_lora", "train.max_steps=4", "optim.warmup_ratio=0")


@pytest.fixture
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The repository's root as the working directory, from which configs name their data."""
    from tests.train.tiny import reset_accelerate

    monkeypatch.chdir(ROOT)
    reset_accelerate()
    yield ROOT
    reset_accelerate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, for tests of pages; they are skipped without it, except in CI."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None and os.environ.get("CI") == "true":
        pytest.fail("there is no Chromium: pages would not be tested")
    if path is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as run:
        found = run.chromium.launch(executable_path=path, args=BROWSER_FLAGS)
        yield found
        found.close()
