"""Whether the run can use its directories, resume there, and has room on the disk."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from vlm_sft.checkpoint.format import Checkpoint
from vlm_sft.checkpoint.run_dir import require_run_folder, require_same_config, require_unlocked
from vlm_sft.checkpoint.store import CheckpointStore, require_within
from vlm_sft.checks.verdict import Verdict
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.tokenize_cache import require_tokenize_cache
from vlm_sft.train.preflight import require_unchanged
from vlm_sft.utils.filesystem import free_bytes


def examine_output_dir(config: RunConfig, verdict: Verdict) -> Checkpoint | None:
    """Report what keeps a run out of its output directory, without changing anything there.

    Returns:
        The checkpoint that the run would resume from.
    """
    output_dir = Path(config.output_dir)

    def warn(text: str) -> None:
        verdict.report("output_dir", "warning", text)

    store = CheckpointStore(output_dir, {}, log=warn)
    has_checkpoints = bool(store.step_folders()) or store.final_dir.exists()
    with verdict.examine("output_dir"):
        require_run_folder(config)
        require_unlocked(output_dir)
        require_same_config(config, has_checkpoints=has_checkpoints)
        if (final := store.finished()) is not None:
            words = f"already finished: {final.folder} (step {final.step}); a run would do nothing"
            warn(words)
        elif (newest := store.newest_complete()) is not None:
            words = f"a run would resume from {newest.folder} (step {newest.step})"
            verdict.report("output_dir", "note", words)
            return newest
    return None


def examine_cache_dir(config: RunConfig, verdict: Verdict) -> RunConfig:
    """Report a `data.cache_dir` that the run cannot use; return a configuration without it."""
    if config.data.cache_dir is None:
        return config
    with verdict.examine("cache_dir"):
        require_tokenize_cache(config.data.cache_dir)
        verdict.add("cache_dir", True, f"{config.data.cache_dir} can be written and locked")
        return config
    data = config.data.model_copy(update={"cache_dir": None})
    return config.model_copy(update={"data": data})


def examine_resume(
    checkpoint: Checkpoint,
    store: CheckpointStore,
    total_steps: int,
    frozen_digests: Callable[[], Mapping[str, str]],
    verdict: Verdict,
) -> None:
    """Report what keeps a run from resuming from a complete checkpoint of its own.

    Args:
        checkpoint: Where the run would resume from.
        store: Of the run, with its model, data and template.
        total_steps: Of the run.
        frozen_digests: Fingerprints of the parts that must not move.
        verdict: Gets the line.
    """

    def note(text: str) -> None:
        verdict.report("resume", "note", text)

    with verdict.examine("resume"):
        replace(store, log=note).require_same_fingerprint(checkpoint)
        require_within(checkpoint, total_steps)
        require_unchanged(checkpoint.manifest["frozen"], frozen_digests())
        verdict.add("resume", True, "model, data and template are those of the checkpoint")


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
    # A new checkpoint is complete before the oldest one is deleted.
    count = min(config.train.keep_last_checkpoints + 1, saves)
    there = len(CheckpointStore(Path(config.output_dir), {}).step_folders())
    needed, free = max(0, count - there) * num_bytes, free_bytes(place)
    words = f"{count} checkpoint(s) of about {num_bytes / 1e9:.2f} GB lie there at once"
    if free is None:
        verdict.report("disk", "note", f"{words}; the free space is not known")
        return
    words += f"; {free / 1e9:.1f} GB free"
    if free < needed:
        words += (
            "; free some space, lower train.keep_last_checkpoints, or choose another output_dir"
        )
    verdict.add("disk", free >= needed, words)
