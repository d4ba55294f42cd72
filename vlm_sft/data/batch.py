"""Examples to one right-padded batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm_sft.data.dataset import Example
from vlm_sft.utils.constants import IGNORE_INDEX


@dataclass(frozen=True)
class Tensors:
    """What holds tensors in its fields and moves with them."""

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same in page-locked memory (DataLoader calls this)."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class Batch(Tensors):
    """Records padded on the right to the longest.

    Attributes:
        record_ids: The records' ids.
        input_ids: [B, T] int64, `IMAGE_TOKEN_ID` where image features go, the pad id at the end.
        attention_mask: [B, T] bool, False on padding.
        labels: [B, T] int64, aligned with `input_ids` (unshifted), `IGNORE_INDEX` where there is
            no loss; never a label at position 0.
        pixel_values: [N, 3, H, W] uint8, all records' images in reading order; None if none.
        image_features: [N, tokens, width], kept features of the images, in place of them.
    """

    record_ids: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor | None
    image_features: Tensor | None = None

    @property
    def num_targets(self) -> int:
        """Positions that carry loss."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad the examples on the right and stack their images.

    Raises:
        ValueError: There are no examples.
    """
    if not examples:
        raise ValueError("cannot make a batch of no examples")
    ids = [example.input_ids for example in examples]
    lengths = torch.tensor([len(row) for row in ids])
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    labels = pad_sequence(
        [example.labels for example in examples], batch_first=True, padding_value=IGNORE_INDEX
    )
    images = [example.pixel_values for example in examples if len(example.pixel_values)]
    features = [e.image_features for e in examples if e.image_features is not None]
    return Batch(
        record_ids=tuple(example.record_id for example in examples),
        input_ids=input_ids,
        attention_mask=torch.arange(input_ids.shape[1]) < lengths[:, None],
        labels=labels,
        pixel_values=torch.cat(images) if images else None,
        image_features=torch.cat(features) if features else None,
    )
