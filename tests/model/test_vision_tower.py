import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModel

from tests.model.tiny import CLIP, OPEN_CLIP, VIT, images
from tests.rounding import assert_near, terms_of
from vlm_sft.config.schema import VisionTowerConfig
from vlm_sft.errors import UserError
from vlm_sft.export.clip_weights import clip_from_open_clip
from vlm_sft.model.build import build_vision_tower
from vlm_sft.model.vision_tower import VisionTower

VIT_TIMM = {"architecture": "vit_tiny_patch16_224", "depth": 3, "img_size": 32}
NET = {"architecture": "resnet18"}


def tower(seed: int = 3, dtype: torch.dtype = torch.float32, **keys: Any) -> VisionTower:
    return build_vision_tower(VisionTowerConfig(**keys), dtype=dtype, seed=seed)


def kind(model_type: str, **more: Any) -> dict[str, Any]:
    return {"library": "transformers", "config": {"model_type": model_type, **VIT, **more}}


@pytest.mark.parametrize(
    ("keys", "tokens", "width"),
    [
        (CLIP, 4, 32),
        ({**CLIP, "feature_select": "cls_patch"}, 5, 32),
        ({**CLIP, "feature_layers": [-2, 0, 3]}, 4, 96),
        ({**CLIP, "image_size": 42}, 9, 32),
        ({**CLIP, "image_size": 42, "grid_pool": 2}, 4, 32),
        (kind("siglip_vision_model"), 4, 32),
        ({**kind("siglip_vision_model"), "image_size": 56}, 16, 32),
        (kind("dinov2"), 4, 32),
        (kind("dinov2_with_registers", num_register_tokens=3), 4, 32),
        ({**kind("dinov2_with_registers"), "feature_select": "cls_patch"}, 9, 32),
        (OPEN_CLIP, 4, 32),
        ({**OPEN_CLIP, "image_size": 42}, 9, 32),
        ({"library": "timm", "config": VIT_TIMM}, 4, 192),
        ({"library": "timm", "config": VIT_TIMM, "image_size": 48}, 9, 192),
        ({"library": "timm", "config": NET, "feature_layers": [-1], "image_size": 64}, 4, 512),
        ({"library": "timm", "config": NET, "feature_layers": [-3], "image_size": 64}, 16, 256),
    ],
)
def test_every_tower_gives_images_by_tokens_by_width(
    keys: dict[str, Any], tokens: int, width: int
) -> None:
    made = tower(**keys)
    features = made(images(2, size=made.image_spec.size))
    assert features.shape == (2, tokens, width) == (2, made.num_tokens, made.width)
    assert not features.requires_grad


def test_a_siglip_name_of_open_clip_is_held_through_its_timm_trunk() -> None:
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "", "image_size": 32}
    made = tower(library="open_clip", config={"vision_cfg": {**vision, "timm_pool": "avg"}})
    assert (made.image_spec.size, made.num_tokens, made.width) == (32, 4, 192)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_the_same_clip_weights_through_open_clip_and_transformers_give_the_same_features(
    quick_gelu: bool, tmp_path: Path
) -> None:
    config = {**OPEN_CLIP["config"], "quick_gelu": quick_gelu}
    layers = [0, 1, -2, -1]
    keys = {"feature_layers": layers, "feature_select": "cls_patch"}
    ours = tower(library="open_clip", config=config, **keys)
    converted = clip_from_open_clip(ours.encoder)
    assert converted.config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")
    converted.save_pretrained(tmp_path)
    theirs = tower(library="transformers", name=str(tmp_path), **keys)
    pixels = images(2)
    terms = terms_of(converted, length=5)
    assert_near(ours(pixels), theirs(pixels), terms)
    with torch.no_grad():
        states = converted(theirs.normalized(pixels), output_hidden_states=True).hidden_states
        expected = torch.cat([states[layer] for layer in layers], dim=-1)
    assert_near(theirs(pixels), expected, terms)


def test_the_converted_encoder_ends_in_the_same_image_embedding() -> None:
    made = tower(**OPEN_CLIP)
    visual, pixels = made.encoder, made.normalized(images(2))
    with torch.no_grad():
        converted = clip_from_open_clip(visual)
        pooled = converted(pixels).pooler_output @ visual.proj
        assert_near(pooled, visual(pixels), terms_of(converted, length=5) + visual.proj.shape[0])


def test_an_open_clip_file_of_weights_loads_by_name(tmp_path: Path) -> None:
    name = "tiny-test-clip"
    (tmp_path / f"{name}.json").write_text(
        json.dumps(
            {
                **OPEN_CLIP["config"],
                "text_cfg": {"width": 8, "heads": 1, "layers": 1, "vocab_size": 8},
            }
        )
    )
    open_clip.add_model_config(tmp_path / f"{name}.json")
    model = open_clip.create_model(name)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    made = tower(library="open_clip", name=name, weights=str(tmp_path / "weights.safetensors"))
    assert torch.equal(made.encoder.conv1.weight, model.visual.conv1.weight)
    assert made.image_spec.mean == open_clip.OPENAI_DATASET_MEAN


def test_a_whole_clip_folder_gives_its_vision_part_and_its_own_normalisation(
    tmp_path: Path,
) -> None:
    text = {**VIT, "vocab_size": 30, "max_position_embeddings": 8, "eos_token_id": 2}
    text["bos_token_id"] = text["pad_token_id"] = 1
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=VIT, projection_dim=16))
    whole.save_pretrained(tmp_path)
    CLIPImageProcessor(
        image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=2
    ).save_pretrained(tmp_path)
    made = tower(library="transformers", name=str(tmp_path))
    assert isinstance(made.encoder, CLIPVisionModel)
    assert made.image_spec.mean == (0.1, 0.2, 0.3)
    assert made.image_spec.std == (0.4, 0.5, 0.6)
    assert (made.image_spec.size, made.image_spec.interpolation) == (28, "bilinear")
    with torch.no_grad():
        pixels = made.normalized(images(1))
        expected = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    assert (made(images(1)) - expected[:, 1:]).abs().max() <= 1e-6
    CLIPImageProcessor(do_rescale=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.vision_tower\.name: .* has do_rescale False"):
        tower(library="transformers", name=str(tmp_path))


def test_a_folder_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    encoder = tower(**CLIP).encoder
    encoder.save_pretrained(tmp_path)
    state = encoder.state_dict()
    dropped = next(key for key in state if "layers.1" in key)
    save_file({k: v for k, v in state.items() if k != dropped}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lacks 1 tensors"):
        tower(library="transformers", name=str(tmp_path))


@pytest.mark.parametrize("form", ["safetensors", "pth", "folder"])
def test_timm_weights_load_from_a_file_and_from_a_folder_as_timm_saves(
    form: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=7).eval()
    keys: dict[str, Any] = {"library": "timm", "feature_layers": [-1], "image_size": 64}
    if form == "safetensors":
        save_file(model.state_dict(), tmp_path / "w.safetensors")
        keys |= {"name": "resnet18", "weights": str(tmp_path / "w.safetensors")}
    elif form == "pth":
        torch.save(model.state_dict(), tmp_path / "w.pth")
        keys |= {"name": "resnet18", "weights": str(tmp_path / "w.pth")}
    else:
        timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
        keys |= {"name": str(tmp_path)}
    made = tower(**keys)
    with torch.no_grad():
        pixels = made.normalized(images(1, size=64))
        expected = model.forward_features(pixels).flatten(2).transpose(1, 2)
    # Convolutions in another memory layout add up in another order.
    assert_near(made(images(1, size=64)), expected, terms_of(model, length=0))
    assert made.image_spec.mean == (0.485, 0.456, 0.406)


def test_timm_vit_states_are_numbered_like_hidden_states() -> None:
    made = tower(library="timm", config=VIT_TIMM, feature_layers=[1, 2])
    with torch.no_grad():
        blocks = made.encoder.forward_intermediates(
            made.normalized(images(1, size=32)),
            indices=[0, 1],
            intermediates_only=True,
            output_fmt="NLC",
        )
    expected = torch.cat(blocks, dim=-1)
    assert_near(made(images(1, size=32)), expected, terms_of(made.encoder, length=4))


def test_a_feature_map_is_read_row_by_row_and_pooled_as_a_square() -> None:
    keys: dict[str, Any] = {"library": "timm", "config": NET, "feature_layers": [-1]}
    pixels = images(1, size=128)
    whole = tower(**keys, image_size=128)
    square = whole.encoder.forward_features(whole.normalized(pixels))
    terms = terms_of(whole.encoder, length=0)
    assert_near(whole(pixels)[0, 1], square[0, :, 0, 1], terms)
    pooled = tower(**keys, image_size=128, grid_pool=2)(pixels)
    assert_near(pooled[0, 1], square[0, :, :2, 2:].mean(dim=(1, 2)), terms)


def test_train_mode_never_reaches_a_tower_and_no_gradient_leaves_it() -> None:
    made = tower(library="timm", config=NET, feature_layers=[-1], image_size=64)
    before = made.digest()
    made.train()
    features = made(images(2, size=64))
    assert not any(module.training for module in made.modules())
    assert not any(parameter.requires_grad for parameter in made.parameters())
    assert not features.requires_grad
    assert made.digest() == before


def test_a_tower_normalises_bytes_itself_and_takes_nothing_else() -> None:
    made = tower(**CLIP)
    red, green, blue = made.normalized(
        torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    ).flatten()
    assert red == pytest.approx((1 - 0.48145466) / 0.26862954)
    assert green == pytest.approx(-0.4578275 / 0.26130258)
    assert blue == pytest.approx((0.2 - 0.40821073) / 0.27577711)
    half = build_vision_tower(VisionTowerConfig(**CLIP), dtype=torch.bfloat16)
    pixels = images(2)
    assert torch.equal(half.normalized(pixels), made.normalized(pixels).bfloat16())
    assert half(pixels).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="uint8"):
        made(torch.zeros(1, 3, 28, 28))


def test_layers_after_the_deepest_wanted_one_are_not_run() -> None:
    made = tower(**{**CLIP, "feature_layers": [1]})
    calls: list[int] = []
    for index, layer in enumerate(made.encoder.encoder.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    made(images(1))
    assert calls == [0]


def test_random_towers_are_drawn_from_the_seed_alone() -> None:
    torch.manual_seed(11)
    first = tower(**CLIP, seed=5).digest()
    state = torch.get_rng_state()
    assert tower(**CLIP, seed=5).digest() == first
    assert tower(**CLIP, seed=6).digest() != first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("keys", [CLIP, {"library": "timm", "config": NET, "feature_layers": [-1]}])
def test_a_tower_is_held_in_the_dtype_asked_for(keys: dict[str, Any]) -> None:
    made = tower(**{**keys, "image_size": 28}, dtype=torch.bfloat16)
    assert made(images(1)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**CLIP, "feature_layers": [4]}, "feature_layers: found 4, expected -4 to 3"),
        ({**CLIP, "grid_pool": 3}, "grid_pool: found 3, expected at most 2"),
        ({**kind("siglip_vision_model"), "feature_select": "cls_patch"}, "encoder has none"),
        (kind("vit"), "model_type: found 'vit', expected one of clip_vision_model"),
        (
            {"library": "timm", "config": NET, "feature_layers": [-1, 0], "image_size": 64},
            "only layers of one grid",
        ),
        ({"library": "timm", "config": {"architecture": "resnet19"}}, "did you mean 'resnet"),
        ({"library": "timm", "config": {}}, "key 'architecture' is missing"),
        ({"library": "timm", "name": "resnet18", "weights": "/no/w.pth"}, "no such file"),
        ({"library": "open_clip", "name": "ViT-L14", "weights": "x"}, "did you mean 'ViT-L-14'"),
        ({"library": "open_clip", "name": "ViT-L-14"}, "needs a pretrained tag or a file"),
        (
            {"library": "open_clip", "name": "ViT-L-14", "weights": "openai"},
            "trained with QuickGELU .* use 'ViT-L-14-quickgelu'",
        ),
        ({"library": "open_clip", "config": {"vision_cfg": {"layer": 2}}}, "mean 'layers'"),
        ({"library": "transformers", "name": "/no/such"}, "no such folder '/no/such'"),
        ({"library": "transformers", "name": "./x", "weights": "y"}, "remove `weights`"),
        ({"library": "timm"}, "exactly one of `name` and `config`"),
    ],
)
def test_a_wrong_tower_is_told_in_one_sentence(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        tower(**keys)
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused_with_counts(tmp_path: Path) -> None:
    save_file({"stem.weight": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="tensors missing and 1 unknown"):
        tower(library="timm", name="resnet18", weights=str(tmp_path / "w.safetensors"))


def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match=r"torch cannot read .* as weights"):
        tower(library="timm", name="resnet18", weights=str(tmp_path / "w.pth"))


def test_a_layer_scaled_open_clip_vit_has_no_place_in_transformers_clip() -> None:
    vision = {**OPEN_CLIP["config"]["vision_cfg"], "ls_init_value": 0.1}
    encoder = tower(library="open_clip", config={"vision_cfg": vision}).encoder
    with pytest.raises(UserError, match="layer scale"):
        clip_from_open_clip(encoder)
