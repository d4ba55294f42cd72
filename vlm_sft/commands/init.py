"""Choose the settings of a new model's runs with the planner, and write their configurations."""

import argparse
import itertools
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from vlm_sft.commands.init_files import (
    Chosen,
    Project,
    SuiteTask,
    stage1_file,
    stage2_file,
    suite_file,
)
from vlm_sft.commands.inputs import require_model_name
from vlm_sft.config.finished import resolve
from vlm_sft.config.method import Method
from vlm_sft.config.schema import ColumnNames, DataFile, RunConfig, parse_config
from vlm_sft.config.yaml_text import parse_yaml
from vlm_sft.data.build import load_chat_tokenizer
from vlm_sft.data.conversation import Conversation, Turn
from vlm_sft.data.records import open_records
from vlm_sft.errors import RecordError, UserError
from vlm_sft.model.dtypes import DTYPES
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.planning.assumed import AssumedRecords, assumed_data_stats, parse_assumed
from vlm_sft.planning.data_stats import DataStats, read_data_stats
from vlm_sft.planning.devices import find_device
from vlm_sft.planning.estimate import Estimator
from vlm_sft.planning.gpus import ASSUMED_EFFICIENCY, GIB, GPUS, Device
from vlm_sft.planning.local_configs import known_shapes, require_local_tokenizer
from vlm_sft.planning.planner import Planner
from vlm_sft.planning.report import METHOD_NAMES
from vlm_sft.planning.step_stats import plan_steps
from vlm_sft.utils.atomic_files import write_bytes
from vlm_sft.utils.console import echo
from vlm_sft.utils.filesystem import existing_above
from vlm_sft.utils.libraries import install_command
from vlm_sft.utils.progress import track
from vlm_sft.utils.reading import read_json

HEAD: Final = 2_000
"""Records that are read to recognize the task, and tokenized to plan."""

SUITE_QUESTIONS: Final = 200
"""Questions of the evaluation suite."""

SHORT_WORDS: Final = 8
"""Words of the longest answer that is compared as a whole; longer ones are descriptions."""

MOSTLY: Final = 0.75
"""Share of long answers to a question from which its short answers are scored as descriptions."""

SUITE_FILES: Final[Mapping[SuiteTask, str]] = {
    "answer": "suite.jsonl",
    "describe": "suite_descriptions.jsonl",
}

MOST_AT_ONCE: Final = 8
"""Records of a micro-batch; with more, a step gets hardly faster."""

ONE_EPOCH: Final = 50_000
"""From how many records a run has one epoch."""

ONE_EPOCH_ON_CPU: Final = 64
"""The same without a GPU: a small model takes about a second a record."""

FEWEST_STEPS: Final = {"stage1": 120, "stage2": 30}
"""Steps for which a small file is repeated, in stage 1 and in stage 2 after it: with fewer, a model
whose projector begins with random weights says the same about every image."""

MOST_EPOCHS: Final = {"stage1": 20, "stage2": 3}
"""Limit of these repetitions, in stage 1 and in stage 2."""

LENGTHS: Final = (4096, 2048, 1024, 512, 256)
"""Limits of a record's tokens that are tried in turn, if the longest records do not fit."""

_DEFAULT_MODELS: Final = (
    (40, "Qwen/Qwen2-7B-Instruct"),
    (12, "Qwen/Qwen2.5-1.5B-Instruct"),
    (0, "Qwen/Qwen2.5-0.5B-Instruct"),
)
"""Language models by the memory in GiB from which they are the default."""

_DEFAULT_TOWER: Final = "openai/clip-vit-large-patch14-336"


@dataclass(frozen=True)
class Head:
    """What the first records of a file say about it.

    Attributes:
        count: Records of the file, or an upper bound.
        records: The first usable ones.
        words: Median number of words of their answers.
        characters: Characters of the longest.
        are_captions: Whether no record has a question.
        has_captions: Whether a record has no question.
    """

    count: int
    records: list[Conversation]
    words: float
    characters: int
    are_captions: bool
    has_captions: bool


def run(arguments: argparse.Namespace, ask: Callable[[str], str] = input) -> int:
    """Ask for what is missing, plan, write the files and print the next commands; return 0.

    Args:
        arguments: Of the command.
        ask: Shows a question and returns the answer.

    Raises:
        UserError: Something is missing or wrong, a file exists already, or nothing fits.
    """
    asks = not arguments.yes and sys.stdin.isatty()
    if arguments.data is None:
        if not asks:
            raise UserError("missing: --data PATH; `vlm-sft init --help` shows examples")
        arguments.data = _answered(ask, "File or folder of questions and answers", None)
    out = arguments.out
    _require_out(out)
    head = _read_head(_data_file(arguments, arguments.data, arguments.columns))
    device = _device(arguments)
    _ask_for_models(arguments, device, ask if asks else None)
    held_out = head
    if arguments.eval is not None:
        held_out = _read_head(_data_file(arguments, arguments.eval, arguments.columns))
    project = _project(arguments, head, held_out, device)
    stage2 = _plan_stage2(arguments, project, head, device)
    files = {"stage2.yaml": stage2_file(project, stage2)}
    if project.has_stage1:
        captions = head
        if arguments.captions is not None:
            captions = _read_head(_data_file(arguments, arguments.captions))
        # The projector learns the weights that it will have in stage 2.
        quantized = stage2.method == "qlora"
        planned = (
            _plan(
                arguments,
                project,
                captions,
                device,
                "stage1",
                stage1_file,
                quantized=quantized,
                shorten=shorten,
            )
            for shorten in (False, True)
        )
        stage1 = next(filter(None, planned), None)
        if stage1 is None:
            raise _too_large(["stage1"], device)
        files["stage1.yaml"] = stage1_file(project, stage1)
    suite = {task: rows for task, rows in _suite_questions(arguments, held_out).items() if rows}
    for task, rows in suite.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files[SUITE_FILES[task]] = "".join(lines)
    if suite:
        places = {task: f"{out}/{SUITE_FILES[task]}" for task in suite}
        files["suite.yaml"] = suite_file(project, places)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in sorted(files.items()):
        write_bytes(out / name, text.encode())
        echo(f"written: {out / name}")
    if not suite:
        echo("note: no suite was written, because the images are embedded in the records")
    _print_next(project, stage2, has_suite=bool(suite))
    return 0


def _require_out(out: Path) -> None:
    """Check, before any record is read, that the files can be written and replace nothing.

    Raises:
        UserError: One of them exists, or `--out` is no folder that can be written to.
    """
    for name in ("stage1.yaml", "stage2.yaml", "suite.yaml", *SUITE_FILES.values()):
        if (out / name).exists():
            raise UserError(
                f"{out / name} exists, and init replaces nothing; give another --out",
                code="not_ours",
            )
    existing = existing_above(out.absolute())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        problem = "cannot be written to" if existing.is_dir() else "is a file"
        raise UserError(f"--out {out}: {existing} {problem}; give another --out", code="not_ours")


def _answered(ask: Callable[[str], str], question: str, default: str | None) -> str:
    """Ask until there is an answer; an empty one means the default."""
    while True:
        shown = f" [{default}]" if default else ""
        try:
            answer = ask(f"{question}{shown}: ").strip()
        except EOFError:
            raise UserError(f"{question}: no answer; give the options, or --yes") from None
        if answer or default:
            return answer or str(default)


def _ask_for_models(
    arguments: argparse.Namespace, device: Device, ask: Callable[[str], str] | None
) -> None:
    """Fill in the models that are not given."""
    if arguments.from_checkpoint is not None:
        return
    gib = device.memory / GIB
    limit = gib / 4 if device.is_cpu else gib  # a CPU's memory allows more than its speed
    llm = next(name for least, name in _DEFAULT_MODELS if limit >= least)
    for option, question, default in (
        ("tower", "Vision tower (folder or hub name)", _DEFAULT_TOWER),
        ("llm", "Language model (folder or hub name)", llm),
    ):
        if getattr(arguments, option) is None:
            value = default if ask is None else _answered(ask, question, default)
            require_model_name(f"--{option}", value)
            setattr(arguments, option, value)


def _data_file(
    arguments: argparse.Namespace, path: str, columns: Mapping[str, str] | None = None
) -> DataFile:
    """Return a file as the configurations will name it."""
    names = ColumnNames.of_option(columns)
    return DataFile(path=path, image_root=arguments.images, columns=names)


def _read_head(file: DataFile) -> Head:
    """Read the first records of a file.

    Raises:
        UserError: The file cannot be read, or none of the first records can be used.
    """
    opened = open_records(file)
    first = itertools.islice(opened.conversations, HEAD)
    read = list(track(first, min(HEAD, opened.total), f"reading {Path(file.path).name}"))
    records = [record for record in read if isinstance(record, Conversation)]
    errors = [record for record in read if isinstance(record, RecordError)]
    if not records:
        raise errors[0] if errors else UserError(f"{file.path}: no record", code="no_records")
    if errors:
        echo(f"note: {len(errors):,} of {len(read):,} records cannot be used; first: {errors[0]}")
    answers = [turn.text for r in records for turn in r.turns if turn.role == "assistant"]
    questions = [turn.text for r in records for turn in r.turns if turn.role == "user"]
    characters = max(sum(len(turn.text) for turn in record.turns) for record in records)
    words = statistics.median(len(answer.split()) for answer in answers)
    empty = [not question.strip() for question in questions]
    return Head(opened.total, records, words, characters, all(empty), any(empty))


def _device(arguments: argparse.Namespace) -> Device:
    if arguments.gpu_memory is None:
        return find_device(arguments.gpu, DTYPES["fp32" if arguments.gpu == "cpu" else "bf16"])
    memory = int(arguments.gpu_memory * GIB)
    similar = min(GPUS.values(), key=lambda gpu: abs(gpu.memory - memory))
    return replace(similar, name=f"GPU with {arguments.gpu_memory:g} GiB", memory=memory)


def _project(arguments: argparse.Namespace, head: Head, held_out: Head, device: Device) -> Project:
    template = arguments.template or ("chatml" if arguments.tokenizer == "bytes" else "auto")
    precision = "fp32" if device.is_cpu else "fp16" if device.name == "t4" else "bf16"
    timm = _timm_settings(arguments.tower)
    return Project(
        out=str(arguments.out),
        data=arguments.data,
        captions=arguments.captions,
        eval=arguments.eval,
        columns=arguments.columns or {},
        images=arguments.images,
        tower=arguments.tower,
        tower_is_timm=timm is not None,
        grid_pool=_pooled(timm) if device.is_cpu else None,
        llm=arguments.llm,
        tokenizer=arguments.tokenizer,
        template=template,
        from_checkpoint=arguments.from_checkpoint,
        projector=arguments.projector,
        start_from=arguments.start_from,
        precision=precision,
        data_are_captions=head.are_captions,
        prompted=frozenset(
            path
            for path, of_file in ((arguments.data, head), (arguments.eval, held_out))
            if path is not None and of_file.has_captions
        ),
        device=device.name,
        gpus=arguments.gpus,
        suite_images=str(_data_file(arguments, arguments.eval or arguments.data).images_start_in()),
    )


def _timm_settings(tower: str | None) -> dict[str, Any] | None:
    """Return timm's settings of a tower; None if it is no folder that timm saved."""
    path = Path(tower or "") / "config.json"
    if tower is None or not path.exists():
        return None
    found: dict[str, Any] | None = read_json(path).get("pretrained_cfg")
    return found


def _pooled(timm: Mapping[str, Any] | None) -> int | None:
    """Return half the side of a tower's last feature map, which an export can write as well."""
    side = ((timm or {}).get("pool_size") or [0])[0]
    return side // 2 if side >= 4 else None


# --- what fits


def _plan_stage2(
    arguments: argparse.Namespace, project: Project, head: Head, device: Device
) -> Chosen:
    methods: list[Method] = ["full", "lora", "qlora"]
    if arguments.start_from is not None:
        methods = ["full"]
    elif arguments.method != "auto":
        methods = [arguments.method]
    # Four bits come before dropped turns.
    for shorten, method in itertools.product((False, True), methods):
        quantized, write = method == "qlora", stage2_file
        found = _plan(
            arguments, project, head, device, method, write, quantized=quantized, shorten=shorten
        )
        if found is not None:
            return found
    raise _too_large(methods, device)


def _too_large(methods: Sequence[Method], device: Device) -> UserError:
    names = " or ".join(METHOD_NAMES[method] for method in methods)
    return UserError(
        f"--llm: {names} does not fit {device.name} ({device.memory / GIB:.1f} GiB), even with "
        f"records of {LENGTHS[-1]} tokens one by one; give a smaller language model or another GPU"
    )


def _plan(
    arguments: argparse.Namespace,
    project: Project,
    head: Head,
    device: Device,
    method: Method,
    write: Callable[[Project, Chosen], str],
    *,
    quantized: bool,
    shorten: bool,
) -> Chosen | None:
    """Return the settings with which a method fits the device; None if there are none."""
    # LLaVA trains one epoch; a small file needs more of them, for which a CPU takes too long.
    epochs = 1 if head.count >= (ONE_EPOCH_ON_CPU if device.is_cpu else ONE_EPOCH) else 3
    most = 256 if method == "stage1" else 128
    batch = min(most, max(8, 2 ** int(head.count * epochs / 100).bit_length() // 2))
    if project.has_stage1:
        stage = "stage1" if method == "stage1" else "stage2"
        needed = math.ceil(FEWEST_STEPS[stage] * batch / max(1, head.count))
        epochs = max(epochs, min(MOST_EPOCHS[stage], needed))
    steps = max(1, epochs * math.ceil(head.count / batch))
    start = Chosen(method, "auto", 1, batch, epochs, LENGTHS[0], steps, quantized)
    config = resolve(_config(write(project, start)), download=False)
    estimator = Estimator(config, device, gpus=arguments.gpus, efficiency=ASSUMED_EFFICIENCY)
    records = _data_stats(arguments, config, estimator, head)
    image_tokens = _image_tokens(estimator)
    longest = records.longest()
    rounded = min(LENGTHS[0], -(-longest * 5 // 4 // 64) * 64)  # a quarter more than was seen
    shorter = tuple(length for length in LENGTHS if length < rounded)
    for length in shorter if shorten else (rounded,):
        if length < image_tokens + 32:
            break
        if length < longest:  # turns beyond the limit are dropped
            count = round(records.records_per_epoch)
            stats = assumed_data_stats(AssumedRecords(count, length, length // 2, 1), config)
        else:
            stats = records
        steps = plan_steps(config, stats, gpus=arguments.gpus)
        most = min(MOST_AT_ONCE, batch)
        found = Planner(estimator, stats, steps, None).chosen(method, most)
        if found is not None:
            policy, size, memory = found
            weights = parameters_by_part(estimator.model(method))["language_model"]
            return replace(
                start,
                policy=policy,
                micro_batch_size=size,
                max_length=length,
                memory=memory.total / GIB,
                parameters=sum(weight.numel() for _, weight in weights),
                notes=tuple(known_shapes(config.model)),
            )
    return None


def _image_tokens(estimator: Estimator) -> int:
    """Return the tokens of an image of 1024 x 768 pixels."""
    return estimator.meta_model.layout_rule.layout(1024, 768).num_tokens


def _config(text: str) -> RunConfig:
    return parse_config(parse_yaml(text), "the configuration of init")


def _data_stats(
    arguments: argparse.Namespace, config: RunConfig, estimator: Estimator, head: Head
) -> DataStats:
    """Return the lengths of the records: tokenized, assumed, or guessed without a tokenizer."""
    if arguments.assume is not None:
        return assumed_data_stats(parse_assumed(arguments.assume), config)
    rule = estimator.meta_model.layout_rule
    try:
        require_local_tokenizer(config.model.language_model)
    except UserError as error:
        # A token of a language model's tokenizer has three characters or more in most languages.
        tokens = min(LENGTHS[0], _image_tokens(estimator) + 64 + head.characters // 3)
        echo(f"note: {error}. Planned with {tokens:,} tokens per record, by its characters")
        return assumed_data_stats(AssumedRecords(head.count, tokens, tokens // 2, 1), config)
    return read_data_stats(config, load_chat_tokenizer(config), layout_rule=rule, sample=HEAD)


# --- the suite and the next commands


def _suite_questions(
    arguments: argparse.Namespace, held_out: Head
) -> dict[SuiteTask, list[dict[str, Any]]]:
    """Return the suite's questions by task: all questions of some records, evenly chosen."""
    file = _data_file(arguments, arguments.eval or arguments.data, arguments.columns)
    root = os.path.abspath(file.images_start_in())
    asked: list[tuple[Conversation, Turn, Turn]] = [
        (record, question, answer)
        for record in held_out.records
        if len(record.images) == 1 and not isinstance(record.images[0], bytes)
        for question, answer in itertools.pairwise(record.turns)
        if (question.role, answer.role) == ("user", "assistant")
    ]
    # A short answer to a question that is mostly answered at length is a description, too.
    long_answers: dict[str, list[bool]] = {}
    for _, question, answer in asked:
        long_answers.setdefault(question.text.strip(), []).append(_is_long(answer.text))
    tasks: dict[SuiteTask, list[dict[str, Any]]] = {"answer": [], "describe": []}
    for number, (record, question, answer) in enumerate(
        asked[:: -(-len(asked) // SUITE_QUESTIONS)]
    ):
        image, text = record.images[0], answer.text.strip()
        assert isinstance(image, Path)
        asks = question.text.strip()
        described = not asks or _is_long(text) or statistics.fmean(long_answers[asks]) > MOSTLY
        task: SuiteTask = arguments.task or ("describe" if described else "answer")
        row = {"question_id": number, "image_id": number, "record": record.id}
        row |= {"image": os.path.relpath(image, root)}
        row |= {"question": asks} if asks else {}
        row |= {"caption" if task == "describe" else "answer": text}
        if asks or task == "describe":
            tasks[task].append(row)
    return tasks


def _is_long(answer: str) -> bool:
    return len(answer.split()) > SHORT_WORDS


def _print_next(project: Project, stage2: Chosen, *, has_suite: bool) -> None:
    for note in dict.fromkeys(stage2.notes):
        echo(f"note: {note}")
    if project.has_stage1 and project.captions is None and not project.data_are_captions:
        echo(
            "note: there are no captions, so stage 1 trains the projector on the questions and "
            "answers. Better: captions (--captions), the projector of an earlier run "
            "(--projector), or a finished LLaVA (--from-checkpoint)"
        )
    if project.asks_training_data:
        echo(
            "note: the suite asks questions of the training data, so its scores say whether they "
            "were learned, not whether the model generalizes; give held-out records as --eval"
        )
    out, run = project.out, f"{project.runs}/stage2/final"
    steps = [f"check {out}/stage1.yaml", f"stage1 {out}/stage1.yaml"] if project.has_stage1 else []
    steps += [f"check {out}/stage2.yaml", f"stage2 {out}/stage2.yaml"]
    steps += [f"evaluate {run} {out}/suite.yaml --out {out}/evaluation"] if has_suite else []
    steps += [f"chat {run} --image IMAGE"]
    if stage2.method == "qlora":
        echo(f"4-bit weights need: {install_command('qlora')}")
    echo("next:")
    for step in steps:
        echo(f"  vlm-sft {step}")
