"""Vision encoders of transformers: CLIP, SigLIP, DINOv2, by folder, hub name or configuration."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    BaseImageProcessor,
    CLIPVisionModel,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from vlm_sft.config.finished import read_finished
from vlm_sft.config.finished_transformers import (
    TRANSFORMERS_CLASSES,
    image_processor,
    require_reproducible,
)
from vlm_sft.data.images import ImageSpec
from vlm_sft.errors import UserError
from vlm_sft.model.finished import load_encoder
from vlm_sft.model.pretrained import load_pretrained, require_all_tensors
from vlm_sft.model.towers.base import BlockStates, LoadedEncoder
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.model_folders import refuse_remote_kernels, report_unused_code

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

_VISION_PART: Final = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
"""The vision part of a checkpoint with two towers."""


_CLASSES: Final[dict[str, Any]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "dinov2": AutoModel,
    "dinov2_with_registers": AutoModel,
    "internvl_vision": AutoModel,
}
_PREFIX_TOKENS: Final = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1}
_NORMALIZATION: Final = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov2_with_registers": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "internvl_vision": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
}
_RESAMPLING: Final[dict[int, Interpolation]] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}


def load(
    *,
    name: str | None,
    config: Mapping[str, Any] | None,
    weights: str | None,
    image_size: int | None,
) -> LoadedEncoder:
    """Load or build an encoder; random weights come from the global random generator.

    Args:
        name: A folder or a hub name; None builds an encoder from `config`.
        config: Fields of the encoder's configuration, with its `model_type`.
        weights: Must be None: transformers keeps weights in the folder.
        image_size: Side of the images in pixels; None: as the encoder was trained.

    Raises:
        UserError: If the folder is missing, incomplete, or of a family that is not supported.
    """
    if weights is not None:
        raise UserError(
            "model.vision_tower.weights: transformers towers take their weights from the folder "
            "in model.vision_tower.name; remove `weights`"
        )
    if config is not None:
        encoder, preprocessing = _random(dict(config)), dict[str, Any]()
    else:
        assert name is not None
        encoder, preprocessing = _pretrained(name), _preprocessing(name)
        require_reproducible("model.vision_tower.name", name, preprocessing)
    encoder_config = encoder.config
    kind = encoder_config.model_type
    image_spec = _image_spec(kind, encoder_config, preprocessing, image_size)
    if kind in ("clip_vision_model", "siglip_vision_model"):
        resize_positions(encoder, image_spec.size)
    prefix = _PREFIX_TOKENS.get(kind, 1 + getattr(encoder_config, "num_register_tokens", 0))
    blocks = BlockStates(transformer_blocks, encoder_config.num_hidden_layers, prefix)
    return LoadedEncoder(encoder, blocks, image_spec)


def transformer_blocks(encoder: nn.Module) -> Sequence[nn.Module]:
    """Return the encoder's layers: its one module list of `num_hidden_layers` entries."""
    depth = cast(PretrainedConfig, encoder.config).num_hidden_layers
    for module in encoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise AssertionError(f"{type(encoder).__name__} has no stack of {depth} layers")


def resize_positions(encoder: PreTrainedModel, size: int) -> None:
    """Make a CLIP or SigLIP encoder take `size` x `size` images, in place.

    The position table is interpolated once (bicubic, as `interpolate_pos_encoding` of transformers
    does at every call), so that the encoder is an ordinary one of that size afterwards.

    Raises:
        UserError: If the image is smaller than a patch.
    """
    config = encoder.config
    if size == config.image_size:
        return
    if size < config.patch_size:
        raise UserError(
            f"model.vision_tower.image_size: found {size}, expected at least one patch of "
            f"{config.patch_size} pixels"
        )
    embeddings = next(m for m in encoder.modules() if hasattr(m, "interpolate_pos_encoding"))
    prefix = _PREFIX_TOKENS[config.model_type]
    tokens = (size // config.patch_size) ** 2 + prefix
    with torch.no_grad():
        row = torch.zeros(1, tokens, config.hidden_size)
        table = embeddings.interpolate_pos_encoding(row, size, size).reshape(tokens, -1)
        embeddings.position_embedding = nn.Embedding(
            tokens, config.hidden_size, _weight=table.clone()
        )
    embeddings.position_ids = torch.arange(tokens).expand((1, -1))
    embeddings.num_patches, embeddings.num_positions = tokens - prefix, tokens
    config.image_size = embeddings.image_size = size


def _random(tree: dict[str, Any]) -> PreTrainedModel:
    model_type = tree.pop("model_type", None)
    model_type = _VISION_PART.get(model_type, model_type)
    if model_type not in _CLASSES:
        raise UserError(
            f"model.vision_tower.config.model_type: found {model_type!r}, expected one of "
            f"{', '.join(_CLASSES)}"
        )
    action = f"build a {model_type} encoder"
    with library_call("transformers", "model.vision_tower.config", action):
        config = AutoConfig.for_model(model_type, **copy.deepcopy(tree))
        model_class = _CLASSES[model_type]
        if model_class is AutoModel:
            return AutoModel.from_config(config, trust_remote_code=False)
        return model_class(config)


def _pretrained(name: str) -> PreTrainedModel:
    where = "model.vision_tower.name"
    config = load_pretrained(AutoConfig.from_pretrained, name, where)
    refuse_remote_kernels(where, name, config)
    report_unused_code(where, name, config)
    if config.model_type in TRANSFORMERS_CLASSES:
        vision: PretrainedConfig = config.vision_config
        found = read_finished(name)
        return load_encoder(found, vision, _CLASSES[vision.model_type])
    kind = _VISION_PART.get(config.model_type, config.model_type)
    if kind not in _CLASSES:
        raise UserError(
            f"{where}: {name} holds a {config.model_type!r} model, expected one of "
            f"{', '.join([*_VISION_PART, *_CLASSES])}"
        )
    encoder, info = load_pretrained(
        _CLASSES[kind].from_pretrained, name, where, dtype=torch.float32, output_loading_info=True
    )
    require_all_tensors(info, where, name, f"{kind} encoder")
    return cast(PreTrainedModel, encoder)


def _preprocessing(name: str) -> dict[str, Any]:
    if Path(name).is_dir() and (found := image_processor(Path(name))):
        return found
    try:
        return cast(dict[str, Any], BaseImageProcessor.get_image_processor_dict(name)[0])
    except OSError:
        if Path(name).is_dir():
            return {}
        raise UserError(
            f"model.vision_tower.name: {name} has no preprocessor_config.json; download it "
            "into the directory of the weights"
        ) from None


def _image_spec(
    kind: str, config: PretrainedConfig, preprocessing: dict[str, Any], image_size: int | None
) -> ImageSpec:
    mean, std = _NORMALIZATION[kind]
    size = config.image_size
    if kind == "internvl_vision":  # a pair of equal numbers
        size = size[0]
    if kind.startswith("dinov2"):  # trained at 518, used at what its preprocessing crops to
        size = _side(preprocessing.get("crop_size") or preprocessing.get("size")) or size
    resample = preprocessing.get("resample", 3)
    return ImageSpec(
        size=image_size or size,
        mean=_triple(preprocessing.get("image_mean", mean)),
        std=_triple(preprocessing.get("image_std", std)),
        interpolation=_RESAMPLING[int(resample)],
    )


def _side(size: Any) -> int | None:
    if isinstance(size, dict):
        return cast("int | None", size.get("height", size.get("shortest_edge")))
    return cast("int | None", size)


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
