"""LLaVA-NeXT and LLaVA-OneVision of transformers are loaded with their tiles and newlines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tests.finished_models import SMALL_LLAMA, change_tensors
from tests.model.tiny import VIT
from tests.test_from_checkpoint import FAST, config_of, train
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.export.__main__ import main as export
from vlm_sft.inference.loaded_model import load_checkpoint
from vlm_sft.inference.prompts import user_message

PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
SIZES = [(28, 28), (60, 20), (161, 184), (20, 200)]


def text_config() -> LlamaConfig:
    return LlamaConfig(**{k: v for k, v in SMALL_LLAMA.items() if k != "model_type"})


def next_folder(out: Path) -> Any:
    tokenizer, template = processor_parts()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VIT),
        text_config=text_config(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=PINPOINTS,
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return save(out, LlavaNextForConditionalGeneration, config, processor)


def onevision_folder(out: Path) -> Any:
    tokenizer, template = processor_parts()
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VIT, vision_use_head=False),
        text_config=text_config(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )
    images = LlavaOnevisionImageProcessorPil(
        size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaOnevisionProcessor(
        images,
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": 28, "width": 28}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=template,
    )
    return save(out, LlavaOnevisionForConditionalGeneration, config, processor)


def processor_parts() -> tuple[Any, str]:
    tokenizer: Any = byte_tokenizer()
    template = ChatTokenizer.from_name("chatml", tokenizer).to_jinja()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_bos_token = False
    return tokenizer, template


def save(out: Path, model_class: type[PreTrainedModel], config: Any, processor: Any) -> Any:
    torch.manual_seed(1)
    model: Any = model_class(config)
    torch.nn.init.normal_(model.model.image_newline)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return processor  # with Pillow, whose pixels `exact` has; a reload takes torchvision


FOLDERS = {"next": next_folder, "onevision": onevision_folder}
CLASSES: dict[str, Any] = {
    "next": LlavaNextForConditionalGeneration,
    "onevision": LlavaOnevisionForConditionalGeneration,
}


@pytest.mark.parametrize("kind", ["next", "onevision"])
@torch.no_grad()
def test_tokens_logits_and_answers_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    processor = FOLDERS[kind](folder)
    ours = load_checkpoint(folder, device="cpu")
    stock = CLASSES[kind].from_pretrained(folder).eval()
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    for index, size in enumerate(SIZES):
        path = tmp_path / f"{index}.png"
        Image.effect_noise(size, 90).convert("RGB").save(path)
        inputs = processor(images=Image.open(path), text=text, return_tensors="pt")
        prompt = user_message("What is it?", [path])
        loaded = ours.load_images(prompt)
        layouts = [image.layout for image in loaded]
        ids = torch.tensor([ours.prompt_ids(prompt, layouts)])
        assert ids.shape == inputs["input_ids"].shape
        pixels = torch.cat([image.pixels for image in loaded])
        found = ours.model.logits(ids, pixel_values=pixels, layouts=layouts)
        assert (found - stock(**inputs).logits).abs().max() < 1e-5
        generated = stock.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = processor.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
        assert ours.generate(prompt, max_new_tokens=8) == answer.strip()


@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_a_run_from_a_tiled_model_trains_and_is_complete(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    FOLDERS[kind](folder)
    config = config_of(folder, tmp_path / "run")
    assert train(config, "data.max_length=512", *FAST) == 0
    folder.rename(tmp_path / "gone")
    loaded = load_checkpoint(tmp_path / "run" / "final", device="cpu")
    before = load_checkpoint(tmp_path / "gone", device="cpu")
    assert loaded.model.layout_rule == before.model.layout_rule
    newlines = [model.model.image_newline for model in (loaded, before)]
    assert newlines[0] is not None and newlines[1] is not None
    assert not torch.equal(newlines[0], newlines[1])


@pytest.mark.parametrize("kind", ["next", "onevision"])
@torch.no_grad()
def test_a_tiled_model_is_exported_and_loaded_again_with_the_same_logits(
    kind: str, tmp_path: Path
) -> None:
    FOLDERS[kind](tmp_path / kind)
    assert export([str(tmp_path / kind), str(tmp_path / "out"), "--to", "hf"]) == 0
    path = tmp_path / "image.png"
    Image.effect_noise((161, 184), 90).convert("RGB").save(path)
    prompt = user_message("What is it?", [path])
    found = []
    for folder in (tmp_path / kind, tmp_path / "out"):
        model = load_checkpoint(folder, device="cpu")
        loaded = model.load_images(prompt)
        layouts = [image.layout for image in loaded]
        ids = torch.tensor([model.prompt_ids(prompt, layouts)])
        pixels = torch.cat([image.pixels for image in loaded])
        found.append(model.model.logits(ids, pixel_values=pixels, layouts=layouts))
    assert torch.equal(*found)


def test_a_tiled_model_without_its_newline_is_refused(tmp_path: Path) -> None:
    next_folder(tmp_path / "next")
    change_tensors(tmp_path / "next", {"image_newline": None, "model.image_newline": None})
    with pytest.raises(UserError, match=r"1 missing \(image_newline\)"):
        load_checkpoint(tmp_path / "next", device="cpu")
