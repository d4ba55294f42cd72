"""Convert timm's EfficientNets to transformers, with grid pooling as one more block.

FastVLM reads the last feature map of any encoder, but no class of transformers averages a map
before the projector. An EfficientNet can express this with its own blocks: the last convolution
becomes the expansion of a block whose depthwise convolution of stride 2 averages. The activation
after it must not change averages of its own outputs, which holds for ReLU and ReLU6.
"""

from typing import Any, Final

import torch
from timm.layers import Conv2dSame
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from torch import Tensor, nn
from transformers import EfficientNetConfig, EfficientNetModel

from vlm_sft.errors import UserError

_ACTIVATIONS: Final[dict[type[nn.Module], str]] = {nn.ReLU: "relu", nn.ReLU6: "relu6"}
_OPEN: Final = 30.0
"""Bias of a gate that is always open: sigmoid(30) is 1 in float32, bfloat16 and float16."""


def pooled_efficientnet(net: Any, size: int, pooled: int) -> EfficientNetModel:
    """Return a model whose last feature map is that of timm, averaged to `pooled` x `pooled`.

    Args:
        net: timm's `EfficientNet` without squeeze-and-excitation, such as `tf_efficientnet_lite0`.
        size: Side of the input image in pixels.
        pooled: Half the side of the network's feature map, rounded down.

    Raises:
        UserError: The network has other blocks, or the pooling is not an average of stride 2.
    """
    activation = _activation(net)
    blocks = [block for stage in net.blocks for block in stage]
    inputs = _input_sides(net, blocks, size)
    kernel = _kernel(inputs[-1], pooled)
    config = _config(net, inputs, activation, kernel)
    with torch.device("meta"):
        model = EfficientNetModel(config)
    state = _stem(net)
    for index, block in enumerate(blocks):
        state |= _block(block, f"encoder.blocks.{index}.")
    state |= _pooling(net, kernel, f"encoder.blocks.{len(blocks)}.")
    model.load_state_dict(_with_gates(state, model), strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _activation(net: Any) -> str:
    found = {type(module) for module in net.modules() if "act" in type(module).__module__}
    found |= {type(getattr(module, "act", None)) for module in net.modules()}
    names = {name for kind, name in _ACTIVATIONS.items() if kind in found}
    if len(names) != 1:
        kind = type(net).__name__
        raise UserError(f"timm's {kind} does not have ReLU or ReLU6 as its only activation")
    return names.pop()


def _input_sides(net: Any, blocks: list[Any], size: int) -> list[int]:
    """Return the side of each block's input, and last that of the feature map."""
    for name, module in net.named_modules():
        strided = isinstance(module, nn.Conv2d) and module.stride != (1, 1)
        if strided and (not isinstance(module, Conv2dSame) or module.stride != (2, 2)):
            raise UserError(f"the convolution {name} does not have TensorFlow's padding")
    if size % 2:
        raise UserError(f"transformers' EfficientNet pads an image of odd side {size} differently")
    sides = [size // 2]
    for block in blocks:
        if type(block) not in (DepthwiseSeparableConv, InvertedResidual):
            raise UserError(f"transformers' EfficientNet has no {type(block).__name__}")
        sides.append(-(-sides[-1] // block.conv_dw.stride[0]))
    return sides


def _kernel(side: int, pooled: int) -> int:
    """Return the side of the windows of adaptive average pooling with stride 2."""
    if side not in (2 * pooled, 2 * pooled + 1):
        raise UserError(
            f"a feature map of {side} x {side} averaged to {pooled} x {pooled} is not a "
            f"convolution of stride 2; model.vision_tower.grid_pool: {side // 2} would be"
        )
    return 2 + side % 2


def _config(net: Any, inputs: list[int], activation: str, kernel: int) -> EfficientNetConfig:
    heads = [stage[0] for stage in net.blocks]
    width = net.conv_head.out_channels
    last = net.conv_head.in_channels
    return EfficientNetConfig(
        image_size=2 * inputs[0],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        kernel_sizes=[*(b.conv_dw.kernel_size[0] for b in heads), kernel],
        in_channels=[*(_first_conv(b).in_channels for b in heads), last],
        out_channels=[*(_last_conv(b).out_channels for b in heads), width],
        strides=[*(b.conv_dw.stride[0] for b in heads), 2],
        num_block_repeats=[*map(len, net.blocks), 1],
        expand_ratios=[
            *(b.conv_dw.in_channels // _first_conv(b).in_channels for b in heads),
            width // last,
        ],
        # Blocks whose input has an odd side are padded equally on all sides.
        depthwise_padding=[i for i, side in enumerate(inputs[:-1]) if side % 2],
        hidden_act=activation,
        hidden_dim=width,
        hidden_size=width,
        batch_norm_eps=net.bn1.eps,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        num_labels=0,
    )


def _first_conv(block: Any) -> Any:
    return block.conv_pw if isinstance(block, InvertedResidual) else block.conv_dw


def _last_conv(block: Any) -> Any:
    return block.conv_pwl if isinstance(block, InvertedResidual) else block.conv_pw


def _stem(net: Any) -> dict[str, Tensor]:
    state = {"embeddings.convolution.weight": net.conv_stem.weight}
    return state | _norm(net.bn1, "embeddings.batchnorm.")


def _block(block: Any, prefix: str) -> dict[str, Tensor]:
    state = {
        f"{prefix}depthwise_conv.depthwise_conv.weight": block.conv_dw.weight,
        f"{prefix}projection.project_conv.weight": _last_conv(block).weight,
    }
    if isinstance(block, InvertedResidual):
        state[f"{prefix}expansion.expand_conv.weight"] = block.conv_pw.weight
        state |= _norm(block.bn1, f"{prefix}expansion.expand_bn.")
        state |= _norm(block.bn2, f"{prefix}depthwise_conv.depthwise_norm.")
        return state | _norm(block.bn3, f"{prefix}projection.project_bn.")
    state |= _norm(block.bn1, f"{prefix}depthwise_conv.depthwise_norm.")
    return state | _norm(block.bn2, f"{prefix}projection.project_bn.")


def _pooling(net: Any, kernel: int, prefix: str) -> dict[str, Tensor]:
    """Return a block with the last convolution, the average, and two identities after it."""
    weight = net.conv_head.weight
    width = weight.shape[0]
    average = torch.full((width, 1, kernel, kernel), kernel**-2.0, dtype=weight.dtype)
    identity = torch.eye(width, dtype=weight.dtype)[:, :, None, None]
    eps = net.bn1.eps
    return {
        f"{prefix}expansion.expand_conv.weight": weight,
        **_norm(net.bn2, f"{prefix}expansion.expand_bn."),
        f"{prefix}depthwise_conv.depthwise_conv.weight": average,
        **_no_norm(width, eps, weight.dtype, f"{prefix}depthwise_conv.depthwise_norm."),
        f"{prefix}projection.project_conv.weight": identity,
        **_no_norm(width, eps, weight.dtype, f"{prefix}projection.project_bn."),
        "encoder.top_conv.weight": identity.clone(),
        **_no_norm(width, eps, weight.dtype, "encoder.top_bn."),
    }


def _norm(norm: Any, prefix: str) -> dict[str, Tensor]:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{prefix}{name}": getattr(norm, name) for name in names}


def _no_norm(width: int, eps: float, dtype: torch.dtype, prefix: str) -> dict[str, Tensor]:
    """Return a batch norm that is the identity: (x - 0) / sqrt(1 - eps + eps)."""
    zeros = torch.zeros(width, dtype=dtype)
    return {
        f"{prefix}weight": torch.ones(width, dtype=dtype),
        f"{prefix}bias": zeros.clone(),
        f"{prefix}running_mean": zeros.clone(),
        f"{prefix}running_var": torch.full((width,), 1.0 - eps, dtype=dtype),
        f"{prefix}num_batches_tracked": torch.tensor(0),
    }


def _with_gates(state: dict[str, Tensor], model: EfficientNetModel) -> dict[str, Tensor]:
    """Add squeeze-and-excitation gates that are always open; timm's network has none."""
    dtype = state["encoder.top_conv.weight"].dtype
    for name, value in model.state_dict().items():
        if ".squeeze_excite." in name:
            opened = _OPEN if name.endswith(".expand.bias") else 0.0
            state[name] = torch.full(value.shape, opened, dtype=dtype)
    return {name: value.detach() for name, value in state.items()}
