"""Build the model, the checkpoint store and the trainer from a run's configuration."""

import dataclasses
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vlm_sft.checkpoint.components import checkpoint_components, dtype_of, load_projector
from vlm_sft.checkpoint.digests import (
    base_identity,
    frozen_digests,
    template_digest,
    tokenizer_digest,
)
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.build import Data, Language, make_collator, make_sampler
from vlm_sft.data.dataset import content_difference
from vlm_sft.model.build import build_model
from vlm_sft.model.costs import image_cost
from vlm_sft.model.parts import parameters_by_part, set_trainable
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.trainer import Hooks, Plan, SampleGenerator, Trainer, say_on_stderr


def load_model(
    config: RunConfig, trainable: Set[str]
) -> tuple[VisionLanguageModel, dict[str, Any]]:
    """The model with its trainable parts thawed, and the identity of the base it starts from.

    Raises:
        UserError: A part cannot be built.
        CheckpointError: `projector` is no checkpoint, or of another model.
    """
    model = build_model(config.model, dtype=dtype_of(config), seed=config.seed, lora=config.lora)
    identity = base_identity(config, model)
    if config.projector is not None:
        load_projector(model, Path(config.projector), identity)
    widen = config.train.master_weights == "fp32"
    set_trainable(model, trainable, widen_language_model=widen)
    model.neftune_alpha = config.train.neftune_alpha
    return model, identity


def make_trainer(
    config: RunConfig,
    stage: str,
    accelerator: Accelerator,
    language: Language,
    model: VisionLanguageModel,
    identity: dict[str, Any],
    data: Data,
    samples: SampleGenerator | None,
) -> Trainer:
    """Return the trainer of a run; `Trainer.run` does the rest."""
    say = say_on_stderr if accelerator.is_main_process else lambda text: None
    return Trainer(
        model=model,
        accelerator=accelerator,
        plan=make_plan(config, language, data, model),
        hooks=Hooks(
            parameters_by_part(model),
            lambda: frozen_digests(model),
            samples,
            lambda fault, held_out: data.quarantine(
                fault, Path(config.output_dir), held_out=held_out
            ),
        ),
        store=make_store(config, stage, language, model, identity, data, say),
        train_data=data.train,
        eval_data=data.eval,
    )


def make_store(
    config: RunConfig,
    stage: str,
    language: Language,
    model: VisionLanguageModel,
    identity: dict[str, Any],
    data: Data,
    say: Callable[[str], None],
) -> CheckpointStore:
    """Return the run's checkpoints, with everything that a resumed run must have in common."""
    parts = parameters_by_part(model)
    trainable = {part for part, named in parts.items() if any(p.requires_grad for _, p in named)}
    files = [file.path for file in config.data.train]
    return CheckpointStore(
        Path(config.output_dir),
        checkpoint_components(
            config, model, language.tokenizer, language.chat_tokenizer, trainable
        ),
        fingerprint={
            "stage": stage,
            "base_model": identity,
            "tokenizer": tokenizer_digest(language.tokenizer),
            "template": template_digest(language.chat_tokenizer.describe()),
            "data": [dataclasses.asdict(content) for content in data.train.contents],
            "recipe": language.chat_tokenizer.llava_quirks.describe(),
        },
        describe_mismatch={
            "tokenizer": lambda then, now: "the tokenizer's vocabulary or rules have changed",
            "template": lambda then, now: "the chat template has changed",
            "data": lambda then, now: content_difference(files, then, data.train.contents),
        },
        keep=config.train.keep_last_checkpoints,
        log=say,
    )


def make_plan(
    config: RunConfig, language: Language, data: Data, model: VisionLanguageModel
) -> Plan:
    """How many steps, which records in each, and how they become micro-batches."""
    train = data.train
    sampler = make_sampler(config, train)
    steps = sampler.total_steps(config.train.epochs)
    if config.train.max_steps is not None:
        steps = min(steps, config.train.max_steps)
    return Plan(
        output_dir=Path(config.output_dir),
        seed=config.seed,
        total_steps=steps,
        records_of_step=sampler.step_indices,
        epoch_of_step=sampler.epoch_of,
        collator=make_collator(config, language.pad_token_id, image_cost(model)),
        num_workers=config.data.num_workers,
        train=config.train,
        optim=config.optim,
        max_quarantined=config.data.max_quarantined if config.data.on_error != "stop" else None,
    )
