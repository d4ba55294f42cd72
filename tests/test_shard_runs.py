"""A run on tar shards that is really killed resumes to the bytes of an undisturbed one."""

import signal
from functools import partial
from pathlib import Path

import pytest

from tests.tools.reliability.kill_places import kill_at
from tests.tools.reliability.kills import untouched
from tests.tools.reliability.lab import Lab, pack_shards

SETTINGS = (
    "train.save_every_steps=2",
    "train.max_steps=5",
    "train.eval_every_steps=null",
    "train.eval_samples=0",
    "data.eval=[]",
    "train.micro_batch_size=null",
    "train.packing.max_tokens=512",
    "optim.warmup_ratio=0",
)


def test_a_killed_run_on_shards_resumes_exactly(
    tmp_path: Path, in_the_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shards = pack_shards(tmp_path / "shards")
    overrides = (*SETTINGS, f"data.train.0.path={shards}")
    lab = Lab(tmp_path / "runs", "stage2", overrides)
    lab.folder.mkdir()
    expected, _ = untouched(lab)
    for place, count, workers in (("checkpoint.renamed", 1, 2), ("step.updated", 4, 0)):
        setting = f"data.num_workers={workers}"
        ended = lab.start(place, setting, before=partial(kill_at, place, count)).wait()
        assert ended.code == -signal.SIGKILL, ended.output
        assert lab.finish(place, setting).code == 0
        assert lab.result(place) == expected
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 2
