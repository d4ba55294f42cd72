"""LLaVA-NeXT, LLaVA-OneVision and InternVL of transformers are loaded with their tiles."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tests.finished_models import SMALL_LLAMA, OriginalParts, change_json, change_tensors
from tests.model.tiny import VIT
from tests.test_from_checkpoint import FAST, config_of, train
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.images import to_crops
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.export.__main__ import main as export
from vlm_sft.export.hf_llava import export_hf_llava
from vlm_sft.export.verify import reload_here
from vlm_sft.inference.loaded_model import load_checkpoint
from vlm_sft.inference.prompts import user_message
from vlm_sft.utils.constants import IMAGE_TOKEN_ID

FROZEN = ["optim.learning_rate={projector: 1e-3, language_model: 1e-12}", "train.max_steps=1"]
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


INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for part in message['content'] %}"
    "{{ '<IMG_CONTEXT>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def internvl_folder(out: Path, template: str = INTERNVL_TEMPLATE, **keys: Any) -> Any:
    tokenizer: Any = byte_tokenizer(("<img>", "</img>"))
    tokenizer.add_bos_token = False
    tokenizer.add_tokens(["<IMG_CONTEXT>", "<video>"], special_tokens=True)
    named = {"start": "<img>", "end": "</img>", "context": "<IMG_CONTEXT>"}
    tokenizer._set_model_specific_special_tokens(
        {"video_token": "<video>", **{f"{key}_image_token": v for key, v in named.items()}}
    )
    text = {**SMALL_LLAMA, "vocab_size": 272, "max_position_embeddings": 4096}
    vision = {k: v for k, v in VIT.items() if k != "model_type"}
    options = {"image_token_id": tokenizer.context_image_token_id, "image_seq_length": 1, **keys}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**{**vision, "layer_norm_eps": 1e-3}),
        text_config=Qwen2Config(**{k: v for k, v in text.items() if k != "model_type"}),
        **options,
    )
    square = {"height": 28, "width": 28}
    images = GotOcr2ImageProcessorPil(
        size=square,
        max_patches=5,
        crop_to_patches=False,  # the processor does so anyway
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.4],
    )
    processor = InternVLProcessor(
        images,
        tokenizer,
        InternVLVideoProcessor(size=square),
        image_seq_length=1,
        chat_template=template,
    )
    return save(out, InternVLForConditionalGeneration, config, processor)


def processor_parts() -> tuple[Any, str]:
    tokenizer: Any = byte_tokenizer()
    template = ChatTokenizer.from_name("chatml", tokenizer).to_jinja()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_bos_token = False
    return tokenizer, template


def save(out: Path, model_class: type[PreTrainedModel], config: Any, processor: Any) -> Any:
    torch.manual_seed(1)
    model: Any = model_class(config)
    for name, parameter in model.named_parameters():
        if not parameter.any() or name.endswith("image_newline"):  # zeros would hide faults
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return processor  # with Pillow, whose pixels `exact` has; a reload takes torchvision


FOLDERS = {"next": next_folder, "onevision": onevision_folder, "internvl": internvl_folder}
CLASSES: dict[str, Any] = {
    "next": LlavaNextForConditionalGeneration,
    "onevision": LlavaOnevisionForConditionalGeneration,
    "internvl": InternVLForConditionalGeneration,
}


@pytest.mark.parametrize("kind", list(FOLDERS))
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
        if kind == "internvl":
            features = stock.model.get_image_features(inputs["pixel_values"]).pooler_output
            assert (ours.model.encode_images(pixels) - features).abs().max() < 1e-5
        found = ours.model.logits(ids, pixel_values=pixels, layouts=layouts)
        assert (found - stock(**inputs).logits).abs().max() < 1e-5
        generated = stock.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = processor.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
        assert ours.generate(prompt, max_new_tokens=8) == answer.strip()


@pytest.mark.parametrize("kind", list(FOLDERS))
def test_a_run_from_a_tiled_model_trains_and_is_complete(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / kind
    FOLDERS[kind](folder)
    config = config_of(folder, tmp_path / "run")
    assert train(config, "data.max_length=512", *FAST) == 0
    folder.rename(tmp_path / "gone")
    loaded = load_checkpoint(tmp_path / "run" / "final", device="cpu")
    before = load_checkpoint(tmp_path / "gone", device="cpu")
    assert loaded.model.layout_rule == before.model.layout_rule
    trained, start = (model.model.projector_state() for model in (loaded, before))
    assert trained.keys() == start.keys()
    assert ("image_newline" in trained) == (kind != "internvl")
    assert all(not torch.equal(trained[name], start[name]) for name in trained)


@pytest.mark.parametrize("kind", list(FOLDERS))
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


@pytest.mark.parametrize("kind", ["full", "tower", "lora"])
def test_a_folder_of_llava_1_6_is_loaded_and_exported_with_the_same_logits(
    kind: str, tmp_path: Path
) -> None:
    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    parts = OriginalParts(tmp_path, pinpoints=pinpoints)
    source = tmp_path / "llava"
    if kind == "lora":
        parts.lora(source)
    else:
        parts.full(source, tower=kind == "tower")
        for parameter in parts.model.vision_tower.parameters():
            parameter.data += 0.01 * (kind == "tower")
    as_text = str([tuple(pair) for pair in pinpoints])  # as the script's argument had it
    if kind != "full":
        change_json(source / "config.json", image_grid_pinpoints=as_text)
    loaded = load_checkpoint(source, device="cpu", template="vicuna_v1")
    export_hf_llava(
        loaded.model,
        loaded.tokenizer,
        tmp_path / "out",
        image_aspect=loaded.image_aspect,
        image_processing="exact",
        chat_template=loaded.chat_tokenizer.to_jinja(),
        reload=reload_here,
    )
    assert loaded.model.layout_rule == parts.model.layout_rule
    stock = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    for size in SIZES:
        crops = to_crops(
            Image.effect_noise(size, 90).convert("RGB"),
            loaded.model.layout_rule,
            loaded.image_spec,
            "pad",
        )
        ids = torch.tensor([[5, 6, *[IMAGE_TOKEN_ID] * crops.layout.num_tokens, 7]])
        known = {"pixel_values": crops.pixels, "layouts": [crops.layout]}
        with torch.no_grad():
            expected = parts.model.logits(ids, **known)
            found = loaded.model.logits(ids, **known)
            pixels = loaded.model.vision_tower.normalized(crops.pixels)
            theirs = stock(
                input_ids=ids.masked_fill(ids == IMAGE_TOKEN_ID, stock.config.image_token_id),
                pixel_values=pixels[None],
                image_sizes=torch.tensor([[size[1], size[0]]]),
            ).logits
        assert torch.equal(found, expected)
        assert (theirs[..., : found.shape[-1]] - found).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_patch_merge_type": "flat"}, r"'anyres' with mm_patch_merge_type 'flat'.*expected"),
        ({"image_aspect_ratio": "pad"}, "'pad' with mm_patch_merge_type 'spatial_unpad'"),
        ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio 'anyres_max_9'"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "expected pairs of width and height"),
        ({"image_grid_pinpoints": [[28, 0]]}, "expected pairs of width and height"),
        ({"image_grid_pinpoints": [[56, 56]]}, "squares of 56 pixels, but .* takes images of 28"),
    ],
)
def test_tiles_of_original_folders_that_cannot_be_made_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = OriginalParts(tmp_path, pinpoints=[[28, 56], [56, 28]]).full(tmp_path / "llava")
    change_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder, device="cpu", template="vicuna_v1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsample_ratio": 0.25}, "downsample_ratio 0.25, which is not supported; expected 0.5"),
        ({"vision_feature_select_strategy": "full"}, "strategy 'full'.*expected 'default'"),
        ({"vision_feature_layer": [-1]}, r"vision_feature_layer \[-1\], expected one layer"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "expected 'internvl_vision'"),
        ({"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling False"),
        ({"vision_config": {"image_size": [28, 56]}}, r"28 pixels, but .* takes \[28, 56\]"),
    ],
)
def test_an_internvl_that_cannot_be_held_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "internvl"
    internvl_folder(folder)
    change_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load_checkpoint(folder, device="cpu")


def test_the_own_template_of_an_internvl_has_its_tokens_around_images(tmp_path: Path) -> None:
    folder, own = tmp_path / "internvl", INTERNVL_TEMPLATE.replace("role'] + '", "role'] + ': ")
    own = own.replace("assistant\n", "assistant: \n")
    processor = internvl_folder(folder, own)
    loaded = load_checkpoint(folder, device="cpu")
    Image.effect_noise((60, 20), 90).convert("RGB").save(tmp_path / "image.png")
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(images=Image.open(tmp_path / "image.png"), text=text)
    ids = loaded.prompt_ids(user_message("What?", [tmp_path / "image.png"]))
    image_id = processor.image_token_id
    assert [image_id if token < 0 else token for token in ids] == inputs["input_ids"][0]
    described = loaded.chat_tokenizer.describe()
    again = ChatTokenizer.from_description(described, loaded.tokenizer)
    assert again.image_tokens == ("<img>", "</img>")


def test_a_head_that_differs_from_the_embeddings_is_not_tied_to_them(tmp_path: Path) -> None:
    folder = tmp_path / "internvl"  # of transformers 4, whose outer configuration states no tie
    internvl_folder(folder)
    head = torch.randn(272, 48)
    change_tensors(folder, {"language_model.lm_head.weight": head})
    assert train(config_of(folder, tmp_path / "run"), "data.max_length=512", *FAST, *FROZEN) == 0
    stock = InternVLForConditionalGeneration.from_pretrained(folder).eval()
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
    for place in (folder, tmp_path / "run" / "final"):
        assert torch.equal(load_checkpoint(place, device="cpu").model.logits(ids), expected)


def test_a_tiled_model_without_its_newline_is_refused(tmp_path: Path) -> None:
    next_folder(tmp_path / "next")
    change_tensors(tmp_path / "next", {"image_newline": None, "model.image_newline": None})
    with pytest.raises(UserError, match=r"1 missing \(image_newline\)"):
        load_checkpoint(tmp_path / "next", device="cpu")
