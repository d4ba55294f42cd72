"""Build the model, the checkpoint store and the trainer from a run's configuration."""

import dataclasses
import logging
from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from vlm_sft.checkpoint.components import (
    checkpoint_components,
    load_projector,
    load_trained_model,
)
from vlm_sft.checkpoint.digests import base_identity, template_digest, tokenizer_digest
from vlm_sft.checkpoint.optimizer import optimizer_component
from vlm_sft.checkpoint.run_dir import PACKING_STATS
from vlm_sft.checkpoint.snapshot import Component
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.config.method import Stage
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.batch import Collator
from vlm_sft.data.build import (
    Data,
    make_collator,
    make_sampler,
    num_steps,
    sampled_packing_stats,
)
from vlm_sft.data.dataset import content_difference
from vlm_sft.data.hf_tokenizer import padding_id
from vlm_sft.data.sampler import StepSampler
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.model.build import build_model
from vlm_sft.model.costs import image_cost
from vlm_sft.model.dtypes import DTYPES
from vlm_sft.model.fp8 import use_fp8
from vlm_sft.model.notes import model_notes
from vlm_sft.model.parts import parameters_by_part, set_trainable
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.checkpointing_policy import set_up_activation_checkpointing
from vlm_sft.train.compile import compile_layers, eager
from vlm_sft.train.distributed import checkpoint_group
from vlm_sft.train.metrics import MetricsFile, RunMetrics
from vlm_sft.train.optimizer import build_optimizer, checkpoint_bytes
from vlm_sft.train.packing_check import prepare_packing
from vlm_sft.train.preflight import report_parts
from vlm_sft.train.run_checkpoints import RunCheckpoints
from vlm_sft.train.run_cost import log_disk
from vlm_sft.train.run_history import RunHistory
from vlm_sft.train.run_log import RunLog
from vlm_sft.train.step_loader import StepLoader
from vlm_sft.train.trainer import Trainer
from vlm_sft.train.update import Updater
from vlm_sft.train.validation import (
    EvaluateSuite,
    GenerateSamples,
    MeasureText,
    Validation,
    text_loss,
)
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.dtensor import is_sharded
from vlm_sft.utils.process_group import ProcessGroup

logger = logging.getLogger(__name__)


def load_model(
    config: RunConfig, trainable: Set[str]
) -> tuple[VisionLanguageModel, dict[str, Any]]:
    """Build the model with its trainable parts unfrozen and the weights that the run starts from.

    Returns:
        The model, and the identity of the base models that it is made from.

    Raises:
        UserError: A part cannot be built.
        CheckpointError: `projector` or `start_from` is no checkpoint, or of another model.
    """
    model = build_model(
        config.model, dtype=DTYPES[config.train.precision], seed=config.seed, lora=config.lora
    )
    identity = base_identity(config, model)
    if config.projector is not None:
        load_projector(model, Path(config.projector), identity)
    widen = config.train.master_weights == "fp32"
    set_trainable(model, trainable, widen_language_model=widen)
    if config.start_from is not None:  # only now, since its weights may be wider than the base's
        load_trained_model(model, Path(config.start_from), identity)
    model.neftune_alpha = config.train.neftune_alpha
    return model, identity


def build_trainer(
    config: RunConfig,
    stage: Stage,
    accelerator: Accelerator,
    chat_tokenizer: ChatTokenizer,
    model: VisionLanguageModel,
    identity: dict[str, Any],
    data: Data,
    samples: GenerateSamples | None,
    suite: EvaluateSuite | None = None,
    *,
    history: RunHistory,
) -> Trainer:
    """Build the trainer of a run and restore it from the run's newest checkpoint, if any.

    Args:
        config: The run's configuration.
        stage: The stage that is run.
        accelerator: Device, precision and ranks.
        chat_tokenizer: Tokenizer and chat template.
        model: As `load_model` returns it, sharded or not.
        identity: As `load_model` returns it.
        data: Training and validation records.
        samples: Generates samples at evaluations, or None.
        suite: Evaluates the run's suite, or None.
        history: Where the time of the run goes.

    Raises:
        UserError: Nothing is trainable, or a setting is not available on this machine.
        CheckpointError: The run's checkpoints cannot be used, or none can be written.
    """
    output_dir, world_size = Path(config.output_dir), accelerator.num_processes
    parts, sharded = parameters_by_part(model), is_sharded(model.parameters())
    sampler = make_sampler(config, data.train)
    total_steps = num_steps(config, sampler)
    collator = make_collator(config, padding_id(chat_tokenizer.tokenizer), image_cost(model))
    stats = sampled_packing_stats(
        collator, sampler, data.train, num_steps=total_steps, world_size=world_size
    )
    if stats is not None:
        logger.info("packing: %s", stats.summary())
        if accelerator.is_main_process:
            write_json(output_dir / PACKING_STATS, dataclasses.asdict(stats))

    prepared_model = prepare_model(config, model, accelerator)
    optimizer = build_optimizer(parts, config.optim, seed=config.seed)
    report_parts(parts, optimizer, accelerator, output_dir / "parts.json")
    for note in model_notes(model):
        logger.info(note)

    store = make_store(
        config,
        stage,
        chat_tokenizer,
        model,
        identity,
        data,
        optimizer_state=optimizer_component(optimizer, accelerator.scaler),
        saving_ranks=checkpoint_group(accelerator) if sharded else ProcessGroup(),
    )
    asynchronous = config.train.async_checkpointing
    checkpoints = RunCheckpoints(
        store, model, accelerator, sharded=sharded, asynchronous=asynchronous
    )
    checkpoints.restore(total_steps)
    if accelerator.is_main_process:
        log_disk(
            output_dir,
            config.train,
            total_steps=total_steps,
            num_bytes=store.num_bytes,
            there=len(store.step_folders()),
        )

    # Only now: files of rows are cut at the step of the checkpoint, and the records that it
    # excludes are not loaded again.
    metrics = RunMetrics(
        output_dir, accelerator, first_step=checkpoints.saved_step, total_steps=total_steps
    )
    loader = build_loader(config, data, sampler, collator, checkpoints, accelerator)
    set_up_activation_checkpointing(
        config, model, optimizer, loader, accelerator, total_steps=total_steps
    )
    return Trainer(
        config,
        accelerator,
        model=prepared_model,
        loader=loader,
        updater=Updater(optimizer, parts, config, accelerator, total_steps=total_steps),
        checkpoints=checkpoints,
        metrics=metrics,
        history=history,
        validation=build_validation(config, model, data, collator, samples, accelerator),
        suite=suite,
        text=build_text_loss(config, prepared_model, data, collator, accelerator),
        total_steps=total_steps,
    )


def build_loader(
    config: RunConfig,
    data: Data,
    sampler: StepSampler,
    collator: Collator,
    checkpoints: RunCheckpoints,
    accelerator: Accelerator,
) -> StepLoader:
    """Build the loader of the training steps, with the log of the records used and excluded.

    Args:
        config: The run's configuration.
        data: Training and validation records.
        sampler: The records of each step.
        collator: How the records of a step become micro-batches.
        checkpoints: Restored: the records excluded before stay excluded.
        accelerator: The run's ranks.
    """
    output_dir, skip_errors = Path(config.output_dir), config.data.on_error != "stop"
    file = None
    if accelerator.is_main_process:
        file = MetricsFile(output_dir / "trained.jsonl", last_step=checkpoints.saved_step)
    run_log = RunLog(
        data.train.record_ids,
        accelerator,
        file,
        max_quarantined=config.data.max_quarantined if skip_errors else 0,
        max_skipped=config.train.max_skipped_steps,
        on_quarantine=partial(data.quarantine, output_dir=output_dir, held_out=False),
    )
    if checkpoints.resumed_from is not None:
        run_log.restore(checkpoints.resumed_from.manifest)
    return StepLoader(
        data.train,
        sampler,
        collator,
        run_log,
        accelerator,
        num_workers=config.data.num_workers,
        skip_errors=skip_errors,
    )


def build_validation(
    config: RunConfig,
    model: VisionLanguageModel,
    data: Data,
    collator: Collator,
    samples: GenerateSamples | None,
    accelerator: Accelerator,
) -> Validation | None:
    """Build what evaluates on the validation records; return None if there are none.

    Args:
        config: The run's configuration.
        model: The model, sharded or not.
        data: Training and validation records.
        collator: How records become micro-batches.
        samples: Generates samples, or None.
        accelerator: Device, precision and ranks.
    """
    if data.eval is None:
        return None
    quarantine = partial(data.quarantine, output_dir=Path(config.output_dir), held_out=True)
    return Validation(
        model,
        data.eval,
        collator,
        accelerator,
        num_workers=config.data.num_workers,
        samples=samples,
        sample_on_all_ranks=is_sharded(model.parameters()),
        compiled=config.train.compile,
        on_quarantine=None if config.data.on_error == "stop" else quarantine,
    )


def build_text_loss(
    config: RunConfig,
    model: nn.Module,
    data: Data,
    collator: Collator,
    accelerator: Accelerator,
) -> MeasureText | None:
    """Build what measures the loss of `data.eval_text`; return None without it.

    Args:
        config: The run's configuration.
        model: The model as the forward pass takes it.
        data: All records.
        collator: How records become micro-batches.
        accelerator: Device, precision and ranks.
    """
    if data.text is None:
        return None
    return partial(
        text_loss,
        model,
        data.text,
        accelerator,
        collator=collator,
        num_workers=config.data.num_workers,
        compiled=config.train.compile,
    )


def prepare_model(
    config: RunConfig, model: VisionLanguageModel, accelerator: Accelerator
) -> nn.Module:
    """Set up fp8, compilation, DDP and packed attention; return the model for the forward pass.

    Args:
        config: The run's configuration.
        model: Changed in place and moved to the device.
        accelerator: Device, precision and ranks.

    Raises:
        UserError: A setting is not available on this machine or does not work with this model.
    """
    train = config.train
    model.train()
    if train.fp8:
        layers = use_fp8(model)
        logger.info("fp8: %d linear layers of the language model multiply in fp8", len(layers))
    if train.compile:
        compile_layers(model, accelerator.device, packed=train.packing is not None)
    # FSDP2 has already moved and sharded the model; DDP would replicate it.
    prepared = model if is_sharded(model.parameters()) else accelerator.prepare(model)
    if train.packing is not None:
        with eager(train.compile):
            prepare_packing(
                model,
                train.packing,
                train.precision,
                accelerator.device,
                accelerator.autocast(),
                prune=not train.compile,
            )
    return prepared


def make_store(
    config: RunConfig,
    stage: str,
    chat_tokenizer: ChatTokenizer,
    model: VisionLanguageModel,
    identity: dict[str, Any],
    data: Data,
    *,
    optimizer_state: Component | None = None,
    saving_ranks: ProcessGroup | None = None,
) -> CheckpointStore:
    """Build the store of the run's checkpoints.

    Args:
        config: The run's configuration.
        stage: The stage that is run.
        chat_tokenizer: Tokenizer and chat template.
        model: The model with its trainable parts.
        identity: Identity of the base models, which a resumed run must share.
        data: The records, which a resumed run must share.
        optimizer_state: Saves and loads the optimizer; None for a store that only compares.
        saving_ranks: The ranks that save; None: this one.
    """
    trainable = {
        part: [(name, p) for name, p in named if p.requires_grad]
        for part, named in parameters_by_part(model).items()
    }
    tensors = {name: p for named in trainable.values() for name, p in named}
    components = checkpoint_components(
        config,
        model,
        chat_tokenizer.tokenizer,
        chat_tokenizer,
        {part for part, named in trainable.items() if named},
    )
    if optimizer_state is not None:
        components = {**components, "optimizer": optimizer_state}
    files = [file.path for file in config.data.train]
    return CheckpointStore(
        Path(config.output_dir),
        components,
        fingerprint={
            "stage": stage,
            "base_model": identity,
            "tokenizer": tokenizer_digest(chat_tokenizer.tokenizer),
            "template": template_digest(chat_tokenizer.describe()),
            "data": [dataclasses.asdict(content) for content in data.train.contents],
            "recipe": chat_tokenizer.llava_quirks.describe(),
        },
        describe_mismatch={
            "tokenizer": lambda then, now: "the tokenizer's vocabulary or rules have changed",
            "template": lambda then, now: "the chat template has changed",
            "data": lambda then, now: content_difference(files, then, data.train.contents),
        },
        keep=config.train.keep_last_checkpoints,
        num_bytes=checkpoint_bytes(tensors.values()),
        log=logger.info,
        trainable=tensors,
        group=saving_ranks or ProcessGroup(),
    )
