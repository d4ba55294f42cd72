"""Exports of models that divide images into crops: LLaVA-NeXT, LLaVA-OneVision and InternVL."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from tests.data.test_images import encode, photo
from tests.model.tiny import LLAMA, VIT
from vlm_sft.config.schema import (
    ImageTilingConfig,
    LanguageModelConfig,
    ModelConfig,
    VisionTowerConfig,
)
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.images import read_crops
from vlm_sft.data.tokenize import ChatTokenizer, expand
from vlm_sft.errors import UserError
from vlm_sft.export.hf_llava import ExportReport, export_hf_llava
from vlm_sft.export.obstacles import export_obstacles
from vlm_sft.export.verify import reload_here, reload_in_new_process
from vlm_sft.model.build import build_model
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IMAGE_TOKEN_ID

SIGLIP = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
INTERNVIT = {"model_type": "internvl_vision", **VIT}
TOKENIZER = byte_tokenizer(("<img>", "</img>"))
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "InternVLForConditionalGeneration": (INTERNVIT, "dynamic"),
    "LlavaNextForConditionalGeneration": (
        {"model_type": "clip_vision_model", **VIT},
        "anyres",
    ),
    "LlavaOnevisionForConditionalGeneration": (SIGLIP, "anyres_max_4"),
}


def model_of(
    tower: dict[str, Any],
    layout: str,
    projector: str = "",
    language_model: dict[str, Any] = LLAMA,
    **vision: Any,
) -> Any:
    projector = projector or ("pixel_shuffle_mlp" if layout == "dynamic" else "mlp2x_gelu")
    config = ModelConfig(
        vision_tower=VisionTowerConfig(library="transformers", config=tower, **vision),
        image_tiling=ImageTilingConfig(layout=layout),
        projector_type=projector,
        language_model=LanguageModelConfig(
            config={**language_model, "max_position_embeddings": 4096}, tokenizer="bytes"
        ),
    )
    return build_model(config, dtype=torch.float32, seed=5).eval()


def export(model: VisionLanguageModel, out: Path, **keys: Any) -> ExportReport:
    keys = {"image_aspect": "pad", "image_processing": "exact", "chat_template": None, **keys}
    if model.layout_rule.tiling == "dynamic":
        keys = {"image_tokens": ("<img>", "</img>"), **keys}
    return export_hf_llava(model, TOKENIZER, out, **keys)


def processor_of(folder: Path) -> Any:
    """Return the processor of a folder that resizes with Pillow, as `exact` does.

    AutoProcessor takes torchvision if it is installed, which differs by up to 2 of 255 levels.
    """
    processor = AutoProcessor.from_pretrained(folder)
    kind = type(processor.image_processor).__name__.removesuffix("Pil")
    pillow = {
        "GotOcr2ImageProcessor": GotOcr2ImageProcessorPil,
        "LlavaNextImageProcessor": LlavaNextImageProcessorPil,
        "LlavaOnevisionImageProcessor": LlavaOnevisionImageProcessorPil,
    }[kind]
    processor.image_processor = pillow.from_pretrained(folder)
    return processor


@pytest.mark.parametrize("class_name", sorted(KINDS))
def test_the_folder_computes_what_the_model_computes_from_text_and_image(
    class_name: str, tmp_path: Path
) -> None:
    model = model_of(*KINDS[class_name])
    new_process = not class_name.startswith("LlavaOnevision")
    reload = reload_in_new_process if new_process else reload_here
    report = export(model, tmp_path / "out", reload=reload)
    assert report.model_class == class_name
    assert report.max_abs_logit_difference <= 1e-4
    assert report.max_pixel_difference <= 2
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = processor_of(tmp_path / "out")
    for width, height in ((120, 40), (30, 90), (161, 184), (28, 28)):
        image = photo(width, height)
        inputs = processor(images=image, text="ab<image>cd", return_tensors="pt")
        spec = model.vision_tower.image_spec
        crops, layout = read_crops(encode(image, "PNG"), model.layout_rule, spec, "pad", "exact")
        is_image = inputs["input_ids"] == processor.image_token_id
        assert int(is_image.sum()) == layout.num_tokens
        with torch.no_grad():
            ids = inputs["input_ids"].masked_fill(is_image, IMAGE_TOKEN_ID)
            ours = model.logits(ids, pixel_values=crops, layouts=[layout])
            theirs = stock(**inputs).logits[..., : ours.shape[-1]]
        assert (ours - theirs).abs().max() <= 1e-4, (width, height)


def test_several_images_are_not_divided_by_the_exported_onevision(tmp_path: Path) -> None:
    model = model_of(*KINDS["LlavaOnevisionForConditionalGeneration"])
    export(model, tmp_path / "out", reload=reload_here)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = processor_of(tmp_path / "out")
    images = [photo(120, 40), photo(40, 90)]
    inputs = processor(images=[images], text="a<image>b<image>c", return_tensors="pt")
    spec, rule = model.vision_tower.image_spec, model.layout_rule
    found = [
        read_crops(encode(image, "PNG"), rule, spec, "pad", "exact", num_images=2)
        for image in images
    ]
    is_image = inputs["input_ids"] == processor.image_token_id
    with torch.no_grad():
        ours = model.logits(
            inputs["input_ids"].masked_fill(is_image, IMAGE_TOKEN_ID),
            pixel_values=torch.cat([one.pixels for one in found]),
            layouts=[one.layout for one in found],
        )
        theirs = stock(**inputs).logits[..., : ours.shape[-1]]
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("tower", "reason"),
    [
        ({"model_type": "clip_vision_model"}, "clip_vision_model tower would be replaced"),
        (SIGLIP, "siglip_vision_model tower would be replaced by a random one"),
        ({**INTERNVIT, "use_mean_pooling": False}, "a norm after the last layer"),
    ],
)
def test_internvl_holds_its_own_tower_alone(
    tower: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = model_of({**VIT, **tower}, "dynamic", "mlp2x_gelu")
    export_refused(model, reason, tmp_path)


@pytest.mark.parametrize(
    ("projector", "layers", "tokens", "reason"),
    [
        ("pixel_shuffle_mlp", [-1], ("", ""), "with which this model was not trained"),
        ("pixel_shuffle_mlp", [-1], ("<img>", ""), "with which this model was not trained"),
        ("pixel_shuffle_mlp", [-2, -1], ("<img>", "</img>"), "reads one layer of the vision tower"),
        ("mlp2x_gelu", [-1], ("<img>", "</img>"), "train with model.projector_type: pixel_shuffle"),
    ],
)
def test_internvl_needs_its_projector_one_layer_and_tokens_around_images(
    projector: str, layers: list[int], tokens: tuple[str, str], reason: str, tmp_path: Path
) -> None:
    model = model_of(INTERNVIT, "dynamic", projector, feature_layers=layers)
    export_refused(model, reason, tmp_path, tokens)


def export_refused(
    model: VisionLanguageModel,
    reason: str,
    tmp_path: Path,
    tokens: tuple[str, str] = ("<img>", "</img>"),
) -> None:
    assert any(reason in obstacle for obstacle in export_obstacles(model, tokens))
    with pytest.raises(UserError, match=reason):
        export(model, tmp_path / "out", image_tokens=tokens)
    assert not (tmp_path / "out").exists()


def test_internvls_processor_gives_the_ids_of_training_for_several_images(tmp_path: Path) -> None:
    model = model_of(*KINDS["InternVLForConditionalGeneration"])
    by = ChatTokenizer.from_name("internvl2_5", TOKENIZER)
    template = by.to_jinja(image_tokens=False)
    export(model, tmp_path / "out", chat_template=template, reload=reload_here)
    processor = processor_of(tmp_path / "out")
    images = [photo(120, 40), photo(40, 90)]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True
    )
    found = processor(images=images, text=text, return_tensors="pt")["input_ids"][0].tolist()
    turn = Turn("user", (ImagePart(0), ImagePart(1), TextPart("Which?")), image_separator=None)
    prompt = by.prompt(Conversation("r", (turn,), (b"", b"")))
    counts = [model.layout_rule.layout(*image.size).num_tokens for image in images]
    expected = expand(prompt, counts)
    assert found == [i if i >= 0 else processor.image_token_id for i in expected]
