"""Image-text agreement by CLIP and SigLIP is that of a plain loop, one image and text at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.errors import UserError
from vlm_sft.evaluation import clip_scores
from vlm_sft.evaluation.clip_scores import ClipScore, ClipScorer

CONTEXT = 24
VISION = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 300, "max_position_embeddings": CONTEXT, "bos_token_id": 257,
    "eos_token_id": 258, "pad_token_id": 256,
}  # fmt: skip
PAD = TEXT["pad_token_id"]


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Bytes as tokens; between start and end for CLIP, before the end for SigLIP."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*alphabet, "<pad>", "<s>", "</s>"]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    single = "<s> $A </s>" if kind == "clip" else "$A </s>"
    made.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 257), ("</s>", 258)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        model_max_length=CONTEXT,
    )  # fmt: skip


def clip_folder(folder: Path, kind: str = "clip") -> Path:
    """A random model of two towers, with weights large enough for texts and images to matter."""
    torch.manual_seed(0)
    vision, text = dict(VISION), dict(TEXT)
    if kind == "clip":
        model: Any = CLIPModel(
            CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
        )
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder)
    else:
        text["projection_size"] = 16
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    with torch.no_grad():
        for values in model.parameters():
            if values.dim() > 1:
                values.mul_(8)
    model.save_pretrained(folder)
    tokenizer(kind).save_pretrained(folder)
    return folder


def record(name: str, answer: str, *images: Path) -> Conversation:
    shown = tuple(ImagePart(i) for i in range(len(images)))
    turns = (Turn("user", (*shown, TextPart("What?"))), Turn("assistant", (TextPart(answer),)))
    return Conversation(name, turns, images)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for number, size in enumerate([(40, 28), (16, 50), (33, 33)]):
        noise = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(noise).save(paths[-1])
    narrow = folder / "narrow.png"
    Image.new("RGB", (700, 10)).save(narrow)
    return [
        record("short", "A dog.", paths[0]),
        record("long", "A very long answer about a small image.", paths[1]),
        record("two", "Noise, twice.", paths[0], paths[2]),
        record("text", "There is nothing to see."),
        record("lost", "Gone.", folder / "missing.png"),
        record("narrow", "A line.", narrow),
        record("same", "A dog.", paths[2]),
    ]


def plain_cosine(folder: Path, kind: str, one: Conversation) -> float:
    """The mean cosine of one record's text with its images, each by itself."""
    if kind == "clip":
        model: Any = CLIPModel.from_pretrained(folder)
        processor: Any = CLIPImageProcessor.from_pretrained(folder)
    else:
        model, processor = SiglipModel.from_pretrained(folder), None
        processor = SiglipImageProcessor.from_pretrained(folder)
    ids = tokenizer(kind)(one.turns[1].text, add_special_tokens=False)["input_ids"]
    start = [257] if kind == "clip" else []
    ids = [*start, *ids[: CONTEXT - 1 - len(start)], 258]
    if kind == "siglip":
        ids += [PAD] * (CONTEXT - len(ids))
    cosines = []
    with torch.no_grad():
        text = model.text_model(torch.tensor([ids])).pooler_output[0]
        text = model.text_projection(text) if kind == "clip" else text
        for path in one.images:
            pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"]
            image = model.vision_model(pixels).pooler_output[0]
            image = model.visual_projection(image) if kind == "clip" else image
            cosines.append(float(text @ image / (text.norm() * image.norm())))
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_cosines_are_those_of_a_plain_loop(
    tmp_path: Path, records: list[Conversation], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = clip_folder(tmp_path, kind)
    monkeypatch.setattr(clip_scores, "_IMAGES_AT_ONCE", 2)
    monkeypatch.setattr(clip_scores, "_TEXTS_AT_ONCE", 3)
    found = ClipScorer(str(folder), device="cpu").score(records)
    seen = []
    for one, score in zip(records, found, strict=True):
        if one.id in ("lost", "narrow"):
            assert isinstance(score, UserError)
            assert score.reason == {"lost": "image_missing", "narrow": "image_too_large"}[one.id]
            continue
        assert isinstance(score, ClipScore)
        assert score.truncated == (one.id == "long")
        if not one.images:
            assert score.clip is None
            continue
        seen.append(score.clip)
        assert score.clip == pytest.approx(plain_cosine(folder, kind, one), abs=1e-5)
    assert max(seen) - min(seen) > 1e-3, "the model tells texts and images apart"


def test_a_folder_of_another_model_or_with_missing_tensors_is_refused(tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    with pytest.raises(UserError, match="clip_model: no such folder"):
        ClipScorer(str(tmp_path / "none"))
    vision = tmp_path / "vision"
    CLIPModel.from_pretrained(folder).vision_model.save_pretrained(vision)
    with pytest.raises(UserError, match="'clip_vision_model' model, expected one with an image"):
        ClipScorer(str(vision))
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors.*text_projection\.weight"):
        ClipScorer(str(folder))
