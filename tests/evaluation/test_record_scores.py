"""IFD, perplexity and visual necessity of records are those of a plain loop, packed or padded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.conftest import run
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.tokenize import expand
from vlm_sft.errors import UserError
from vlm_sft.evaluation.record_scores import RecordScorer, RecordScores
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.utils.constants import IGNORE_INDEX

__all__ = ["run"]


def record(name: str, *said: str, images: tuple[Path, ...] = ()) -> Conversation:
    turns = []
    for number, text in enumerate(said):
        shown = [ImagePart(i) for i in range(len(images))] if number == 0 else []
        role = "user" if number % 2 == 0 else "assistant"
        turns.append(Turn(role, (*shown, TextPart(text))))  # type: ignore[arg-type]
    return Conversation(name, tuple(turns), images)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for number in range(2):
        noise = np.random.default_rng(number).integers(0, 256, (40, 28, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(noise).save(paths[-1])
    return [
        record("one", "Is there a dog?", "Yes.", images=(paths[0],)),
        record("two", "Where?", "On the left, by a tree.", "Why?", "Who knows", images=(paths[1],)),
        record("both", "Compare them.", "The first is darker.", images=tuple(paths)),
        record("text", "Say something long about nothing in particular.", "No."),
        record("lost", "What?", "That.", images=(folder / "missing.png",)),
    ]  # fmt: skip


def plain_loss(loaded: LoadedModel, one: Conversation, *, blank: bool, alone: bool) -> float:
    """The mean loss of the answers, from the logits of one record at a time."""
    if alone:
        turns = tuple(
            Turn(t.role, tuple(p for p in t.parts if t.role != "user" or isinstance(p, ImagePart)))
            for t in one.turns
        )
        one = Conversation(one.id, turns, one.images)
    tokenized = loaded.chat_tokenizer.tokenize(one)
    images = loaded.load_images(one)
    tokens = [image.layout.num_tokens for image in images]
    ids = torch.tensor([expand(tokenized.input_ids, tokens)])
    labels = expand(tokenized.input_ids, tokens, tokenized.labels)
    pixels = torch.cat([image.pixels for image in images]) if images else None
    if blank and pixels is not None:
        for channel, value in enumerate(loaded.image_spec.mean):
            pixels[:, channel] = int(255 * value)
    with torch.no_grad():
        logits = loaded.model.logits(ids, pixel_values=pixels)[0]
    losses = [
        -float(logits[place - 1].log_softmax(-1)[label])
        for place, label in enumerate(labels)
        if label != IGNORE_INDEX
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("max_tokens", [64, 4096])
def test_scores_are_those_of_a_plain_loop(
    run: LoadedModel, records: list[Conversation], packed: bool, max_tokens: int
) -> None:
    found = RecordScorer(run, packed=packed, max_tokens=max_tokens).score(records)
    assert isinstance(found[4], UserError) and found[4].reason == "image_missing"
    for one, scores in zip(records[:4], found[:4], strict=True):
        assert isinstance(scores, RecordScores)
        own = plain_loss(run, one, blank=False, alone=False)
        alone = plain_loss(run, one, blank=False, alone=True)
        assert scores.loss == pytest.approx(own, abs=1e-5)
        assert scores.perplexity == pytest.approx(np.exp(own), rel=1e-5)
        assert scores.ifd == pytest.approx(own / alone, abs=1e-5)
        if not one.images:
            assert scores.necessity is None
            continue
        blank = plain_loss(run, one, blank=True, alone=False)
        assert abs(blank - own) > 1e-4  # the model does look
        assert scores.necessity == pytest.approx(blank - own, abs=1e-5)
    first = found[0]
    assert isinstance(first, RecordScores) and first.num_tokens == len("Yes.") + 1
    assert np.linalg.norm(first.embedding.astype(np.float32)) == pytest.approx(1, abs=1e-2)


def test_embeddings_do_not_depend_on_the_batch(
    run: LoadedModel, records: list[Conversation]
) -> None:
    together = RecordScorer(run, packed=True).score(records[:3])
    for one, scores in zip(records, together, strict=False):
        (single,) = RecordScorer(run, only_loss=True).score([one])
        assert isinstance(scores, RecordScores) and isinstance(single, RecordScores)
        assert single.ifd is None
        np.testing.assert_allclose(scores.embedding, single.embedding, atol=2e-3)


@pytest.mark.parametrize("only_loss", [False, True])
def test_the_tower_sees_each_image_once(
    run: LoadedModel, records: list[Conversation], only_loss: bool
) -> None:
    seen = []
    hook = run.model.vision_tower.register_forward_hook(
        lambda _module, inputs, _output: seen.append(len(inputs[0]))
    )
    again = record("again", "Is there a cat?", "No.", images=records[0].images)
    scorer = RecordScorer(run, only_loss=only_loss)
    found = scorer.score([*records, again])
    hook.remove()
    assert isinstance(found[5], RecordScores)
    # Three records with images of their own, one and one and two; and one blank crop.
    assert sum(seen) == 4 + (not only_loss)
