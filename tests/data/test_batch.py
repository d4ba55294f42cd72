"""Examples become one batch type: padded rows, or one packed row with the same targets."""

from dataclasses import replace

import pytest
import torch

from vlm_sft.data.batch import (
    Batch,
    PackedCollator,
    PaddedCollator,
    pack_examples,
    pad_examples,
)
from vlm_sft.data.dataset import Example
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID


def example(name: str, ids: list[int], labels: list[int], images: int = 0) -> Example:
    pixels = torch.full((images, 3, 2, 2), float(sum(map(ord, name))))
    return Example(name, torch.tensor(ids), torch.tensor(labels), pixels)


SHOWN = example("shown", [1, IMAGE_TOKEN_ID, 5, 6], [-100, -100, 5, 6], images=2)
PLAIN = example("plain", [1, 7], [-100, 7])


def test_records_are_padded_on_the_right_without_attention_or_loss():
    batch = pad_examples([PLAIN, SHOWN], pad_token_id=0)
    assert batch.record_ids == ("plain", "shown")
    assert batch.input_ids.tolist() == [[1, 7, 0, 0], [1, IMAGE_TOKEN_ID, 5, 6]]
    assert batch.labels().tolist() == [[-100, 7, -100, -100], [-100, -100, 5, 6]]
    assert batch.attention_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.attention_mask.dtype == torch.bool
    assert batch.num_targets == 3


def test_a_pad_token_that_is_also_the_end_token_keeps_its_label_where_it_ends_an_answer():
    batch = pad_examples([example("a", [1, 2], [-100, 2]), SHOWN], pad_token_id=2)
    assert batch.labels()[0].tolist() == [-100, 2, -100, -100]
    assert batch.attention_mask[0].tolist() == [True, True, False, False]


def test_images_of_all_records_are_stacked_in_order_and_none_is_none():
    other = example("other", [IMAGE_TOKEN_ID, 3], [-100, 3], images=1)
    batch = pad_examples([SHOWN, PLAIN, other], pad_token_id=0)
    assert batch.pixel_values is not None
    assert torch.equal(batch.pixel_values, torch.cat([SHOWN.pixel_values, other.pixel_values]))
    assert pad_examples([PLAIN], pad_token_id=0).pixel_values is None


def test_kept_features_are_stacked_in_place_of_images_and_move_with_their_batch():
    def kept(name, count):
        plain = example(name, [IMAGE_TOKEN_ID] * count + [3], [-100] * count + [3])
        features = torch.arange(count * 4.0).view(count, 1, 4) if count else None
        return replace(plain, image_features=features)

    one, none, two = kept("one", 1), kept("none", 0), kept("two", 2)
    batch = pad_examples([one, none, two], pad_token_id=0)
    assert batch.pixel_values is None
    assert torch.equal(batch.image_features, torch.cat([one.image_features, two.image_features]))
    assert batch.to("meta").image_features.device.type == "meta"
    assert pad_examples([none], pad_token_id=0).image_features is None


def test_targets_are_counted_as_the_shifted_loss_sees_them():
    first = example("first", [4, 5], [4, 5])
    assert pad_examples([first], pad_token_id=0).num_targets == 1
    none = example("none", [4, 5], [IGNORE_INDEX] * 2)
    assert pad_examples([none], pad_token_id=0).num_targets == 0


def test_a_batch_moves_whole():
    batch = pad_examples([PLAIN, SHOWN], pad_token_id=0).to("meta")
    assert batch.record_ids == ("plain", "shown")
    assert batch.pixel_values is not None
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_no_examples_are_a_batch_without_targets_for_a_collator_and_an_error_otherwise():
    for collator in (PaddedCollator(2, 0), PackedCollator(8, False, 1, 0.0, 0)):
        batch = collator([])
        assert batch.record_ids == () and batch.num_targets == 0 and batch.num_images == 0
    for function in (pad_examples, pack_examples):
        with pytest.raises(ValueError, match="no examples"):
            function([], pad_token_id=0)


def test_padded_targets_are_predicted_by_the_position_before_them():
    batch = pad_examples([PLAIN, SHOWN], pad_token_id=0)
    assert batch.target_positions.tolist() == [0, 5, 6]
    assert batch.target_ids.tolist() == [7, 5, 6]
    assert batch.target_records.tolist() == [0, 1, 1]
    assert torch.equal(batch.unique_target_positions, batch.target_positions)


# --- packed rows


def record(name: str, ids: list[int], labels: list[int], images: int = 0) -> Example:
    pixels = torch.full((images, 3, 2, 2), len(ids), dtype=torch.uint8)
    return Example(name, torch.tensor(ids), torch.tensor(labels), pixels)


def pack_group(*examples: Example, shared: int) -> Batch:
    """Pack examples of which all but the first share a prefix with the one before."""
    first, *rest = examples
    return pack_examples([first, *(replace(e, shared_prefix_length=shared) for e in rest)], 0)


X, P = IGNORE_INDEX, IMAGE_TOKEN_ID


def test_records_are_concatenated_and_each_label_is_predicted_by_the_token_before_it() -> None:
    first = record("a", [5, 6, 7], [X, 6, 7])
    second = record("b", [8, 9], [X, 9])
    batch = pack_examples([first, second], pad_token_id=0)
    assert batch.record_ids == ("a", "b")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.attention_mask is None
    assert batch.segments == ((3, -1), (2, -1))
    assert batch.target_positions.tolist() == [0, 1, 3]
    assert batch.target_ids.tolist() == [6, 7, 9]
    assert batch.target_records.tolist() == [0, 0, 1]
    assert batch.num_targets == 3 and batch.pixel_values is None
    with pytest.raises(ValueError, match="has no labels"):
        batch.labels()


def test_a_shared_prefix_is_stored_once_and_its_last_state_predicts_each_branchs_first() -> None:
    alone = record("c", [9, 9], [X, 9])
    first = record("a", [5, P, P, 6, 7], [X, X, X, 6, 7], images=1)
    second = record("b", [5, P, P, 8], [X, X, X, 8])
    batch = pack_examples([alone, first, replace(second, shared_prefix_length=3)], 0)
    assert batch.input_ids.tolist() == [[9, 9, 5, P, P, 6, 7, 8]]
    assert batch.segments == ((2, -1), (3, -1), (2, 1), (1, 1))
    assert batch.target_positions.tolist() == [0, 4, 5, 4]
    assert batch.unique_target_positions.tolist() == [0, 4, 5]
    assert batch.target_ids.tolist() == [9, 6, 7, 8]
    assert batch.target_records.tolist() == [0, 1, 1, 2]
    assert batch.pixel_values is not None and batch.pixel_values.shape == (1, 3, 2, 2)


def test_rows_are_padded_by_a_segment_of_their_own() -> None:
    batch = pack_examples([record("a", [5, 6, 7], [X, 6, 7])], pad_token_id=3, round_to=4)
    assert batch.input_ids.tolist() == [[5, 6, 7, 3]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[True, True, True, False]]
    assert batch.segments == ((3, -1), (1, -1))
    assert batch.num_targets == 2


def test_examples_that_do_not_fit_together_are_refused() -> None:
    good = record("a", [5, P, 7], [X, X, 7])
    with pytest.raises(ValueError, match="b does not begin like the rest of its group"):
        pack_group(good, record("b", [4, P, 7], [X, X, 7]), shared=2)
    with pytest.raises(ValueError, match="b has a label in the prefix that its group shares"):
        pack_group(good, record("b", [5, P, 7], [X, P, 7]), shared=2)
    with pytest.raises(ValueError, match="first token has a label"):
        pack_examples([record("a", [5, 6], [5, 6])], pad_token_id=0)
