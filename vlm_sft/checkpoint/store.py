"""The checkpoints of one run: save, find the newest, load, finish."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vlm_sft.checkpoint.earlier_versions import identity
from vlm_sft.checkpoint.folders import (
    STEP_FOLDER,
    Log,
    copy_checkpoint,
    remove,
    sweep,
    write_folder,
)
from vlm_sft.checkpoint.format import (
    Checkpoint,
    foreign_content,
    has_manifest,
    step_name,
    verify,
)
from vlm_sft.checkpoint.provenance import (
    environment_difference,
    recorded_environment,
    software,
    software_difference,
)
from vlm_sft.checkpoint.snapshot import (
    Component,
    Writer,
    require_all_saved,
    snapshot_components,
)
from vlm_sft.errors import CheckpointError, ConfigError
from vlm_sft.errors.codes import CODE_OF_FINGERPRINT
from vlm_sft.utils.filesystem import free_bytes
from vlm_sft.utils.process_group import ProcessGroup


@dataclass
class CheckpointStore:
    """The checkpoints of one run, in `checkpoints/step-N` and `final/` of its folder.

    If several ranks save together, each has a store of its own and all call the same methods.

    Args:
        output_dir: The run folder.
        components: The components of a checkpoint, by name.
        fingerprint: What the run trains from (stage, base models, tokenizer, data), as JSON values.
            It is written into every manifest; a checkpoint with another fingerprint is refused.
        describe_mismatch: For an entry of the fingerprint, a function that returns one sentence
            about the difference of a recorded value and this run's.
        keep: Number of step checkpoints left after a save.
        num_bytes: Approximate size of a checkpoint, for the check of the free space; 0 skips it.
        log: Called with each line for the user.
        trainable: The tensors that the run trains, by name. A save that lacks one is refused.
        group: The ranks that save.
    """

    output_dir: Path
    components: Mapping[str, Component]
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    describe_mismatch: Mapping[str, Callable[[Any, Any], str]] = field(default_factory=dict)
    keep: int = 2
    num_bytes: int = 0
    log: Log = print
    trainable: Mapping[str, torch.Tensor] = field(default_factory=dict)
    group: ProcessGroup = field(default_factory=ProcessGroup)
    _damaged: set[Path] = field(default_factory=set, init=False)
    _not_pruned: set[Path] = field(default_factory=set, init=False)
    """Folders with foreign content, which are not deleted and of which the user was warned."""

    @property
    def steps_dir(self) -> Path:
        """The directory of the step checkpoints."""
        return self.output_dir / "checkpoints"

    @property
    def final_dir(self) -> Path:
        """The directory of a finished run's checkpoint."""
        return self.output_dir / "final"

    def save(self, position: Mapping[str, Any]) -> Checkpoint:
        """Write `checkpoints/step-N`, verify it, then delete the oldest ones beyond `keep`.

        Args:
            position: `step`, and whatever else defines the position in the data.

        Raises:
            CheckpointError: There is too little free space, a trainable tensor would be missing, or
                what was written does not verify.
            OSError: The disk is full or failed; older checkpoints are untouched.
        """
        return self.snapshot(position)()

    def snapshot(self, position: Mapping[str, Any]) -> Callable[[], Checkpoint]:
        """Copy the state to host memory and return the function that does the rest of `save`.

        Training may continue before that function is called; it may be called in a thread.

        Raises:
            CheckpointError: There is too little free space, or a trainable tensor would be missing.
        """
        self.group.rank0_then_broadcast(lambda: require_space(self.output_dir, self.num_bytes))
        self.group.all_ranks(lambda: require_all_saved(self.trainable, self.components))
        folder = self.steps_dir / step_name(int(position["step"]))
        fields = {**self.fingerprint, **position}
        return partial(
            self._write, folder, snapshot_components(self.components, self.group), fields
        )

    def _write(
        self, folder: Path, writers: Sequence[Writer], fields: Mapping[str, Any]
    ) -> Checkpoint:
        write_folder(folder, writers, fields, self.group, self.log)
        return self.group.rank0_then_broadcast(lambda: self._verify_and_prune(folder))

    def _verify_and_prune(self, folder: Path) -> Checkpoint:
        # In this order: until the new checkpoint is proven to read back, the old ones stay.
        checkpoint = verify(folder)
        self._prune(folder)
        return checkpoint

    def _prune(self, saved: Path) -> None:
        """Delete older checkpoints so that `keep` undamaged ones are left, including `saved`.

        Checkpoints newer than `saved` are not counted: a run that resumed from an earlier step can
        have them, and they are damaged or about to be replaced. An older folder stays if it is not
        a checkpoint or holds anything that no save wrote.
        """
        self._damaged.discard(saved)
        folders = self.step_folders()
        folders = folders[folders.index(saved) :]
        undamaged = [f for f in folders if f not in self._damaged and has_manifest(f)]
        for old in folders[folders.index(undamaged[: self.keep][-1]) + 1 :]:
            if not (foreign := foreign_content(old)):
                remove(old)
            elif old not in self._not_pruned:
                self._not_pruned.add(old)
                self.log(f"warning: {old} was not deleted: {foreign}")

    def finish(self, checkpoint: Checkpoint) -> Checkpoint:
        """Make `final/` a complete copy of `checkpoint`; see `copy_checkpoint`."""
        return copy_checkpoint(checkpoint, self.final_dir, self.components, log=self.log)

    def keep_best(self, checkpoint: Checkpoint) -> Checkpoint:
        """Make `best/` a complete copy of `checkpoint`; see `copy_checkpoint`."""
        best = self.output_dir / "best"
        return copy_checkpoint(checkpoint, best, self.components, log=self.log)

    def finished(self) -> Checkpoint | None:
        """Return the `final/` of a finished run; None if there is none or it is damaged."""
        if not self.final_dir.exists():
            return None
        try:
            return verify(self.final_dir)
        except CheckpointError as error:
            self.log(f"not used: {error}")
            return None

    def newest(self) -> Checkpoint | None:
        """Clear what a killed save left, then return `newest_complete`.

        Raises:
            CheckpointError: There are checkpoints and all of them are damaged.
        """
        sweep(self.output_dir, self.log)
        sweep(self.steps_dir, self.log)
        return self.newest_complete()

    def newest_complete(self) -> Checkpoint | None:
        """Return the newest step checkpoint that verifies; None if the run has none yet.

        Damaged ones are logged and skipped. Nothing is changed on the disk.

        Raises:
            CheckpointError: There are checkpoints and all of them are damaged.
        """
        folders = self.step_folders()
        for folder in folders:
            try:
                return verify(folder)
            except CheckpointError as error:
                self._damaged.add(folder)
                self.log(f"skipped: {error}")
        if folders:
            # Starting again from step 0 would silently throw the run's progress away.
            raise CheckpointError(
                f"{self.steps_dir}: none of the {len(folders)} checkpoints is complete (each one's "
                "fault is listed above); copy a complete one back, or move that directory away to "
                "start the run over",
                code="checkpoints_all_damaged",
            )
        return None

    def load(self, checkpoint: Checkpoint) -> None:
        """Load every component into the live objects.

        Raises:
            CheckpointError: See `require_same_fingerprint`; or a tensor is missing, unexpected or
                of another shape.
        """
        self.require_same_fingerprint(checkpoint)
        for component in self.components.values():
            if component.load is not None:
                component.load(checkpoint.folder)

    def require_same_fingerprint(self, checkpoint: Checkpoint) -> None:
        """Compare a checkpoint's fingerprint with this run's; log differing software.

        Raises:
            CheckpointError: The checkpoint is of another stage, model, tokenizer or data.
        """
        for name, expected in self.fingerprint.items():
            found = checkpoint.manifest.get(name)
            if identity(name, found, checkpoint.folder) == identity(name, expected):
                continue
            describe = self.describe_mismatch.get(name)
            if describe is not None and found is not None:
                difference = describe(found, expected)
            else:
                what = name.replace("_", " ")
                difference = f"{what} is {_short(found)}, but this run's is {_short(expected)}"
            raise CheckpointError(
                f"{checkpoint.folder}: {difference}; resume with what the checkpoint was made "
                "from, or choose another output_dir",
                code=CODE_OF_FINGERPRINT.get(name),
            )
        if changed := software_difference(checkpoint.manifest.get("software", {}), software()):
            self.log(f"{checkpoint.folder} was made by other software ({changed})")
        recorded = checkpoint.manifest.get("environment")
        if recorded is not None and (
            changed := environment_difference(recorded, recorded_environment())
        ):
            self.log(f"{checkpoint.folder} was made with other environment variables ({changed})")

    def step_folders(self) -> list[Path]:
        """Return the folders of step checkpoints, complete or not, newest first."""
        found = self.steps_dir.glob("step-*")
        folders = [f for f in found if STEP_FOLDER.fullmatch(f.name) and f.is_dir()]
        return sorted(folders, key=lambda folder: int(folder.name[5:]), reverse=True)


def require_within(checkpoint: Checkpoint, total_steps: int) -> None:
    """Refuse to resume from a checkpoint beyond the last step of the run.

    Raises:
        ConfigError: With both steps.
    """
    if checkpoint.step > total_steps:
        raise ConfigError(
            f"{checkpoint.folder}: the run is already at step {checkpoint.step}, beyond the "
            f"{total_steps} of train.max_steps and train.epochs; raise them, or choose another "
            "output_dir",
            code="settings_changed",
        )


def require_space(place: Path, num_bytes: int) -> None:
    """Check that the disk has room for a checkpoint before any of it is written.

    Raises:
        CheckpointError: With the space that is free and the space that is needed.
    """
    free = free_bytes(place)
    if free is not None and free < num_bytes:
        raise CheckpointError(
            f"{place}: {free / 1e9:.1f} GB free, but a checkpoint takes about "
            f"{num_bytes / 1e9:.1f} GB; free some space or choose another output_dir",
            code="disk_full",
        )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else text[:197] + "..."
