"""The gradient of one optimizer step: all token losses of the step over all of its targets."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from vlm_sft.data.batch import Batch
from vlm_sft.errors import UserError
from vlm_sft.model.vlm import VlmOutput
from vlm_sft.train.distributed import all_reduce_sum


@dataclass(frozen=True)
class StepGradient:
    """Result of the backward passes of a step; the gradients are in the parameters' `.grad`.

    Attributes:
        loss_sum: Summed cross-entropy over all targets of the step, on all ranks (scalar tensor).
        num_targets: Targets of the step, on all ranks.
        num_records: Records of the step, on all ranks.
        record_losses: This rank's records with their summed losses, for error messages.
        num_load_errors: Records of the step that could not be loaded, on all ranks.
    """

    loss_sum: torch.Tensor
    num_targets: int
    num_records: int
    record_losses: tuple[tuple[str, torch.Tensor], ...]
    num_load_errors: int

    @property
    def loss(self) -> float:
        """Mean loss per target in nats; 0 for a step without targets."""
        return float(self.loss_sum) / max(1, self.num_targets)


def accumulate_gradient(
    model: nn.Module,
    batches: Sequence[Batch],
    accelerator: Accelerator,
    *,
    num_load_errors: int = 0,
    seed_of: Callable[[int], int] | None = None,
) -> StepGradient:
    """Run forward and backward of all micro-batches of a step.

    The loss is `sum of all token losses / number of targets` over every micro-batch of every rank,
    so its gradient depends neither on the micro-batch size nor on the number of ranks. A batch
    without targets adds exactly 0.

    Args:
        model: `VisionLanguageModel`, prepared by `accelerator`.
        batches: This rank's micro-batches, as many as every other rank has.
        accelerator: Device, precision and ranks.
        num_load_errors: Records of the step that this rank could not load.
        seed_of: Seed of the random generators (dropout) for micro-batch `i` of this rank.
    """
    mine = [sum(b.num_targets for b in batches), sum(len(b.record_ids) for b in batches)]
    counts = torch.tensor([*mine, num_load_errors], device=accelerator.device)
    num_targets, num_records, num_errors = (int(n) for n in all_reduce_sum(accelerator, counts))
    # DDP and FSDP average gradients over ranks; multiply to get the sum.
    scale = accelerator.num_processes / max(1, num_targets)
    loss_sums: list[torch.Tensor] = []
    record_losses: list[tuple[str, torch.Tensor]] = []
    for number, batch in enumerate(batches):
        if seed_of is not None:
            torch.manual_seed(seed_of(number))
        last = number == len(batches) - 1
        # Ranks reduce their gradients in the backward pass of the last micro-batch only.
        with nullcontext() if last else accelerator.no_sync(model):
            with accelerator.autocast(), explain_out_of_memory(batch):
                output: VlmOutput = model(batch.to(accelerator.device))
            with explain_out_of_memory(batch):
                accelerator.backward(output.loss_sum * scale)
        loss_sums.append(output.loss_sum.detach())
        record_losses += zip(batch.record_ids, output.per_record_loss.detach(), strict=True)
    summed = torch.stack(loss_sums).sum()
    return StepGradient(
        loss_sum=all_reduce_sum(accelerator, summed),
        num_targets=num_targets,
        num_records=num_records,
        record_losses=tuple(record_losses),
        num_load_errors=num_errors,
    )


@contextmanager
def explain_out_of_memory(batch: Batch) -> Iterator[None]:
    """Context manager that adds the micro-batch to an out-of-memory error; none is ever skipped.

    Raises:
        UserError: In place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        rows, tokens = len(batch.record_ids), batch.input_ids.shape[1]
        named = ", ".join(repr(name) for name in batch.record_ids[:8])
        raise UserError(
            f"the GPU is out of memory for a micro-batch of {rows} records, {tokens} tokens long, "
            f"and {batch.num_images} images (records {named}); lower train.micro_batch_size (or "
            "train.packing.max_tokens) or data.max_length, or set "
            "train.activation_checkpointing: full",
            code="out_of_memory",
        ) from None


def step_seed(seed: int, step: int, micro_batch: int) -> int:
    """Return the seed of the random generators for one micro-batch of one step."""
    digest = hashlib.sha256(f"{seed}/{step}/{micro_batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def nonfinite_problem(
    gradient: StepGradient, norm: torch.Tensor, accelerator: Accelerator
) -> str | None:
    """Return what is not finite in a step, the loss or the gradient norm; None if both are finite.

    The text is the same on every rank. It names the records whose loss is not finite, or, if there
    are none, all records of the step.
    """
    loss_is_finite = bool(torch.isfinite(gradient.loss_sum))
    if loss_is_finite and bool(torch.isfinite(norm)):
        return None
    bad = [name for name, loss in gradient.record_losses if not bool(torch.isfinite(loss))]
    everyone = [name for name, _ in gradient.record_losses]
    pairs = gather_object([(bad, everyone)]) if accelerator.num_processes > 1 else [(bad, everyone)]
    blamed = [name for pair in pairs for name in pair[0]]
    suspects = blamed or [name for pair in pairs for name in pair[1]]
    what = f"the gradient norm is {float(norm)}" if loss_is_finite else "the loss is not finite"
    shown = ", ".join(repr(name) for name in suspects[:8])
    more = f" and {len(suspects) - 8} more" if len(suspects) > 8 else ""
    return f"{what} (records {shown}{more})"


def raise_if_nonfinite(problem: str | None, *, step: int) -> None:
    """Stop before the optimizer step if `nonfinite_problem` found something.

    Raises:
        UserError: If `problem` is not None.
    """
    if problem is not None:
        raise UserError(
            f"step {step}: {problem}; the weights are those before this step - look at these "
            "records with vlm_sft.show, lower the learning rate, or use precision bf16 or fp32",
            code="not_finite",
        )
