"""Vision encoders of open_clip: CLIP, SigLIP, CoCa, EVA and its other models."""

import copy
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import open_clip
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from vlm_sft.data.images import ImageSpec
from vlm_sft.errors import UserError
from vlm_sft.model.pretrained import no_custom_code_prompts
from vlm_sft.model.towers.base import BlockStates, FeatureSource, LoadedEncoder
from vlm_sft.model.towers.timm import timm_source
from vlm_sft.utils.hub import use_cache_if_hub_unreachable
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.model_folders import custom_code_refused, require_plain_folder

_WHERE: Final = "model.vision_tower"
_TINY_TEXT: Final = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def load(
    *,
    name: str | None,
    config: Mapping[str, Any] | None,
    weights: str | None,
    image_size: int | None,
) -> LoadedEncoder:
    """Load or build the vision encoder of an open_clip model; its text encoder is dropped.

    Args:
        name: A model of open_clip, `hf-hub:NAME` or `local-dir:FOLDER`; None builds one from
            `config`.
        config: An open_clip model configuration, or fields that override those of its
            `model_name`.
        weights: A pretrained tag or a file.
        image_size: Side of the images in pixels; None: as the encoder was trained.

    Raises:
        UserError: If name, tag or file is unknown, or the activation is not the one that the
            pretrained weights were trained with.
    """
    if config is not None:
        if weights is not None:
            raise UserError(
                f"{_WHERE}.weights: `config` draws random weights; remove one of the two"
            )
        visual, preprocessing = _random(dict(config), image_size)
    else:
        assert name is not None
        visual, preprocessing = _pretrained(name, weights, image_size)
    size = visual.image_size
    image_spec = ImageSpec(
        size=size[0] if isinstance(size, Sequence) else size,
        mean=_triple(preprocessing.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=_triple(preprocessing.get("std", open_clip.OPENAI_DATASET_STD)),
        interpolation=preprocessing.get("interpolation", "bicubic"),
    )
    return LoadedEncoder(visual, _source(visual), image_spec)


def visual_blocks(visual: nn.Module) -> Sequence[nn.Module]:
    """Return the transformer blocks of an open_clip `VisionTransformer`."""
    return list(cast(Any, visual).transformer.resblocks)


@dataclass(frozen=True)
class _ResNetMap:
    """The last feature map of OpenAI's modified ResNets, row by row."""

    num_states: int = 1
    num_prefix_tokens: int = 0

    def states(
        self, encoder: nn.Module, pixel_values: Tensor, indices: Sequence[int]
    ) -> list[Tensor]:
        resnet = cast(Any, encoder)
        x = resnet.stem(pixel_values)
        for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            x = stage(x)
        return [x.flatten(2).transpose(1, 2) for _ in indices]


@dataclass(frozen=True)
class _Trunk:
    """An open_clip model whose vision encoder is a timm model, its `trunk`."""

    inner: FeatureSource

    @property
    def num_states(self) -> int:
        return self.inner.num_states

    @property
    def num_prefix_tokens(self) -> int:
        return self.inner.num_prefix_tokens

    def states(
        self, encoder: nn.Module, pixel_values: Tensor, indices: Sequence[int]
    ) -> list[Tensor]:
        return self.inner.states(cast(Any, encoder).trunk, pixel_values, indices)


def _source(visual: nn.Module) -> FeatureSource:
    if isinstance(visual, VisionTransformer):
        return BlockStates(visual_blocks, len(visual_blocks(visual)), 1)
    if isinstance(visual, TimmModel):
        return _Trunk(timm_source(visual.trunk))
    if isinstance(visual, ModifiedResNet):
        return _ResNetMap()
    raise UserError(f"{_WHERE}: open_clip's {type(visual).__name__} is not supported; take a ViT")


def _random(tree: dict[str, Any], image_size: int | None) -> tuple[Any, dict[str, Any]]:
    preprocessing = tree.pop("preprocess_cfg", {})
    name = tree.pop("model_name", None)
    if name is not None:
        tree = {**_model_config(name), **tree}
    vision = dict(tree.get("vision_cfg") or {})
    if not vision:
        raise UserError(f"{_WHERE}.config: expected open_clip's 'vision_cfg' or a 'model_name'")
    if image_size is not None:
        vision["image_size"] = image_size
    vision["timm_model_pretrained"] = False
    known = {field.name for field in dataclasses.fields(open_clip.CLIPVisionCfg)}
    for key in vision:
        if key not in known:
            raise UserError(f"{_WHERE}.config.vision_cfg: unknown key {key!r}{_hint(key, known)}")
    with library_call("open_clip", f"{_WHERE}.config", "build this encoder"):
        model = open_clip.CLIP(
            embed_dim=tree.get("embed_dim", 8),
            vision_cfg=open_clip.CLIPVisionCfg(**vision),
            text_cfg=open_clip.CLIPTextCfg(**_TINY_TEXT),
            quick_gelu=bool(tree.get("quick_gelu", False)),
        )
        visual: Any = model.visual
        if isinstance(visual, TimmModel) and "image_size" in vision:
            visual.set_input_size(vision["image_size"])
    return visual, preprocessing


def _pretrained(
    name: str, weights: str | None, image_size: int | None
) -> tuple[Any, dict[str, Any]]:
    if not name.startswith(("hf-hub:", "local-dir:")):
        if weights is None:
            tags = open_clip.list_pretrained_tags_by_model(name)
            raise UserError(
                f"{_WHERE}.weights: {name!r} needs a pretrained tag or a file"
                + (f"; its tags: {', '.join(tags)}" if tags else "")
            )
        _check_weights(name, weights, bool(_model_config(name).get("quick_gelu", False)))
    elif name.startswith("local-dir:"):
        require_plain_folder(Path(name.removeprefix("local-dir:")))
    if not name.startswith("local-dir:") and not Path(weights or "").is_file():
        use_cache_if_hub_unreachable()
    with (
        library_call("open_clip", _WHERE, f"load {name!r} with weights {weights!r}"),
        custom_code_refused(_WHERE, name),
        no_custom_code_prompts(),
    ):
        model = open_clip.create_model(
            name,
            pretrained=weights,
            force_image_size=image_size,
            precision="fp32",
            weights_only=True,
        )
    visual = model.visual
    return visual, dict(getattr(visual, "preprocess_cfg", {}))


def _check_weights(name: str, weights: str, quick_gelu: bool) -> None:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights not in tags:
        if not Path(weights).is_file():
            raise UserError(
                f"{_WHERE}.weights: {weights!r} is neither a file nor a pretrained tag of {name}"
                f"{_hint(weights, tags)}; its tags: {', '.join(tags) or 'none'}"
            )
        return
    expected = bool((open_clip.get_pretrained_cfg(name, weights) or {}).get("quick_gelu", False))
    # open_clip only logs a wrong activation, and the features would be silently wrong.
    if expected != quick_gelu:
        other = f"{name}-quickgelu" if expected else name.removesuffix("-quickgelu")
        raise UserError(
            f"{_WHERE}.name: the weights {weights!r} were trained with "
            f"{'QuickGELU' if expected else 'GELU'} and {name!r} has the other activation; "
            f"use {other!r}"
        )


def _model_config(name: str) -> dict[str, Any]:
    found = open_clip.get_model_config(name)
    if found is None:
        known = open_clip.list_models()
        raise UserError(f"{_WHERE}.name: open_clip has no model {name!r}{_hint(name, known)}")
    return copy.deepcopy(cast(dict[str, Any], found))


def _hint(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def _triple(values: Sequence[float] | float) -> tuple[float, float, float]:
    if isinstance(values, (int, float)):
        return float(values), float(values), float(values)
    red, green, blue = (float(value) for value in values)
    return red, green, blue
