"""Save, kill, damage and resume in any order: the newest complete checkpoint is loaded as saved."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.tools.reliability.kill_places import interrupted
from vlm_sft.checkpoint.async_save import CheckpointSaver
from vlm_sft.checkpoint.format import step_name
from vlm_sft.checkpoint.snapshot import tensor_component
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.checkpoint.tensor_files import copy_tensors, load_tensors, save_tensors
from vlm_sft.errors import CheckpointError

POINTS = (
    "checkpoint.captured",
    "checkpoint.begun",
    "checkpoint.component",
    "checkpoint.files_synced",
    "checkpoint.manifest",
    "checkpoint.replaced",
    "checkpoint.renamed",
    "checkpoint.folder_synced",
    "checkpoint.verified",
    "checkpoint.pruning",
    "checkpoint.pruned",
)
COMPLETE_FROM = POINTS.index("checkpoint.renamed")


class Killed(BaseException):
    """The process was killed; the run directory is as it was at that moment."""


class RunOnDisk(RuleBasedStateMachine):
    """A run of one tensor whose value is the step at which it was saved."""

    @initialize(keep=st.integers(1, 3), background=st.booleans())
    def begin(self, keep: int, background: bool) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.keep, self.background = keep, background
        self.step = 0
        self.whole: set[int] = set()
        """Steps whose checkpoint was reported or renamed, and is undamaged."""
        self.there: set[int] = set()
        self.passed_over: set[int] = set()
        """Steps whose checkpoint this process found damaged when it looked for the newest."""
        self.start_process()

    def start_process(self) -> None:
        self.weights = {"w": torch.full((64,), float(self.step))}
        component = tensor_component(
            lambda: self.weights,
            lambda folder, tensors: save_tensors(folder / "w.safetensors", tensors),
            lambda folder: copy_tensors(
                load_tensors(folder / "w.safetensors"), self.weights, folder
            ),
        )
        self.store = CheckpointStore(
            self.root / "run", {"w": component}, keep=self.keep, log=lambda text: None
        )
        (self.root / "run").mkdir(exist_ok=True)
        self.saver = CheckpointSaver(self.store, asynchronous=self.background)

    @rule(steps=st.integers(1, 3))
    def train(self, steps: int) -> None:
        self.step += steps
        self.weights["w"].fill_(float(self.step))

    @rule()
    def save(self) -> None:
        self.saver.save({"step": self.step})
        self.weights["w"].add_(0.5)  # training continues while the copy is written
        self.saver.wait()
        self.weights["w"].sub_(0.5)
        self.announce(self.step)

    @rule(point=st.sampled_from(POINTS))
    def save_and_be_killed(self, point: str) -> None:
        died = self.killed_at(point)
        if not died or POINTS.index(point) >= COMPLETE_FROM:
            self.whole.add(self.step)
        self.look()
        self.resume()

    @precondition(lambda self: self.there)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.there)))
        folder = self.store.steps_dir / step_name(step)
        files = sorted(folder.iterdir())
        assume(files)
        path = data.draw(st.sampled_from(files))
        how = data.draw(st.sampled_from(("flip", "cut", "delete")))
        content = bytearray(path.read_bytes())
        if how == "delete" or not content:
            path.unlink()
        elif how == "cut":
            os.truncate(path, data.draw(st.integers(0, len(content) - 1)))
        else:
            bit = data.draw(st.integers(0, 8 * len(content) - 1))
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
        self.whole.discard(step)

    @rule()
    def resume(self) -> None:
        """Start a new process: it finds the newest complete checkpoint, as it was saved."""
        self.start_process()
        if self.there and not self.whole:
            with pytest.raises(CheckpointError):
                self.store.newest()
            shutil.rmtree(self.store.steps_dir)  # what the message says to do
            self.there.clear()
        newest = self.store.newest()
        self.passed_over = {s for s in self.there if newest is None or s > newest.step}
        assert (newest.step if newest else None) == max(self.whole, default=None)
        assert not [*self.root.rglob("*.tmp"), *self.root.rglob("*.replaced")]
        self.step = newest.step if newest else 0
        self.weights["w"].fill_(-1.0 if newest else 0.0)
        if newest:
            self.store.load(newest)
        assert (self.weights["w"] == self.step).all()

    def announce(self, step: int) -> None:
        self.whole.add(step)
        self.passed_over.discard(step)
        self.look()
        assert step in self.there
        assert len([there for there in self.whole if there <= step]) <= self.keep

    def look(self) -> None:
        """Look at the disk: a checkpoint may be gone only if `keep` newer ones exist.

        Newer ones that were damaged since this process looked count among those it keeps.
        """
        names = [path.name for path in self.store.steps_dir.glob("*step-????????*")]
        names = [name.removeprefix(".").removesuffix(".replaced") for name in names]
        self.there = {int(name[5:]) for name in names if name[5:].isdigit()}
        for lost in self.whole - self.there:
            newer = {step for step in self.there if lost < step <= self.step} - self.passed_over
            assert len(newer) >= self.keep
        self.whole &= self.there

    def killed_at(self, point: str) -> bool:
        """Save with a kill at `point`; return whether the save reached it."""
        snapshot = self.root / "as it was"

        def kill() -> None:
            shutil.copytree(self.root / "run", snapshot)
            raise Killed

        try:
            with interrupted(point, kill):
                CheckpointSaver(self.store).save({"step": self.step})
        except Killed:
            shutil.rmtree(self.root / "run")
            os.rename(snapshot, self.root / "run")
            return True
        return False

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)


TestRunOnDisk = RunOnDisk.TestCase
TestRunOnDisk.settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
