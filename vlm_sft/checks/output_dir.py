"""Check that a run can use its directories, resume there, and has enough disk space."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from vlm_sft.checkpoint.format import Checkpoint
from vlm_sft.checkpoint.run_dir import (
    has_other_length,
    require_run_dir,
    require_same_config,
    require_unlocked,
)
from vlm_sft.checkpoint.store import CheckpointStore, require_within
from vlm_sft.checks.results import CheckResults
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.tokenize_cache import require_tokenize_cache
from vlm_sft.train.preflight import require_unchanged
from vlm_sft.train.run_cost import checkpoints_at_once
from vlm_sft.utils.filesystem import free_bytes


def check_output_dir(config: RunConfig, results: CheckResults) -> Checkpoint | None:
    """Check that a run can use its output directory, without changing anything there.

    Returns:
        The checkpoint from which the run would resume, or None.
    """
    output_dir = Path(config.output_dir)

    def warn(text: str) -> None:
        results.add("output_dir", "warning", text)

    store = CheckpointStore(output_dir, {}, log=warn)
    has_checkpoints = bool(store.step_folders()) or store.final_dir.exists()
    with results.check("output_dir"):
        require_run_dir(config)
        require_unlocked(output_dir)
        require_same_config(config, has_checkpoints=has_checkpoints)
        final = store.finished()
        if final is not None and not has_other_length(config, final):
            text = f"already finished: {final.folder} (step {final.step}); nothing to do"
            warn(text)
        elif (newest := store.newest_complete()) is not None:
            text = f"a run would resume from {newest.folder} (step {newest.step})"
            results.add("output_dir", "note", text)
            return newest
    return None


def check_cache_dir(config: RunConfig, results: CheckResults) -> RunConfig:
    """Check that `data.cache_dir` can be used; return a configuration without an unusable one."""
    if config.data.cache_dir is None:
        return config
    with results.check("cache_dir"):
        require_tokenize_cache(config.data.cache_dir)
        results.add("cache_dir", "good", f"{config.data.cache_dir} can be written and locked")
        return config
    data = config.data.model_copy(update={"cache_dir": None})
    return config.model_copy(update={"data": data})


def check_resume(
    checkpoint: Checkpoint,
    store: CheckpointStore,
    total_steps: int,
    frozen_digests: Callable[[], Mapping[str, str]],
    results: CheckResults,
) -> None:
    """Check that a run can resume from its newest complete checkpoint.

    Args:
        checkpoint: Checkpoint from which the run would resume.
        store: Checkpoint store of the run, with its model, data and template.
        total_steps: Number of steps of the run.
        frozen_digests: Returns the digests of the frozen parts of the model.
        results: Receives the result.
    """

    def note(text: str) -> None:
        results.add("resume", "note", text)

    with results.check("resume"):
        replace(store, log=note).require_same_fingerprint(checkpoint)
        require_within(checkpoint, total_steps)
        require_unchanged(checkpoint.manifest["frozen"], frozen_digests())
        results.add("resume", "good", "model, data and template equal those of the checkpoint")


def check_disk(
    config: RunConfig, place: Path, total_steps: int, num_bytes: int, results: CheckResults
) -> None:
    """Check that the disk has space for all checkpoints that exist at the same time.

    Args:
        config: Configuration of the run.
        place: An existing directory on the disk of `output_dir`.
        total_steps: Number of steps of the run.
        num_bytes: Size of a checkpoint.
        results: Receives the result.
    """
    count = checkpoints_at_once(config.train, total_steps)
    there = len(CheckpointStore(Path(config.output_dir), {}).step_folders())
    needed, free = max(0, count - there) * num_bytes, free_bytes(place)
    text = f"{count} checkpoint(s) of about {num_bytes / 1e9:.2f} GB exist at the same time"
    if free is None:
        results.add("disk", "note", f"{text}; the free space is unknown")
        return
    text += f"; {free / 1e9:.1f} GB free"
    if free < needed:
        text += "; free some space, lower train.keep_last_checkpoints, or choose another output_dir"
    results.add("disk", "good" if free >= needed else "bad", text)
