"""Exports of models that divide images into crops: LLaVA-NeXT and LLaVA-OneVision."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
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
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.images import read_crops
from vlm_sft.errors import UserError
from vlm_sft.export.hf_llava import ExportReport, export_hf_llava
from vlm_sft.export.obstacles import export_obstacles
from vlm_sft.export.verify import reload_here, reload_in_new_process
from vlm_sft.model.build import build_model
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IMAGE_TOKEN_ID

SIGLIP = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "LlavaNextForConditionalGeneration": (
        {"model_type": "clip_vision_model", **VIT},
        "anyres",
    ),
    "LlavaOnevisionForConditionalGeneration": (SIGLIP, "anyres_max_4"),
}


def model_of(tower: dict[str, Any], layout: str, projector: str = "mlp2x_gelu") -> Any:
    config = ModelConfig(
        vision_tower=VisionTowerConfig(library="transformers", config=tower),
        image_tiling=ImageTilingConfig(layout=layout),
        projector_type=projector,
        language_model=LanguageModelConfig(
            config={**LLAMA, "max_position_embeddings": 4096}, tokenizer="bytes"
        ),
    )
    return build_model(config, dtype=torch.float32, seed=5).eval()


def export(model: VisionLanguageModel, out: Path, **keys: Any) -> ExportReport:
    keys = {"image_aspect": "pad", "image_processing": "exact", "chat_template": None, **keys}
    return export_hf_llava(model, byte_tokenizer(), out, **keys)


def processor_of(folder: Path) -> Any:
    """Return the processor of a folder that resizes with Pillow, as `exact` does.

    AutoProcessor takes torchvision if it is installed, which differs by up to 2 of 255 levels.
    """
    processor = AutoProcessor.from_pretrained(folder)
    kind = type(processor.image_processor).__name__.removesuffix("Pil")
    pillow = {
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
    new_process = class_name.startswith("LlavaNext")
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
        ("clip_vision_model", "clip_vision_model tower would be replaced by a random one"),
        ("internvl_vision", "<img> and </img> around every image"),
    ],
)
def test_tiles_of_internvl_are_refused_with_what_can_be_exported(
    tower: str, reason: str, tmp_path: Path
) -> None:
    model = model_of({"model_type": tower, **VIT}, "dynamic", "pixel_shuffle_mlp")
    assert any(reason in obstacle for obstacle in export_obstacles(model))
    with pytest.raises(UserError, match="anyres and anyres_max_N"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
