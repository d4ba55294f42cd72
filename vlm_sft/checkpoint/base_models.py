"""Locate the base models of a checkpoint, also after they were moved.

A checkpoint holds only what was trained. `bases.json` records where the frozen parts are, as an
absolute path and relative to the run's directory, since the configuration may name them relative to
the working directory of the training.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from vlm_sft.config.schema import RunConfig, parse_config
from vlm_sft.errors import CheckpointError, UserError
from vlm_sft.utils.reading import read_json

FILE: Final = "bases.json"
FINISHED: Final = "model.from_checkpoint"
KEYS: Final = (
    FINISHED,
    "model.language_model.name",
    "model.vision_tower.name",
    "model.vision_tower.weights",
)
"""Settings that may name a local file or folder that a checkpoint needs but does not contain."""

LANGUAGE_MODEL: Final = "language_model"
"""Folder of a checkpoint with the language model, if that was trained in full."""

VISION_TOWER: Final = "vision_tower"
"""Folder of a checkpoint that contains every part of its model and needs no base model."""

_LOCAL_DIR: Final = "local-dir:"
"""Prefix of local folders in model names of timm and open_clip."""


def describe_bases(config: RunConfig) -> dict[str, dict[str, str]]:
    """Return the location of each local base model by its key: `path` (absolute), `from_run`."""
    tree, found = config.model_dump(mode="json"), {}
    for key in KEYS:
        path = _local(_get(tree, key))
        if path is not None and not _is_open_clip_name(config, key):
            from_run = os.path.relpath(os.path.realpath(path), os.path.realpath(config.output_dir))
            found[key] = {"path": str(path.absolute()), "from_run": from_run}
    return found


def find_bases(config: RunConfig, checkpoint: Path, given: Mapping[str, str]) -> RunConfig:
    """Return the configuration with the current locations of the base models.

    Each is searched at the path that the user gave, at its absolute path, and at its path relative
    to the run, in this order.

    Args:
        config: The checkpoint's configuration.
        checkpoint: Its folder, `RUN/final` or `RUN/checkpoints/step-N`.
        given: Locations that the user gave, by key.

    Raises:
        CheckpointError: A base model is not found.
    """
    if (checkpoint / VISION_TOWER).is_dir():
        return _with_own_parts(config, checkpoint)
    recorded, tree = _recorded(checkpoint), config.model_dump(mode="json")
    run = checkpoint.absolute().parent
    run = run.parent if run.name == "checkpoints" else run
    for key in KEYS:
        if key in given:
            _move(tree, key, given[key])
        elif key != FINISHED and _get(tree, key) == tree["model"]["from_checkpoint"]:
            continue  # moved together with the finished model
        elif key in recorded:
            place = recorded[key]
            candidates = [Path(place["path"]), run / place["from_run"]]
            existing = next((path for path in candidates if path.exists()), None)
            if existing is None:
                raise CheckpointError(
                    f"{checkpoint}: the base model that it was trained on was not found "
                    f"({key}: searched {candidates[0]} and "
                    f"{os.path.normpath(candidates[1])}); put it back, or give its new path with "
                    f"--base {key}=PATH"
                )
            _move(tree, key, str(existing))
    return parse_config(tree, str(checkpoint / "config.yaml"))


def with_recorded_paths(config: RunConfig, checkpoint: Path) -> RunConfig:
    """Return a checkpoint's configuration with the paths that its local base models had.

    The names in it may be relative to the working directory of the training, where they would look
    like those of a hub.
    """
    tree = config.model_dump(mode="json")
    for key, place in _recorded(checkpoint).items():
        _set(tree, key, place["path"])
    return parse_config(tree, str(checkpoint / "config.yaml"))


def _with_own_parts(config: RunConfig, checkpoint: Path) -> RunConfig:
    """Return the configuration with the parts that a complete checkpoint contains as its bases."""
    tree = config.model_dump(mode="json")
    model = tree["model"]
    model["from_checkpoint"] = None
    model["vision_tower"]["name"] = str((checkpoint / VISION_TOWER).absolute())
    place = (checkpoint / LANGUAGE_MODEL).absolute()
    source: dict[str, Any] = {"name": str(place), "config": None}
    if not list(place.glob("*.safetensors")):  # shards, which are loaded into a model
        source = {"name": None, "config": read_json(place / "config.json")}
    source["tokenizer"] = str((checkpoint / "tokenizer").absolute())
    model["language_model"] |= source
    return parse_config(tree, str(checkpoint / "config.yaml"))


def parse_bases(arguments: Sequence[str]) -> dict[str, str]:
    """Read the values of `--base`.

    Raises:
        UserError: One is not `KEY=PATH`, the key is unknown, or the path does not exist.
    """
    found = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in KEYS or not value:
            raise UserError(
                f"--base {argument}: expected KEY=PATH with one of the keys {', '.join(KEYS)}"
            )
        if _local(value) is None:
            raise UserError(f"--base {argument}: {value} does not exist")
        found[key] = value
    return found


def absolute_if_local(name: str | None) -> str | None:
    """Return the absolute path of a local folder or file; any other name unchanged."""
    path = _local(name)
    return name if path is None else str(path.absolute())


def _is_open_clip_name(config: RunConfig, key: str) -> bool:
    """Return whether open_clip resolves a name from its own list, even if such a folder exists."""
    tower = config.model.vision_tower
    return (
        key == "model.vision_tower.name"
        and tower.library == "open_clip"
        and not str(tower.name).startswith(_LOCAL_DIR)
    )


def _local(name: str | None) -> Path | None:
    """Return the local file or folder of a name, if it exists."""
    if not name:
        return None
    path = Path(name.removeprefix(_LOCAL_DIR)).expanduser()
    return path if path.exists() else None


def _recorded(checkpoint: Path) -> dict[str, dict[str, str]]:
    path = checkpoint / FILE
    if not path.exists():  # written by a version without this file
        return {}
    try:
        found: dict[str, dict[str, str]] = read_json(path)
        return {key: {"path": at["path"], "from_run": at["from_run"]} for key, at in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{path}: cannot be read; the checkpoint is damaged", code="checkpoint_damaged"
        ) from None


def _get(tree: Mapping[str, Any], key: str) -> str | None:
    value: Any = tree
    for name in key.split("."):
        value = value[name]
    return value if isinstance(value, str) else None


def _move(tree: dict[str, Any], key: str, place: str) -> None:
    """Set the location of a base model; a finished model takes along the parts named after it."""
    before = _get(tree, key)
    _set(tree, key, place)
    if key == FINISHED:
        for part in KEYS[1:]:
            if before is not None and _get(tree, part) == before:
                _set(tree, part, place)


def _set(tree: dict[str, Any], key: str, value: str) -> None:
    *sections, last = key.split(".")
    section: dict[str, Any] = tree
    for name in sections:
        section = section[name]
    prefix = _LOCAL_DIR if str(section[last]).startswith(_LOCAL_DIR) else ""
    section[last] = prefix + value.removeprefix(_LOCAL_DIR)
