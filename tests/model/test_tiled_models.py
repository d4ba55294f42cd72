"""Tiled models compute what transformers' own classes compute, from the same weights and images."""

from typing import Any

import pytest
import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
)

from tests.data.layouts_for_tests import pinpoints, sizes
from tests.data.test_images import encode, photo
from tests.model.tiny import LLAMA, VIT
from vlm_sft.config.schema import (
    ImageTilingConfig,
    LanguageModelConfig,
    ModelConfig,
    VisionTowerConfig,
)
from vlm_sft.data.images import ImageCrops, read_crops
from vlm_sft.model.build import build_model
from vlm_sft.model.image_tokens import image_tokens
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IMAGE_TOKEN_ID

IMAGE_ID = 299
TOWERS = {
    "anyres": {"model_type": "clip_vision_model", **VIT},
    "anyres_max_2": {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False},
    "dynamic": {"model_type": "internvl_vision", **VIT},
}
LAYERS = {"anyres": -2, "anyres_max_2": -1, "dynamic": -1}


def config_of(layout: str) -> ModelConfig:
    return ModelConfig(
        vision_tower=VisionTowerConfig(
            library="transformers", config=TOWERS[layout], feature_layers=[LAYERS[layout]]
        ),
        image_tiling=ImageTilingConfig(layout=layout),
        projector_type="pixel_shuffle_mlp" if layout == "dynamic" else "mlp2x_gelu",
        language_model=LanguageModelConfig(
            config={**LLAMA, "max_position_embeddings": 4096}, tokenizer="bytes"
        ),
    )


def stock_of(layout: str, model: VisionLanguageModel) -> PreTrainedModel:
    """Return transformers' class with the weights of a model."""
    classes: Any = {
        "anyres": (LlavaNextConfig, LlavaNextForConditionalGeneration),
        "anyres_max_2": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration),
        "dynamic": (InternVLConfig, InternVLForConditionalGeneration),
    }
    options: dict[str, Any] = {
        "vision_config": TOWERS[layout],
        "text_config": LlamaConfig(**{**LLAMA, "max_position_embeddings": 4096}),
        "vision_feature_layer": LAYERS[layout],
        "vision_feature_select_strategy": "full" if layout == "anyres_max_2" else "default",
        "tie_word_embeddings": False,
    }
    if layout == "dynamic":
        options |= {"image_token_id": IMAGE_ID, "image_seq_length": 1}
    else:
        options |= {
            "image_token_index": IMAGE_ID,
            "image_grid_pinpoints": pinpoints(model.layout_rule),
        }
    if layout == "anyres_max_2":
        options |= {"vision_aspect_ratio": layout, "video_token_index": 298}
    make_config, make_model = classes[layout]
    stock = make_model(make_config(**options)).eval()
    state = {
        f"model.vision_tower.{k}": v for k, v in model.vision_tower.encoder.state_dict().items()
    }
    state |= {
        f"model.multi_modal_projector.{k}": v
        for k, v in model.multi_modal_projector.state_dict().items()
    }
    if model.image_newline is not None:
        state["model.image_newline"] = model.image_newline
    for key, value in model.language_model.state_dict().items():
        name = f"model.language_model.{key.removeprefix('model.')}"
        state[key if key.startswith("lm_head") else name] = value
    stock.load_state_dict(state, strict=True)
    return stock


@pytest.fixture(scope="module", params=sorted(TOWERS))
def pair(request: pytest.FixtureRequest) -> tuple[str, VisionLanguageModel, PreTrainedModel]:
    layout = request.param
    model = build_model(config_of(layout), dtype=torch.float32, seed=3).eval()
    return layout, model, stock_of(layout, model)


def load(model: VisionLanguageModel, width: int, height: int, count: int = 1) -> ImageCrops:
    """Return a test image as a model takes it."""
    spec = model.vision_tower.image_spec
    data = encode(photo(width, height, seed=width), "PNG")
    return read_crops(data, model.layout_rule, spec, "pad", "exact", num_images=count)


def inputs_of(
    layout: str, model: VisionLanguageModel, images: list[ImageCrops], shapes: list[tuple[int, int]]
) -> dict[str, Any]:
    """Return the images as transformers takes them: crops filled up with zeros, and sizes."""
    normalized = [model.vision_tower.normalized(image.pixels) for image in images]
    if layout == "dynamic":
        return {"pixel_values": torch.cat(normalized)}
    most = max(map(len, normalized))
    filled = [
        torch.cat([crops, crops.new_zeros(most - len(crops), *crops.shape[1:])])
        for crops in normalized
    ]
    found: dict[str, Any] = {
        "pixel_values": torch.stack(filled),
        "image_sizes": torch.tensor([(height, width) for width, height in shapes]),
    }
    if layout == "anyres_max_2":
        found["batch_num_images"] = torch.tensor([len(images)])
    return found


@torch.no_grad()
def test_features_of_every_size_are_those_of_transformers(
    pair: tuple[str, VisionLanguageModel, PreTrainedModel],
) -> None:
    layout, model, stock = pair
    for width, height in sizes():
        if width * height > 30_000:
            continue  # `test_image_tokens` has all sizes; here the images are decoded and encoded
        image = load(model, width, height)
        tokens = image_tokens(
            model.encode_images(image.pixels), [image.layout], model.image_newline
        )
        inputs = inputs_of(layout, model, [image], [(width, height)])
        found = stock.model.get_image_features(**inputs, return_dict=True).pooler_output
        expected = found.flatten(0, 1) if layout == "dynamic" else found[0]
        assert tokens.shape == expected.shape
        assert (tokens - expected).abs().max() <= 1e-5, (width, height)


@torch.no_grad()
@pytest.mark.parametrize(
    "shapes",
    [[(161, 184)], [(700, 840)], [(1, 2000)], [(56, 28)], [(90, 40), (30, 100), (28, 28)]],
)
def test_logits_are_those_of_transformers(
    pair: tuple[str, VisionLanguageModel, PreTrainedModel], shapes: list[tuple[int, int]]
) -> None:
    layout, model, stock = pair
    images = [load(model, *shape, count=len(shapes)) for shape in shapes]
    layouts = [image.layout for image in images]
    ids = [5, 6]
    for number, image_layout in enumerate(layouts):
        ids += [IMAGE_TOKEN_ID] * image_layout.num_tokens + [7 + number]
    row = torch.tensor([ids])
    pixels = torch.cat([image.pixels for image in images])
    logits = model.logits(row, pixel_values=pixels, layouts=layouts)
    stock_ids = row.masked_fill(row == IMAGE_TOKEN_ID, IMAGE_ID)
    inputs = inputs_of(layout, model, images, shapes)
    expected = stock(input_ids=stock_ids, **inputs).logits
    assert (logits - expected).abs().max() <= 1e-4
