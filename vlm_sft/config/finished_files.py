"""The files of a finished vision-language model that describe it, and what is read from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from vlm_sft.config.fields import ImageAspect
from vlm_sft.config.schema import means_folder
from vlm_sft.errors import UserError
from vlm_sft.utils.hub import use_cache_if_hub_unreachable
from vlm_sft.utils.image_paths import looked_for, nearest_existing
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.reading import read_json

WHERE: Final = "model.from_checkpoint"

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
        crop_size: Side in pixels that the vision tower's images must have; None: as the tower says.
    """

    name: str
    folder: Path
    layout: Layout
    weights: Weights
    settings: dict[str, Any]
    elsewhere: frozenset[str]
    image_aspect: ImageAspect | None
    crop_size: int | None = None


ONE_CROP: Final[Mapping[str, Any]] = {"image_tiling.layout": "none"}
"""Settings of a model that does not divide images."""


def is_hub_name(name: str) -> bool:
    """Return whether a name can only be that of a hub repository: `owner/model`, and no folder."""
    path = Path(name)
    return (
        name.count("/") == 1
        and not path.is_absolute()
        and not means_folder(name)
        and (not path.exists())
    )


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
            f"{WHERE}: no such folder {name!r}{looked_for(folder)}; give the folder of a finished "
            "model or a hub name"
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
    near = nearest_existing(name, folder=True)
    action = f"get {name!r} from the hub, and there is no such folder{near}"
    with library_call("huggingface_hub", WHERE, action):
        return Path(snapshot_download(name, allow_patterns=patterns or _SMALL_FILES))


def read_object(path: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of the finished model `name`.

    Raises:
        UserError: The file is missing, cannot be read, or contains no object.
    """
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


def refuse_quantized(name: str, tree: Mapping[str, Any]) -> None:
    """Refuse a configuration whose weights are quantized.

    Raises:
        UserError: Names the method.
    """
    for section in (tree, tree.get("text_config") or {}):
        quantization = section.get("quantization_config")
        if quantization:
            raise UserError(
                f"{WHERE}: {name} is quantized (quantization_config in its config.json: "
                f"{quantization.get('quant_method', 'unknown method')!s}); take the model without "
                "quantization, model.language_model.quantization can quantize it again"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_list_of(accepts: Callable[[Any], bool], value: Any) -> bool:
    """Return whether a value is a list whose items all are as `accepts` says."""
    return isinstance(value, list) and all(accepts(item) for item in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_A_TEXT: Final = (_is_text, "a string")
_A_NUMBER: Final = (_is_int, "a whole number")
_AN_OBJECT: Final = (lambda value: isinstance(value, dict), "an object")
_TYPES: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "model_type": _A_TEXT,
    "architectures": (lambda value: is_list_of(_is_text, value), "a list of strings"),
    "vision_config": _AN_OBJECT,
    "vision_config.model_type": _A_TEXT,
    "vision_config.image_size": (
        lambda value: _is_int(value) or (is_list_of(_is_int, value) and len(value) == 2),
        "a whole number",
    ),
    "text_config": _AN_OBJECT,
    "text_config.model_type": _A_TEXT,
    "vision_feature_layer": (
        lambda value: _is_int(value) or (bool(value) and is_list_of(_is_int, value)),
        "a whole number or a list of whole numbers",
    ),
    "vision_feature_select_strategy": _A_TEXT,
    "vision_aspect_ratio": _A_TEXT,
    "image_grid_pinpoints": (
        lambda value: is_list_of(lambda pair: is_list_of(_is_int, pair) and len(pair) == 2, value),
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


def require_types(name: str, tree: Mapping[str, Any]) -> None:
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
