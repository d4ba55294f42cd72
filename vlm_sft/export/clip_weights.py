"""Convert the image encoder of a CLIP model from open_clip to transformers."""

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
    """Return a CLIP encoder of transformers with the weights and features of an open_clip one.

    Raises:
        UserError: The encoder has a part that transformers' CLIP does not have.
    """
    config = clip_config_from_open_clip(visual)
    with torch.device("meta"):
        model = CLIPVisionModel(config)
    state = clip_state_from_open_clip(visual.state_dict())
    model.load_state_dict(state, assign=True)
    for module in model.modules():  # buffers that are not in the state dict
        if isinstance(getattr(module, "position_ids", None), Tensor):
            cast(Any, module).position_ids = torch.arange(cast(Any, module).num_positions)[None]
    return model.requires_grad_(False).eval()


def clip_state_from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of an open_clip `VisionTransformer` for `CLIPVisionModel`.

    The fused query-key-value matrix is split in three. The final projection `proj` is dropped,
    because features are taken before it.

    Raises:
        UserError: A tensor does not exist in transformers' CLIP.
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
            raise UserError(f"the open_clip tensor {key!r} does not exist in transformers' CLIP")
    return renamed


def clip_config_from_open_clip(visual: nn.Module) -> CLIPVisionConfig:
    """Return the configuration of an open_clip encoder for transformers.

    Raises:
        UserError: The encoder is not a plain CLIP ViT.
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
