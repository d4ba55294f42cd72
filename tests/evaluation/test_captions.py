"""Caption losses equal those computed by hand and without batches."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.model.tiny import batch_of
from tests.rounding import rounding, terms_of
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.tokenize import expand
from vlm_sft.errors import UserError
from vlm_sft.evaluation.captions import (
    CaptionLoss,
    caption_losses,
    other_images,
    summarize_captions,
)
from vlm_sft.inference.loaded_model import LoadedModel


def test_losses_are_taken_a_token_and_differences_within_a_record() -> None:
    losses = [CaptionLoss("a", 10, 5.0, 20.0), CaptionLoss("b", 30, 15.0, 40.0)]
    found = summarize_captions(losses)
    assert (found["records"], found["tokens"]) == (2, 40)
    assert found["right"]["estimate"] == pytest.approx(20 / 40)
    assert found["shuffled"]["estimate"] == pytest.approx(60 / 40)
    assert found["difference"]["estimate"] == pytest.approx(40 / 40)
    # Every resample is one of {aa, ab, bb}: 15/10, 40/40 or 25/30 nats a token.
    assert found["difference"]["low"] == pytest.approx(25 / 30)
    assert found["difference"]["high"] == pytest.approx(15 / 10)


def test_every_caption_gets_another_records_image() -> None:
    records = [captioned("a.png"), captioned("b.png"), captioned("c.png")]
    others = other_images(records, seed=0)
    assert set(others) == set(others.values()) == {"a.png", "b.png", "c.png"}
    assert all(name != other for name, other in others.items())


def test_one_image_has_no_other() -> None:
    with pytest.raises(UserError, match="at least two images"):
        other_images([captioned("a.png"), captioned("a.png")], seed=0)


def plain_loss(run: LoadedModel, record: Conversation, image: str) -> float:
    tokenized, tokens = run.chat_tokenizer.tokenize(record), run.model.vision_tower.num_tokens
    ids = torch.tensor([expand(tokenized.input_ids, [tokens])])
    labels = torch.tensor([expand(tokenized.input_ids, [tokens], tokenized.labels)])
    pixels = run.load_image(Path(image)).pixels
    with torch.inference_mode():
        output = run.model(batch_of(ids, torch.ones_like(ids), labels, pixels))
    return float(output.loss_sum)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_captions_of_unequal_length_are_measured_together_as_alone(
    run: LoadedModel, tmp_path: Path, batch_size: int
) -> None:
    names = [str(tmp_path / f"{color}.png") for color in ("red", "green", "blue")]
    for name in names:
        Image.new("RGB", (40, 30), Path(name).stem).save(name)
    texts = ("A thing.", "Something rather longer than that.", "No")
    records = [captioned(name, text) for name, text in zip(names, texts, strict=True)]
    others = other_images(records, seed=0)

    found = list(caption_losses(run, records, others, batch_size=batch_size))

    assert [loss.image for loss in found] == names
    bound = rounding(terms_of(run.model, length=40))
    for loss, record, text in zip(found, records, texts, strict=True):
        assert loss.num_tokens == len(run.chat_tokenizer.answer_ids(text))
        right = plain_loss(run, record, loss.image)
        shuffled = plain_loss(run, record, others[loss.image])
        assert loss.right == pytest.approx(right, rel=bound)
        assert loss.shuffled == pytest.approx(shuffled, rel=bound)
        # An image makes little difference to an untrained model, and still more than rounding does.
        assert abs(loss.right - right) < abs(loss.right - shuffled) / 10
        assert abs(loss.shuffled - shuffled) < abs(loss.shuffled - right) / 10


def captioned(name: str, text: str = "A thing.") -> Conversation:
    turns = (Turn("user", (ImagePart(0),)), Turn("assistant", (TextPart(text),)))
    return Conversation(name, turns, (name,))  # type: ignore[arg-type]
