"""The training loop: every step's batches, their gradient, the update, and what is written down."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from vlm_sft.checkpoint.async_save import CheckpointSaver
from vlm_sft.checkpoint.format import Checkpoint
from vlm_sft.checkpoint.optimizer import optimizer_component
from vlm_sft.checkpoint.snapshot import Component
from vlm_sft.checkpoint.store import CheckpointStore, require_within
from vlm_sft.config.schema import OptimConfig, TrainConfig
from vlm_sft.data.batch import Batch, Collator, LoadError
from vlm_sft.data.loader import (
    Examples,
    load_batch,
    load_steps,
    lost_worker_errors,
    micro_batches_of_rank,
)
from vlm_sft.errors import UserError
from vlm_sft.model.activation_checkpointing import CheckpointPolicy, set_activation_checkpointing
from vlm_sft.model.fp8 import use_fp8
from vlm_sft.model.notes import model_notes
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.checkpointing_policy import (
    Trial,
    device_named,
    longest_micro_batch,
    measure,
    settle,
)
from vlm_sft.train.compile import compile_faults_told, compile_layers, eager
from vlm_sft.train.distributed import checkpoint_group, raise_together, rank0_only, total
from vlm_sft.train.metrics import (
    LiveLine,
    MetricsFile,
    Speed,
    memory_bytes,
    tracker_values,
)
from vlm_sft.train.optimizer import (
    build_optimizer,
    checkpoint_bytes,
    gradient_norm,
    lr_multiplier,
    optimizer_state_bytes,
    set_learning_rates,
)
from vlm_sft.train.packing_check import prepare_packing
from vlm_sft.train.preflight import (
    Parts,
    parts_rows,
    parts_table,
    print_table,
    rehearse_saving,
    require_gradients,
    require_unchanged,
)
from vlm_sft.train.run_log import Account
from vlm_sft.train.signals import StopRequest
from vlm_sft.train.train_step import (
    StepGradient,
    accumulate_gradient,
    non_finite_fault,
    refuse_non_finite,
    step_seed,
)
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.console import say
from vlm_sft.utils.dtensor import is_sharded
from vlm_sft.utils.libraries import one_line
from vlm_sft.utils.process_group import Value

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """What a run is to do, apart from the objects that do it.

    Attributes:
        output_dir: The run folder.
        seed: Of dropout and of rounding; data order has its own, inside `records_of_step`.
        total_steps: Optimizer steps of the whole run.
        records_of_step: The records of a step (from 0), a pure function.
        epoch_of_step: Epochs gone after so many steps.
        collator: How a step's records become micro-batches.
        num_workers: Processes that load records ahead.
    """

    output_dir: Path
    seed: int
    total_steps: int
    records_of_step: Callable[[int], Sequence[int]]
    epoch_of_step: Callable[[int], float]
    collator: Collator
    num_workers: int
    train: TrainConfig
    optim: OptimConfig
    max_quarantined: int | None = None
    """Records that may turn out broken on the way; None: the first one stops the run."""


SampleGenerator = Callable[[Callable[[LoadError], None] | None], list[dict[str, Any]]]
"""Returns answers to a few validation records as rows; the argument gets unloadable records."""


@dataclass(frozen=True)
class Hooks:
    """What the loop asks of those who know more than it does.

    Attributes:
        parts: The model's parameters by part.
        frozen_digests: Fingerprints of the parts that must not move, worked out anew.
        answers: Answers of the model to a few held-out records, as plain rows; None: no samples.
            Records that cannot be loaded go to the function that it is called with, which is None
            where the first one is an error.
        quarantine: Told of each record that is left out because it cannot be loaded, and whether
            it is a held-out one.
    """

    parts: Parts
    frozen_digests: Callable[[], dict[str, str]]
    answers: SampleGenerator | None = None
    quarantine: Callable[[LoadError, bool], None] = lambda fault, held_out: None


@dataclass(frozen=True)
class Requests:
    """What any process asks for after a step.

    Attributes:
        stop: Save and leave.
        save: Save and continue.
    """

    stop: bool
    save: bool


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        step: Optimizer steps done.
        checkpoint: The newest one; `final/` when the run is finished.
        stopped_by: The signal that ended the run early, or None.
    """

    step: int
    checkpoint: Checkpoint | None
    stopped_by: signal.Signals | None = None


@dataclass
class Trainer:
    """One run: start or resume, train, evaluate, save, finish.

    Args:
        model: The whole model; what has `requires_grad` is trained.
        accelerator: Device, precision and processes.
        plan: What to do.
        hooks: Parts, fingerprints, generated answers.
        store: Where checkpoints go; the optimizer's own component is added here.
        train_data: Records to learn from.
        eval_data: Held-out records, or None.
    """

    model: nn.Module
    accelerator: Accelerator
    plan: Plan
    hooks: Hooks
    store: CheckpointStore
    train_data: Examples
    eval_data: Examples | None = None
    step: int = field(default=0, init=False)
    _saved_step: int = field(default=0, init=False)
    _saved_at: float = field(default=0.0, init=False)
    _resumed_from: Checkpoint | None = field(default=None, init=False)
    _gradients_seen: bool = field(default=False, init=False)
    _tracker_failed: bool = field(default=False, init=False)

    def run(self) -> Outcome:
        """Train to the end, or until a signal asks to stop.

        Raises:
            UserError: Nothing learns, a loss is not finite, a frozen part moved.
            CheckpointError: The run's checkpoints cannot be used or written.
        """
        self._prepare()
        resumed = rank0_only(self.accelerator, self._newest)
        if resumed is None:
            self._saving(self._rehearse)
            self._frozen = self.hooks.frozen_digests()
        else:
            self._resume(resumed)
        self._open_records(resumed)
        self._settle_activations()
        told = compile_faults_told(self.plan.train.compile)
        with StopRequest() as request, self._live, told:
            stopped = self._train(request)
            if self._saved_step < self.step:
                self._save()
            checkpoint = self._saving(self._saver.wait)
        if stopped and self.step < self.plan.total_steps:
            return Outcome(self.step, checkpoint, request.received or signal.SIGTERM)
        return self._finish(checkpoint)

    def _prepare(self) -> None:
        """Device, precision and optimizer; the table of what learns."""
        self.model.train()
        self._sharded = is_sharded(self.model.parameters())
        if self.plan.train.fp8:
            names = use_fp8(cast(VisionLanguageModel, self.model))
            self.store.log(f"fp8: {len(names)} linear layers of the language model multiply in it")
        if self.plan.train.compile:
            compile_layers(
                cast(VisionLanguageModel, self.model),
                self.accelerator.device,
                packed=self.plan.train.packing is not None,
            )
        self._wrapped = self.model if self._sharded else self.accelerator.prepare(self.model)
        self._prepare_packing()
        self.optimizer = build_optimizer(self.hooks.parts, self.plan.optim, seed=self.plan.seed)
        rates = {group["part"]: group["peak_lr"] for group in self.optimizer.param_groups}
        rows = parts_rows(self.hooks.parts, rates)
        if self.accelerator.is_main_process:
            print_table(parts_table(rows))
            for note in model_notes(cast(VisionLanguageModel, self.model)):
                self.store.log(note)
            write_json(self.plan.output_dir / "parts.json", rows)
        self._scaler = cast("torch.amp.GradScaler | None", self.accelerator.scaler)
        components: dict[str, Component] = {
            **self.store.components,
            "optimizer": optimizer_component(self.optimizer, self._scaler),
        }
        self.store.components = components
        self.store.trainable = dict(self._learning())
        if self._sharded:
            self.store.group = checkpoint_group(self.accelerator)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.store.num_bytes = checkpoint_bytes(self._parameters)

    def _prepare_packing(self) -> None:
        """Choose the kernel for packed records, and check that it keeps them apart."""
        train = self.plan.train
        if train.packing is None:
            return
        with eager(train.compile):
            prepare_packing(
                cast(VisionLanguageModel, self.model),
                train.packing,
                train.precision,
                self.accelerator.device,
                self.accelerator.autocast(),
                prune=not train.compile,
            )

    def _saving(self, action: Callable[[], Value]) -> Value:
        """Do what concerns saving where it is done: in every process that shares the weights."""
        return action() if self._sharded else rank0_only(self.accelerator, action)

    def _newest(self) -> Checkpoint | None:
        self.plan.output_dir.mkdir(parents=True, exist_ok=True)
        return self.store.newest()

    def _learning(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (name, parameter)
            for named in self.hooks.parts.values()
            for name, parameter in named
            if parameter.requires_grad
        ]

    def _rehearse(self) -> None:
        rehearse_saving(
            self.plan.output_dir, self.store.components, self._learning(), self.store.group
        )

    def _resume(self, checkpoint: Checkpoint) -> None:
        self.store.load(checkpoint)
        require_within(checkpoint, self.plan.total_steps)
        self.step = self._saved_step = checkpoint.step
        self._resumed_from = checkpoint
        self._frozen = dict(checkpoint.manifest["frozen"])
        require_unchanged(self._frozen, self.hooks.frozen_digests())
        if self.accelerator.is_main_process:
            self.store.log(f"going on from {checkpoint.folder} (step {self.step})")

    def _open_records(self, resumed: Checkpoint | None) -> None:
        """Files and line that the run reports on."""
        main, folder = self.accelerator.is_main_process, self.plan.output_dir
        self._metrics = MetricsFile(folder / "metrics.jsonl", last_step=self.step) if main else None
        self._samples = MetricsFile(folder / "samples.jsonl", last_step=self.step) if main else None
        trained = MetricsFile(folder / "trained.jsonl", last_step=self.step) if main else None
        self._account = Account(
            self.train_data.record_ids,
            self.accelerator,
            trained,
            max_quarantined=self.plan.max_quarantined or 0,
            max_skipped=self.plan.train.max_skipped_steps,
            on_quarantine=lambda fault: self.hooks.quarantine(fault, False),
        )
        if resumed is not None:
            self._account.restore(resumed.manifest)
        self._saver = CheckpointSaver(self.store, asynchronous=self.plan.train.async_checkpointing)
        self._saved_at = time.monotonic()
        self._live = LiveLine(self.plan.total_steps, self.step, enabled=main)
        before = self._metrics.last_seconds if self._metrics is not None else 0.0
        self._started = time.monotonic() - before
        self._speed = Speed()

    def _settle_activations(self) -> None:
        """Keep what the configuration says to keep for the backward pass, or what fits."""
        model, asked = cast(VisionLanguageModel, self.model), self.plan.train
        policy: CheckpointPolicy | Literal["auto"] = asked.activation_checkpointing
        if policy == "auto" and self._sharded:
            policy = "full"  # one process out of memory would leave the others waiting for it
            if self.accelerator.is_main_process:
                self.store.log(
                    "activation checkpointing: full; auto measures no step where processes share "
                    "the weights, so ask for none or selective by name if there is room"
                )
        if policy == "auto":
            indices, several = longest_micro_batch(
                map(self._all_micro_batches, range(self.plan.total_steps)),
                partial(self.plan.collator.num_tokens, self.train_data),
                processes=self.accelerator.num_processes,
            )
            positions = self.plan.collator.num_tokens(self.train_data, indices)
            basis = {
                "device": device_named(self.accelerator.device),
                "processes": self.accelerator.num_processes,
                "precision": asked.precision,
                "compile": asked.compile,
                "fp8": asked.fp8,
                "learning": sum(parameter.numel() for parameter in self._parameters),
                "batch": f"{len(indices)} records in {positions:,} positions",
            }
            policy = settle(
                self.plan.output_dir,
                basis,
                lambda: self._measured(self._account.usable(indices), several),
                self.accelerator,
                say=self.store.log,
            ).policy
        set_activation_checkpointing(model, policy)

    def _measured(self, indices: Sequence[int], several: bool) -> tuple[Trial, ...]:
        """Steps of these records under one policy after the other, until one fits."""
        batch = load_batch(
            self.train_data,
            indices,
            collator=self.plan.collator,
            on_error=None if self.plan.max_quarantined is None else lambda error: None,
        )

        def step() -> None:
            for parameter in self._parameters if several else ():
                parameter.grad = torch.zeros_like(parameter)  # of the micro-batches before
            with self.accelerator.autocast():
                output = self.model(batch.to(self.accelerator.device))
            output.loss_sum.backward()

        # What compiled code allocates on a CPU cannot be counted; without, it is no less.
        uncounted = self.plan.train.compile and self.accelerator.device.type == "cpu"
        model = cast(VisionLanguageModel, self.model)
        with eager(uncounted), compile_faults_told(self.plan.train.compile):
            return measure(
                step,
                lambda policy: set_activation_checkpointing(model, policy),
                self.model,
                self.accelerator,
                later_bytes=0 if self.optimizer.state else optimizer_state_bytes(self.optimizer),
            )

    @lost_worker_errors()
    def _train(self, request: StopRequest) -> bool:
        """Train to the end, saving and evaluating; return whether a process was asked to stop.

        The step that runs when the request comes is the last one. A checkpoint comes before the
        evaluation of its step, so that nothing that happens in an evaluation costs training.
        """
        if self._lacks_evaluation():
            self._evaluate_if_due()
        for batches in self._batches_from(self.step, self.plan.total_steps):
            if self._stopped_alone(request):
                return True
            self._train_step(batches)
            requests, last = self._agreed(request), self.step == self.plan.total_steps
            if requests.save or last or self.step % self.plan.train.save_every_steps == 0:
                self._save()
            if requests.stop and not last:
                return True
            self._evaluate_if_due()
        return False

    def _stopped_alone(self, request: StopRequest) -> bool:
        """Return whether the only process was asked to stop since its last step."""
        return self.accelerator.num_processes == 1 and request.received is not None

    def _agreed(self, request: StopRequest) -> Requests:
        """Return what any process asks for; all of them must call."""
        minutes = self.plan.train.save_every_minutes
        long_ago = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        save = request.save_now or (long_ago and self.accelerator.is_main_process)
        request.save_now = False
        stop = request.received is not None or self._saver.failed
        asked = torch.tensor([int(stop), int(save)], device=self.accelerator.device)
        stops, saves = total(self.accelerator, asked).tolist()
        return Requests(stop=stops > 0, save=saves > 0)

    def _batches_from(self, first: int, last: int) -> Iterator[list[Batch]]:
        return load_steps(
            self.train_data,
            map(self._micro_batches, range(first, last)),
            collator=self.plan.collator,
            num_workers=self.plan.num_workers,
            on_error=None if self.plan.max_quarantined is None else self._account.meet,
        )

    def _all_micro_batches(self, step: int) -> list[list[int]]:
        """Of every process."""
        records = self.plan.records_of_step(step)
        processes = self.accelerator.num_processes
        return self.plan.collator.assign_to_ranks(self.train_data, records, processes)

    def _micro_batches(self, step: int) -> list[list[int]]:
        chunks = micro_batches_of_rank(
            self.plan.collator,
            self.train_data,
            self.plan.records_of_step(step),
            world_size=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
        )
        return [self._account.usable(chunk) for chunk in chunks]

    def _train_step(self, batches: list[Batch]) -> None:
        """Gradient, checks, update, and a row of metrics."""
        self.optimizer.zero_grad(set_to_none=True)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        gradient = accumulate_gradient(
            self._wrapped,
            batches,
            self.accelerator,
            num_faults=self._account.num_met,
            seed_of=lambda i: step_seed(self.plan.seed, self.step, i * processes + rank),
        )
        self._account.settle(gradient.num_faults)
        self._account.require_planned(batches, self._micro_batches(self.step))
        norm, fault = self._checked_norm(gradient)
        factor = lr_multiplier(self.step, total_steps=self.plan.total_steps, config=self.plan.optim)
        rates = set_learning_rates(self.optimizer, factor)
        if fault is None:
            self._update()
        self._account.note(self.step + 1, self.plan.records_of_step(self.step), fault)
        self.step += 1
        self._speed.add(gradient.num_records, gradient.num_targets)
        self._write_step(gradient, norm, rates)

    def _update(self) -> None:
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaler.step(self.optimizer)
            self._scaler.update()

    def _checked_norm(self, gradient: StepGradient) -> tuple[torch.Tensor, str | None]:
        """The gradient's norm before clipping, and why it may not be applied, if so."""
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if gradient.num_targets == 0:
            self._live.say(
                f"step {self.step + 1}: none of its {gradient.num_records} records has a "
                "supervised token, so it adds nothing"
            )
        elif not self._gradients_seen and torch.isfinite(gradient.loss_sum):
            without = self._parts_without_records()
            require_gradients(self.hooks.parts, without=without)
            self._gradients_seen = not without
        norm = gradient_norm(self._parameters, self.plan.optim.max_grad_norm)
        if self._scaler is not None and torch.isfinite(gradient.loss_sum):
            return self._tolerated_overflow(norm), None
        fault = non_finite_fault(gradient, norm, self.accelerator)
        if self.plan.train.on_nonfinite_loss == "stop":
            refuse_non_finite(fault, step=self.step + 1)
        elif fault is not None:
            self._account.skip(fault, step=self.step + 1)
            self._live.say(f"step {self.step + 1}: {fault}; its update is left out")
        return norm, fault

    def _parts_without_records(self) -> frozenset[str]:
        """The projector, in a step whose records (those of all ranks) have no image."""
        has_image = getattr(self.train_data, "has_image", None)
        if has_image is None or any(has_image[i] for i in self.plan.records_of_step(self.step)):
            return frozenset()
        return frozenset({"projector"})

    def _tolerated_overflow(self, norm: torch.Tensor) -> torch.Tensor:
        """In fp16 an overflow of the scaled gradient is met by a smaller scale, down to 1."""
        assert self._scaler is not None
        if not torch.isfinite(norm):
            scale = self._scaler.get_scale()
            if scale <= 1:
                raise UserError(
                    f"step {self.step + 1}: the gradient overflows fp16 even unscaled; use bf16 "
                    "or fp32 (the weights are those before this step)",
                    code="fp16_overflow",
                )
            self._live.say(
                f"step {self.step + 1}: the fp16 gradient overflowed at loss scale {scale:g}; the "
                "update is left out and the scale made smaller"
            )
        return norm

    def _write_step(
        self, gradient: StepGradient, norm: torch.Tensor, rates: Mapping[str, float]
    ) -> None:
        last = self.step == self.plan.total_steps
        if self.step % self.plan.train.log_every_steps and not last:
            return
        row: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.plan.epoch_of_step(self.step), 6),
            "loss": gradient.loss if math.isfinite(gradient.loss) else None,
            "learning_rate": dict(rates),
            "grad_norm": float(norm) if bool(torch.isfinite(norm)) else None,
            **self._speed.read(),
            "num_targets": gradient.num_targets,
            "memory_bytes": memory_bytes(self.accelerator.device),
            "seconds": round(time.monotonic() - self._started, 3),
        }
        self._record(row)
        self._live.show(row)

    def _record(self, row: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(row)
        try:
            self.accelerator.log(tracker_values(row), step=self.step)
        except Exception as error:
            if not self._tracker_failed:
                self._live.say(
                    f"warning: step {self.step}: a tracker failed ({one_line(error)}); training "
                    "continues, and metrics.jsonl has every row"
                )
            self._tracker_failed = True

    def _evaluation_is_due(self) -> bool:
        every = self.plan.train.eval_every_steps
        last = self.step == self.plan.total_steps
        return self.eval_data is not None and (last or bool(every and self.step % every == 0))

    def _lacks_evaluation(self) -> bool:
        """Return whether a resumed run ended between a checkpoint and its evaluation."""
        if self._resumed_from is None or not self._evaluation_is_due():
            return False
        return rank0_only(
            self.accelerator, lambda: not cast(MetricsFile, self._metrics).has_evaluation(self.step)
        )

    def _evaluate_if_due(self) -> None:
        """Evaluate if this step is one for it; a failure is reported and training continues.

        Raises:
            UserError: A held-out record is wrong and is not to be left out; all is saved.
        """
        if not self._evaluation_is_due():
            return
        if self._sharded and self._saved_step < self.step:
            self._save()  # where weights are shared, a process that fails leaves the others waiting
        try:
            with eager(self.plan.train.compile):
                self._evaluate()
        except UserError:
            if self._saved_step < self.step:
                self._save()
            self._saving(self._saver.wait)
            raise
        except Exception as error:
            self._survive(error)
        finally:
            self.model.train()
            self._speed = Speed()

    def _survive(self, error: Exception) -> None:
        """Report an evaluation that failed."""
        reason = one_line(error)
        self._live.say(
            f"warning: step {self.step}: the evaluation failed ({reason}); training continues"
        )
        logger.debug("the evaluation of step %d failed", self.step, exc_info=error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self._metrics is not None:
            self._metrics.write({"step": self.step, "eval_error": reason})

    def _evaluate(self) -> None:
        assert self.eval_data is not None
        met: list[LoadError] = []
        on_error = None if self.plan.max_quarantined is None else met.append
        loss, num_targets = evaluate(
            self.model,
            self.eval_data,
            self.accelerator,
            collator=self.plan.collator,
            num_workers=self.plan.num_workers,
            on_error=on_error,
        )
        met = gather_object(met) if self.accelerator.num_processes > 1 else met
        answers = self._answers(met.append if on_error is not None else None)
        for fault in met if self.accelerator.is_main_process else []:
            self.hooks.quarantine(fault, True)
        self._record(
            {
                "step": self.step,
                "epoch": round(self.plan.epoch_of_step(self.step), 6),
                "eval_loss": loss,
                "eval_num_targets": num_targets,
            }
        )
        self._live.say(f"step {self.step}: held-out loss {loss:.4f} over {num_targets:,} tokens")
        for row in answers if self._samples is not None else []:
            cast(MetricsFile, self._samples).write({"step": self.step, **row})
            self._live.say(f"  {row['id']}: {row['question']!r} -> {row['answer']!r}")

    def _answers(self, on_error: Callable[[LoadError], None] | None) -> list[dict[str, Any]]:
        # Where the weights are shared every process has to answer, and all answer alike.
        if self.hooks.answers is None or (self._samples is None and not self._sharded):
            return []
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            return self.hooks.answers(on_error)

    def _save(self) -> None:
        """Begin to save where the run is; in the background if the plan says so."""
        position = {
            "step": self.step,
            "total_steps": self.plan.total_steps,
            "epoch": self.plan.epoch_of_step(self.step),
            "frozen": self._frozen,
            **self._account.position(),
        }
        for file in (self._metrics, self._samples, self._account.file):
            if file is not None:
                file.sync()
        self._saving(lambda: self._saver.save(position))
        self._saved_step, self._saved_at = self.step, time.monotonic()

    def _finish(self, checkpoint: Checkpoint | None) -> Outcome:
        """Prove that what was frozen stayed so, then give the last checkpoint its final name."""
        require_unchanged(self._frozen, self.hooks.frozen_digests())
        # The last checkpoint is either this process's own or the one that it came from.
        last = checkpoint or self._resumed_from
        assert last is not None and last.step == self.plan.total_steps
        final = rank0_only(self.accelerator, lambda: self.store.finish(last))
        self.accelerator.wait_for_everyone()
        return Outcome(self.step, final)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    examples: Examples,
    accelerator: Accelerator,
    *,
    collator: Collator,
    num_workers: int,
    on_error: Callable[[LoadError], None] | None = None,
) -> tuple[float, int]:
    """Mean loss (nats) of a supervised token over all `examples`, and the number of such tokens.

    Leaves the model in eval mode. 0.0 where nothing is supervised. `on_error` is told of records
    that cannot be loaded and are left out; without it they raise.

    Raises:
        Exception: What any process met, in all of them.
    """
    mine = micro_batches_of_rank(
        collator,
        examples,
        range(len(examples)),
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    model.eval()
    loss = torch.zeros((), dtype=torch.float32, device=accelerator.device)
    count = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    steps = [[micro_batch] for micro_batch in mine]
    batches = load_steps(
        examples,
        steps,
        collator=collator,
        num_workers=num_workers,
        on_error=on_error,
    )
    failure: Exception | None = None
    try:
        with accelerator.autocast():
            for (batch,) in batches:
                output = model(batch.to(accelerator.device))
                loss += output.loss_sum
                count += output.num_targets
    except Exception as error:
        failure = error
    raise_together(accelerator, failure)
    targets = int(total(accelerator, count))
    return float(total(accelerator, loss)) / max(1, targets), targets


def say_on_stderr(text: str) -> None:
    """A line for the user."""
    say(text)
