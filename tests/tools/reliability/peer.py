"""The same kills for transformers' Trainer and for our own runs: same model, records and schedule.

Both are started again as their users start them: our command as it was, the Trainer with
`resume_from_checkpoint=True` as soon as `get_last_checkpoint` finds one. Where a start fails, its
newest checkpoint is deleted by hand, as its error asks for, and counted; then it is started again.
"""

import hashlib
import json
import math
import random
import re
import shutil
import signal
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from rich.table import Table
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from tests.tools.reliability.kills import HITS, strike
from tests.tools.reliability.lab import Ended, Lab, Running, forked
from vlm_sft.checkpoint.format import verify
from vlm_sft.checkpoint.store import CheckpointStore
from vlm_sft.config.schema import RunConfig, load_config
from vlm_sft.data.batch import Batch, pad_examples
from vlm_sft.data.build import load_chat_tokenizer, load_data
from vlm_sft.data.dataset import Example
from vlm_sft.data.hf_tokenizer import padding_id
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.setup import load_model

SETTINGS = (
    "train.micro_batch_size=4",
    "train.save_every_steps=2",
    "train.max_steps=48",
    "train.epochs=100",
)
"""Micro-batches of one size, as the Trainer has them, and so many saves that kills hit some."""
FINAL = "final"
PATIENCE = 1800.0
"""Seconds that a run may take on a machine that others use too."""

Order = dict[int, list[str]]
"""The records that each step trained on."""


@dataclass(frozen=True)
class System(ABC):
    """What trains: its runs have names, checkpoints and results.

    Args:
        lab: Whose folder and settings its runs have.
    """

    name: ClassVar[str]
    """What the tables call it."""
    lab: Lab

    @abstractmethod
    def start(self, run: str) -> Running:
        """Begin the run, or go on with it."""

    @abstractmethod
    def newest(self, run: str) -> Path | None:
        """The checkpoint that a person would delete when the run does not go on."""

    @abstractmethod
    def weights(self, run: str) -> Mapping[str, str]:
        """sha256 of the files of a finished run's weights."""

    def order(self, run: str) -> Order:
        """What each step trained on when it was done for the last time."""
        lines = (self.lab.out(run) / "trained.jsonl").read_text().splitlines()
        return {row["step"]: row["records"] for row in map(json.loads, lines)}


@dataclass(frozen=True)
class Ours(System):
    """This program."""

    name = "vlm_sft"

    def start(self, run: str) -> Running:
        return self.lab.start(run)

    def newest(self, run: str) -> Path | None:
        return next(iter(CheckpointStore(self.lab.out(run), {}).step_folders()), None)

    def weights(self, run: str) -> Mapping[str, str]:
        files = verify(self.lab.out(run) / FINAL).manifest["files"]
        tensors = {file: digest for file, digest in files.items() if file.endswith(".safetensors")}
        return {file: digest for file, digest in tensors.items() if "optimizer" not in file}


@dataclass(frozen=True)
class Peer(System):
    """transformers' Trainer on the same model."""

    name = f"Trainer {transformers.__version__}"

    def start(self, run: str) -> Running:
        arguments = self.lab.arguments(run)
        log = self.lab.folder / f"{run}.log"
        return forked(lambda: train_with_trainer(self.lab.kind, arguments), log)

    def newest(self, run: str) -> Path | None:
        found = get_last_checkpoint(str(self.lab.out(run)))
        return Path(found) if found else None

    def weights(self, run: str) -> Mapping[str, str]:
        content = (self.lab.out(run) / FINAL / "model.safetensors").read_bytes()
        return {"model.safetensors": hashlib.sha256(content).hexdigest()}


SYSTEMS: tuple[type[Ours] | type[Peer], ...] = (Ours, Peer)


def train_with_trainer(kind: str, arguments: Sequence[str]) -> None:
    """What a script around the Trainer does: build everything, go on if there is a checkpoint."""
    config = load_config(arguments[0], arguments[1:])
    chat_tokenizer = load_chat_tokenizer(config)
    learned = "language_model" if config.lora is None else "adapter"
    model, _ = load_model(config, {"projector"} if kind == "stage1" else {"projector", learned})
    tower = model.vision_tower
    records = load_data(config, chat_tokenizer, tower.image_spec, model.layout_rule).train
    wrapped = ForTrainer(model)
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        model=wrapped,
        args=training_arguments(config, kind),
        train_dataset=records,
        data_collator=collator(padding_id(chat_tokenizer.tokenizer)),
        callbacks=[TrainedRecords(wrapped, out / "trained.jsonl")],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(config.output_dir) is not None)
    trainer.save_model(str(out / FINAL))


def training_arguments(config: RunConfig, kind: str) -> TrainingArguments:
    """The run's settings under the Trainer's names; what is not named is as the Trainer has it."""
    train, optim = config.train, config.optim
    rates = optim.learning_rate
    assert train.global_batch_size % train.micro_batch_size == 0
    assert train.max_steps is not None and optim.max_grad_norm is not None
    return TrainingArguments(
        output_dir=config.output_dir,
        seed=config.seed,
        data_seed=config.seed,
        max_steps=train.max_steps,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=train.global_batch_size // train.micro_batch_size,
        dataloader_num_workers=config.data.num_workers,
        learning_rate=rates.projector if kind == "stage1" else rates.language_model,
        lr_scheduler_type=optim.schedule,
        warmup_steps=math.ceil(optim.warmup_ratio * train.max_steps),
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        save_strategy="steps",
        save_steps=train.save_every_steps,
        save_total_limit=train.keep_last_checkpoints,
        save_only_model=False,
        logging_steps=train.log_every_steps,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


class ForTrainer(nn.Module):
    """The model with the loss and the state that the Trainer asks of one.

    Its state is what is trained, as in our checkpoints, and not the frozen parts too: so that a
    save takes the Trainer no longer than it has to.
    """

    accepts_loss_kwargs = True
    _keys_to_ignore_on_save = None  # the Trainer asks for it, as transformers' own models have it

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.model = model
        self.seen: list[str] = []

    def forward(
        self, batch: Batch, num_items_in_batch: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        self.seen += batch.record_ids
        return {"loss": self.model(batch).loss_sum / num_items_in_batch}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


def collator(pad_token_id: int) -> Callable[[Sequence[Example]], dict[str, Any]]:
    """Our batches as the keyword arguments of `ForTrainer.forward`; the Trainer counts labels."""

    def collate(examples: Sequence[Example]) -> dict[str, Any]:
        batch = pad_examples(examples, pad_token_id)
        return {"batch": batch, "labels": batch.labels()}

    return collate


@dataclass
class TrainedRecords(TrainerCallback):
    """A row for each step, before the step can be saved; a step done again gets another row."""

    model: ForTrainer
    path: Path

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        row = {"step": state.global_step, "records": self.model.seen}
        self.model.seen = []
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


@dataclass
class Score:
    """What came of a system's trials.

    Attributes:
        runs: Trials brought to their end.
        kills: Processes killed.
        several: Runs killed twice or more.
        resumes: Starts of a run that had been started before, those included that were killed too.
        failed: Those that ended with an error, by what it said.
        cleanups: Checkpoints deleted by hand.
        stuck: Runs that could not be ended at all.
        other_weights: Runs whose final weights are not those of the untouched run, bit for bit.
        other_steps: Steps that trained on other records than in the untouched run.
        lost: Records that an epoch did not see.
        repeated: Records that an epoch saw more often.
    """

    runs: int = 0
    kills: int = 0
    several: int = 0
    resumes: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    cleanups: int = 0
    stuck: int = 0
    other_weights: int = 0
    other_steps: int = 0
    lost: int = 0
    repeated: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def num_failed(self) -> int:
        """Resumes that failed."""
        return self.failed.total()

    def sentence(self) -> str:
        """The score in one line."""
        parts = (
            f"{self.num_failed} of {self.resumes} resumes failed",
            f"{self.cleanups} clean-ups by hand",
            f"{self.other_weights + self.stuck} of {self.runs} runs with other weights",
            f"{self.lost} records lost, {self.repeated} repeated",
        )
        return "; ".join(parts)

    def faults(self) -> list[str]:
        """Sentences for whatever is not as if nothing had happened."""
        wrong = bool(self.stuck or self.other_weights or self.other_steps)
        wrong = wrong or bool(self.lost or self.repeated)
        return [f"{count} times: {said}" for said, count in self.failed.items()] + (
            [self.sentence()] if wrong else []
        )


def killed_runs(system: System, count: int, *, seed: int) -> Iterator[Score]:
    """Kill runs at random times until `count` processes died; the score after every run."""
    ended = system.start("untouched").wait(PATIENCE)
    if ended.code:
        raise RuntimeError(f"{system.name}: the untouched run failed: {ended.output[-2000:]}")
    draw, seconds = random.Random(seed), ended.seconds
    score = Score()
    while score.kills < count:
        run = f"killed-{score.runs}"
        died = 0
        for hit in range(draw.choice(HITS)):
            found = strike(system.start(run), draw, seconds)
            if hit == 0 and found.code == 0:  # this machine is faster than it was
                seconds = found.seconds
            score.resumes += hit > 0
            died += found.code == -signal.SIGKILL
            if found.code not in (0, -signal.SIGKILL):
                _clean_up(system, run, found, score)
        score.kills += died
        score.several += died > 1
        score.runs += 1
        if _bring_to_its_end(system, run, score):
            _judge(system, run, score)
            shutil.rmtree(system.lab.out(run))
        yield score


def _bring_to_its_end(system: System, run: str, score: Score) -> bool:
    """Start it until it is finished, cleaning up by hand as often as it takes."""
    while True:
        ended = system.start(run).wait(PATIENCE)
        score.resumes += 1
        if ended.code == 0:
            return True
        if not _clean_up(system, run, ended, score):
            score.stuck += 1
            return False


def _clean_up(system: System, run: str, ended: Ended, score: Score) -> bool:
    """Count a start that failed, and delete what it stumbled over; whether there was such."""
    score.failed[_first_line(ended.output, system.lab.out(run))] += 1
    newest = system.newest(run)
    if newest is None:
        return False
    shutil.rmtree(newest)
    score.cleanups += 1
    return True


def _judge(system: System, run: str, score: Score) -> None:
    """Compare a finished run with the untouched one."""
    score.other_weights += system.weights(run) != system.weights("untouched")
    expected, found = system.order("untouched"), system.order(run)
    steps = expected.keys() | found
    score.other_steps += sum(expected.get(step) != found.get(step) for step in steps)
    length = _epoch_length(expected)
    for first in range(1, max(steps) + 1, length):
        wanted, seen = (
            Counter(name for step in range(first, first + length) for name in order.get(step, []))
            for order in (expected, found)
        )
        score.lost += (wanted - seen).total()
        score.repeated += (seen - wanted).total()


def _epoch_length(order: Order) -> int:
    """Steps until every record was seen."""
    waiting = {name for records in order.values() for name in records}
    for step in sorted(order):
        waiting -= set(order[step])
        if not waiting:
            return step
    raise AssertionError("an order sees all of its records")


def _first_line(said: str, folder: Path) -> str:
    """What the last exception said, without the names of this run and of its steps."""
    lines = re.findall(r"^(?:[\w.]*(?:Error|Exception|Interrupt)\b|error:).*", said, re.MULTILINE)
    line = lines[-1] if lines else (said.strip().splitlines() or ["nothing"])[-1]
    return re.sub(r"(checkpoint|step)-\d+", r"\1-N", line.replace(str(folder), "RUN"))


def comparison(scores: Mapping[str, Score]) -> Table:
    """The systems side by side."""
    table = Table(title="the same kills, side by side")
    table.add_column("")
    for name in scores:
        table.add_column(name, justify="right")
    questions: dict[str, Callable[[Score], int]] = {
        "runs": lambda s: s.runs,
        "kills": lambda s: s.kills,
        "runs killed twice or more": lambda s: s.several,
        "resumes": lambda s: s.resumes,
        "resumes that failed": lambda s: s.num_failed,
        "clean-ups by hand": lambda s: s.cleanups,
        "runs that could not be ended": lambda s: s.stuck,
        "runs whose weights differ": lambda s: s.other_weights,
        "steps with other records": lambda s: s.other_steps,
        "records lost": lambda s: s.lost,
        "records repeated": lambda s: s.repeated,
    }
    for question, ask in questions.items():
        table.add_row(question, *(str(ask(score)) for score in scores.values()))
    for said in sorted({said for score in scores.values() for said in score.failed}):
        table.add_row(f"  {said}", *(str(score.failed[said]) for score in scores.values()))
    return table
