"""The optimizer update of a step: checks, clipping, learning rates, and the step itself."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator

from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import UserError
from vlm_sft.train.optimizer import (
    NamedParameters,
    gradient_norm,
    lr_multiplier,
    set_learning_rates,
)
from vlm_sft.train.preflight import require_gradients
from vlm_sft.train.train_step import StepGradient, nonfinite_problem, raise_if_nonfinite

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """The result of an optimizer step.

    Attributes:
        gradient_norm: Global norm of the gradient before clipping (scalar tensor).
        learning_rates: Learning rate of each part.
        problem: Why the update was skipped (a loss or gradient that is not finite), or None. An
            overflow of fp16 is no problem: the loss scaler skips the step and lowers its scale.
    """

    gradient_norm: torch.Tensor
    learning_rates: dict[str, float]
    problem: str | None


class Updater:
    """Applies the gradient of each step to the weights.

    Args:
        optimizer: As `build_optimizer` makes it.
        parts: The model's parameters by part.
        config: Clipping, schedule, and what to do about losses that are not finite.
        accelerator: Ranks and, with fp16, the loss scaler.
        total_steps: Optimizer steps of the run.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[str, NamedParameters],
        config: RunConfig,
        accelerator: Accelerator,
        *,
        total_steps: int,
    ) -> None:
        self._optimizer = optimizer
        self._parts = parts
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._config = config
        self._accelerator = accelerator
        self._scaler = cast("torch.amp.GradScaler | None", accelerator.scaler)
        self._total_steps = total_steps
        self._gradients_seen = False

    def zero_grad(self) -> None:
        """Free the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def apply(self, gradient: StepGradient, step: int, *, has_image: bool) -> Update:
        """Clip the gradient, set the learning rates and update the weights.

        Args:
            gradient: What the backward passes of all micro-batches found.
            step: The step, counted from 0.
            has_image: Whether a record of the step, on any rank, has an image.

        Raises:
            UserError: A trainable part has no gradient; or the loss or the gradient is not finite
                and `train.on_nonfinite_loss` is `stop`. The weights are not changed.
        """
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        self._check_gradients(gradient, step, has_image=has_image)
        norm = gradient_norm(self._parameters, self._config.optim.max_grad_norm)
        problem = self._problem(gradient, norm, step)
        multiplier = lr_multiplier(step, total_steps=self._total_steps, config=self._config.optim)
        learning_rates = set_learning_rates(self._optimizer, multiplier)
        if problem is None:
            if self._scaler is None:
                self._optimizer.step()
            else:
                self._scaler.step(self._optimizer)  # skips the step if a gradient overflowed
                self._scaler.update()
        return Update(norm, learning_rates, problem)

    def _check_gradients(self, gradient: StepGradient, step: int, *, has_image: bool) -> None:
        if gradient.num_targets == 0:
            logger.info(
                "step %d: none of its %d records has a supervised token, so its gradient is zero",
                step + 1,
                gradient.num_records,
            )
        elif not self._gradients_seen and torch.isfinite(gradient.loss_sum):
            # A step without images gives the projector a gradient of exactly zero.
            without = frozenset() if has_image else frozenset({"projector"})
            require_gradients(self._parts, without=without)
            self._gradients_seen = has_image

    def _problem(self, gradient: StepGradient, norm: torch.Tensor, step: int) -> str | None:
        """Return what is not finite; raise it if the configuration says stop."""
        if self._scaler is not None and torch.isfinite(gradient.loss_sum):
            if not torch.isfinite(norm):
                self._report_overflow(self._scaler.get_scale(), step)
            return None
        problem = nonfinite_problem(gradient, norm, self._accelerator)
        if self._config.train.on_nonfinite_loss == "stop":
            raise_if_nonfinite(problem, step=step + 1)
        return problem

    def _report_overflow(self, scale: float, step: int) -> None:
        """Report that the scaler skips this step, or stop if its scale cannot be lowered further.

        Raises:
            UserError: The gradient overflows fp16 at scale 1.
        """
        if scale <= 1:
            raise UserError(
                f"step {step + 1}: the gradient overflows fp16 even unscaled; use bf16 or fp32 "
                "(the weights are those before this step)",
                code="fp16_overflow",
            )
        logger.info(
            "step %d: the fp16 gradient overflowed at loss scale %g; the update is skipped and the "
            "scale lowered",
            step + 1,
            scale,
        )
