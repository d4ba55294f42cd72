"""Training with each connector: packed as padded as one by one, sharded as replicated."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.train.test_train_step import largest_difference
from tests.train.tiny import double_model, in_processes
from vlm_sft.data.batch import Collator, PackedCollator, PaddedCollator
from vlm_sft.data.dataset import Example
from vlm_sft.data.loader import load_steps, micro_batches_of_rank
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.packed_attention import install_packed_attention
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.fsdp import shard
from vlm_sft.train.train_step import accumulate_gradient
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from vlm_sft.utils.dtensor import full_tensor

CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp2x_gelu": {},
    "pixel_shuffle_mlp": {},
    "resampler": {"num_queries": 9},
}
TOKENS = {"linear": 4, "mlp2x_gelu": 4, "pixel_shuffle_mlp": 1, "resampler": 9}
"""Image tokens of a tower of 2 x 2 patches."""


class Conversations(list[Example]):
    """Records of which three are about the same image; one has two images and one has none."""

    def __init__(self, tokens: int) -> None:
        super().__init__(
            self._record(number, images, tokens)
            for number, images in enumerate([(0,), (0,), (1,), (), (2, 1), (0,)])
        )
        self.prefix_lengths = [1 + tokens if len(e.pixel_values) else 0 for e in self]

    def _record(self, number: int, images: tuple[int, ...], tokens: int) -> Example:
        generator = torch.Generator().manual_seed(number)
        text = torch.randint(1, 40, (5 + 2 * number,), generator=generator).tolist()
        ids = [7, *([IMAGE_TOKEN_ID] * tokens * len(images)), *text]
        labels = [IGNORE_INDEX] * (len(ids) - 3) + ids[-3:]
        pixels = torch.stack(
            [
                torch.randint(
                    0, 256, (3, 8, 8), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
                )
                for i in images
            ]
            or [torch.empty(3, 8, 8, dtype=torch.uint8)]
        )[: len(images)]
        return Example(f"record-{number}", torch.tensor(ids), torch.tensor(labels), pixels)

    @property
    def record_ids(self) -> list[str]:
        return [e.record_id for e in self]

    @property
    def lengths(self) -> list[int]:
        return [len(e.input_ids) for e in self]

    @property
    def num_images(self) -> list[int]:
        return [len(e.pixel_values) for e in self]

    @property
    def num_crops(self) -> list[int]:
        return self.num_images

    @property
    def prefix_crops(self) -> list[int]:
        return [int(length > 0) for length in self.prefix_lengths]

    @property
    def prefix_ids(self) -> list[int]:
        return [int(e.pixel_values[0].sum()) if len(e.pixel_values) else -1 for e in self]

    def example(self, index: int, *, first_image: int = 0) -> Example:
        found = self[index]
        pixels = found.pixel_values[first_image:]
        return Example(found.record_id, found.input_ids, found.labels, pixels)


def model_with(projector_type: str, *trainable: str) -> VisionLanguageModel:
    changes = {"projector_type": projector_type, **CONNECTORS[projector_type]}
    return double_model(*trainable, **changes)


def gradients(
    accelerator: Accelerator, projector_type: str, collator: Collator, *, sharded: bool = False
) -> tuple[dict[str, Any], float]:
    """Return the gradient of one step of all records, by parameter, and its loss."""
    model = model_with(projector_type, "projector", "language_model")
    records = Conversations(TOKENS[projector_type])
    install_packed_attention(causal_lm(model.language_model))
    if sharded:
        shard(model, accelerator, "fp32")
    wrapped = model if sharded else accelerator.prepare(model)
    mine = micro_batches_of_rank(
        collator,
        records,
        range(len(records)),
        world_size=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    (batches,) = load_steps(records, [mine], collator=collator, num_workers=0)
    loss = accumulate_gradient(wrapped, batches, accelerator).loss
    named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    return {name: full_tensor(grad).numpy() for name, grad in named}, loss


def packed(max_tokens: int, *, share: bool) -> PackedCollator:
    return PackedCollator(max_tokens, share, 1, image_cost=0.0, pad_token_id=0)


@pytest.mark.parametrize("projector_type", CONNECTORS)
def test_packed_is_padded_is_one_by_one(projector_type: str) -> None:
    expected, loss = gradients(make_accelerator("fp32"), projector_type, PaddedCollator(1, 0))
    ways = [PaddedCollator(6, 0), packed(400, share=False), packed(400, share=True)]
    for collator in ways:
        found, same_loss = gradients(make_accelerator("fp32"), projector_type, collator)
        assert same_loss == pytest.approx(loss, rel=1e-12)
        assert largest_difference(expected, found) <= 1e-10
    assert any(grad.any() for name, grad in expected.items() if "multi_modal_projector" in name)


@pytest.mark.parametrize("projector_type", CONNECTORS)
def test_stage_1_trains_the_whole_connector_and_nothing_else(projector_type: str) -> None:
    model = model_with(projector_type, "projector")
    records = Conversations(TOKENS[projector_type])
    mine = [[list(range(len(records)))]]
    (batches,) = load_steps(records, mine, collator=PaddedCollator(6, 0), num_workers=0)
    accumulate_gradient(model, batches, make_accelerator("fp32"))
    for part, named in parameters_by_part(model).items():
        for name, parameter in named:
            assert parameter.requires_grad == (part == "projector"), name
            if part == "projector":
                assert parameter.grad is not None and parameter.grad.any(), name


def everything(accelerator: Accelerator) -> dict[str, dict[str, Any]]:
    return {
        kind: gradients(accelerator, kind, packed(64, share=True), sharded=True)[0]
        for kind in CONNECTORS
    }


def test_sharded_weights_have_the_gradient_of_whole_ones() -> None:
    for ranks in in_processes(2, everything):
        for projector_type, found in ranks.items():
            expected, _ = gradients(
                make_accelerator("fp32"), projector_type, packed(400, share=True)
            )
            assert largest_difference(expected, found) <= 1e-10, projector_type
