"""Read what a finished vision-language model consists of, from the JSON files of its folder.

A finished model is a folder of transformers' LLaVA, LLaVA-NeXT or LLaVA-OneVision, or of the
original LLaVA code (full weights, a projector alone, or LoRA adapters). `model.from_checkpoint`
names one; `resolve` derives the other settings of the model from it.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NoReturn, cast

from pydantic import ValidationError

from vlm_sft.config.fields import ImageAspect
from vlm_sft.config.schema import ModelConfig, RunConfig, means_folder
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.hub import use_cache_if_hub_unreachable
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.reading import read_json

WHERE: Final = "model.from_checkpoint"

TRANSFORMERS_CLASSES: Final[Mapping[str, str]] = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
}
"""Classes of transformers that can be loaded, by `model_type`."""

ORIGINAL_LANGUAGE_MODELS: Final[Mapping[str, str]] = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
"""Language model of transformers by the `model_type` of original LLaVA folders."""

_TOWERS: Final = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1}
"""Vision towers of transformers that can be loaded, and their number of class tokens."""

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

_SMALL_FILES: Final = ["*.json", "*.jinja", "*.model", "*.txt"]
"""Files of a hub repository that say what it contains; weights are fetched when they are loaded."""

Layout = Literal["transformers", "original"]
Weights = Literal["full", "projector", "lora"]


@dataclass(frozen=True)
class FinishedModel:
    """A finished vision-language model, as far as its JSON files describe it.

    Attributes:
        name: The folder or hub name.
        folder: Local folder with its small files.
        layout: Whose folder it is: that of transformers, or of the original LLaVA code.
        weights: What an original folder contains: all weights, a projector alone, or a projector
            and LoRA adapters. A folder of transformers contains all.
        settings: Values of `model` that the folder determines, by their key in `model`.
        elsewhere: Keys of `settings` that locate a part outside the folder, which the user may
            therefore set to another location.
        image_aspect: How its image processor makes images square; None if in another way than
            training can.
    """

    name: str
    folder: Path
    layout: Layout
    weights: Weights
    settings: dict[str, Any]
    elsewhere: frozenset[str]
    image_aspect: ImageAspect | None


def resolve(config: RunConfig, *, download: bool = True) -> RunConfig:
    """Return the configuration with every setting that `model.from_checkpoint` determines.

    A configuration without it is returned unchanged.

    Args:
        config: As `load_config` returns it, or resolved already.
        download: Whether small files of a hub repository may be fetched; if not, they must be in
            the local cache.

    Raises:
        ConfigError: A setting of the configuration contradicts the folder.
        UserError: The folder cannot be read, or is of a kind that cannot be loaded.
    """
    if config.model.from_checkpoint is None:
        return config
    if config.projector is not None:
        raise ConfigError(
            f"projector and {WHERE} each name a projector to start from; remove one of them"
        )
    found = read_finished(config.model.from_checkpoint, download=download)
    model = resolve_model(config.model, found)
    data = config.data
    if "image_aspect" not in data.model_fields_set:
        remedy = "say what to do instead with data.image_aspect (pad or crop)"
        data = data.model_copy(update={"image_aspect": require_aspect(found, remedy)})
    elif found.image_aspect is not None and data.image_aspect != found.image_aspect:
        echo(
            f"note: data.image_aspect is {data.image_aspect}, but the image processor of "
            f"{found.name} is set to {found.image_aspect}"
        )
    return config.model_copy(update={"model": model, "data": data})


def require_aspect(found: FinishedModel, remedy: str) -> ImageAspect:
    """Return how a finished model's image processor makes images square.

    Args:
        found: The description of the model.
        remedy: What to do if it does so in another way, for the error message.

    Raises:
        ConfigError: In a way that training cannot.
    """
    if found.image_aspect is None:
        raise ConfigError(
            f"{WHERE}: the image processor of {found.name} neither pads images to a square nor "
            f"resizes their shorter side to its size and crops them; {remedy}"
        )
    return found.image_aspect


def resolve_model(config: ModelConfig, found: FinishedModel) -> ModelConfig:
    """Return the model settings with those that a finished model determines.

    Raises:
        ConfigError: A setting was given that contradicts it.
    """
    tree = config.model_dump(mode="json")
    for key, value in {**found.settings, **_EMPTY}.items():
        section, _, field = key.rpartition(".")
        node = tree[section] if section else tree
        owner: Any = getattr(config, section) if section else config
        given = node[field] if field in owner.model_fields_set else None
        # The schema fills names that are not given with that of the finished model.
        if given is None or given == found.name or key in found.elsewhere:
            node[field] = value if given in (None, found.name) else given
        elif given != value:
            raise ConfigError(
                f"model.{key} is {given!r}, but {WHERE} ({found.name}) "
                + (f"has {value!r}" if value is not None else "determines the model")
                + f"; remove model.{key}"
            )
        if node[field] is None and key in found.elsewhere:
            raise ConfigError(
                f"{WHERE}: {found.name} does not contain the {_PART[section]} and does not say "
                f"where it is; set model.{key} to its folder or hub name"
            )
    try:
        return ModelConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"])
        raise ConfigError(
            f"{WHERE}: {found.name} has a value that is not supported: model.{key} would be "
            f"{first['input']!r} ({first['msg']})"
        ) from None


_EMPTY: Final[Mapping[str, Any]] = {
    "vision_tower.library": "transformers",
    "vision_tower.config": None,
    "vision_tower.weights": None,
    "vision_tower.image_size": None,
    "vision_tower.grid_pool": None,
    "language_model.config": None,
    "num_queries": None,
}
"""Settings of `model` that every finished model determines."""

_PART: Final = {"vision_tower": "vision tower", "language_model": "language model"}


def is_hub_name(name: str) -> bool:
    """Return whether a name can only be that of a hub repository: `owner/model`, and no folder."""
    path = Path(name)
    return (
        name.count("/") == 1
        and not path.is_absolute()
        and not means_folder(name)
        and (not path.exists())
    )


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a finished vision-language model, of any kind."""
    try:
        tree = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and (
        "vision_config" in tree
        or "mm_vision_tower" in tree
        or str(tree.get("model_type")).startswith("llava")
    )


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


def read_finished(name: str, *, download: bool = True) -> FinishedModel:
    """Read the JSON files of a finished vision-language model.

    Args:
        name: A folder or a hub name.
        download: Whether small files may be fetched from the hub.

    Raises:
        UserError: They are missing, or describe a model that cannot be loaded.
    """
    try:
        folder = small_files(name, download=download)
    except UserError:
        if download or name not in PUBLISHED:
            raise
        return _transformers(name, Path(name), *PUBLISHED[name])
    tree = _read(folder / "config.json", name)
    _require_types(name, tree)
    if "mm_vision_tower" in tree or tree.get("model_type") in set(ORIGINAL_LANGUAGE_MODELS) - {
        "llava"
    }:
        return _original(name, folder, tree)
    for key in ("vision_config", "text_config"):
        if tree.get("model_type") in TRANSFORMERS_CLASSES and not tree.get(key):
            raise UserError(
                f"{WHERE}: {folder / 'config.json'} has no {key}; copy it again from where the "
                "model is from"
            )
    _refuse_quantized(name, tree)
    classes = tree.get("architectures") or [_class_of(tree)]
    if classes[0] not in TRANSFORMERS_CLASSES.values():
        known = ", ".join(TRANSFORMERS_CLASSES.values())
        raise UserError(
            f"{WHERE}: {name} is a {classes[0]}, expected one of {known}, or a folder of the "
            "original LLaVA code"
        )
    return _transformers(name, folder, tree, image_processor(folder))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(accepts: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and all(accepts(item) for item in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_A_TEXT: Final = (_is_text, "a string")
_A_NUMBER: Final = (_is_int, "a whole number")
_AN_OBJECT: Final = (lambda value: isinstance(value, dict), "an object")
_TYPES: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "model_type": _A_TEXT,
    "architectures": (lambda value: _is_list_of(_is_text, value), "a list of strings"),
    "vision_config": _AN_OBJECT,
    "vision_config.model_type": _A_TEXT,
    "vision_config.image_size": _A_NUMBER,
    "text_config": _AN_OBJECT,
    "text_config.model_type": _A_TEXT,
    "vision_feature_layer": (
        lambda value: _is_int(value) or (bool(value) and _is_list_of(_is_int, value)),
        "a whole number or a list of whole numbers",
    ),
    "vision_feature_select_strategy": _A_TEXT,
    "vision_aspect_ratio": _A_TEXT,
    "image_grid_pinpoints": (
        lambda value: _is_list_of(
            lambda pair: _is_list_of(_is_int, pair) and len(pair) == 2, value
        ),
        "a list of pairs of whole numbers",
    ),
    "image_token_id": _A_NUMBER,
    "image_token_index": _A_NUMBER,
    "quantization_config": _AN_OBJECT,
    "mm_vision_tower": _A_TEXT,
    "mm_vision_select_layer": _A_NUMBER,
    "mm_projector_type": _A_TEXT,
    "_name_or_path": _A_TEXT,
}
"""What values of `config.json` have to be, by their key."""

_NEVER_NULL: Final = ("vision_feature_layer", "vision_config.image_size")
"""Keys of `_TYPES` that have no meaning with null; others are then as if absent."""


def _require_types(name: str, tree: Mapping[str, Any]) -> None:
    """Refuse a configuration with a value of another type.

    Raises:
        UserError: Names the key.
    """
    for key, (accepts, expected) in _TYPES.items():
        section, _, field = key.rpartition(".")
        owner = (tree.get(section) or {}) if section else tree
        value = owner.get(field)
        if field not in owner or (value is None and key not in _NEVER_NULL):
            continue
        # The configurations of original folders have other keys of these names.
        if not accepts(value) and not ("mm_vision_tower" in tree and key.startswith("image_")):
            raise UserError(
                f"{WHERE}: the config.json of {name} has {key} {value!r}, expected {expected}; "
                "copy it again from where the model is from"
            )


def _refuse_quantized(name: str, tree: Mapping[str, Any]) -> None:
    for section in (tree, tree.get("text_config") or {}):
        quantization = section.get("quantization_config")
        if quantization:
            raise UserError(
                f"{WHERE}: {name} is quantized (quantization_config in its config.json: "
                f"{quantization.get('quant_method', 'unknown method')!s}); take the model without "
                "quantization, model.language_model.quantization can quantize it again"
            )


def _class_of(tree: Mapping[str, Any]) -> str:
    """Return the class for a configuration that does not name its own."""
    model_type = tree.get("model_type")
    return TRANSFORMERS_CLASSES.get(str(model_type), f"{model_type!r} model")


def small_files(name: str, *, download: bool = True, patterns: list[str] | None = None) -> Path:
    """Return the folder of a model, which for a hub name is in the local cache.

    Args:
        name: A folder or a hub name.
        download: Whether files may be fetched from the hub.
        patterns: The files to fetch; None for those that describe the model.

    Raises:
        UserError: There is no such folder, or the hub does not give the files.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if means_folder(name):
        raise UserError(
            f"{WHERE}: no such folder {name!r} (looked for {folder.absolute()}); give the folder "
            "of a finished model or a hub name"
        )
    from huggingface_hub import snapshot_download

    if not download:
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except Exception as error:
            raise UserError(
                f"{WHERE}: the configuration of {name!r} is not on this machine and nothing is "
                f"downloaded here; fetch these small files with `hf download {name} --include "
                "'*.json'`, or name a local folder"
            ) from error
    use_cache_if_hub_unreachable()
    action = f"get {name!r} from the hub, and there is no such folder"
    with library_call("huggingface_hub", WHERE, action):
        return Path(snapshot_download(name, allow_patterns=patterns or _SMALL_FILES))


# --- transformers


def _transformers(
    name: str, folder: Path, tree: Mapping[str, Any], processor: Mapping[str, Any]
) -> FinishedModel:
    vision = dict(tree.get("vision_config") or {})
    kind = vision.get("model_type", "clip_vision_model")
    if kind not in _TOWERS:
        raise UserError(
            f"{WHERE}: {name} has the vision tower {kind!r}, expected one of {', '.join(_TOWERS)}"
        )
    onevision = tree.get("model_type") == "llava_onevision"
    layers = tree.get("vision_feature_layer", -1 if onevision else -2)
    tiling = _tiling(name, vision, tree)
    _require_same_size(name, vision, processor)
    _require_reproducible(name, processor)
    settings = {
        "vision_tower.name": name,
        "vision_tower.feature_layers": [layers] if isinstance(layers, int) else list(layers),
        "vision_tower.feature_select": _feature_select(name, kind, tree),
        "projector_type": _projector_type(name, tree),
        "language_model.name": name,
        "language_model.tokenizer": None,
        **tiling,
    }
    return FinishedModel(
        name,
        folder,
        layout="transformers",
        weights="full",
        settings=settings,
        elsewhere=frozenset(),
        # A tiled model has only undivided images to make square; LLaVA-OneVision's are padded.
        image_aspect=_aspect(processor) if tiling == _ONE_CROP else "pad",
    )


_ONE_CROP: Final = {"image_tiling.layout": "none"}


def _tiling(name: str, vision: Mapping[str, Any], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `model.image_tiling`."""
    kind = tree.get("model_type", "llava")
    if kind == "llava":
        return _ONE_CROP
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
    if side != wanted and vision.get("model_type") != "dinov2":  # DINOv2 takes any size
        raise UserError(
            f"{WHERE}: the image processor of {name} makes images of {side} pixels, but its vision "
            f"tower takes {wanted}; copy the folder again from where the model is from"
        )


def _require_reproducible(name: str, processor: Mapping[str, Any]) -> None:
    """Refuse an image processor with settings that give other pixel values than training's.

    Raises:
        UserError: Names the setting.
    """
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if processor.get(key, True) not in (True, None):
            _refuse_setting(name, processor, key, "true")
    factor = processor.get("rescale_factor")
    if factor is not None and not (
        _is_finite(factor) and math.isclose(factor * 255, 1, rel_tol=1e-4)
    ):
        _refuse_setting(name, processor, "rescale_factor", "1/255")
    for key in ("image_mean", "image_std"):
        values = processor.get(key, [0.5, 0.5, 0.5])
        if not (_is_list_of(_is_finite, values) and len(values) == 3):
            _refuse_setting(name, processor, key, "three finite numbers")
        if key == "image_std" and min(values) <= 0:
            _refuse_setting(name, processor, key, "three numbers above 0")
    if "resample" in processor and processor["resample"] not in range(4):
        _refuse_setting(name, processor, "resample", "a number from 0 to 3")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_setting(name: str, processor: Mapping[str, Any], key: str, expected: str) -> NoReturn:
    raise UserError(
        f"{WHERE}: the image processor of {name} has {key} {processor[key]!r}, expected "
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


# --- the original LLaVA code


def _original(name: str, folder: Path, tree: Mapping[str, Any]) -> FinishedModel:
    weights = _original_weights(folder, tree)
    if weights == "full":  # others name a language model that is not quantized
        _refuse_quantized(name, tree)
    _refuse_unknown_features(name, tree)
    settings = {
        **_ONE_CROP,
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
        image_aspect="pad" if tree.get("image_aspect_ratio") == "pad" else "crop",
    )


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
        adapter = _read(folder / "adapter_config.json", str(folder))
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


_ORIGINAL_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "mm_use_im_start_end": (None, False),
    "mm_use_im_patch_token": (None, False),
    "mm_patch_merge_type": (None, "flat"),
    "mm_resampler_type": (None,),
    "image_aspect_ratio": (None, "square", "pad"),
    "mm_vision_select_feature": (None, "patch", "cls_patch"),
}
"""Values of original configurations that are supported; None: the key is absent."""


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder contains a tokenizer."""
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        tree = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{WHERE}: {name} has no {path.name} that can be read ({error}); give the folder of a "
            "finished model"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{WHERE}: {path} is not a JSON object; give the folder of a finished model"
        )
    return tree
