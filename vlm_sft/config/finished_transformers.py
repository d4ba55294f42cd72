"""Read what a folder of transformers' LLaVA, LLaVA-NeXT, LLaVA-OneVision or InternVL has."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from vlm_sft.config.fields import ImageAspect
from vlm_sft.config.finished_files import ONE_CROP, WHERE, FinishedModel, is_list_of
from vlm_sft.errors import UserError
from vlm_sft.utils.reading import read_json

TRANSFORMERS_CLASSES: Final[Mapping[str, str]] = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}
"""Classes of transformers that can be loaded, by `model_type`."""

_TOWERS: Final = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1}
"""Vision towers of LLaVA's classes that can be loaded, and their number of class tokens."""

_INTERNVIT: Final = "internvl_vision"
"""The vision tower of InternVL's class, which takes no other."""

_CLIP_336: Final = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_VICUNA: Final = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096}
_CROP_336: Final = {
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
}
PUBLISHED: Final[Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]] = {
    "llava-hf/llava-1.5-7b-hf": (
        {
            "model_type": "llava",
            "vision_config": _CLIP_336,
            "text_config": {
                **_VICUNA,
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
            },
        },
        _CROP_336,
    ),
    "llava-hf/llava-1.5-13b-hf": (
        {
            "model_type": "llava",
            "vision_config": _CLIP_336,
            "text_config": {
                **_VICUNA,
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_hidden_layers": 40,
                "num_attention_heads": 40,
                "num_key_value_heads": 40,
            },
        },
        _CROP_336,
    ),
}
"""Configuration and image processor of hub repositories, to plan without a download."""


def read_released(
    name: str, folder: Path, tree: Mapping[str, Any], processor: Mapping[str, Any]
) -> FinishedModel:
    """Return the description of a folder of transformers.

    Args:
        name: The folder or hub name.
        folder: Local folder with its small files.
        tree: Its `config.json`.
        processor: The settings of its image processor.

    Raises:
        UserError: It is of a model that cannot be loaded.
    """
    vision = dict(tree.get("vision_config") or {})
    is_internvl = tree.get("model_type") == "internvl"
    read_parts = _internvl_parts if is_internvl else _llava_parts
    parts = read_parts(name, vision, tree, processor)
    _require_same_size(name, vision, processor)
    require_reproducible(WHERE, name, processor)
    is_tiled = parts["image_tiling.layout"] != "none"
    return FinishedModel(
        name,
        folder,
        layout="transformers",
        weights="full",
        settings={
            "vision_tower.name": name,
            "language_model.name": name,
            "language_model.tokenizer": None,
            **parts,
        },
        elsewhere=frozenset(),
        # A tiled model has only undivided images to make square; LLaVA-OneVision's are padded.
        image_aspect="pad" if is_tiled else _aspect(processor),
    )


def _llava_parts(
    name: str, vision: Mapping[str, Any], tree: Mapping[str, Any], _processor: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of LLaVA, LLaVA-NeXT and LLaVA-OneVision."""
    kind = vision.get("model_type", "clip_vision_model")
    if kind not in _TOWERS:
        raise UserError(
            f"{WHERE}: {name} has the vision tower {kind!r}, expected one of {', '.join(_TOWERS)}"
        )
    if isinstance(vision.get("image_size"), list):
        raise UserError(
            f"{WHERE}: {name} has vision_config.image_size {vision['image_size']!r}, expected a "
            "whole number"
        )
    onevision = tree.get("model_type") == "llava_onevision"
    layers = tree.get("vision_feature_layer", -1 if onevision else -2)
    return {
        **_tiling(name, vision, tree),
        "vision_tower.feature_layers": [layers] if isinstance(layers, int) else list(layers),
        "vision_tower.feature_select": _feature_select(name, kind, tree),
        "projector_type": _projector_type(name, tree),
    }


def _tiling(name: str, vision: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `model.image_tiling`."""
    kind = tree.get("model_type", "llava")
    if kind == "llava":
        return dict(ONE_CROP)
    layout = "anyres"
    if kind == "llava_onevision":
        layout = str(tree.get("vision_aspect_ratio", "anyres_max_9"))
    if not layout.startswith("anyres"):
        raise UserError(
            f"{WHERE}: {name} has vision_aspect_ratio {layout!r}, expected anyres_max_9"
        )
    pinpoints, size = tree.get("image_grid_pinpoints"), vision.get("image_size")
    settings: dict[str, Any] = {"image_tiling.layout": layout}
    if pinpoints and size:
        if any(side % size for pair in pinpoints for side in pair):
            raise UserError(
                f"{WHERE}: {name} has image_grid_pinpoints that are not multiples of {size}, the "
                "size of its vision tower's images"
            )
        settings["image_tiling.grids"] = [[h // size, w // size] for h, w in pinpoints]
    return settings


def _internvl_parts(
    name: str, vision: Mapping[str, Any], tree: Mapping[str, Any], processor: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the settings of InternVL, whose processor divides images whatever its files say.

    Raises:
        UserError: A value of its configuration is another than that of the connector or the tower.
    """
    layer = tree.get("vision_feature_layer", -1)
    mean_pooling = vision.get("use_mean_pooling", True)
    found: Mapping[str, tuple[Any, Any]] = {
        "vision_config.model_type": (vision.get("model_type", _INTERNVIT), _INTERNVIT),
        "vision_feature_select_strategy": (
            tree.get("vision_feature_select_strategy", "default"),
            "default",
        ),
        "downsample_ratio": (tree.get("downsample_ratio", 0.5), 0.5),
        "projector_hidden_act": (tree.get("projector_hidden_act", "gelu"), "gelu"),
        # Without it there is a norm after the last layer, which is no hidden state.
        "vision_config.use_mean_pooling": (mean_pooling or layer != -1, True),
    }
    for key, (value, expected) in found.items():
        if value != expected:
            raise UserError(
                f"{WHERE}: {name} has {key} {value!r}, which is not supported; expected "
                f"{expected!r}"
            )
    if not isinstance(layer, int):
        raise UserError(
            f"{WHERE}: {name} has vision_feature_layer {layer!r}, expected one layer, such as -1"
        )
    for key in ("image_mean", "image_std"):
        if processor and key not in processor:  # the defaults of its image processors differ
            raise UserError(
                f"{WHERE}: the image processor of {name} has no {key}; copy the folder again from "
                "where the model is from"
            )
    return {
        "image_tiling.layout": "dynamic",
        "image_tiling.min_tiles": processor.get("min_patches", 1),
        "image_tiling.max_tiles": processor.get("max_patches", 12),
        "vision_tower.feature_layers": [layer],
        "vision_tower.feature_select": "patch",
        "projector_type": "pixel_shuffle_mlp",
    }


def _require_same_size(name: str, vision: Mapping[str, Any], processor: Mapping[str, Any]) -> None:
    """Refuse an image processor whose images are not those of the vision tower.

    Raises:
        UserError: It is missing, or their sizes differ.
    """
    if not processor:
        raise UserError(
            f"{WHERE}: {name} has no preprocessor_config.json; copy it from where the model is from"
        )
    size: Any = processor.get("crop_size") or processor.get("size")
    side = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    wanted = vision.get("image_size", side)
    if isinstance(wanted, list):  # InternVL's height and width
        wanted = wanted[0] if wanted == wanted[:1] * 2 else wanted
    if side != wanted and vision.get("model_type") != "dinov2":  # DINOv2 takes any size
        raise UserError(
            f"{WHERE}: the image processor of {name} makes images of {side} pixels, but its vision "
            f"tower takes {wanted}; copy the folder again from where the model is from"
        )


def require_reproducible(where: str, name: str, processor: Mapping[str, Any]) -> None:
    """Refuse an image processor with settings that give other pixel values than training's.

    Args:
        where: The setting that names its folder.
        name: The folder or hub name.
        processor: Its settings.

    Raises:
        UserError: Names the setting.
    """
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(key, True) not in (True, None):
            _refuse_setting(where, name, processor, key, "true")
    factor = processor.get("rescale_factor")
    if factor is not None and not (
        _is_finite(factor) and math.isclose(factor * 255, 1, rel_tol=1e-4)
    ):
        _refuse_setting(where, name, processor, "rescale_factor", "1/255")
    for key in ("image_mean", "image_std"):
        values = processor.get(key, [0.5, 0.5, 0.5])
        if not (is_list_of(_is_finite, values) and len(values) == 3):
            _refuse_setting(where, name, processor, key, "three finite numbers")
        if key == "image_std" and min(values) <= 0:
            _refuse_setting(where, name, processor, key, "three numbers above 0")
    if "resample" in processor and processor["resample"] not in range(4):
        _refuse_setting(where, name, processor, "resample", "a number from 0 to 3")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_setting(
    where: str, name: str, processor: Mapping[str, Any], key: str, expected: str
) -> NoReturn:
    raise UserError(
        f"{where}: the image processor of {name} has {key} {processor[key]!r}, expected "
        f"{expected}; other values cannot be reproduced in training"
    )


def _feature_select(name: str, kind: str, tree: Mapping[str, Any]) -> str:
    onevision = tree.get("model_type") == "llava_onevision"
    strategy = tree.get("vision_feature_select_strategy", "full" if onevision else "default")
    if strategy not in ("default", "full"):
        raise UserError(
            f"{WHERE}: {name} has vision_feature_select_strategy {strategy!r}, expected 'default' "
            "or 'full'"
        )
    if _TOWERS[kind]:
        return "patch" if strategy == "default" else "cls_patch"
    if strategy == "default":
        raise UserError(
            f"{WHERE}: {name} drops the first token of its vision tower "
            f"(vision_feature_select_strategy 'default'), but {kind} has no class token: that is "
            "the first patch, which training keeps; set the strategy to 'full' in its config.json"
        )
    return "patch"


def _projector_type(name: str, tree: Mapping[str, Any]) -> str:
    activation = tree.get("projector_hidden_act", "gelu")
    if activation not in ("gelu", "linear") or not tree.get("multimodal_projector_bias", True):
        raise UserError(
            f"{WHERE}: {name} has a projector with activation {activation!r} and "
            f"multimodal_projector_bias {tree.get('multimodal_projector_bias', True)}, expected "
            "'gelu' or 'linear', with biases"
        )
    return "mlp2x_gelu" if activation == "gelu" else "linear"


def image_processor(folder: Path) -> dict[str, Any]:
    """Return the settings of a folder's image processor; empty if it has none.

    Raises:
        UserError: A file with them cannot be read.
    """
    for file, key in (  # in this order in transformers
        ("processor_config.json", "image_processor"),
        ("preprocessor_config.json", None),
    ):
        try:
            tree = read_json(folder / file)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{folder / file}: cannot be read ({error})") from None
        if not isinstance(tree, dict):
            raise UserError(f"{folder / file}: is not a JSON object; copy it again")
        found = tree if key is None else tree.get(key)
        if isinstance(found, dict) and ("image_mean" in found or "size" in found):
            return cast(dict[str, Any], found)
    return {}


def _aspect(processor: Mapping[str, Any]) -> ImageAspect | None:
    size, crop = (_shorter(processor.get(key)) for key in ("size", "crop_size"))
    if processor.get("do_center_crop") and None not in (size, crop) and size != crop:
        return None  # cuts off a margin
    if processor.get("do_pad"):
        return "pad"
    keeps_aspect = isinstance(processor.get("size"), int) or "shortest_edge" in (
        processor["size"] if isinstance(processor.get("size"), dict) else {}
    )
    return "crop" if keeps_aspect and processor.get("do_center_crop") else None


def _shorter(size: Any) -> Any:
    return size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
