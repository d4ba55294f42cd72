"""Read what a folder of the original LLaVA code consists of."""

import ast
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from vlm_sft.config.finished_files import (
    ONE_CROP,
    WHERE,
    FinishedModel,
    Weights,
    read_object,
    refuse_quantized,
)
from vlm_sft.errors import UserError
from vlm_sft.utils.reading import read_json

ORIGINAL_LANGUAGE_MODELS: Final[Mapping[str, str]] = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
"""Language model of transformers by the `model_type` of original LLaVA folders."""


def original_language_model(folder: Path) -> str | None:
    """Return the `model_type` in transformers of the language model of an original LLaVA folder.

    Returns:
        None for any other folder.
    """
    try:
        tree = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    is_original = isinstance(tree, dict) and "mm_vision_tower" in tree
    return ORIGINAL_LANGUAGE_MODELS.get(str(tree.get("model_type"))) if is_original else None


def read_original(name: str, folder: Path, tree: Mapping[str, Any]) -> FinishedModel:
    """Return the description of a folder of the original LLaVA code.

    Args:
        name: The folder or hub name.
        folder: Local folder with its small files.
        tree: Its `config.json`.

    Raises:
        UserError: It is of a model that cannot be loaded.
    """
    weights = _original_weights(folder, tree)
    if weights == "full":  # others name a language model that is not quantized
        refuse_quantized(name, tree)
    _refuse_unknown_features(name, tree)
    tiled = tree.get("image_aspect_ratio") == "anyres"
    crop_size, tiling = _tiling(name, tree) if tiled else (None, ONE_CROP)
    settings = {
        **tiling,
        "vision_tower.name": tree.get("mm_vision_tower") or tree.get("vision_tower"),
        "vision_tower.feature_layers": [int(tree.get("mm_vision_select_layer", -2))],
        "vision_tower.feature_select": tree.get("mm_vision_select_feature") or "patch",
        "projector_type": tree.get("mm_projector_type") or "linear",
        "language_model.name": name,
    }
    elsewhere = {"vision_tower.name"}
    if weights != "full":
        settings["language_model.name"] = _base_language_model(folder, tree, weights)
        elsewhere.add("language_model.name")
        if has_tokenizer(folder):
            settings["language_model.tokenizer"] = name
    return FinishedModel(
        name,
        folder,
        layout="original",
        weights=weights,
        settings=settings,
        elsewhere=frozenset(elsewhere),
        image_aspect="pad" if tree.get("image_aspect_ratio") in ("pad", "anyres") else "crop",
        crop_size=crop_size,
    )


def _tiling(name: str, tree: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """Return the side of a crop in pixels and the settings of `model.image_tiling`.

    The configuration states the sizes of canvases, not of crops: a crop is the largest square of
    which every canvas consists.

    Raises:
        UserError: `image_grid_pinpoints` cannot be read.
    """
    pinpoints = tree.get("image_grid_pinpoints")
    if isinstance(pinpoints, str):  # as the training script was given it
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError):
            pinpoints = None
    is_list = isinstance(pinpoints, (list, tuple)) and all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and all(isinstance(side, int) and side > 0 for side in pair)
        for pair in pinpoints
    )
    if not is_list or not pinpoints:
        raise UserError(
            f"{WHERE}: {name} has image_grid_pinpoints {tree.get('image_grid_pinpoints')!r}, "
            "expected pairs of width and height in pixels, such as [[336, 672], [672, 336]]"
        )
    crop_size = math.gcd(*(side for pair in pinpoints for side in pair))
    grids = [[height // crop_size, width // crop_size] for width, height in pinpoints]
    return crop_size, {"image_tiling.layout": "anyres", "image_tiling.grids": grids}


def _original_weights(folder: Path, tree: Mapping[str, Any]) -> Weights:
    if (folder / "adapter_config.json").exists():
        return "lora"
    projector_alone = (folder / "mm_projector.bin").exists() or tree.get("tune_mm_mlp_adapter")
    files = [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*.bin*")]
    return "projector" if projector_alone and not files else "full"


def _base_language_model(folder: Path, tree: Mapping[str, Any], weights: Weights) -> str | None:
    """Return where an original folder says that its language model is."""
    named = tree.get("_name_or_path")
    if weights == "lora":
        adapter = read_object(folder / "adapter_config.json", str(folder))
        named = adapter.get("base_model_name_or_path") or named
    return str(named) if named else None


def _refuse_unknown_features(name: str, tree: Mapping[str, Any]) -> None:
    if tree.get("model_type") not in ORIGINAL_LANGUAGE_MODELS:
        raise UserError(
            f"{WHERE}: {name} has model_type {tree.get('model_type')!r}, expected one of "
            f"{', '.join(ORIGINAL_LANGUAGE_MODELS)}"
        )
    for key, allowed in _ORIGINAL_VALUES.items():
        if tree.get(key) not in allowed:
            shown = ", ".join(repr(value) for value in allowed if value is not None)
            raise UserError(
                f"{WHERE}: {name} has {key} {tree[key]!r}, which is not supported; expected {shown}"
            )
    tiled = tree.get("image_aspect_ratio") == "anyres"
    if tiled != (tree.get("mm_patch_merge_type") == "spatial_unpad"):
        raise UserError(
            f"{WHERE}: {name} has image_aspect_ratio {tree.get('image_aspect_ratio')!r} with "
            f"mm_patch_merge_type {tree.get('mm_patch_merge_type')!r}, which is not supported; "
            "expected 'anyres' with 'spatial_unpad', or 'pad' or 'square' with 'flat'"
        )


_ORIGINAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "mm_use_im_start_end": (None, False),
    "mm_use_im_patch_token": (None, False),
    "mm_patch_merge_type": (None, "flat", "spatial_unpad"),
    "mm_resampler_type": (None,),
    "image_aspect_ratio": (None, "square", "pad", "anyres"),
    "mm_vision_select_feature": (None, "patch", "cls_patch"),
}
"""Values of original configurations that are supported; None: the key is absent."""


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder contains a tokenizer."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
