"""Everything that can fail later in a run, now: all records, images, masks, model and saving."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import cast

from vlm_sft.checkpoint.components import checkpoint_components, unused_parts
from vlm_sft.checkpoint.digests import frozen_digests
from vlm_sft.checkpoint.format import Checkpoint
from vlm_sft.checkpoint.store import require_space
from vlm_sft.checks.compatibility import require_fit
from vlm_sft.checks.data_head import record_fault
from vlm_sft.checks.machine import examine_machine
from vlm_sft.checks.output_places import (
    examine_cache_dir,
    examine_disk,
    examine_output_dir,
    examine_resume,
)
from vlm_sft.checks.tokenizer.check import (
    build_chat_tokenizer,
    check_tokenizer,
    read_generation_config,
    summary,
)
from vlm_sft.checks.tokenizer.under_test import Finding
from vlm_sft.checks.trial_step import try_an_answer, try_longest_batch
from vlm_sft.checks.verdict import Verdict, fails, print_lines
from vlm_sft.config.method import trainable_parts
from vlm_sft.config.schema import DataFile, LanguageModelConfig, RunConfig
from vlm_sft.data.build import (
    Data,
    Language,
    load_data,
    load_language,
    make_sampler,
    packing_summary,
)
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.duplicates import Repeats
from vlm_sft.data.image_separator import LayoutCheck
from vlm_sft.data.ledger import LedgerEntry
from vlm_sft.data.records import open_records
from vlm_sft.data.text_encoder import load_tokenizer
from vlm_sft.errors import RecordError, UserError
from vlm_sft.errors.codes import CODES
from vlm_sft.export.consumers import consumers_in_words
from vlm_sft.export.obstacles import export_consumers, export_obstacles, outlook
from vlm_sft.model.notes import model_notes
from vlm_sft.model.parts import named_parts
from vlm_sft.model.quantization import num_bytes
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.feature_cache import feature_cache_outlook
from vlm_sft.train.optimizer import base_lr, checkpoint_bytes
from vlm_sft.train.preflight import (
    is_trainable,
    parts_rows,
    parts_table,
    print_table,
    rehearse_saving,
)
from vlm_sft.train.setup import load_model, make_plan, make_store
from vlm_sft.train.trainer import Plan
from vlm_sft.utils.atomic_files import atomic_open
from vlm_sft.utils.console import say, say_json
from vlm_sft.utils.progress import track

SHOWN = 20
"""Bad records that are printed; the rest is counted."""


def check_run(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Check a run's records, model and saving; returns 0 or 2."""
    verdict = Verdict()
    verdict.strict = arguments.strict
    examine_machine(config, trainable_parts(config), verdict)
    resumed = examine_output_dir(config, verdict)
    config = examine_cache_dir(config, verdict)
    language = load_language(config)
    verdict.add_findings(examine_language(config, language), strict=arguments.strict)
    with open_bad_list(arguments.bad) as listed:
        num_bad = check_records(config, language, verdict, listed)
    if not arguments.no_model:
        with verdict.examine("model"):
            check_model(config, language, verdict, resumed, records_are_good=not num_bad)
    verdict.print()
    return 0 if verdict.good else 2


def examine_language(config: RunConfig, language: Language) -> list[Finding]:
    """Return the findings about the tokenizer and the chat template of a run."""
    name = config.model.language_model.name
    generation = read_generation_config(Path(name).expanduser()) if name else None
    return check_tokenizer(
        language.tokenizer, config.data.template, language.chat_tokenizer, generation
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
    good = not any(fails(finding.level, strict=arguments.strict) for finding in findings)
    if arguments.json:
        rows = [asdict(finding) for finding in findings]
        told = {"good": good, "summary": summary(findings), "findings": rows}
        say_json(told, indent=2)
    else:
        rows_of_text = [(f.what, f.level, _in_lines(f)) for f in findings]
        print_lines(f"{arguments.tokenizer} with template {template}", rows_of_text)
        say(summary(findings), file=sys.stdout)
    return 0 if good else 2


def _in_lines(finding: Finding) -> str:
    return f"{finding.found}\n→ {finding.advice}" if finding.advice else finding.found


@contextmanager
def open_bad_list(path: str | Path | None) -> Iterator[Callable[[RecordError], None]]:
    """What writes a bad record into `path` as a line of JSON, as soon as it is found."""
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
    language: Language,
    verdict: Verdict,
    listed: Callable[[RecordError], None] = lambda error: None,
) -> int:
    """Read, tokenize and open every record of every file, one at a time.

    Prints the first bad ones, gives every one to `listed`, and returns how many there are.
    """
    total_bad, repeats = 0, Repeats()
    layout = LayoutCheck(language.chat_tokenizer.image_separator)
    for name, files in (("training data", config.data.train), ("held-out data", config.data.eval)):
        for file in files:
            count, bad = 0, 0
            repeats.begin(Path(file.path).name, held_out=name == "held-out data")
            for record, error in _faults(file, language):
                count += 1
                repeats.add(None if error else cast(Conversation, record))
                if error is None:
                    layout.add(cast(Conversation, record))
                    continue
                bad += 1
                listed(error)
                if total_bad + bad <= SHOWN:
                    say(f"bad record: {error.code}: {error}")
            total_bad += bad
            kept_out = bad and config.data.on_error == "quarantine"
            words = f"{count - bad:,} of {count:,} records can be used"
            if kept_out:
                words += f"; the run would leave {bad:,} out (data.on_error: quarantine)"
            verdict.add(f"{name} {Path(file.path).name}", not bad, words)
    if total_bad > SHOWN:
        more = f"... and {total_bad - SHOWN:,} more bad records (--bad FILE lists all of them)"
        say(more)
    verdict.add_repeats(repeats)
    if language.chat_tokenizer.keeps_layout:
        verdict.add_layout(layout)
    return total_bad


def _faults(
    file: DataFile, language: Language
) -> Iterator[tuple[Conversation | RecordError, RecordError | None]]:
    """Every record with what is wrong with it."""
    records = open_records(file)
    described = f"checking {Path(file.path).name}"
    for record in track(records.conversations, records.total, described):
        yield record, record_fault(record, language.chat_tokenizer)


def check_model(
    config: RunConfig,
    language: Language,
    verdict: Verdict,
    resumed: Checkpoint | None,
    *,
    records_are_good: bool,
) -> None:
    """Build the model, train on the longest batch, rehearse a save, ask the export."""
    trainable = trainable_parts(config)
    model, identity = load_model(config, trainable)
    parts = named_parts(model)
    rates = {part: base_lr(part, config.optim.learning_rate) for part in parts}
    print_table(parts_table(parts_rows(parts, rates)))
    tower = model.vision_tower
    verdict.add("model", True, f"{tower.num_tokens} tokens of width {tower.width} an image")
    if (unused := unused_parts(config.projector)) is not None:
        verdict.report("projector", "note", unused)
    for note in model_notes(model):
        verdict.report("model", "note", note)
    _check_export(model, verdict)
    total_steps = 0
    loaded = _check_data(config, language, model, verdict) if records_are_good else None
    if loaded is not None:
        data, plan = loaded
        total_steps = plan.total_steps
        if resumed is not None and not _is_bad(verdict, "lengths"):
            stage = "stage1" if trainable == {"projector"} else "stage2"
            store = make_store(config, stage, language, model, identity, data, say)
            examine_resume(resumed, store, total_steps, lambda: frozen_digests(model), verdict)
    _check_saving(config, language, model, trainable, total_steps, verdict)
    verdict.add("memory", True, memory_estimate(model))


def _check_export(model: VisionLanguageModel, verdict: Verdict) -> None:
    """Say whether `export` will take the model; a run that is not to be exported may start."""
    obstacles = export_obstacles(model)
    verdict.report("export --to hf", "note" if obstacles else "good", outlook(obstacles))
    if not obstacles:
        verdict.report("programs", "note", consumers_in_words(export_consumers(model)))


def _check_data(
    config: RunConfig, language: Language, model: VisionLanguageModel, verdict: Verdict
) -> tuple[Data, Plan] | None:
    """Fit the records to the model and train on the longest batch; return records and steps."""
    listing = config.data.model_copy(update={"on_error": "quarantine"})
    with verdict.examine("lengths"):
        quarantining, tower = config.model_copy(update={"data": listing}), model.vision_tower
        data = load_data(quarantining, language.chat_tokenizer, tower.image_spec, tower.num_tokens)
        errors = [entry for entry in _entries(data) if entry.bucket == "quarantined"]
        for entry in errors[:SHOWN]:
            say(f"bad record: {CODES[entry.reason]}: {entry.message}")
        longest, plan = max(data.train.lengths), make_plan(config, language, data, model)
        words = (
            f"longest {longest:,} of {config.data.max_length:,} tokens; {plan.total_steps:,} steps"
        )
        if errors:
            words += f"; {len(errors):,} records do not fit"
        verdict.add("lengths", not errors, words)
        verdict.add("ledger", True, data.summary())
        if not errors:
            _check_steps(config, language, data, model, plan, verdict)
        return data, plan
    return None


def _check_steps(
    config: RunConfig,
    language: Language,
    data: Data,
    model: VisionLanguageModel,
    plan: Plan,
    verdict: Verdict,
) -> None:
    sampler = make_sampler(config, data.train)
    summary = packing_summary(
        plan.collator, sampler, data.train, num_steps=plan.total_steps, world_size=1
    )
    if summary is not None:
        verdict.add("packs", True, summary.removeprefix("packing: "))
    before = verdict.good
    with verdict.examine("fit"):
        for note in require_fit(language, data, model):
            verdict.report("fit", "warning", note)
    if config.data.feature_cache is not None and not _is_bad(verdict, "precision"):
        with verdict.examine("feature cache"):
            accelerator = make_accelerator(config.train.precision)
            words = feature_cache_outlook(config, model, accelerator, data)
            verdict.add("feature cache", True, words)
    if before == verdict.good and not _is_bad(verdict, "precision"):
        try_longest_batch(config, plan, data, model, verdict)
        try_an_answer(config, language, data, model, verdict)
        model.to("cpu").train()


def _is_bad(verdict: Verdict, what: str) -> bool:
    return any(line[:2] == (what, "bad") for line in verdict.lines)


def _entries(data: Data) -> list[LedgerEntry]:
    ledgers = [data.train_ledger, *([data.eval_ledger] if data.eval_ledger else [])]
    return [entry for ledger in ledgers for entry in ledger.entries]


def _check_saving(
    config: RunConfig,
    language: Language,
    model: VisionLanguageModel,
    trainable: Set[str],
    total_steps: int,
    verdict: Verdict,
) -> None:
    output_dir = _existing_parent(Path(config.output_dir))
    trained = [
        (name, p) for named in named_parts(model).values() for name, p in named if p.requires_grad
    ]
    size = checkpoint_bytes(p for _, p in trained)
    try:
        require_space(output_dir, size)
        with tempfile.TemporaryDirectory(dir=output_dir, prefix=".check-") as place:
            components = checkpoint_components(
                config, model, language.tokenizer, language.chat_tokenizer, trainable
            )
            rehearse_saving(Path(place), components, trained)
    except (UserError, OSError) as error:
        verdict.add("saving", False, str(error))
        return
    verdict.add("saving", True, f"a checkpoint (about {size / 1e9:.2f} GB) was saved and read back")
    if total_steps:
        examine_disk(config, output_dir, total_steps, size, verdict)


def memory_estimate(model: VisionLanguageModel) -> str:
    """Bytes for weights, gradients and AdamW's moments; activations come on top."""
    weights = sum(map(num_bytes, model.parameters()))
    trained = checkpoint_bytes(
        p for named in named_parts(model).values() if is_trainable(named) for _, p in named
    )
    return (
        f"{(weights + trained) / 1e9:.2f} GB a process for weights ({weights / 1e9:.2f}), "
        f"gradients and AdamW ({trained / 1e9:.2f}); activations come on top"
    )


def _existing_parent(folder: Path) -> Path:
    """The nearest folder at or above `folder` that exists."""
    while not folder.is_dir():
        if folder == folder.parent:
            raise UserError(f"output_dir {folder}: no folder above it exists")
        folder = folder.parent
    return folder
