"""The projector from vision features to language-model embeddings; randomly initialized."""

import re
from typing import Final

import torch
from torch import Tensor, nn

from vlm_sft.errors import UserError

_MLP: Final = re.compile(r"^mlp([1-9]\d*)x_gelu$")


class LinearProjector(nn.Module):
    """One linear layer (LLaVA 1.0); its parameters are named `weight` and `bias`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, width))
        self.bias = nn.Parameter(torch.empty(hidden))

    def forward(self, features: Tensor) -> Tensor:
        """Project `[..., width]` to `[..., hidden]`."""
        return nn.functional.linear(features, self.weight, self.bias)


class MlpProjector(nn.Module):
    """`depth` linear layers with GELU between them (LLaVA 1.5: 2), named `linear_1` to `linear_N`.

    These are the names in `LlavaForConditionalGeneration`.
    """

    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        for index in range(1, depth + 1):
            layer = nn.Linear(width if index == 1 else hidden, hidden)
            self.add_module(f"linear_{index}", layer)

    def forward(self, features: Tensor) -> Tensor:
        """Project `[..., width]` to `[..., hidden]`."""
        for index in range(1, self.depth + 1):
            if index > 1:
                features = nn.functional.gelu(features)
            features = self.get_submodule(f"linear_{index}")(features)
        return features


def build_projector(projector_type: str, width: int, hidden: int, *, seed: int) -> nn.Module:
    """Build a projector in float32 with PyTorch's default initialization of linear layers.

    Args:
        projector_type: `linear` or `mlpNx_gelu` (LLaVA `multimodal_projector/builder.py`).
        width: Number of vision features per image token.
        hidden: Embedding size of the language model.
        seed: Seed of the weights, which do not depend on the global generator.

    Raises:
        UserError: If the type is unknown.
    """
    match = _MLP.match(projector_type)
    if projector_type != "linear" and match is None:
        raise UserError(
            f"model.projector_type: found {projector_type!r}, expected 'linear' or 'mlpNx_gelu' "
            "(mlp2x_gelu is LLaVA-1.5's)"
        )
    # The layers draw initial weights from the global generator; these are replaced below.
    with torch.random.fork_rng(devices=[]):
        projector: nn.Module = (
            MlpProjector(width, hidden, int(match[1])) if match else LinearProjector(width, hidden)
        )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in projector.named_parameters():
        fan_in = width if name in _FIRST_LAYER else hidden
        bound = fan_in**-0.5  # for weight and bias, as in nn.Linear.reset_parameters
        with torch.no_grad():
            parameter.data = torch.empty(parameter.shape, dtype=torch.float32)
            parameter.data.uniform_(-bound, bound, generator=generator)
    return projector


_FIRST_LAYER: Final = frozenset({"weight", "bias", "linear_1.weight", "linear_1.bias"})
