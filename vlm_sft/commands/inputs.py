"""Check the inputs of a command before heavy imports: configuration, files, model names."""

import difflib
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Final, Literal, get_args

from vlm_sft.checkpoint.format import require_checkpoint
from vlm_sft.config.finished import resolve
from vlm_sft.config.finished_files import is_hub_name
from vlm_sft.config.hub_address import HubAddress, is_hub_address
from vlm_sft.config.resume import changes_between
from vlm_sft.config.schema import (
    DataFile,
    RunConfig,
    VisionTowerConfig,
    load_config,
    load_stored_config,
    means_folder,
)
from vlm_sft.data.records import open_raw_records, require_columns
from vlm_sft.data.template_names import builtin_templates
from vlm_sft.errors import ConfigError, ImageError, TemplateError, UserError
from vlm_sft.utils.image_paths import looked_for
from vlm_sft.utils.libraries import require_extra, require_trackers

Part = Literal["tokenizer", "model", "projector", "train", "eval", "packages"]
ALL_PARTS: Final = frozenset[Part](get_args(Part))

_LANGUAGE = "model.language_model"
_TOWER = "model.vision_tower"


def read_config(
    path: str,
    overrides: Sequence[str],
    parts: Set[Part] = ALL_PARTS,
    *,
    download: bool = True,
) -> RunConfig:
    """Load a configuration and check that the files and directories that it names exist.

    A finished run does not need them any more: starting it again only reports that it is finished.
    If settings differ from those of the run, it is checked like a new one.

    Args:
        path: The YAML file.
        overrides: `key.path=value` arguments.
        parts: What the command will read.
        download: Whether the description of a finished model may be fetched from the hub.

    Raises:
        UserError: Names the key or the file.
    """
    if "=" in path and not Path(path).exists():
        raise UserError(f"{path}: the first argument is CONFIG.yaml; settings follow it")
    config = _resolved(load_config(path, overrides), download=download)
    if not _is_finished(config):
        _require_places(config, parts)
    return config


def _resolved(config: RunConfig, *, download: bool) -> RunConfig:
    """Return the configuration with what the finished model determines.

    A finished run of the same model does not need its folder: its own configuration states it.
    """
    try:
        return resolve(config, download=download)
    except ConfigError:
        raise  # a setting contradicts the folder, which is there
    except UserError:
        output_dir = Path(config.output_dir)
        if not (output_dir / "final" / "manifest.json").exists():
            raise
        stored = load_stored_config(output_dir / "config.yaml")
        if stored.model.from_checkpoint != config.model.from_checkpoint:
            raise
        aspect = {"image_aspect": stored.data.image_aspect, **_given_aspect(config)}
        data = config.data.model_copy(update=aspect)
        return config.model_copy(update={"model": stored.model, "data": data})


def _given_aspect(config: RunConfig) -> dict[str, str]:
    given = "image_aspect" in config.data.model_fields_set
    return {"image_aspect": config.data.image_aspect} if given else {}


def _is_finished(config: RunConfig) -> bool:
    """Return whether the output directory contains the finished run of this configuration.

    If a setting differs that may not change freely, the answer is no: a wrong value is then
    reported as such, and not as a difference.
    """
    output_dir = Path(config.output_dir)
    if not (output_dir / "final" / "manifest.json").exists():
        return False
    try:
        before = load_stored_config(output_dir / "config.yaml")
    except (UserError, OSError):
        return True  # training reports what is wrong with the run directory
    return all(change.policy == "free" for change in changes_between(before, config))


def _require_places(config: RunConfig, parts: Set[Part]) -> None:
    if "packages" in parts:
        _require_packages(config)
    language = config.model.language_model
    if "tokenizer" in parts:
        key = "name" if language.tokenizer is None else "tokenizer"
        require_model_name(f"{_LANGUAGE}.{key}", getattr(language, key))
        require_template("data.template", config.data.template)
    if "model" in parts:
        if language.name is not None:
            require_model_name(f"{_LANGUAGE}.name", language.name)
        _require_tower(config.model.vision_tower)
    files = config.data.train if "train" in parts else []
    held_out = [*config.data.eval, *config.data.eval_text] if "eval" in parts else []
    for file in [*files, *held_out]:
        _require_data(file)
    if "projector" in parts and config.projector is not None:
        require_checkpoint(
            Path(config.projector),
            "projector: ",
            "train stage 1 first (vlm-sft stage1), give a checkpoint, or set projector: null to "
            "start from random weights",
        )
    if "projector" in parts and config.start_from is not None:
        require_checkpoint(Path(config.start_from), "start_from: ")


def _require_packages(config: RunConfig) -> None:
    require_trackers(config.train.trackers)
    if config.optim.optimizer == "adamw_8bit":
        require_extra("bitsandbytes", "optim.optimizer: adamw_8bit")
    if config.model.language_model.quantization is not None:
        require_extra("bitsandbytes", "model.language_model.quantization")


def _require_tower(tower: VisionTowerConfig) -> None:
    if tower.name is not None and tower.library == "transformers":
        require_model_name(f"{_TOWER}.name", tower.name)
    weights = tower.weights
    file = Path(weights or "").expanduser()
    if weights is not None and means_folder(weights) and not file.is_file():
        raise ConfigError(f"{_TOWER}.weights: no such file {weights!r}{looked_for(file)}")


def _require_data(file: DataFile) -> None:
    if not is_hub_address(file.path) and not Path(file.path).exists():
        open_raw_records(Path(file.path))  # raises its own sentence
    require_columns(file)
    if file.annotations is not None:
        require_records("annotations", file.annotations)


def require_records(option: str, path: str) -> None:
    """Refuse a file of records that an option names and that does not exist.

    Raises:
        UserError: Names the option and the absolute path, or what is wrong with a hub address.
    """
    if not path:
        raise UserError(f"{option}: an empty name; give a file or folder of records")
    if is_hub_address(path):
        try:
            HubAddress.parse(path)
        except ValueError as error:
            raise UserError(f"{option}: {error}", code="hub_dataset") from None
    elif not Path(path).exists():
        raise UserError(
            f"{option} {path}: no such data file{looked_for(path)}", code="data_file_missing"
        )


def require_model_name(where: str, name: str) -> None:
    """Refuse a name that means a local directory which does not exist; accept hub names.

    Args:
        where: The configuration key or the option that gave the name.
        name: A directory, a hub name, or `bytes`.

    Raises:
        UserError: Names the absolute path.
    """
    folder = Path(name).expanduser()
    if means_folder(name) and not folder.is_dir():
        raise UserError(
            f"{where}: no such folder {name!r}{looked_for(folder)}; give a model folder or a hub "
            "name"
        )


def require_template(where: str, name: str) -> None:
    """Refuse a chat template that is neither built in nor a YAML file.

    Raises:
        TemplateError: Names the nearest built-in template, or all of them.
    """
    known = ["auto", *builtin_templates()]
    if name in known or Path(name).is_file():
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise TemplateError(
        f"{where}: no template {name!r}{hint}; expected a YAML file or one of {', '.join(known)}"
    )


def require_model_source(path: Path) -> None:
    """Refuse a path that is neither a directory nor the hub name of a finished model.

    Raises:
        CheckpointError: There is no such directory.
    """
    if not is_hub_name(str(path)):
        require_checkpoint(path)


def require_images(paths: Sequence[Path]) -> None:
    """Refuse image files that do not exist.

    Raises:
        ImageError: Names the absolute path.
    """
    for path in paths:
        if not path.exists():
            raise ImageError("image_missing", f"{path}: no such image file{looked_for(path)}")
