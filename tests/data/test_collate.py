from dataclasses import replace

import pytest
import torch

from vlm_sft.data.batch import collate
from vlm_sft.data.dataset import Example
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID


def example(name: str, ids: list[int], labels: list[int], images: int = 0) -> Example:
    pixels = torch.full((images, 3, 2, 2), float(sum(map(ord, name))))
    return Example(name, torch.tensor(ids), torch.tensor(labels), pixels)


SHOWN = example("shown", [1, IMAGE_TOKEN_ID, 5, 6], [-100, -100, 5, 6], images=2)
PLAIN = example("plain", [1, 7], [-100, 7])


def test_records_are_padded_on_the_right_without_attention_or_loss():
    batch = collate([PLAIN, SHOWN], pad_token_id=0)
    assert batch.record_ids == ("plain", "shown")
    assert batch.input_ids.tolist() == [[1, 7, 0, 0], [1, IMAGE_TOKEN_ID, 5, 6]]
    assert batch.labels.tolist() == [[-100, 7, -100, -100], [-100, -100, 5, 6]]
    assert batch.attention_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.attention_mask.dtype == torch.bool
    assert batch.num_targets == 3


def test_a_pad_token_that_is_also_the_end_token_keeps_its_label_where_it_ends_an_answer():
    batch = collate([example("a", [1, 2], [-100, 2]), SHOWN], pad_token_id=2)
    assert batch.labels[0].tolist() == [-100, 2, -100, -100]
    assert batch.attention_mask[0].tolist() == [True, True, False, False]


def test_images_of_all_records_are_stacked_in_order_and_none_is_none():
    other = example("other", [IMAGE_TOKEN_ID, 3], [-100, 3], images=1)
    batch = collate([SHOWN, PLAIN, other], pad_token_id=0)
    assert batch.pixel_values is not None
    assert torch.equal(batch.pixel_values, torch.cat([SHOWN.pixel_values, other.pixel_values]))
    assert collate([PLAIN], pad_token_id=0).pixel_values is None


def test_kept_features_are_stacked_in_place_of_images_and_move_with_their_batch():
    def kept(name, count):
        plain = example(name, [IMAGE_TOKEN_ID] * count + [3], [-100] * count + [3])
        features = torch.arange(count * 4.0).view(count, 1, 4) if count else None
        return replace(plain, image_features=features)

    one, none, two = kept("one", 1), kept("none", 0), kept("two", 2)
    batch = collate([one, none, two], pad_token_id=0)
    assert batch.pixel_values is None
    assert torch.equal(batch.image_features, torch.cat([one.image_features, two.image_features]))
    assert batch.to("meta").image_features.device.type == "meta"
    assert collate([none], pad_token_id=0).image_features is None


def test_targets_are_counted_as_the_shifted_loss_sees_them():
    first = example("first", [4, 5], [4, 5])
    assert collate([first], pad_token_id=0).num_targets == 1
    none = example("none", [4, 5], [IGNORE_INDEX] * 2)
    assert collate([none], pad_token_id=0).num_targets == 0


def test_a_batch_moves_whole():
    batch = collate([PLAIN, SHOWN], pad_token_id=0).to("meta")
    assert batch.record_ids == ("plain", "shown")
    assert batch.pixel_values is not None
    for tensor in (batch.input_ids, batch.labels, batch.attention_mask, batch.pixel_values):
        assert tensor.device.type == "meta"


def test_no_examples_make_no_batch():
    with pytest.raises(ValueError, match="no examples"):
        collate([], pad_token_id=0)
