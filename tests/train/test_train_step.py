"""A step's gradient depends on its records alone, not on how they were cut up."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from tests.model.tiny import sums_of
from tests.rounding import rounding
from tests.train.tiny import Records, double_model, example, in_processes, tiny_model
from vlm_sft.data.batch import PaddedCollator, pad_examples
from vlm_sft.data.dataset import Example
from vlm_sft.data.loader import load_steps, micro_batches_of_rank
from vlm_sft.errors import RecordError, UserError
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.train.distributed import make_accelerator, rank0_only
from vlm_sft.train.fsdp import shard
from vlm_sft.train.optimizer import gradient_norm
from vlm_sft.train.train_step import (
    accumulate_gradient,
    nonfinite_problem,
    raise_if_nonfinite,
    step_seed,
)
from vlm_sft.train.validation import validation_loss
from vlm_sft.utils.dtensor import full_tensor

TRAINABLE = ("projector", "language_model")


def eight_records() -> Records:
    """Unequal lengths, text-only ones among them; records 4 to 7 of 8 have no supervised token."""
    return Records(
        example(i, length=4 + 3 * (i % 5), supervised=i < 4, image=i % 3 != 2) for i in range(8)
    )


def gradients(
    accelerator: Accelerator,
    micro_batch_size: int,
    records: list[int],
    *,
    sharded: bool = False,
    reshard_after_forward: bool = True,
) -> tuple[dict[str, NDArray[np.float64]], float, int]:
    model = double_model(*TRAINABLE)
    if sharded:
        shard(model, accelerator, "fp32", reshard_after_forward=reshard_after_forward)
    wrapped = model if sharded else accelerator.prepare(model)
    collator = PaddedCollator(micro_batch_size, pad_token_id=0)
    mine = micro_batches_of_rank(
        collator,
        eight_records(),
        records,
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    (batches,) = load_steps(eight_records(), [mine], collator=collator, num_workers=0)
    found = accumulate_gradient(wrapped, batches, accelerator)
    found_by_name = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    grads = {name: full_tensor(grad).numpy() for name, grad in found_by_name.items()}
    return grads, found.loss, found.num_targets


def largest_difference(
    left: dict[str, NDArray[np.float64]], right: dict[str, NDArray[np.float64]]
) -> float:
    """Of any tensor, relative to that tensor's largest entry."""
    assert left.keys() == right.keys() and left
    return max(
        float(np.abs(left[n] - right[n]).max() / max(np.abs(left[n]).max(), 1e-300)) for n in left
    )


UNEVEN = [0, 4, 1, 5, 2]
"""In chunks of two for two processes: two each, one of them empty."""


def everything(accelerator: Accelerator) -> dict[str, Any]:
    return {
        "even": gradients(accelerator, 4, list(range(8))),
        "uneven": gradients(accelerator, 2, UNEVEN),
        "sharded": gradients(accelerator, 2, list(range(8)), sharded=True),
        "sharded, uneven": gradients(accelerator, 2, UNEVEN, sharded=True),
        "ZeRO-2": gradients(accelerator, 2, UNEVEN, sharded=True, reshard_after_forward=False),
        "held out": held_out_loss(accelerator, 2),
        "error": error_of_the_first(accelerator),
    }


def error_of_the_first(accelerator: Accelerator) -> Any:
    def fail() -> None:
        assert accelerator.is_main_process
        raise RecordError("no_answer", "why?", record_id="r1", where="a.json[3]")

    try:
        rank0_only(accelerator, fail)
    except RecordError as error:
        return error


@pytest.fixture(scope="module")
def two_processes() -> Sequence[dict[str, Any]]:
    """What each of two processes finds; started once, since starting takes longest."""
    return in_processes(2, everything)


def test_micro_batches_and_processes_do_not_change_the_gradient(
    two_processes: Sequence[dict[str, Any]],
) -> None:
    order = list(range(8))
    one, loss, num_targets = gradients(make_accelerator("fp32"), 8, order)
    # records 4 to 7 make the second micro-batch, which then has no supervised token
    halves, loss_of_halves, _ = gradients(make_accelerator("fp32"), 4, order)
    assert num_targets == 2 + 3 + 5 + 6
    assert all(grad.any() for name, grad in one.items() if "multi_modal_projector" in name)
    assert all(grad.dtype == np.float64 for grad in one.values())
    assert loss_of_halves == pytest.approx(loss, rel=1e-12)
    assert largest_difference(one, halves) <= 1e-12
    for found in two_processes:
        grads, process_loss, targets = found["even"]
        assert targets == num_targets
        assert process_loss == pytest.approx(loss, rel=1e-12)
        assert largest_difference(one, grads) <= 1e-12


@pytest.mark.parametrize(
    ("name", "order"),
    [("sharded", list(range(8))), ("sharded, uneven", UNEVEN), ("ZeRO-2", UNEVEN)],
)
def test_sharing_out_the_weights_does_not_change_the_gradient(
    two_processes: Sequence[dict[str, Any]], name: str, order: list[int]
) -> None:
    one, loss, num_targets = gradients(make_accelerator("fp32"), 8, order)
    assert all(grad.any() for name, grad in one.items() if "multi_modal_projector" in name)
    for found in two_processes:
        grads, process_loss, targets = found[name]
        assert targets == num_targets
        assert process_loss == pytest.approx(loss, rel=1e-12)
        assert largest_difference(one, grads) <= 1e-12


def test_a_float64_model_stays_in_float64_from_its_pixels_to_its_loss() -> None:
    model = double_model(*TRAINABLE)
    batch = pad_examples(eight_records()[:2], 0)
    assert batch.pixel_values is not None
    features = model.vision_tower(batch.pixel_values)
    assert (
        features.dtype
        == model.embed(batch.input_ids, model.project(features)).dtype
        == torch.float64
    )
    # An image's float32 twin differs: the tower did not pass through float32 on its way.
    assert not torch.equal(features, features.float().double())
    output = model(batch)
    assert output.loss_sum.dtype == output.per_record_loss.dtype == torch.float64


def test_an_uneven_remainder_is_shared_with_an_empty_micro_batch(
    two_processes: Sequence[dict[str, Any]],
) -> None:
    one, loss, _ = gradients(make_accelerator("fp32"), 5, UNEVEN)
    for found in two_processes:
        grads, process_loss, _ = found["uneven"]
        assert process_loss == pytest.approx(loss, rel=1e-12)
        assert largest_difference(one, grads) <= 1e-12


def test_what_the_first_process_raises_is_raised_in_all(
    two_processes: Sequence[dict[str, Any]],
) -> None:
    for found in two_processes:
        assert str(found["error"]) == "a.json[3]: record 'r1': why?"
        assert (found["error"].reason, found["error"].record_id) == ("no_answer", "r1")


class BrokenRecords(Records):
    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        if index == 2:
            raise RecordError("image_broken", "cut off", record_id="r2", where="a.json[2]")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_record_is_raised_in_its_turn_from_a_worker_too(num_workers: int) -> None:
    steps = load_steps(
        BrokenRecords(eight_records()),
        [[[0], [1]], [[2]]],
        collator=PaddedCollator(1, 0),
        num_workers=num_workers,
    )
    assert [batch.record_ids for batch in next(steps)] == [("record-0",), ("record-1",)]
    with pytest.raises(RecordError) as raised:
        next(steps)
    assert str(raised.value) == "a.json[2]: record 'r2': cut off"
    assert raised.value.reason == "image_broken"


def test_a_step_without_supervised_tokens_has_loss_and_gradient_zero() -> None:
    grads, loss, num_targets = gradients(make_accelerator("fp32"), 2, [4, 5, 6])
    assert (loss, num_targets) == (0.0, 0)
    assert all(not grad.any() for grad in grads.values())


def test_split_gives_every_process_the_same_number_of_micro_batches() -> None:
    assert micro_batches_of_rank(PaddedCollator(2, 0), None, range(5), world_size=2, rank=0) == [
        [0, 1],
        [4],
    ]
    assert micro_batches_of_rank(PaddedCollator(2, 0), None, range(5), world_size=2, rank=1) == [
        [2, 3],
        [],
    ]


def test_a_loss_that_is_not_finite_names_its_record_and_stops() -> None:
    accelerator = make_accelerator("fp32")
    model = tiny_model("projector")
    records = Records([example(1, length=6), example(2, length=6), example(3, length=6)])
    records[1].pixel_values[:] = 255

    def spoil(_tower: object, images: tuple[torch.Tensor], features: torch.Tensor) -> None:
        features[(images[0] == 255).all(dim=(1, 2, 3))] = float("nan")

    model.vision_tower.register_forward_hook(spoil)
    (batches,) = load_steps(records, [[[0, 1, 2]]], collator=PaddedCollator(8, 0), num_workers=0)
    gradient = accumulate_gradient(accelerator.prepare(model), batches, accelerator)
    norm = gradient_norm(model.multi_modal_projector.parameters(), 1.0)
    with pytest.raises(UserError, match=r"step 7: the loss is not finite \(records 'record-2'\)"):
        raise_if_nonfinite(nonfinite_problem(gradient, norm, accelerator), step=7)


def test_dropout_repeats_itself_for_a_step_and_differs_between_steps() -> None:
    assert step_seed(42, 3, 0) == step_seed(42, 3, 0)
    assert len({step_seed(42, step, micro) for step in range(50) for micro in range(4)}) == 200


def held_out_loss(accelerator: Accelerator, micro_batch_size: int) -> Any:
    model = tiny_model(*TRAINABLE).to(accelerator.device)
    records = Records(example(i, length=5 + i) for i in range(5))
    return validation_loss(
        model,
        records,
        accelerator,
        collator=PaddedCollator(micro_batch_size, pad_token_id=0),
        num_workers=0,
    )


def test_the_held_out_loss_is_a_mean_over_tokens_however_it_is_cut_up(
    two_processes: Sequence[dict[str, Any]],
) -> None:
    loss, count = held_out_loss(make_accelerator("fp32"), 1)
    bound = rounding(sums_of(tiny_model()))
    assert count == 2 + 3 + 3 + 4 + 4
    assert held_out_loss(make_accelerator("fp32"), 5)[0] == pytest.approx(loss, rel=bound)
    for found in two_processes:
        shared, shared_count = found["held out"]
        assert shared_count == count
        assert shared == pytest.approx(loss, rel=bound)


def test_frozen_parts_get_no_gradient() -> None:
    accelerator = make_accelerator("fp32")
    model = tiny_model("projector")
    (batches,) = load_steps(
        eight_records(), [[[0, 1]]], collator=PaddedCollator(8, 0), num_workers=0
    )
    accumulate_gradient(accelerator.prepare(model), batches, accelerator)
    for part, named in parameters_by_part(model).items():
        assert all((p.grad is not None) == (part == "projector") for _, p in named)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_no_room_on_the_gpu_is_told_with_the_records(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    accelerator = make_accelerator("fp32")
    batch = pad_examples(eight_records()[:2], 0)
    model = tiny_model(*TRAINABLE)
    monkeypatch.setattr(
        *((model, "forward") if phase == "forward" else (accelerator, "backward")), no_room
    )
    with pytest.raises(UserError, match=r"records 'record-0', 'record-1'") as caught:
        accumulate_gradient(model, [batch], accelerator)
    assert caught.value.reason == "out_of_memory"
    assert "2 records, 11 tokens long, and 2 images" in str(caught.value)
