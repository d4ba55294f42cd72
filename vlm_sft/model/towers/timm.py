"""Vision encoders of timm: tokens of ViTs, flattened feature maps of convolutional networks."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import timm
import timm.data
import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vlm_sft.data.images import ImageSpec
from vlm_sft.errors import UserError
from vlm_sft.model.towers.base import BlockStates, FeatureSource, LoadedEncoder
from vlm_sft.utils.hub import use_cache_if_hub_unreachable
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.model_folders import require_plain_folder
from vlm_sft.utils.reading import read_json, require_regular

_WHERE: Final = "model.vision_tower"


def load(
    *,
    name: str | None,
    config: Mapping[str, Any] | None,
    weights: str | None,
    image_size: int | None,
) -> LoadedEncoder:
    """Load or build a timm model without its classifier.

    Args:
        name: A timm name or a folder; None builds a model from `config`.
        config: `architecture` (a timm name), arguments of `timm.create_model`, and optionally a
            `pretrained_cfg`.
        weights: A file with a state dict.
        image_size: Side of the images in pixels; None: as the model was trained.

    Raises:
        UserError: If the name is unknown, or the weights are missing or of another model.
    """
    if config is not None:
        if weights is not None:
            raise UserError(f"{_WHERE}.weights: `config` draws random weights; remove one of both")
        tree = dict(config)
        architecture = tree.pop("architecture", None)
        if architecture is None:
            raise UserError(f"{_WHERE}.config: key 'architecture' is missing; add a timm name")
        overlay = tree.pop("pretrained_cfg", None)
        model = _create(architecture, image_size, overlay, tree)
    elif (folder := Path(cast(str, name)).expanduser()).is_dir():
        if weights is not None:
            raise UserError(f"{_WHERE}.weights: the folder in `name` has its own; remove `weights`")
        model = _from_folder(folder, image_size)
    else:
        model = _by_name(cast(str, name), weights, image_size)
    source = timm_source(model)
    if isinstance(source, FeatureMaps):  # convolutions are a third faster in this memory format
        model = model.to(memory_format=torch.channels_last)
    return LoadedEncoder(model, source, _image_spec(model, image_size))


def timm_source(model: nn.Module) -> FeatureSource:
    """Return tokens for a ViT-like model (`blocks`, `num_prefix_tokens`), else feature maps."""
    blocks, prefix = getattr(model, "blocks", None), getattr(model, "num_prefix_tokens", None)
    if prefix is not None and isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        return BlockStates(_blocks, len(blocks), prefix)
    return FeatureMaps(len(getattr(model, "feature_info", ())))


@dataclass(frozen=True)
class FeatureMaps:
    """States of a convolutional (or hierarchical) network: its stages, then its last feature map.

    The last state, -1, is the output of `forward_features`; before it come the stages that timm's
    `features_only` returns. Each map `[N, C, h, w]` is flattened row by row to `[N, h * w, C]`.
    """

    num_stages: int
    num_prefix_tokens: int = 0

    @property
    def num_states(self) -> int:
        """Stages and the final map."""
        return self.num_stages + 1

    def states(
        self, encoder: nn.Module, pixel_values: Tensor, indices: Sequence[int]
    ) -> list[Tensor]:
        """See `FeatureSource`."""
        model, last = cast(Any, encoder), self.num_stages
        stages = sorted(set(indices) - {last})
        found: dict[int, Tensor] = {}
        if stages:
            maps = model.forward_intermediates(
                pixel_values, indices=stages, intermediates_only=True, output_fmt="NCHW"
            )
            found = dict(zip(stages, maps, strict=True))
        if last in indices:
            final = model.forward_features(pixel_values)
            if final.dim() == 3:  # already tokens
                return [final if i == last else _rows(found[i]) for i in indices]
            channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
            found[last] = final.permute(0, 3, 1, 2) if channels_last else final
        return [_rows(found[index]) for index in indices]


def _rows(feature_map: Tensor) -> Tensor:
    return feature_map.flatten(2).transpose(1, 2)


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    return list(cast(Any, model).blocks)


def _by_name(name: str, weights: str | None, image_size: int | None) -> Any:
    if weights is None:
        use_cache_if_hub_unreachable()
        action = f"load the weights of {name!r} (or give a file as {_WHERE}.weights)"
        with library_call("timm", f"{_WHERE}.name", action):
            return _create(name, image_size, None, {}, pretrained=True)
    model = _create(name, image_size, None, {})
    _load_weights(model, Path(weights).expanduser(), f"{_WHERE}.weights")
    return model


def _from_folder(folder: Path, image_size: int | None) -> Any:
    where = f"{_WHERE}.name"
    try:
        require_plain_folder(folder)
        saved = read_json(folder / "config.json")
        architecture, arguments = saved["architecture"], saved.get("model_args", {})
        if not isinstance(architecture, str) or not isinstance(arguments, dict):
            raise TypeError
    except UserError:
        raise
    except (OSError, KeyError, TypeError):
        raise UserError(
            f"{where}: {folder} has no timm config.json with an 'architecture'; expected that and "
            "model.safetensors, as timm saves a model"
        ) from None
    model_args = {k: v for k, v in arguments.items() if k != "num_classes"}
    model = _create(architecture, image_size, saved.get("pretrained_cfg"), model_args)
    _load_weights(model, folder / "model.safetensors", where)
    return model


def _create(
    architecture: str,
    image_size: int | None,
    pretrained_cfg: Mapping[str, Any] | None,
    arguments: Mapping[str, Any],
    *,
    pretrained: bool = False,
) -> Any:
    if not architecture.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{_WHERE}: timm has no model {architecture!r}{hint}")
    keywords: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0, **arguments}
    if pretrained_cfg is not None:
        keywords["pretrained_cfg_overlay"] = dict(pretrained_cfg)
    with library_call("timm", f"{_WHERE}.config", f"build {architecture}"):
        if image_size is not None:
            try:
                sized = {**arguments, "img_size": image_size}
                return _remember(timm.create_model(architecture, **{**keywords, **sized}), sized)
            except TypeError:
                pass  # a network without a position table takes any size
        return _remember(timm.create_model(architecture, **keywords), arguments)


def _remember(model: Any, arguments: Mapping[str, Any]) -> Any:
    """Store the creation arguments on the model, so that an export can create it again."""
    model.creation_arguments = dict(arguments)
    return model


def _load_weights(model: Any, path: Path, where: str) -> None:
    state = _read_state(path, where)
    table = state.get("pos_embed")
    expected = getattr(model, "pos_embed", None)
    if table is not None and expected is not None and table.shape != expected.shape:
        prefix = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
        grid = model.patch_embed.grid_size
        state["pos_embed"] = resample_abs_pos_embed(table, grid, num_prefix_tokens=prefix)
    with library_call("timm", where, f"load {path}, which is of another model"):
        result = model.load_state_dict(state, strict=False)
    unexpected = [key for key in result.unexpected_keys if not _is_classifier(key, model)]
    if result.missing_keys or unexpected:
        first = (result.missing_keys or unexpected)[0]
        raise UserError(
            f"{where}: {path} is of another model: {len(result.missing_keys)} tensors missing and "
            f"{len(unexpected)} unknown, the first being {first}",
            code="tensors_differ",
        )


def _read_state(path: Path, where: str) -> dict[str, Tensor]:
    if not path.exists():
        raise UserError(f"{where}: no such file {str(path)!r}; give a .safetensors or .pth file")
    require_regular(path)
    with library_call("torch", where, f"read {path} as weights"):
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state.get("model", state)) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{where}: {path} holds no state dict; save model.state_dict()")
    return dict(state)


def _is_classifier(key: str, model: Any) -> bool:
    names = model.pretrained_cfg.get("classifier", "head") or "head"
    names = (names,) if isinstance(names, str) else tuple(names)
    return key.startswith(tuple(f"{name}." for name in names))


def _image_spec(model: nn.Module, image_size: int | None) -> ImageSpec:
    data = timm.data.resolve_model_data_config(model)
    red, green, blue = (float(value) for value in data["mean"])
    std = tuple(float(value) for value in data["std"])
    size = image_size or _fixed_size(model) or data["input_size"][-1]
    return ImageSpec(size, (red, green, blue), (std[0], std[1], std[2]), data["interpolation"])


def _fixed_size(model: nn.Module) -> int | None:
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return int(size[0]) if isinstance(size, Sequence) else None
