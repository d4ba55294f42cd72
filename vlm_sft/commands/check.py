"""Check in advance what can fail in a run: records, images, masks, model, saving, resuming."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final, cast

from vlm_sft.checkpoint.components import checkpoint_components, unused_parts
from vlm_sft.checkpoint.digests import frozen_digests
from vlm_sft.checkpoint.format import Checkpoint
from vlm_sft.checkpoint.store import require_space
from vlm_sft.checks.compatibility import require_compatible
from vlm_sft.checks.data_head import record_fault
from vlm_sft.checks.machine import check_machine
from vlm_sft.checks.missing_images import MissingImages
from vlm_sft.checks.output_dir import (
    check_cache_dir,
    check_disk,
    check_output_dir,
    check_resume,
)
from vlm_sft.checks.results import CheckResults, is_failure, print_lines
from vlm_sft.checks.tokenizer.check import (
    build_chat_tokenizer,
    check_tokenizer,
    read_generation_config,
    summary,
)
from vlm_sft.checks.tokenizer.under_test import Finding
from vlm_sft.checks.trial_step import counted_steps, try_generation, try_longest_batch
from vlm_sft.config.method import trainable_parts
from vlm_sft.config.schema import DataFile, LanguageModelConfig, RunConfig
from vlm_sft.data.build import (
    Data,
    load_chat_tokenizer,
    load_data,
    make_collator,
    make_sampler,
    num_steps,
    sampled_packing_stats,
)
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.duplicates import DuplicateFinder
from vlm_sft.data.hf_tokenizer import load_tokenizer, padding_id
from vlm_sft.data.image_separator import ImageLayoutCheck
from vlm_sft.data.ledger import LedgerEntry
from vlm_sft.data.records import open_records
from vlm_sft.data.sampler import StepSampler
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import RecordError, UserError
from vlm_sft.errors.codes import CODES
from vlm_sft.export.consumers import describe_consumers
from vlm_sft.export.obstacles import (
    export_consumers,
    export_obstacles,
    summarize_obstacles,
)
from vlm_sft.model.costs import image_cost
from vlm_sft.model.notes import model_notes
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.model.quantization import num_bytes
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.feature_cache import feature_cache_outlook
from vlm_sft.train.optimizer import base_lr, checkpoint_bytes
from vlm_sft.train.preflight import (
    dry_run_save,
    is_trainable,
    parts_rows,
    parts_table,
    print_table,
)
from vlm_sft.train.setup import load_model, make_store
from vlm_sft.utils.atomic_files import atomic_open
from vlm_sft.utils.console import echo, echo_json
from vlm_sft.utils.progress import track

MAX_PRINTED: Final = 20
"""Bad records that are printed; the others are counted."""

FEW_STEPS: Final = 30
"""Fewer steps are too few to make a projector useful that begins with random weights."""


def check_run(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Check the records, the model and the saving of a run; return 0 or 2."""
    results = CheckResults(strict=arguments.strict)
    check_machine(config, trainable_parts(config), results)
    resumed = check_output_dir(config, results)
    for what, level, text in results.lines:
        if level == "bad":  # before the records are read, which can take an hour
            echo(f"BAD {what}: {text}")
    config = check_cache_dir(config, results)
    chat_tokenizer = load_chat_tokenizer(config)
    results.add_findings(language_findings(config, chat_tokenizer))
    with open_bad_list(arguments.bad) as listed:
        num_bad = check_records(config, chat_tokenizer, results, listed)
    if not arguments.no_model:
        with results.check("model"):
            check_model(config, chat_tokenizer, results, resumed, records_are_good=not num_bad)
    results.print(asides=arguments.all)
    return 0 if results.passed else 2


def language_findings(config: RunConfig, chat_tokenizer: ChatTokenizer) -> list[Finding]:
    """Return the findings about the tokenizer and the chat template of a run."""
    name = config.model.language_model.name
    generation = read_generation_config(Path(name).expanduser()) if name else None
    return check_tokenizer(
        chat_tokenizer.tokenizer, config.data.template, chat_tokenizer, generation
    )


def check_tokenizer_alone(arguments: argparse.Namespace) -> int:
    """Print the findings about a tokenizer and a template as a table, or as JSON."""
    template = arguments.template or "auto"
    folder = Path(arguments.generation_config or arguments.tokenizer).expanduser()
    generation = read_generation_config(folder)
    if arguments.generation_config is not None and generation is None:
        raise UserError(f"--generation-config {folder}: there is no generation_config.json in it")
    tokenizer = load_tokenizer(LanguageModelConfig(name=arguments.tokenizer), "--tokenizer")
    chat_tokenizer = build_chat_tokenizer(tokenizer, template, system=arguments.system)
    if isinstance(chat_tokenizer, Finding):
        findings = [chat_tokenizer]
    else:
        findings = check_tokenizer(tokenizer, template, chat_tokenizer, generation)
    good = not any(is_failure(finding.level, strict=arguments.strict) for finding in findings)
    if arguments.json:
        rows = [asdict(finding) for finding in findings]
        result = {"good": good, "summary": summary(findings), "findings": rows}
        echo_json(result, indent=2)
    else:
        lines = [(f.what, f.level, _finding_text(f)) for f in findings]
        print_lines(f"{arguments.tokenizer} with template {template}", lines)
        echo(summary(findings), file=sys.stdout)
    return 0 if good else 2


def _finding_text(finding: Finding) -> str:
    return f"{finding.found}\n→ {finding.advice}" if finding.advice else finding.found


@contextmanager
def open_bad_list(path: str | Path | None) -> Iterator[Callable[[RecordError], None]]:
    """Yield a function that writes a bad record to `path` as a line of JSON."""
    if path is None:
        yield lambda error: None
        return
    with atomic_open(path) as file:

        def write(error: RecordError) -> None:
            row = {
                "where": error.where,
                "id": error.record_id,
                "reason": error.reason,
                "message": error.message,
            }
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())

        yield write


def check_records(
    config: RunConfig,
    chat_tokenizer: ChatTokenizer,
    results: CheckResults,
    listed: Callable[[RecordError], None] = lambda error: None,
) -> int:
    """Read and tokenize every record of every file, and open its images.

    Args:
        config: Configuration of the run.
        chat_tokenizer: Its tokenizer and template.
        results: Receives a line per file.
        listed: Called with every bad record; the first ones are printed, too.

    Returns:
        The number of bad records.
    """
    total_bad, listed_bad, duplicates = 0, 0, DuplicateFinder()
    layout = ImageLayoutCheck(chat_tokenizer.image_separator, chat_tokenizer.text_separator)
    named = {
        "train": config.data.train,
        "validation": config.data.eval,
        "held-out text": config.data.eval_text,
    }
    for name, files in named.items():
        for file in files:
            count, bad = 0, 0
            missing = MissingImages(file)
            duplicates.begin(Path(file.path).name, held_out=name != "train")
            for record, error in _faults(file, chat_tokenizer):
                count += 1
                duplicates.add(None if error else cast(Conversation, record))
                if error is None:
                    layout.add(cast(Conversation, record))
                    continue
                bad += 1
                listed(error)
                if error.reason == "image_missing":
                    missing.add(cast(Conversation, record), error)
                    continue
                listed_bad += 1
                if listed_bad <= MAX_PRINTED:
                    echo(f"bad record: {error.code}: {error}")
            for sentence in missing.sentences(count):
                echo(sentence)
            total_bad += bad
            text = f"{count - bad:,} of {count:,} records can be used"
            if bad and config.data.on_error == "quarantine":
                text += f"; the run would skip {bad:,} (data.on_error: quarantine)"
            results.add(f"{name} {Path(file.path).name}", "bad" if bad else "good", text)
    if listed_bad > MAX_PRINTED:
        more = listed_bad - MAX_PRINTED
        echo(f"... and {more:,} more bad records (--bad FILE lists all of them)")
    results.add_duplicates(duplicates)
    if chat_tokenizer.keeps_layout:
        results.add_layout(layout)
    return total_bad


def _faults(
    file: DataFile, chat_tokenizer: ChatTokenizer
) -> Iterator[tuple[Conversation | RecordError, RecordError | None]]:
    """Yield every record with its error, or None."""
    records = open_records(file)
    described = f"checking {Path(file.path).name}"
    for record in track(records.conversations, records.total, described):
        yield record, record_fault(record, chat_tokenizer)


def check_model(
    config: RunConfig,
    chat_tokenizer: ChatTokenizer,
    results: CheckResults,
    resumed: Checkpoint | None,
    *,
    records_are_good: bool,
) -> None:
    """Build the model, train on the longest batch, save a checkpoint, check the export."""
    trainable = trainable_parts(config)
    model, identity = load_model(config, trainable)
    parts = parameters_by_part(model)
    rates = {part: base_lr(part, config.optim.learning_rate) for part in parts}
    print_table(parts_table(parts_rows(parts, rates)))
    tower = model.vision_tower
    tokens = model.layout_rule.describe()
    results.add(
        "model", "good", f"{tokens}, from {tower.num_tokens} features of width {tower.width}"
    )
    if (unused := unused_parts(config.projector)) is not None:
        results.add("projector", "note", unused)
    for note in model_notes(model):
        results.add("model", "note", note)
    _check_export(model, chat_tokenizer, results)
    total_steps = 0
    loaded = _check_data(config, chat_tokenizer, model, results) if records_are_good else None
    if loaded is not None:
        data, total_steps = loaded
        if resumed is not None and not results.is_bad("lengths"):
            stage = "stage1" if trainable == {"projector"} else "stage2"
            store = make_store(config, stage, chat_tokenizer, model, identity, data)
            check_resume(resumed, store, total_steps, lambda: frozen_digests(model), results)
    _check_saving(config, chat_tokenizer, model, trainable, total_steps, results)
    results.add("memory", "good", memory_estimate(model))


def _check_export(
    model: VisionLanguageModel, chat_tokenizer: ChatTokenizer, results: CheckResults
) -> None:
    """Report whether the model can be exported; a run may start anyway."""
    obstacles = export_obstacles(model, chat_tokenizer.image_tokens)
    results.add("export --to hf", "note" if obstacles else "good", summarize_obstacles(obstacles))
    if not obstacles:
        text = describe_consumers(export_consumers(model))
        results.add("consumers", "note", text, aside=True)


def _check_data(
    config: RunConfig,
    chat_tokenizer: ChatTokenizer,
    model: VisionLanguageModel,
    results: CheckResults,
) -> tuple[Data, int] | None:
    """Load the records for the model and train on the longest batch; return data and steps."""
    listing = config.data.model_copy(update={"on_error": "quarantine"})
    with results.check("lengths"):
        # All records that do not fit are listed, not only the first.
        quarantining, tower = config.model_copy(update={"data": listing}), model.vision_tower
        data = load_data(quarantining, chat_tokenizer, tower.image_spec, model.layout_rule)
        errors = [entry for entry in _entries(data) if entry.bucket == "quarantined"]
        for entry in errors[:MAX_PRINTED]:
            echo(f"bad record: {CODES[entry.reason]}: {entry.message}")
        longest, sampler = max(data.train.lengths), make_sampler(config, data.train)
        steps = num_steps(config, sampler)
        text = f"longest {longest:,} of {config.data.max_length:,} tokens; {counted_steps(steps)}"
        if errors:
            text += f"; {len(errors):,} records do not fit"
        results.add("lengths", "bad" if errors else "good", text)
        if steps < FEW_STEPS and _begins_with_random_projector(config):
            results.add(
                "steps",
                "note",
                f"with {counted_steps(steps)} a projector that begins with random weights learns "
                "little, and the model may say the same about every image; give it more steps "
                "(train.epochs, train.max_steps, a smaller train.global_batch_size), or start from "
                "a trained projector",
            )
        seen, batch = sampler.records_per_epoch, config.train.global_batch_size
        if seen < batch:
            results.add(
                "batch",
                "warning",
                f"an epoch has {seen:,} records and train.global_batch_size is {batch:,}, so every "
                "step takes all of them; lower it for more and smaller steps",
            )
        results.add("ledger", "good", data.summary())
        if not errors:
            _check_steps(config, chat_tokenizer, data, model, sampler, results)
        return data, steps
    return None


def _begins_with_random_projector(config: RunConfig) -> bool:
    return not (config.projector or config.start_from or config.model.from_checkpoint)


def _check_steps(
    config: RunConfig,
    chat_tokenizer: ChatTokenizer,
    data: Data,
    model: VisionLanguageModel,
    sampler: StepSampler,
    results: CheckResults,
) -> None:
    pad_token_id = padding_id(chat_tokenizer.tokenizer)
    collator = make_collator(config, pad_token_id, image_cost(model))
    stats = sampled_packing_stats(
        collator, sampler, data.train, num_steps=num_steps(config, sampler), world_size=1
    )
    if stats is not None:
        results.add("packs", "good", stats.summary())
    before = results.passed
    with results.check("fit"):
        for note in require_compatible(chat_tokenizer, data, model):
            results.add("fit", "warning", note)
    if config.data.feature_cache is not None and not results.is_bad("precision"):
        with results.check("feature cache"):
            accelerator = make_accelerator(config.train.precision)
            text = feature_cache_outlook(config, model, accelerator, data)
            results.add("feature cache", "good", text)
    if before == results.passed and not results.is_bad("precision"):
        try_longest_batch(config, sampler, collator, data, model, results)
        try_generation(config, chat_tokenizer, data, model, results)
        model.to("cpu").train()


def _entries(data: Data) -> list[LedgerEntry]:
    return [entry for ledger in data.ledgers.values() for entry in ledger.entries]


def _check_saving(
    config: RunConfig,
    chat_tokenizer: ChatTokenizer,
    model: VisionLanguageModel,
    trainable: Set[str],
    total_steps: int,
    results: CheckResults,
) -> None:
    output_dir = _existing_parent(Path(config.output_dir))
    trained = [
        (name, p)
        for named in parameters_by_part(model).values()
        for name, p in named
        if p.requires_grad
    ]
    size = checkpoint_bytes(p for _, p in trained)
    try:
        require_space(output_dir, size)
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".check-") as place:
            components = checkpoint_components(
                config, model, chat_tokenizer.tokenizer, chat_tokenizer, trainable
            )
            dry_run_save(Path(place), components, trained)
    except (UserError, OSError) as error:
        results.add("saving", "bad", str(error))
        return
    text = f"a checkpoint (about {size / 1e9:.2f} GB) was saved and read back"
    results.add("saving", "good", text)
    if total_steps:
        check_disk(config, output_dir, total_steps, size, results)


def memory_estimate(model: VisionLanguageModel) -> str:
    """Return the memory of weights, gradients and AdamW's state; activations are extra."""
    weights = sum(map(num_bytes, model.parameters()))
    trained = checkpoint_bytes(
        p for named in parameters_by_part(model).values() if is_trainable(named) for _, p in named
    )
    return (
        f"{(weights + trained) / 1e9:.2f} GB per rank for weights ({weights / 1e9:.2f}), "
        f"gradients and AdamW ({trained / 1e9:.2f}); activations are extra"
    )


def _existing_parent(folder: Path) -> Path:
    """Return the nearest existing folder at or above `folder`."""
    while not folder.is_dir():
        if folder == folder.parent:
            raise UserError(f"output_dir {folder}: no folder above it exists")
        folder = folder.parent
    return folder
