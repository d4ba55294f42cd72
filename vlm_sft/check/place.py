"""Whether the run can use its output directory, and whether the disk has room; writes nothing."""

import math
from pathlib import Path

from vlm_sft.check.verdict import Verdict
from vlm_sft.config import RunConfig
from vlm_sft.filesystem import free_bytes
from vlm_sft.run_folder import require_run_folder, require_same_config, require_unlocked
from vlm_sft.train.checkpoint import CheckpointStore


def examine_output_dir(config: RunConfig, verdict: Verdict) -> None:
    """Report what keeps a run out of its output directory: a lock, another run's settings."""
    output_dir = Path(config.output_dir)
    store = CheckpointStore(output_dir, {}, say=lambda text: None)
    has_checkpoints = bool(store.step_folders()) or store.final_dir.exists()
    with verdict.examine("output_dir"):
        require_run_folder(config)
        require_unlocked(output_dir)
        require_same_config(config, has_checkpoints=has_checkpoints)
        if (final := store.finished()) is not None:
            words = f"already finished: {final.folder} (step {final.step}); a run would do nothing"
            verdict.report("output_dir", "warning", words)
        elif has_checkpoints:
            verdict.report("output_dir", "note", f"a run would resume in {output_dir}")


def examine_steps_done(config: RunConfig, total_steps: int, verdict: Verdict) -> None:
    """Report a checkpoint that is already beyond the last step."""
    store = CheckpointStore(Path(config.output_dir), {}, say=lambda text: None)
    steps = [int(folder.name.removeprefix("step-")) for folder in store.step_folders()]
    if steps and max(steps) > total_steps:
        verdict.report(
            "output_dir",
            "bad",
            f"{config.output_dir}: the run is already at step {max(steps):,}, beyond the "
            f"{total_steps:,} that train.max_steps and train.epochs ask for; ask for more, or "
            "choose another output_dir",
        )


def examine_disk(
    config: RunConfig, place: Path, total_steps: int, num_bytes: int, verdict: Verdict
) -> None:
    """Compare the free space with all checkpoints that lie there at once.

    Args:
        config: The run.
        place: An existing directory on the disk of `output_dir`.
        total_steps: Of the run.
        num_bytes: Of one checkpoint.
        verdict: Gets the line.
    """
    saves = math.ceil(total_steps / config.train.save_every_steps)
    count = min(config.train.keep_checkpoints + 1, saves)  # a new one is complete before one goes
    there = len(CheckpointStore(Path(config.output_dir), {}).step_folders())
    needed, free = max(0, count - there) * num_bytes, free_bytes(place)
    words = f"{count} checkpoint(s) of about {num_bytes / 1e9:.2f} GB lie there at once"
    if free is None:
        verdict.report("disk", "note", f"{words}; the free space is not known")
        return
    words += f"; {free / 1e9:.1f} GB free"
    if free < needed:
        words += "; free some space, lower train.keep_checkpoints, or choose another output_dir"
    verdict.add("disk", free >= needed, words)
