"""Run one training stage: lock the run directory, build model and data, train, report."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from accelerate import Accelerator

from vlm_sft.checkpoint.components import unused_parts
from vlm_sft.checkpoint.format import Checkpoint
from vlm_sft.checkpoint.provenance import software
from vlm_sft.checkpoint.run_dir import (
    EXPORT_OUTLOOK,
    STARTS,
    has_other_length,
    locked,
    own_run_dir,
    set_foreign_files_aside,
    store_config,
)
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.checks.compatibility import require_compatible
from vlm_sft.checks.data_head import check_data_head
from vlm_sft.config.hub_address import is_hub_address
from vlm_sft.config.method import Stage, trainable_parts
from vlm_sft.config.resume import diff_lines, flat
from vlm_sft.config.schema import RunConfig, load_stored_config
from vlm_sft.data.build import load_chat_tokenizer, load_data
from vlm_sft.data.feature_store import require_feature_cache
from vlm_sft.data.hub_datasets import fetch, pinned
from vlm_sft.evaluation.suites.in_training import TrainingSuite, read_training_suite
from vlm_sft.export.obstacles import export_obstacles, summarize_obstacles
from vlm_sft.inference.samples import SampleGenerator
from vlm_sft.inspection.run_report import write_run_report
from vlm_sft.model.fp8 import require_fp8
from vlm_sft.model.quantization import require_quantization
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.adamw_bf16 import require_master_weights
from vlm_sft.train.checkpointing_policy import device_named
from vlm_sft.train.compile import compile_errors
from vlm_sft.train.determinism import deterministic
from vlm_sft.train.distributed import make_accelerator, rank0_only
from vlm_sft.train.environment import environment_notes, require_environment
from vlm_sft.train.feature_cache import use_feature_cache
from vlm_sft.train.fsdp import choose_sharding, shard
from vlm_sft.train.run_history import RunHistory
from vlm_sft.train.setup import build_trainer, load_model
from vlm_sft.train.trackers import (
    require_tracking_folder,
    start_trackers,
    tracking_folder,
)
from vlm_sft.train.trainer import RunResult
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.libraries import one_line, require_trackers

logger = logging.getLogger(__name__)


def run_stage(config: RunConfig, *, stage: Stage, allowed: Sequence[str] = ()) -> RunResult:
    """Train as `config` says, from the newest checkpoint of its run directory if there is one.

    Args:
        config: The run's configuration.
        stage: Which parts of the model are trained.
        allowed: Settings that may differ from those that the run was started with.

    Raises:
        UserError: With one sentence; see the functions called.
    """
    trainable = trainable_parts(config, stage)
    require_environment(config)
    require_trackers(config.train.trackers)
    require_quantization(config.model.language_model.quantization, trainable)
    require_master_weights(config, trainable)
    with deterministic(config.train.deterministic), compile_errors(config.train.compile):
        output_dir = Path(config.output_dir)
        accelerator = make_accelerator(
            config.train.precision,
            trackers=list(config.train.trackers),
            project_dir=str(tracking_folder(config)),
        )
        rank0_only(accelerator, lambda: own_run_dir(config))
        with locked(output_dir, enabled=accelerator.is_main_process):
            config = rank0_only(accelerator, lambda: with_commits(config))
            finished = rank0_only(accelerator, lambda: find_finished(config, allowed))
            if finished is not None:
                log_already_finished(config, finished)
                return RunResult(finished.step, finished)
            rank0_only(accelerator, lambda: set_foreign_files_aside(output_dir))
            history = RunHistory(output_dir / STARTS if accelerator.is_main_process else None)
            with logged_end(history):
                result = train(config, stage, accelerator, history)
            how = f"stopped by {result.stopped_by.name}" if result.stopped_by else "finished"
            history.end(result.step, how)
            close_trackers_and_report(accelerator, output_dir)
    log_result(result, stage)
    return result


def with_commits(config: RunConfig) -> RunConfig:
    """Return a configuration whose data sets of the hub have their commits, that of the run's
    first start if there was one.

    Raises:
        UserError: As `pinned`.
    """
    if not any(is_hub_address(file.path) for file in config.data.files):
        return config
    stored = Path(config.output_dir) / "config.yaml"
    return pinned(config, load_stored_config(stored) if stored.is_file() else None)


@contextmanager
def logged_end(history: RunHistory) -> Iterator[None]:
    """Log the error, if any, that ends the block."""
    try:
        yield
    except BaseException as error:
        history.end(None, f"{type(error).__name__}: {one_line(error)}")
        raise


def train(
    config: RunConfig, stage: Stage, accelerator: Accelerator, history: RunHistory
) -> RunResult:
    """Load everything in the order in which it can fail, then train.

    Raises:
        UserError: With one sentence; see the functions called.
    """
    output_dir, trainable = Path(config.output_dir), trainable_parts(config, stage)
    rank0_only(accelerator, lambda: require_directories(config))
    rank0_only(accelerator, lambda: fetch(config))
    sharding = choose_sharding(config, trainable, world_size=accelerator.num_processes)
    if config.train.fp8:
        require_fp8(accelerator.device, config.train.precision)

    # Text before weights: a wrong template or a missing image fails within seconds.
    chat_tokenizer = load_chat_tokenizer(config)
    check_data_head(config, chat_tokenizer)
    suite_tasks = read_training_suite(config)
    if (unused := unused_parts(config.projector)) is not None:
        logger.info("note: %s", unused)

    model, identity = load_model(config, trainable)
    if accelerator.is_main_process:
        note_export_obstacles(model, output_dir, chat_tokenizer.image_tokens)
    if sharding != "none":
        zero3 = sharding == "zero3"
        shard(model, accelerator, config.train.precision, reshard_after_forward=zero3)

    image_spec = model.vision_tower.image_spec
    data = load_data(config, chat_tokenizer, image_spec, model.layout_rule)
    for warning in require_compatible(chat_tokenizer, data, model):
        logger.warning(warning)
    for note in environment_notes(config):
        logger.info(note)
    if accelerator.is_main_process:
        data.write_ledgers(output_dir)
    logger.info(data.summary())
    use_feature_cache(config, model, accelerator, data)

    samples = None
    if data.eval is not None and config.train.eval_samples:
        samples = SampleGenerator(model, chat_tokenizer, data.eval, config.train.eval_samples)
    suite = None
    if suite_tasks is not None:
        suite = TrainingSuite(config, *suite_tasks, model, chat_tokenizer, accelerator)
    trainer = build_trainer(
        config,
        stage,
        accelerator,
        chat_tokenizer,
        model,
        identity,
        data,
        samples,
        suite,
        history=history,
    )
    start_trackers(accelerator, config, first_step=trainer.step)
    history.start(
        trainer.step,
        trainer.total_steps,
        stage=stage,
        settings=flat(config),
        software=software(),
        device=device_named(accelerator.device),
        ranks=accelerator.num_processes,
    )
    result = trainer.run()
    logger.info(data.summary())
    return result


def require_directories(config: RunConfig) -> None:
    """Check the directories that the run writes to late, before anything is read.

    Raises:
        UserError: `train.tracking.dir` or `data.feature_cache` cannot be used.
    """
    require_tracking_folder(config)
    if config.data.feature_cache is not None:
        require_feature_cache(config.data.feature_cache)


def find_finished(config: RunConfig, allowed: Sequence[str]) -> Checkpoint | None:
    """Write the run's configuration, and return its final checkpoint if nothing is left to train.

    Raises:
        ConfigError: The run was started with other settings, and `allowed` does not name them.
    """
    store = CheckpointStore(Path(config.output_dir), {}, log=logger.info)
    has_checkpoints = bool(store.step_folders()) or store.final_dir.exists()
    changes = store_config(config, has_checkpoints=has_checkpoints, allowed=allowed)
    if changes:
        logger.info("\n".join(["resuming with changed settings:", *diff_lines(changes)]))
    final = store.finished()
    if final is None or has_other_length(config, final):
        return None
    return final


def log_already_finished(config: RunConfig, final: Checkpoint) -> None:
    """Log that a run is finished, and what to do to train further."""
    max_steps = config.train.max_steps
    setting = "train.epochs" if max_steps is None or final.step < max_steps else "train.max_steps"
    logger.info(
        "already finished: %s (step %d). Use a new output_dir, or raise %s with --allow-change %s",
        final.folder,
        final.step,
        setting,
        setting,
    )


def log_result(result: RunResult, stage: Stage) -> None:
    """Log where the run is saved, and after stage 2 the command that asks the model."""
    checkpoint = result.checkpoint
    if result.stopped_by is None:
        assert checkpoint is not None
        logger.info("finished: %s (step %d)", checkpoint.folder, result.step)
        if stage == "stage2":
            logger.info("ask it: vlm-sft chat %s --image IMAGE", quote(str(checkpoint.folder)))
    elif checkpoint is not None:
        logger.info(
            "stopped by %s after step %d; saved in %s; run the same command to resume",
            result.stopped_by.name,
            result.step,
            checkpoint.folder,
        )


def close_trackers_and_report(accelerator: Accelerator, output_dir: Path) -> None:
    """Close the trackers and write `report.html`; an error is a warning, since all is saved."""
    with errors_as_warnings("closing the trackers"):
        accelerator.end_training()
    if accelerator.is_main_process:
        with errors_as_warnings(f"writing {output_dir / 'report.html'}"):
            logger.info("report: %s", write_run_report(output_dir, is_running=False))


def note_export_obstacles(
    model: VisionLanguageModel, output_dir: Path, image_tokens: tuple[str, str] = ("", "")
) -> None:
    """Log what an export would refuse, and store it for the report."""
    with errors_as_warnings("looking for what an export would refuse"):
        obstacles = export_obstacles(model, image_tokens)
        for obstacle in obstacles:
            logger.info("note: this model cannot be exported with --to hf: %s", obstacle)
        write_json(output_dir / EXPORT_OUTLOOK, {"hf": summarize_obstacles(obstacles)})


@contextmanager
def errors_as_warnings(action: str) -> Iterator[None]:
    """Log any error of the block as a warning."""
    try:
        yield
    except Exception as error:
        logger.warning("%s failed (%s); the run is not affected", action, one_line(error))
