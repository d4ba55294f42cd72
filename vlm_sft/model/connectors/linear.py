"""One linear layer (LLaVA 1.0)."""

import torch
from torch import Tensor, nn

from vlm_sft.config.connectors import TokenGrid
from vlm_sft.model.connectors.base import Connector, draw_linear


class LinearConnector(Connector):
    """One linear layer; its parameters are named `weight` and `bias`."""

    def __init__(self, grid: TokenGrid, width: int, hidden: int) -> None:
        super().__init__(grid)
        self.weight = nn.Parameter(torch.empty(hidden, width))
        self.bias = nn.Parameter(torch.empty(hidden))

    def forward(self, features: Tensor) -> Tensor:
        """Map `[crops, tokens, width]` to `[crops, tokens, hidden]`."""
        return nn.functional.linear(features, self.weight, self.bias)

    def draw_weights(self, generator: torch.Generator) -> None:
        """See `Connector`."""
        draw_linear(self, self.weight.shape[1], generator)


def build(
    _projector_type: str, _tower_grid: TokenGrid, grid: TokenGrid, width: int, hidden: int
) -> LinearConnector:
    """Build the connector `linear`."""
    return LinearConnector(grid, width, hidden)
