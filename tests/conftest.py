"""Tiny runs, trained once a session, for the tests of what is done with a finished run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
