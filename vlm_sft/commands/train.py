"""What both stages do around their own decisions: folder, processes, training, farewell."""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from vlm_sft.checkpoint.components import unused_parts
from vlm_sft.checkpoint.run_dir import (
    EXPORT_OUTLOOK,
    locked,
    own_run_dir,
    set_foreign_files_aside,
    store_config,
)
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.checks.compatibility import require_compatible
from vlm_sft.checks.data_head import check_data_head
from vlm_sft.config.method import Stage, trainable_parts
from vlm_sft.config.resume import diff_lines
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.build import load_data, load_language, make_sampler, packing_summary
from vlm_sft.data.feature_store import require_feature_cache
from vlm_sft.export.obstacles import export_obstacles, summarize_obstacles
from vlm_sft.inference.samples import Answers
from vlm_sft.inspection.run_report import write_run_report
from vlm_sft.model.fp8 import require_fp8
from vlm_sft.model.quantization import require_quantization
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.adamw_bf16 import require_roundable
from vlm_sft.train.determinism import deterministic
from vlm_sft.train.distributed import make_accelerator, rank0_only
from vlm_sft.train.environment import environment_notes, require_environment
from vlm_sft.train.feature_cache import use_feature_cache
from vlm_sft.train.fsdp import choose_sharding, shard
from vlm_sft.train.metrics import (
    require_trackers,
    require_tracking_folder,
    start_trackers,
    tracking_folder,
)
from vlm_sft.train.setup import load_model, make_trainer
from vlm_sft.train.signals import exit_code
from vlm_sft.train.trainer import Outcome, say_on_stderr
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.libraries import one_line

LENGTH = ("train.epochs", "train.max_steps")
"""Settings that make a finished run unfinished."""


def run_stage(config: RunConfig, *, stage: Stage, allowed: Sequence[str] = ()) -> int:
    """Train as `config` says, from the newest checkpoint of its folder if it has one.

    Settings named in `allowed` may differ from those that the folder's run was started with.

    Returns the exit code: 0 when finished (now or before), 128 + signal when asked to stop.

    Raises:
        UserError: With one sentence; see the functions called.
    """
    trainable = trainable_parts(config, stage)
    require_environment(config)
    require_trackers(config.train.trackers)
    require_quantization(config.model.language_model, trainable)
    require_roundable(config, trainable)
    with deterministic(config.train.deterministic):
        return _run(config, stage, trainable, allowed)


def _run(config: RunConfig, stage: str, trainable: Set[str], allowed: Sequence[str]) -> int:
    output_dir = Path(config.output_dir)
    accelerator = make_accelerator(
        config.train.precision,
        trackers=list(config.train.trackers),
        project_dir=str(tracking_folder(config)),
    )
    rank0_only(accelerator, lambda: own_run_dir(config))
    with locked(output_dir, enabled=accelerator.is_main_process):
        if rank0_only(accelerator, lambda: _is_finished(config, allowed)):
            return 0
        rank0_only(accelerator, lambda: set_foreign_files_aside(output_dir))
        outcome = _train(config, stage, trainable, accelerator)
        _close(accelerator, output_dir)
        if outcome.stopped_by is None:
            return 0
    return farewell(outcome, say=accelerator.is_main_process)


def _close(accelerator: Accelerator, output_dir: Path) -> None:
    """Close the trackers and write the report; what fails is a warning, since all is saved."""
    with _only_warned("closing the trackers"):
        accelerator.end_training()
    if accelerator.is_main_process:
        with _only_warned(f"writing {output_dir / 'report.html'}"):
            say_on_stderr(f"report: {write_run_report(output_dir)}")


@contextmanager
def _only_warned(action: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        say_on_stderr(f"warning: {action} failed ({one_line(error)}); the run is not affected")


def _is_finished(config: RunConfig, allowed: Sequence[str]) -> bool:
    """Settle the folder's configuration; say so if its run is done, and was not made longer."""
    store = CheckpointStore(Path(config.output_dir), {}, log=say_on_stderr)
    has_checkpoints = bool(store.step_folders()) or store.final_dir.exists()
    changes = store_config(config, has_checkpoints=has_checkpoints, allowed=allowed)
    if changes:
        say_on_stderr("\n".join(["going on with changed settings:", *diff_lines(changes)]))
    if any(change.key in LENGTH for change in changes):
        return False
    final = store.finished()
    if final is not None:
        say_on_stderr(f"finished before: {final.folder} (step {final.step})")
    return final is not None


def note_export_obstacles(model: VisionLanguageModel, output_dir: Path) -> None:
    """Report before training what an export would refuse after it, and keep it for the report."""
    with _only_warned("looking for what an export would refuse"):
        obstacles = export_obstacles(model)
        for obstacle in obstacles:
            say_on_stderr(f"note: this model cannot be exported with --to hf: {obstacle}")
        write_json(output_dir / EXPORT_OUTLOOK, {"hf": summarize_obstacles(obstacles)})


def _require_directories(config: RunConfig) -> None:
    """Check, before anything is read, the directories that the run writes to late.

    Raises:
        UserError: `train.tracking.dir` or `data.feature_cache` cannot be used.
    """
    require_tracking_folder(config)
    if config.data.feature_cache is not None:
        require_feature_cache(config.data.feature_cache)


def _train(config: RunConfig, stage: str, trainable: Set[str], accelerator: Accelerator) -> Outcome:
    main = accelerator.is_main_process
    rank0_only(accelerator, lambda: _require_directories(config))
    sharding = choose_sharding(config, trainable, world_size=accelerator.num_processes)
    if config.train.fp8:
        require_fp8(accelerator.device, config.train.precision)
    language = load_language(config)
    check_data_head(config, language.chat_tokenizer)
    if main and (unused := unused_parts(config.projector)) is not None:
        say_on_stderr(f"note: {unused}")
    model, identity = load_model(config, trainable)
    if main:
        note_export_obstacles(model, Path(config.output_dir))
    if sharding != "none":
        zero3 = sharding == "zero3"
        shard(model, accelerator, config.train.precision, reshard_after_forward=zero3)
    tower = model.vision_tower
    data = load_data(config, language.chat_tokenizer, tower.image_spec, tower.num_tokens)
    notes = require_compatible(language, data, model)
    if main:
        for note in notes:
            say_on_stderr(f"warning: {note}")
        for note in environment_notes(config):
            say_on_stderr(note)
        data.write_ledgers(Path(config.output_dir))
        say_on_stderr(data.summary())
    use_feature_cache(config, model, accelerator, data)
    samples: Answers | None = None
    if data.eval is not None and config.train.eval_samples:
        samples = Answers(config, language, model, data.eval)
    trainer = make_trainer(config, stage, accelerator, language, model, identity, data, samples)
    summary = packing_summary(
        trainer.plan.collator,
        make_sampler(config, data.train),
        data.train,
        num_steps=trainer.plan.total_steps,
        world_size=accelerator.num_processes,
    )
    if main and summary is not None:
        say_on_stderr(summary)
    start_trackers(accelerator, config)
    outcome = trainer.run()
    if main:
        say_on_stderr(data.summary())
        if outcome.stopped_by is None and outcome.checkpoint is not None:
            say_on_stderr(f"finished: {outcome.checkpoint.folder} (step {outcome.step})")
    return outcome


def farewell(outcome: Outcome, *, say: bool) -> int:
    """Print where a stopped run is saved, and return its exit code."""
    assert outcome.stopped_by is not None
    if say and outcome.checkpoint is not None:
        say_on_stderr(
            f"stopped by {outcome.stopped_by.name} after step {outcome.step}; saved in "
            f"{outcome.checkpoint.folder}; run the same command to resume"
        )
    return exit_code(outcome.stopped_by)
