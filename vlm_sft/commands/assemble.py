"""From a run's configuration to the objects that carry it out, in the order they can fail."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from vlm_sft.checkpoint.components import (
    base_identity,
    checkpoint_components,
    dtype_of,
    frozen_digests,
    load_projector,
    template_digest,
    tokenizer_digest,
)
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.config.schema import DataFile, RunConfig
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.dataset import SupervisedDataset, content_difference
from vlm_sft.data.images import open_image
from vlm_sft.data.ledger import Ledger
from vlm_sft.data.loader import Batching, Fault, Faults, Packed, Padded
from vlm_sft.data.packing import Sizes, packing_figures
from vlm_sft.data.record_formats import read_records
from vlm_sft.data.sampler import StepSampler
from vlm_sft.data.text_encoder import load_tokenizer, padding_id
from vlm_sft.data.tokenize import Renderer, expand
from vlm_sft.data.tokenize_cache import CachedRenderer
from vlm_sft.errors import ImageError, RecordError
from vlm_sft.model.build import build_model
from vlm_sft.model.parts import named_parts, set_trainable
from vlm_sft.model.quantization import num_weights
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm
from vlm_sft.train.trainer import Hooks, Plan, Trainer, say_on_stderr

HEAD_RECORDS = 16
"""Records of each file that are read, rendered and opened before the model is loaded."""

MAX_ANSWER_TOKENS = 64
"""Length of the answers that are generated during training."""


@dataclass(frozen=True)
class Language:
    """The tokenizer and the renderer that every text of a run goes through."""

    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer

    @property
    def pad_token_id(self) -> int:
        """What fills up shorter sequences; never seen by the loss or by attention."""
        return padding_id(self.tokenizer)


@dataclass(frozen=True)
class Data:
    """Training and held-out records with the account of what became of each."""

    train: SupervisedDataset
    train_ledger: Ledger
    eval: SupervisedDataset | None
    eval_ledger: Ledger | None

    def write_ledgers(self, output_dir: Path) -> None:
        """Write `ledger.jsonl`, and `ledger_eval.jsonl` for the held-out records."""
        self.train_ledger.write(output_dir / "ledger.jsonl")
        if self.eval_ledger is not None:
            self.eval_ledger.write(output_dir / "ledger_eval.jsonl")

    def quarantine(self, fault: Fault, output_dir: Path, *, held_out: bool) -> None:
        """Account for a record that turned out broken on the way."""
        dataset = self.eval if held_out else self.train
        assert dataset is not None
        if dataset.quarantine(fault.index, fault.reason, fault.message):
            self.write_ledgers(output_dir)
            say_on_stderr(f"quarantined: {fault.message}")

    def summary(self) -> str:
        """A line for each ledger."""
        lines = [f"train: {self.train_ledger.summary()}"]
        if self.eval_ledger is not None:
            lines.append(f"validation: {self.eval_ledger.summary()}")
        return "\n".join(lines)


def load_language(config: RunConfig) -> Language:
    """Tokenizer, template, and the renderer made of both.

    Raises:
        UserError: The tokenizer or the template cannot be loaded, or they do not fit.
    """
    tokenizer = load_tokenizer(config.model.language_model)
    data = config.data
    renderer = Renderer.from_name(
        data.template,
        tokenizer,
        default_system=data.system,
        recipe="fixed" if data.llava_quirks == "none" else data.llava_quirks,
        image_separator=data.image_separator,
    )
    return Language(tokenizer, renderer)


def check_data_head(config: RunConfig, renderer: Renderer) -> None:
    """Read, render and open the images of each file's first records, before any model is loaded.

    Raises:
        UserError: A file cannot be read.
        RecordError: A record cannot be used and `data.on_error` is `stop`.
    """
    for file in [*config.data.train, *config.data.eval]:
        for record in islice(read_records(file), HEAD_RECORDS):
            error = record_fault(record, renderer)
            if error is not None and config.data.on_error == "stop":
                raise error


def record_fault(record: Conversation | RecordError, renderer: Renderer) -> RecordError | None:
    """What is wrong with a record: its form, its rendering or one of its images."""
    if isinstance(record, RecordError):
        return record
    try:
        renderer.render(record)
        for source in record.images:
            open_image(source)
    except RecordError as error:
        return error
    except ImageError as error:
        return RecordError(error.reason, str(error), record_id=record.id, where=record.where)
    return None


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


def load_data(config: RunConfig, renderer: Renderer, model: VisionLanguageModel) -> Data:
    """Read and render all records, or find them in `data.cache_dir`; see `SupervisedDataset`."""
    cache = config.data.cache_dir
    renders = renderer if cache is None else CachedRenderer(renderer, cache)

    def load(files: list[DataFile], ledger: Ledger) -> SupervisedDataset:
        return SupervisedDataset(
            files,
            renders,
            model.vision_tower.image_spec,
            num_image_tokens=model.vision_tower.num_tokens,
            config=config.data,
            ledger=ledger,
        )

    train_ledger = Ledger()
    train = load(config.data.train, train_ledger)
    if not config.data.eval:
        return Data(train, train_ledger, None, None)
    eval_ledger = Ledger(held_out=True)
    return Data(train, train_ledger, load(config.data.eval, eval_ledger), eval_ledger)


def make_trainer(
    config: RunConfig,
    stage: str,
    accelerator: Accelerator,
    language: Language,
    model: VisionLanguageModel,
    identity: dict[str, Any],
    data: Data,
) -> Trainer:
    """Everything wired together; `Trainer.run` does the rest."""
    say = say_on_stderr if accelerator.is_main_process else lambda text: None
    answers: Answers | None = None
    if data.eval is not None and config.train.eval_samples:
        answers = Answers(config, language, model, data.eval)
    return Trainer(
        model=model,
        accelerator=accelerator,
        plan=make_plan(config, language, data, model),
        hooks=Hooks(
            named_parts(model),
            lambda: frozen_digests(model),
            answers,
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
    parts = named_parts(model)
    trainable = {part for part, named in parts.items() if any(p.requires_grad for _, p in named)}
    files = [file.path for file in config.data.train]
    return CheckpointStore(
        Path(config.output_dir),
        checkpoint_components(config, model, language.tokenizer, language.renderer, trainable),
        facts={
            "stage": stage,
            "base_model": identity,
            "tokenizer": tokenizer_digest(language.tokenizer),
            "template": template_digest(language.renderer),
            "data": [dataclasses.asdict(content) for content in data.train.contents],
            "recipe": language.renderer.recipe.describe(),
        },
        explain={
            "tokenizer": lambda then, now: "the tokenizer's vocabulary or rules have changed",
            "template": lambda then, now: "the chat template has changed",
            "data": lambda then, now: content_difference(files, then, data.train.contents),
        },
        keep=config.train.keep_last_checkpoints,
        say=say,
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
        batching=make_batching(config, language.pad_token_id, image_cost(model)),
        num_workers=config.data.num_workers,
        train=config.train,
        optim=config.optim,
        max_quarantined=config.data.max_quarantined if config.data.on_error != "stop" else None,
    )


class Ordered(Sizes, Protocol):
    """What the order of a run's records hangs on."""

    @property
    def weights(self) -> Sequence[float]:
        """How often each record is seen in an epoch."""
        ...

    @property
    def has_image(self) -> Sequence[bool]: ...


def make_sampler(config: RunConfig, train: Ordered) -> StepSampler:
    """The order of the run's records."""
    by_length = config.train.group_by_length
    return StepSampler(
        train.weights,
        batch_size=config.train.global_batch_size,
        seed=config.seed,
        lengths=train.lengths if by_length else None,
        has_image=train.has_image if by_length else None,
        prefix_keys=train.prefix_keys if config.train.share_image_prefix else None,
    )


def make_batching(config: RunConfig, pad_token_id: int, image_cost: float) -> Batching:
    """Padded or packed, as the configuration says.

    Args:
        config: The run.
        pad_token_id: Fills up.
        image_cost: What encoding an image costs, in tokens; see `image_cost`.
    """
    packing = config.train.packing
    if packing is None:
        assert config.train.micro_batch_size is not None
        return Padded(config.train.micro_batch_size, pad_token_id)
    return Packed(
        max_tokens=packing.max_tokens,
        share_prefixes=config.train.share_image_prefix,
        round_to=packing.round_to,
        image_cost=0.0 if config.data.feature_cache else image_cost,
        pad_token_id=pad_token_id,
    )


STEPS_LOOKED_AT = 50


def steps_looked_at(total: int) -> list[int]:
    """Some steps spread over a run, from which the figures of packing are taken."""
    count = min(STEPS_LOOKED_AT, total)
    return [i * total // count for i in range(count)]


def packing_told(plan: Plan, train: Sizes, num_processes: int) -> str | None:
    """What packing makes of the run's steps, in a sentence; None where it is padded."""
    batching = plan.batching
    if not isinstance(batching, Packed):
        return None
    steps = [
        batching.share_out(train, plan.records_of_step(step), num_processes)
        for step in steps_looked_at(plan.total_steps)
    ]
    return packing_figures(
        steps, train, max_tokens=batching.max_tokens, share_prefixes=batching.share_prefixes
    ).told(batching.max_tokens)


def image_cost(model: VisionLanguageModel) -> float:
    """What encoding an image costs, in tokens through the language model, by their parameters.

    The tower runs forward only; the language model forward and backward, which is twice as much
    where its weights are frozen and three times where they learn (2 FLOP a parameter and token).
    """
    tower = sum(map(num_weights, model.vision_tower.parameters()))
    weights = list(causal_lm(model.language_model).parameters())
    passes = 3 if all(p.requires_grad for p in weights) else 2
    return tower * model.vision_tower.num_tokens / (passes * sum(map(num_weights, weights)))


@dataclass(frozen=True)
class Answers:
    """Greedy answers of the model to the first question of a few held-out records."""

    config: RunConfig
    language: Language
    model: VisionLanguageModel
    data: SupervisedDataset
    max_new_tokens: int = MAX_ANSWER_TOKENS

    def __call__(self, on_fault: Callable[[Fault], None] | None) -> list[dict[str, Any]]:
        """Return rows of `id`, `question`, `answer`, `expected`, spread over the held-out records.

        Args:
            on_fault: Called with each record whose image cannot be read, which has no row; None:
                such a record raises.

        Raises:
            RecordError: An image cannot be read and `on_fault` is None.
        """
        count = min(self.config.train.eval_samples, len(self.data))
        faults, rows = Faults(lenient=on_fault is not None), []
        for index in (i * len(self.data) // count for i in range(count)):
            try:
                rows.append(self._row(index))
            except RecordError as error:
                faults.note(index, error)
        if on_fault is not None:
            for fault in faults.met:
                on_fault(fault)
        return rows

    def _row(self, index: int) -> dict[str, Any]:
        conversation = self.data.conversation(index)
        first = next(i for i, t in enumerate(conversation.turns) if t.role == "assistant")
        turns = conversation.turns[:first]
        num_images = len(list(Conversation("", turns).image_parts()))
        asked = Conversation(conversation.id, turns, conversation.images[:num_images])
        return {
            "id": conversation.id,
            "question": turns[-1].text if turns else "",
            "answer": self._answer(asked, self._pixels(index, num_images)),
            "expected": conversation.turns[first].text,
        }

    def _pixels(self, index: int, count: int) -> list[torch.Tensor]:
        return [self.data.pixels(index, number) for number in range(count)]

    def _answer(self, asked: Conversation, pixels: list[torch.Tensor]) -> str:
        tower, tokenizer = self.model.vision_tower, self.language.tokenizer
        device = tower.device
        ids = expand(self.language.renderer.prompt(asked), tower.num_tokens)
        input_ids = torch.tensor([ids], device=device)
        generated = self.model.generate(
            input_ids,
            torch.ones_like(input_ids),
            torch.stack(pixels).to(device) if pixels else None,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=list(self.language.renderer.stop_token_ids),
            pad_token_id=self.language.pad_token_id,
        )
        return str(tokenizer.decode(generated[0], skip_special_tokens=True)).strip()


def write_report(output_dir: Path) -> None:
    """Write the run's `report.html` where this installation has the report's module."""
    if importlib.util.find_spec("vlm_sft.report") is not None:
        path = importlib.import_module("vlm_sft.report").write_run_report(output_dir)
        say_on_stderr(f"report: {path}")
