"""Examples to batches: one `Batch` type, filled by a padded and by a packed collator."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm_sft.data.dataset import Example
from vlm_sft.data.image_layout import ImageLayout
from vlm_sft.data.packing import RecordLengths, pack_items, pack_records
from vlm_sft.errors import RecordError
from vlm_sft.utils.constants import IGNORE_INDEX, Segment


@dataclass(frozen=True)
class LoadError:
    """A record that could not be loaded during a run and was skipped.

    Attributes:
        index: Index of the record in the dataset.
        reason: Name of the error in `errors.codes`, as it appears in the ledger.
        message: Sentence for the user; it names the record and its file.
    """

    index: int
    reason: str
    message: str

    @classmethod
    def of(cls, index: int, error: RecordError) -> "LoadError":
        """Return the error of the record with this index as a plain value."""
        return cls(index, error.reason, str(error))


@dataclass(frozen=True)
class Batch:
    """One micro-batch: what `VisionLanguageModel.forward` takes.

    Either every row is one record, padded on the right, or the batch is a single packed row of
    concatenated records (`segments` is set). Both list their targets, the tokens that carry loss,
    explicitly: hidden state `target_positions[i]` predicts token `target_ids[i]`.

    Attributes:
        record_ids: Ids of the records, in order.
        input_ids: `[B, T]` int64; `IMAGE_TOKEN_ID` once for each image token.
        attention_mask: `[B, T]` bool, false on padding; None if there is no padding.
        segments: Segments of the packed row, padding included; None for padded rows.
        target_positions: `[num_targets]` int64, positions in the flattened `[B * T]` batch of the
            hidden states that predict the targets.
        target_ids: `[num_targets]` int64, the tokens to predict.
        target_records: `[num_targets]` int64, index in `record_ids` of each target's record.
        unique_target_positions: `target_positions` without duplicates, sorted. Only packed rows
            have duplicates: the last token of a shared prefix predicts one token in each branch.
        pixel_values: `[N, 3, H, W]` uint8, the crops of all images in the order of their
            placeholders; None if there are none.
        image_features: `[N, tower tokens, width]`, cached features of the crops, used instead of
            `pixel_values`.
        layouts: The layout of each image; None: every image is one crop.
        load_errors: Records that should be in this batch but could not be loaded.
    """

    record_ids: tuple[str, ...]
    input_ids: Tensor
    attention_mask: Tensor | None
    segments: tuple[Segment, ...] | None
    target_positions: Tensor
    target_ids: Tensor
    target_records: Tensor
    unique_target_positions: Tensor
    pixel_values: Tensor | None = None
    image_features: Tensor | None = None
    layouts: tuple[ImageLayout, ...] | None = None
    load_errors: tuple[LoadError, ...] = ()

    @property
    def num_targets(self) -> int:
        """Number of tokens that carry loss."""
        return len(self.target_ids)

    @property
    def num_crops(self) -> int:
        """Number of crops of all images, given as pixels or as cached features."""
        crops = self.pixel_values if self.image_features is None else self.image_features
        return 0 if crops is None else len(crops)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self.num_crops if self.layouts is None else len(self.layouts)

    def labels(self) -> Tensor:
        """Return `[B, T]` unshifted labels of padded rows, as models of transformers take them.

        Raises:
            ValueError: If the batch is packed: a token of a shared prefix has several labels.
        """
        if self.segments is not None:
            raise ValueError("a packed batch has no labels: a position can have several targets")
        labels = torch.full_like(self.input_ids, IGNORE_INDEX)
        labels.view(-1)[self.target_positions + 1] = self.target_ids
        return labels

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on another device; copies from pinned memory are asynchronous."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory (called by DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {
            field.name: function(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)


class Collator(Protocol):
    """Assigns the records of a step to micro-batches and makes a `Batch` of each (`collate_fn`)."""

    @property
    def share_image_prefix(self) -> bool:
        """True if neighboring records of one image share its tokens in the batch."""
        ...

    def assign_to_ranks(
        self, records: RecordLengths, indices: Sequence[int], world_size: int
    ) -> list[list[int]]:
        """Split the records of a step into micro-batches; number `j` is for rank `j % world_size`.

        The number of micro-batches is a multiple of `world_size`, so that every rank runs equally
        many; where records run out, the last ones are empty.
        """
        ...

    def num_tokens(self, records: RecordLengths, indices: Sequence[int]) -> int:
        """Return how many positions a micro-batch has in the model, padding included."""
        ...

    def __call__(self, examples: Sequence[Example], /) -> Batch:
        """Return the batch of these examples; without any it is one of zero loss."""
        ...


@dataclass(frozen=True)
class PaddedCollator:
    """Makes batches of `micro_batch_size` records, padded on the right to the longest."""

    micro_batch_size: int
    pad_token_id: int

    @property
    def share_image_prefix(self) -> bool:
        """Always false: every record has a row of its own."""
        return False

    def assign_to_ranks(
        self, records: RecordLengths | None, indices: Sequence[int], world_size: int
    ) -> list[list[int]]:
        """Cut the records into chunks in their order; see `Collator`."""
        size = self.micro_batch_size
        chunks = [list(indices[start : start + size]) for start in range(0, len(indices), size)]
        return chunks + [[] for _ in range(-len(chunks) % world_size)]

    def num_tokens(self, records: RecordLengths, indices: Sequence[int]) -> int:
        """Return rows times the longest record."""
        return len(indices) * max((records.lengths[index] for index in indices), default=0)

    def __call__(self, examples: Sequence[Example], /) -> Batch:
        """Pad the examples; see `pad_examples`."""
        if not examples:
            return empty_batch(self.pad_token_id)
        return pad_examples(examples, self.pad_token_id)


def pad_examples(examples: Sequence[Example], pad_token_id: int) -> Batch:
    """Return a batch of one row per example, padded on the right to the longest.

    Raises:
        ValueError: If there are no examples.
    """
    if not examples:
        raise ValueError("cannot make a batch of no examples")
    ids = [example.input_ids for example in examples]
    lengths = torch.tensor([len(row) for row in ids])
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    labels = pad_sequence(
        [example.labels for example in examples], batch_first=True, padding_value=IGNORE_INDEX
    )
    positions, targets, rows = targets_of(labels)
    return Batch(
        record_ids=tuple(example.record_id for example in examples),
        input_ids=input_ids,
        attention_mask=torch.arange(input_ids.shape[1]) < lengths[:, None],
        segments=None,
        target_positions=positions,
        target_ids=targets,
        target_records=rows,
        unique_target_positions=positions,
        pixel_values=_concatenated_pixels(examples),
        image_features=_concatenated_features(examples),
        layouts=_concatenated_layouts(examples),
    )


def targets_of(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return target positions, target ids and target rows of padded labels.

    Args:
        labels: `[B, T]` int64, aligned with the input ids (not shifted); `IGNORE_INDEX` where
            there is no loss. A label at position 0 has no hidden state that predicts it.

    Returns:
        Three `[num_targets]` int64 tensors; see `Batch`.
    """
    # The state at position t predicts the token at t + 1.
    shifted = labels[:, 1:]
    rows, columns = (shifted != IGNORE_INDEX).nonzero(as_tuple=True)
    return rows * labels.shape[1] + columns, shifted[rows, columns], rows


@dataclass(frozen=True)
class PackedCollator:
    """Makes batches of one row that concatenates records, at most `max_tokens` long.

    Attributes:
        max_tokens: Capacity of a row in tokens.
        share_image_prefix: Records of one image share the tokens up to and including the image.
        round_to: Rows are padded to a multiple of this many tokens.
        image_cost: Cost of encoding a crop of an image, in tokens through the language model.
        pad_token_id: Id of the padding.
    """

    max_tokens: int
    share_image_prefix: bool
    round_to: int
    image_cost: float
    pad_token_id: int

    def assign_to_ranks(
        self, records: RecordLengths, indices: Sequence[int], world_size: int
    ) -> list[list[int]]:
        """Pack the records into rows of about equal cost; see `Collator` and `pack_records`."""
        return pack_records(
            indices,
            records,
            max_tokens=self.max_tokens,
            share_image_prefix=self.share_image_prefix,
            world_size=world_size,
            image_cost=self.image_cost,
        )

    def num_tokens(self, records: RecordLengths, indices: Sequence[int]) -> int:
        """Return the length of the row, shared prefixes counted once, padding included."""
        items = pack_items(
            indices, records, self.max_tokens, share_image_prefix=self.share_image_prefix
        )
        tokens = sum(item.tokens for item in items)
        return tokens + -tokens % self.round_to

    def __call__(self, examples: Sequence[Example], /) -> Batch:
        """Concatenate the examples in one row; see `pack_examples`."""
        if not examples:
            return empty_batch(self.pad_token_id)
        return pack_examples(examples, self.pad_token_id, self.round_to)


def pack_examples(examples: Sequence[Example], pad_token_id: int, round_to: int = 1) -> Batch:
    """Concatenate examples in one row and pad it to a multiple of `round_to` tokens.

    An example of its own is one segment. Examples that share a prefix (all but the first have a
    `shared_prefix_length`) become a tree: the prefix is a segment, and the rest of each example is
    a segment that continues it. No hidden state of one record predicts a token of another.

    Raises:
        ValueError: If there are no examples, or those of a group do not share the prefix they are
            said to share.
    """
    if not examples:
        raise ValueError("cannot pack a row of no examples")
    ids: list[Tensor] = []
    segments: list[Segment] = []
    positions, targets, records = [], [], []
    length = number = 0

    def append(tokens: Tensor, parent: int) -> None:
        nonlocal length
        ids.append(tokens)
        segments.append((len(tokens), parent))
        length += len(tokens)

    for group in _prefix_groups(examples):
        shared = group[-1].shared_prefix_length
        parent, prefix_end = -1, -1
        if shared:
            _require_shared_prefix(group, shared)
            parent, prefix_end = len(segments), length + shared - 1
            append(group[0].input_ids[:shared], -1)
        for example in group:
            labels = example.labels[shared:]
            offsets = (labels != IGNORE_INDEX).nonzero().flatten()
            # A token is predicted by the state before it, which for the first token of a branch
            # is the end of its prefix: in the row, another branch may lie between the two.
            sources = offsets + (length - 1)
            if len(offsets) and int(offsets[0]) == 0:
                if not shared:
                    raise ValueError(
                        f"{example.record_id}: its first token has a label that no state predicts"
                    )
                sources[0] = prefix_end
            append(example.input_ids[shared:], parent)
            positions.append(sources)
            targets.append(labels[offsets])
            records.append(torch.full_like(offsets, number))
            number += 1

    padding = -length % round_to
    attention_mask = None
    if padding:
        attention_mask = (torch.arange(length + padding) < length).unsqueeze(0)
        append(torch.full((padding,), pad_token_id), -1)
    return Batch(
        record_ids=tuple(example.record_id for example in examples),
        input_ids=torch.cat(ids).unsqueeze(0),
        attention_mask=attention_mask,
        segments=tuple(segments),
        target_positions=torch.cat(positions),
        target_ids=torch.cat(targets),
        target_records=torch.cat(records),
        unique_target_positions=torch.unique(torch.cat(positions)),
        pixel_values=_concatenated_pixels(examples),
        image_features=_concatenated_features(examples),
        layouts=_concatenated_layouts(examples),
    )


def _prefix_groups(examples: Sequence[Example]) -> list[list[Example]]:
    """Return the examples in groups that share a prefix; most groups have one member."""
    groups: list[list[Example]] = []
    for example in examples:
        if example.shared_prefix_length and groups:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups


def _require_shared_prefix(group: Sequence[Example], shared: int) -> None:
    prefix = group[0].input_ids[:shared]
    for example in group:
        if not torch.equal(example.input_ids[:shared], prefix):
            raise ValueError(f"{example.record_id} does not begin like the rest of its group")
        if bool((example.labels[:shared] != IGNORE_INDEX).any()):
            raise ValueError(f"{example.record_id} has a label in the prefix that its group shares")


def empty_batch(pad_token_id: int) -> Batch:
    """Return a batch of no record and no target: its loss and its gradient are exactly zero."""
    ids = torch.full((1, 2), pad_token_id)
    none = torch.empty(0, dtype=torch.int64)
    return Batch(
        record_ids=(),
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        segments=None,
        target_positions=none,
        target_ids=none,
        target_records=none,
        unique_target_positions=none,
    )


def _concatenated_pixels(examples: Sequence[Example]) -> Tensor | None:
    images = [example.pixel_values for example in examples if len(example.pixel_values)]
    return torch.cat(images) if images else None


def _concatenated_features(examples: Sequence[Example]) -> Tensor | None:
    features = [e.image_features for e in examples if e.image_features is not None]
    return torch.cat(features) if features else None


def _concatenated_layouts(examples: Sequence[Example]) -> tuple[ImageLayout, ...] | None:
    """Return the layouts of all images; None if the examples give none."""
    found = [e.layouts for e in examples]
    if all(layouts is None for layouts in found):
        return None
    assert None not in found, "either all examples have layouts, or none"
    return tuple(itertools.chain.from_iterable(layouts for layouts in found if layouts))
