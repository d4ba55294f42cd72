"""The training loop."""

import logging
import signal
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from vlm_sft.checkpoint.format import Checkpoint
from vlm_sft.config.schema import RunConfig
from vlm_sft.data.batch import Batch
from vlm_sft.data.loader import lost_worker_errors
from vlm_sft.errors import UserError
from vlm_sft.train.metrics import RunMetrics
from vlm_sft.train.run_checkpoints import RunCheckpoints
from vlm_sft.train.run_cost import DurationNote
from vlm_sft.train.run_history import RunHistory
from vlm_sft.train.signals import SignalHandler, exit_code
from vlm_sft.train.step_loader import StepLoader
from vlm_sft.train.train_step import StepGradient, accumulate_gradient, step_seed
from vlm_sft.train.update import Update, Updater
from vlm_sft.train.validation import BestEvaluation, EvaluateSuite, MeasureText, Validation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        step: Optimizer steps done.
        checkpoint: The newest checkpoint; `final/` if the run is finished.
        stopped_by: The signal that ended the run early, or None.
    """

    step: int
    checkpoint: Checkpoint | None
    stopped_by: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """0 if the run is finished, 128 + signal number if a signal stopped it."""
        return 0 if self.stopped_by is None else exit_code(self.stopped_by)


class Trainer:
    """Trains a model that `build_trainer` has set up, restored from its newest checkpoint if any.

    All ranks have a trainer and call the same methods in the same order.

    Args:
        config: The run's configuration.
        accelerator: Device, precision and ranks.
        model: The model as the forward pass takes it (wrapped by DDP, or sharded).
        loader: Loads the micro-batches of each step.
        updater: Applies gradients to the weights.
        checkpoints: Saves the run; it knows the checkpoint that the run was resumed from.
        metrics: Files, trackers and the progress line.
        history: Where the time of the run goes.
        validation: Evaluates on the validation records, or None.
        suite: Evaluates the suite of `train.eval_suite`, or None.
        text: Measures the loss of `data.eval_text`, or None.
        total_steps: Optimizer steps of the run.

    Attributes:
        step: Optimizer steps done.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        *,
        model: nn.Module,
        loader: StepLoader,
        updater: Updater,
        checkpoints: RunCheckpoints,
        metrics: RunMetrics,
        history: RunHistory,
        validation: Validation | None,
        suite: EvaluateSuite | None,
        text: MeasureText | None,
        total_steps: int,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.model = model
        self.loader = loader
        self.updater = updater
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.history = history
        self.validation = validation
        self.suite = suite
        self.text = text
        self.best: BestEvaluation | None = None
        if config.train.keep_best is not None:
            before = metrics.evaluations(config.train.keep_best)
            self.best = BestEvaluation(config.train.keep_best, before)
        self.total_steps = total_steps
        self.step = checkpoints.saved_step
        self.signals = SignalHandler()
        self._stop_agreed = self._save_agreed = False
        self.duration = DurationNote(self.step, total_steps)

    def run(self) -> RunResult:
        """Train to the last step, or until a signal asks to stop; save, and check the result.

        Raises:
            UserError: A loss is not finite, a part gets no gradient, or a frozen part was changed.
            CheckpointError: A checkpoint cannot be written.
        """
        with self.signals, self.metrics:
            with self.history.phase("training"):
                self.train()
            if self.checkpoints.saved_step < self.step:
                self.save()
            with self.history.phase("saving"):
                checkpoint = self.checkpoints.wait()
        if self.step < self.total_steps and not self.stops_early():
            # A rank that got no signal itself stops because another one did.
            return RunResult(self.step, checkpoint, self.signals.received or signal.SIGTERM)
        if self.step < self.total_steps:
            assert self.best is not None
            logger.info(
                "step %d: %s has not improved in %d evaluations; the run ends (best at step %s: "
                "%.4f)",
                *(self.step, self.best.metric, self.best.num_since, self.best.step),
                float("nan") if self.best.value is None else self.best.value,
            )
        assert checkpoint is not None and checkpoint.step == self.step
        with self.history.phase("saving"):
            final = self.checkpoints.finish(checkpoint)
        self.accelerator.wait_for_everyone()
        return RunResult(self.step, final)

    @lost_worker_errors()
    def train(self) -> None:
        """Run the training loop.

        A step is saved before it is evaluated, so that no error of an evaluation costs training.
        """
        self.measure_text_before_training()
        if self.missed_evaluation():
            self.evaluate()
        batches = self.loader.load(self.step, self.total_steps)
        while self.step < self.total_steps and not (self.stops_early() or self.stop_requested()):
            gradient, update = self.train_step(next(batches))
            if self.should_log():
                self.metrics.log_step(self.step, self.epoch, gradient, update)
            else:
                self.metrics.show_step(self.step)
            if self.accelerator.is_main_process:
                self.duration.after_step(self.step)
            if self.should_save():
                self.save()
            if self.should_evaluate():
                self.evaluate()

    def train_step(self, batches: list[Batch]) -> tuple[StepGradient, Update]:
        """Do one optimizer step on this rank's micro-batches.

        Args:
            batches: The micro-batches; records that could not be loaded are missing from them.

        Raises:
            UserError: See `Updater.apply` and `RunLog`; the weights are those before this step.
        """
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.updater.zero_grad()
        gradient = accumulate_gradient(
            self.model,
            batches,
            self.accelerator,
            num_load_errors=self.loader.run_log.num_errors,
            # Micro-batches are dealt out to ranks in turn, so dropout draws the same bits for a
            # micro-batch whatever the number of ranks.
            seed_of=lambda i: step_seed(self.config.seed, self.step, i * world_size + rank),
        )
        self.loader.run_log.sync_errors(gradient.num_load_errors)
        self.loader.run_log.require_planned(batches, self.loader.micro_batches(self.step))
        has_image = self.loader.has_image(self.step)
        update = self.updater.apply(gradient, self.step, has_image=has_image)
        self.loader.run_log.log_step(self.step + 1, self.loader.records(self.step), update.problem)
        self.step += 1
        self.metrics.count(gradient)
        self.agree_on_requests()
        return gradient, update

    def agree_on_requests(self) -> None:
        """Agree with all ranks on whether to stop and whether to save after this step.

        Signals and timers reach ranks at different times. A rank that acted on its own would leave
        the others waiting in a collective that it never enters.
        """
        minutes = self.config.train.save_every_minutes
        overdue = minutes is not None and self.checkpoints.minutes_since_save() >= minutes
        save = self.signals.take_save_request() or (overdue and self.accelerator.is_main_process)
        stop = self.signals.received is not None or self.checkpoints.failed
        requests = torch.tensor([int(stop), int(save)], device=self.accelerator.device)
        stops, saves = self.accelerator.reduce(requests, reduction="sum").tolist()
        self._stop_agreed, self._save_agreed = stops > 0, saves > 0

    def stop_requested(self) -> bool:
        """Return whether a rank got a signal to stop, or failed to save."""
        if self.accelerator.num_processes == 1:  # nobody to agree with: stop at once
            return self._stop_agreed or self.signals.received is not None
        return self._stop_agreed

    def should_log(self) -> bool:
        """Return whether this step is logged."""
        return self.is_last_step or self.step % self.config.train.log_every_steps == 0

    def should_save(self) -> bool:
        """Return whether this step is saved."""
        every = self.config.train.save_every_steps
        return self._save_agreed or self.is_last_step or self.step % every == 0

    def should_evaluate(self) -> bool:
        """Return whether this step is evaluated; a run that was asked to stop does so at once."""
        return self.evaluation_is_due() and (self.is_last_step or not self.stop_requested())

    def evaluation_is_due(self) -> bool:
        """Return whether the configuration wants an evaluation of this step."""
        every = self.config.train.eval_every_steps
        if self.validation is None and self.suite is None and self.text is None:
            return False
        return self.is_last_step or (every is not None and self.step % every == 0)

    def missed_evaluation(self) -> bool:
        """Return whether the run was ended between saving this step and evaluating it."""
        if self.checkpoints.resumed_from is None or not self.evaluation_is_due():
            return False
        return not self.metrics.has_evaluation(self.step)

    def stops_early(self) -> bool:
        """Return whether the metric of `train.keep_best` has not improved for too long."""
        patience = self.config.train.early_stopping
        return patience is not None and self.best is not None and self.best.num_since >= patience

    @property
    def is_last_step(self) -> bool:
        """Whether all steps are done."""
        return self.step == self.total_steps

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.loader.epoch_after(self.step)

    def measure_text_before_training(self) -> None:
        """Measure the loss of `data.eval_text` with the weights that the run starts from.

        New adapters change nothing, so with LoRA this is the loss of the language model alone.
        """
        if self.text is None:
            return
        if self.step == 0:
            with self.history.phase("evaluation"):
                self.metrics.log_evaluation(0, 0.0, None, {}, self.text())
        elif not self.metrics.has_evaluation(0):
            logger.warning(
                "data.eval_text: the run is at step %d, so the loss before training cannot be "
                "measured; it can in a new output_dir",
                self.step,
            )

    def evaluate(self) -> None:
        """Compute the losses, generate samples, answer the suite, keep the best.

        A failure is logged, and training continues.

        Raises:
            UserError: A validation record cannot be loaded and `data.on_error` is `stop`; the run
                is saved before that.
        """
        with self.history.phase("evaluation"):
            self._evaluate()

    def _evaluate(self) -> None:
        unsaved = self.checkpoints.saved_step < self.step
        if unsaved and self.checkpoints.sharded:
            self.save()  # an error on one rank leaves the others waiting in a collective
        try:
            result = None if self.validation is None else self.validation.run()
            suite = {} if self.suite is None else self.suite()
            text = None if self.text is None else self.text()
            # Before the row: a resumed run takes every row's checkpoint for compared.
            loss = {} if result is None else {"eval_loss": result.loss}
            self.keep_if_best({**suite, **loss})
            self.metrics.log_evaluation(self.step, self.epoch, result, suite, text)
        except UserError:
            if self.checkpoints.saved_step < self.step:
                self.save()
            self.checkpoints.wait()
            raise
        except Exception as error:
            self.metrics.log_failed_evaluation(self.step, error)
        finally:
            self.metrics.reset_throughput()

    def keep_if_best(self, values: Mapping[str, float | None]) -> None:
        """Copy this step's checkpoint to `best/` if its metric is better than all before.

        Args:
            values: Every metric of the evaluation, the same on all ranks.

        Raises:
            CheckpointError: It cannot be saved or copied.
        """
        if self.best is None or not self.best.add(self.step, values.get(self.best.metric)):
            return
        if self.checkpoints.saved_step < self.step:
            self.save()
        kept = self.checkpoints.keep_best()
        logger.info(
            "step %d: %s is %.4f, the best so far: %s",
            *(self.step, self.best.metric, self.best.value, kept.folder),
        )

    def save(self) -> None:
        """Save the run, in a thread with `train.async_checkpointing`."""
        with self.history.phase("saving"):
            self.metrics.sync()
            self.loader.run_log.sync_file()
            self.checkpoints.save(
                {
                    "step": self.step,
                    "total_steps": self.total_steps,
                    "epoch": self.epoch,
                    **self.loader.run_log.state(),
                }
            )
        self.history.saved(self.step)
