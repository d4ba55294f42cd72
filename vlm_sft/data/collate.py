"""Examples to one right-padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm_sft.constants import IGNORE_INDEX
from vlm_sft.data.dataset import Example


@dataclass(frozen=True)
class Batch:
    """Records padded on the right to the longest.

    Attributes:
        record_ids: The records' ids.
        input_ids: [B, T] int64, `IMAGE_TOKEN_ID` where image features go, the pad id at the end.
        attention_mask: [B, T] bool, False on padding.
        labels: [B, T] int64, aligned with `input_ids` (unshifted), `IGNORE_INDEX` where there is
            no loss; never a label at position 0.
        pixel_values: [N, 3, H, W] uint8, all records' pictures in reading order; None if none.
    """

    record_ids: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    pixel_values: Tensor | None

    @property
    def num_targets(self) -> int:
        """Positions that carry loss."""
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        pixels = self.pixel_values
        return Batch(
            self.record_ids,
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            None if pixels is None else pixels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (DataLoader calls this)."""
        pixels = self.pixel_values
        return Batch(
            self.record_ids,
            self.input_ids.pin_memory(),
            self.attention_mask.pin_memory(),
            self.labels.pin_memory(),
            None if pixels is None else pixels.pin_memory(),
        )


def collate(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Pad the examples on the right and stack their pictures.

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
    pictures = [example.pixel_values for example in examples if len(example.pixel_values)]
    return Batch(
        record_ids=tuple(example.record_id for example in examples),
        input_ids=input_ids,
        attention_mask=torch.arange(input_ids.shape[1]) < lengths[:, None],
        labels=labels,
        pixel_values=torch.cat(pictures) if pictures else None,
    )
