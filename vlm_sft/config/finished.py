"""Read what a finished vision-language model consists of, from the JSON files of its folder.

A finished model is a folder of transformers' LLaVA, LLaVA-NeXT, LLaVA-OneVision or InternVL, or of
the original LLaVA code (full weights, a projector alone, or LoRA adapters). `model.from_checkpoint`
names one; `resolve` derives the other settings of the model from it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from vlm_sft.config.fields import ImageAspect
from vlm_sft.config.finished_files import (
    WHERE,
    FinishedModel,
    read_object,
    refuse_quantized,
    require_types,
    small_files,
)
from vlm_sft.config.finished_original import ORIGINAL_LANGUAGE_MODELS, read_original
from vlm_sft.config.finished_transformers import (
    PUBLISHED,
    TRANSFORMERS_CLASSES,
    image_processor,
    read_released,
)
from vlm_sft.config.schema import ModelConfig, RunConfig
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.reading import read_json


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
        return read_released(name, Path(name), *PUBLISHED[name])
    _refuse_checkpoint(name, folder)
    tree = read_object(folder / "config.json", name)
    require_types(name, tree)
    if "mm_vision_tower" in tree or tree.get("model_type") in set(ORIGINAL_LANGUAGE_MODELS) - {
        "llava"
    }:
        return read_original(name, folder, tree)
    for key in ("vision_config", "text_config"):
        if tree.get("model_type") in TRANSFORMERS_CLASSES and not tree.get(key):
            raise UserError(
                f"{WHERE}: {folder / 'config.json'} has no {key}; copy it again from where the "
                "model is from"
            )
    refuse_quantized(name, tree)
    classes = tree.get("architectures") or [_class_of(tree)]
    if classes[0] not in TRANSFORMERS_CLASSES.values():
        known = ", ".join(TRANSFORMERS_CLASSES.values())
        raise UserError(
            f"{WHERE}: {name} is a {classes[0]}, expected one of {known}, or a folder of the "
            "original LLaVA code"
        )
    return read_released(name, folder, tree, image_processor(folder))


def _refuse_checkpoint(name: str, folder: Path) -> None:
    """Refuse a checkpoint of this package, which has other settings for what it is used for.

    Raises:
        UserError: Names them.
    """
    if any((folder / place / "manifest.json").exists() for place in (".", "final")):
        raise UserError(
            f"{WHERE}: {name} is a checkpoint of vlm_sft; name it in start_from (full fine-tuning "
            "continues with its projector and language model) or projector (its projector alone), "
            "with its `model` section, or export it and name the export"
        )


def _class_of(tree: Mapping[str, Any]) -> str:
    """Return the class for a configuration that does not name its own."""
    model_type = tree.get("model_type")
    return TRANSFORMERS_CLASSES.get(str(model_type), f"{model_type!r} model")
