"""Read model configurations from files on this machine; nothing is downloaded.

Planning needs the shapes of a model and not its weights, so the `name` of a run's configuration is
replaced by the model configuration found in a folder or in the hub's local cache, or by the shapes
in `known_models`.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PretrainedConfig

from vlm_sft.config.finished import is_finished, read_finished
from vlm_sft.config.finished_files import FinishedModel
from vlm_sft.config.finished_transformers import PUBLISHED
from vlm_sft.config.schema import (
    LanguageModelConfig,
    ModelConfig,
    VisionTowerConfig,
    means_folder,
)
from vlm_sft.data.hf_tokenizer import BYTE_TOKENIZERS
from vlm_sft.errors import UserError
from vlm_sft.model.finished import language_config as finished_language_config
from vlm_sft.planning.known_models import KNOWN_LANGUAGE_MODELS, KNOWN_TOWERS
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.model_folders import custom_code_refused, require_plain_folder
from vlm_sft.utils.reading import read_json

_TOWER: Final = "model.vision_tower"
_LANGUAGE: Final = "model.language_model"


def known_shapes(config: ModelConfig) -> list[str]:
    """Return a sentence for each model whose shapes come from the table and not from a file."""
    named = [(f"{_LANGUAGE}.name", config.language_model.name, KNOWN_LANGUAGE_MODELS)]
    if config.vision_tower.library == "transformers":
        named.append((f"{_TOWER}.name", config.vision_tower.name, KNOWN_TOWERS))
    return [
        f"{where}: the shapes of {name} are the published ones; its configuration is not on this "
        "machine"
        for where, name, table in named
        if name is not None
        and (name in table or name in PUBLISHED)
        and _cached_config(name) is None
    ]


TowerConfig = tuple[dict[str, Any], int | None]
"""Configuration of a tower in its library's terms, and the image size if that does not state it."""


def language_model_config(config: LanguageModelConfig) -> PretrainedConfig:
    """Return the language model's configuration: given in the run's, of a folder, or cached.

    Raises:
        UserError: If it is not on this machine, or of an unknown `model_type`.
    """
    if config.name is not None:
        found = _finished(config.name)
        if found is not None:
            return cast(PretrainedConfig, finished_language_config(*found))
        return _local_config(config.name, f"{_LANGUAGE}.name")
    tree = dict(cast(dict[str, Any], config.config))
    model_type = tree.pop("model_type", None)
    if model_type is None:
        raise UserError(f"{_LANGUAGE}.config: key 'model_type' is missing; add it, e.g. llama")
    with library_call("transformers", f"{_LANGUAGE}.config", f"build a {model_type} model"):
        return AutoConfig.for_model(model_type, **copy.deepcopy(tree))


def require_local_tokenizer(config: LanguageModelConfig) -> None:
    """Check that the tokenizer does not have to be downloaded.

    Raises:
        UserError: If it is neither a folder nor in the local cache.
    """
    name = config.tokenizer or config.name
    assert name is not None
    if name in BYTE_TOKENIZERS or means_folder(name) or Path(name).expanduser().is_dir():
        return  # loading it reports a folder that does not exist
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if not any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        raise _not_local(name, _LANGUAGE, "tokenizer", "config.json 'tokenizer*'")


def tower_without_weights(config: VisionTowerConfig) -> VisionTowerConfig:
    """Return the same tower with random weights, its shape read from files on this machine.

    Raises:
        UserError: If the tower's configuration is not on this machine.
    """
    if config.config is not None:
        return config
    assert config.name is not None
    tree, size = _TOWER_CONFIGS[config.library](config.name)
    changes: dict[str, Any] = {"name": None, "weights": None, "config": tree}
    if config.image_size is None and size is not None:
        changes["image_size"] = size
    return config.model_copy(update=changes)


def _finished(name: str) -> tuple[FinishedModel, Mapping[str, Any] | None] | None:
    """Return a finished model whose parts are planned, or None.

    Returns:
        Its description, and its configuration if that is the published one, of which no file is on
        this machine.
    """
    folder = Path(name).expanduser()
    cached = None if folder.is_dir() or means_folder(name) else _cached_config(name)
    place = folder if cached is None else Path(cached).parent
    if is_finished(place):
        return read_finished(name, download=False), None
    if cached is None and name in PUBLISHED:
        return read_finished(name, download=False), PUBLISHED[name][0]
    return None


def _transformers_tower(name: str) -> TowerConfig:
    if (finished := _finished(name)) is not None:
        found, published = finished
        tree = published or read_json(found.folder / "config.json")
        vision = AutoConfig.for_model(**{"model_type": "llava", **tree}).vision_config
        return vision.to_dict(), None
    config = _local_config(name, f"{_TOWER}.name")
    tree = config.to_dict()
    if "vision_config" in tree:  # a two-tower model (CLIP, SigLIP): take its vision tower
        tree = {**config.vision_config.to_dict(), "model_type": config.model_type}
    if not str(tree["model_type"]).startswith("dinov2"):
        return tree, None
    # DINOv2 interpolates its position embeddings, so its `image_size` is that of pretraining (518);
    # the size at which it is used is stated by the image processor.
    preprocessing = _local_json(name, "preprocessor_config.json")
    size: Any = preprocessing.get("crop_size") or preprocessing.get("size")
    side = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    return tree, side


def _timm_tower(name: str) -> TowerConfig:
    if means_folder(name) or Path(name).expanduser().is_dir():
        saved = _local_json(name, "config.json")
        if "architecture" not in saved:
            raise UserError(f"{_TOWER}.name: {name} has no timm config.json with an 'architecture'")
        model_args = {k: v for k, v in saved.get("model_args", {}).items() if k != "num_classes"}
        return {"architecture": saved["architecture"], **model_args}, None
    return {"architecture": _registered(name)}, None


def _open_clip_tower(name: str) -> TowerConfig:
    if name.startswith("local-dir:"):
        folder = name.removeprefix("local-dir:")
        saved = _local_json(folder, "open_clip_config.json").get("model_cfg")
        if saved is None:
            raise UserError(f"{_TOWER}.name: {folder} has no open_clip_config.json; add it")
        return saved, None
    return {"model_name": _registered(name)}, None


_TOWER_CONFIGS: Final[Mapping[str, Callable[[str], TowerConfig]]] = {
    "transformers": _transformers_tower,
    "timm": _timm_tower,
    "open_clip": _open_clip_tower,
}


def _registered(name: str) -> str:
    """Return the name of an architecture that timm or open_clip knows without the hub."""
    if name.startswith(("hf-hub:", "hf_hub:")):
        raise UserError(
            f"{_TOWER}.name: the shape of {name!r} is only known to the hub, and planning "
            "downloads nothing; give its architecture's name or a local folder instead"
        )
    return name


def _local_config(name: str, where: str) -> PretrainedConfig:
    """Return a transformers configuration from a folder or the local cache."""
    folder = Path(name).expanduser()
    if means_folder(name) and not folder.is_dir():
        raise UserError(f"{where}: no such folder {name!r}; give a model folder or a hub name")
    if folder.is_dir():
        action = f"read the config.json of {name!r}"
        with library_call("transformers", where, action), custom_code_refused(where, name):
            require_plain_folder(folder)
            return AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    known = {**KNOWN_TOWERS, **KNOWN_LANGUAGE_MODELS}.get(name)
    if known is not None and _cached_config(name) is None:
        return AutoConfig.for_model(**known)
    try:
        with custom_code_refused(where, name):
            return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise _not_local(name, where, "configuration", "'*.json'") from error


def _cached_config(name: str) -> str | None:
    """Return the path of a hub name's `config.json` in the local cache, or None."""
    found = try_to_load_from_cache(name, "config.json")
    return found if isinstance(found, str) else None


def _local_json(name: str, file: str) -> dict[str, Any]:
    """Return a JSON file of a folder or of the local cache; empty if there is none."""
    folder = Path(name).expanduser()
    path: Any = folder / file if folder.is_dir() else try_to_load_from_cache(name, file)
    try:
        return cast(dict[str, Any], read_json(Path(path)))
    except (OSError, TypeError, ValueError):
        return {}


def _not_local(name: str, where: str, what: str, files: str) -> UserError:
    return UserError(
        f"{where}: the {what} of {name!r} is not on this machine and planning downloads nothing; "
        f"fetch these small files with `hf download {name} --include {files}`, or name a local "
        "folder or a `config:` of the same shape"
    )
