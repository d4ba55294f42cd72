"""CLIP's image encoder from open_clip's names and layout to those of transformers."""

import re
from collections.abc import Mapping
from typing import Any, Final, cast

import torch
from open_clip.transformer import LayerNorm, QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm_sft.errors import UserError

_TOP: Final = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",  # transformers' own spelling
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_BLOCK: Final = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IN_BLOCK: Final = re.compile(r"^transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$")
_IN_PROJECTION: Final = re.compile(r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")


def clip_from_open_clip(visual: nn.Module) -> CLIPVisionModel:
    """A transformers CLIP encoder with the weights of an open_clip one; features are the same.

    Raises:
        UserError: If the encoder has something that transformers' CLIP has not.
    """
    config = clip_config_from_open_clip(visual)
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    state = clip_state_from_open_clip(visual.state_dict())
    model.load_state_dict(state, assign=True)
    for module in model.modules():  # not part of a state dict
        if isinstance(getattr(module, "position_ids", None), Tensor):
            cast(Any, module).position_ids = torch.arange(cast(Any, module).num_positions)[None]
    return model.requires_grad_(False).eval()


def clip_state_from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of an open_clip `VisionTransformer`, renamed for `CLIPVisionModel`.

    The fused query-key-value matrix is cut in three; the final projection `proj` is left out,
    since a feature layer comes before it.

    Raises:
        UserError: If a tensor has no place in transformers' CLIP.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "proj":
            continue
        block, fused = _IN_BLOCK.match(key), _IN_PROJECTION.match(key)
        if key in _TOP:
            renamed[_TOP[key]] = value
        elif fused is not None:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                name = f"encoder.layers.{fused[1]}.self_attn.{letter}_proj.{fused[2]}"
                renamed[name] = part.contiguous()
        elif block is not None and block[2] in _BLOCK:
            renamed[f"encoder.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}"] = value
        else:
            raise UserError(f"the open_clip tensor {key!r} has no place in transformers' CLIP")
    return renamed


def clip_config_from_open_clip(visual: nn.Module) -> CLIPVisionConfig:
    """Sizes and activation of an open_clip encoder as transformers' configuration.

    Raises:
        UserError: If it is no plain CLIP ViT.
    """
    if not isinstance(visual, VisionTransformer):
        raise UserError(
            f"open_clip's {type(visual).__name__} is not the plain ViT that transformers' CLIP is"
        )
    model = cast(Any, visual)
    block = model.transformer.resblocks[0]
    plain = type(block) is ResidualAttentionBlock and isinstance(model.ln_pre, LayerNorm)
    if not plain or not isinstance(block.ls_1, nn.Identity) or model.attn_pool is not None:
        raise UserError(
            "this open_clip ViT has layer scale, other blocks, a pooler or no first norm, which "
            "transformers' CLIP cannot hold"
        )
    height, width = model.image_size
    assert height == width
    return CLIPVisionConfig(
        hidden_size=model.conv1.out_channels,
        intermediate_size=block.mlp.c_fc.out_features,
        num_hidden_layers=len(model.transformer.resblocks),
        num_attention_heads=block.attn.num_heads,
        image_size=height,
        patch_size=model.patch_size[0],
        projection_dim=model.output_dim,
        hidden_act=_activation(block.mlp.gelu),
        layer_norm_eps=model.ln_pre.eps,
    )


def _activation(module: nn.Module) -> str:
    if isinstance(module, QuickGELU):
        return "quick_gelu"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    raise UserError(f"the activation {type(module).__name__} is not one of transformers' CLIP")
