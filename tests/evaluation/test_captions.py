"""Caption loss: what the picture is worth, on cases counted by hand."""

import pytest

from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.errors import UserError
from vlm_sft.evaluation.captions import CaptionLoss, other_pictures, summarize_captions


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


def test_every_caption_gets_another_records_picture() -> None:
    records = [captioned("a.png"), captioned("b.png"), captioned("c.png")]
    others = other_pictures(records, seed=0)
    assert set(others) == set(others.values()) == {"a.png", "b.png", "c.png"}
    assert all(name != other for name, other in others.items())


def test_one_picture_has_no_other() -> None:
    with pytest.raises(UserError, match="at least two pictures"):
        other_pictures([captioned("a.png"), captioned("a.png")], seed=0)


def captioned(name: str) -> Conversation:
    turns = (Turn("user", (ImagePart(0),)), Turn("assistant", (TextPart("A thing."),)))
    return Conversation(name, turns, (name,))  # type: ignore[arg-type]
