"""Pixel shuffle in front of a two-layer MLP (InternVL): a quarter of the tower's tokens."""

from typing import Final

import torch
from torch import Tensor, nn

from vlm_sft.config.connectors import TokenGrid
from vlm_sft.model.connectors.base import Connector, draw_linear

_FACTOR: Final = 2
"""Side of the squares that become one token (InternVL's `downsample_ratio` of 0.5)."""


class PixelShuffleMlpConnector(Connector):
    """Squares of 2 x 2 tokens side by side, then LayerNorm, linear, GELU, linear.

    Order of the features and names of the weights are those of transformers'
    `InternVLForConditionalGeneration`.
    """

    def __init__(
        self, tower_grid: tuple[int, int], grid: TokenGrid, width: int, hidden: int
    ) -> None:
        super().__init__(grid)
        self.tower_grid = tower_grid
        self.layer_norm = nn.LayerNorm(width * _FACTOR**2)
        self.linear_1 = nn.Linear(width * _FACTOR**2, hidden)
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """Map `[crops, rows * columns, width]` to `[crops, rows * columns / 4, hidden]`."""
        rows, columns = self.tower_grid
        squares = features.reshape(
            len(features), rows // _FACTOR, _FACTOR, columns // _FACTOR, _FACTOR, -1
        )
        joined = squares.transpose(2, 3).flatten(3).flatten(1, 2)
        return self.linear_2(nn.functional.gelu(self.linear_1(self.layer_norm(joined))))

    def draw_weights(self, generator: torch.Generator) -> None:
        """See `Connector`."""
        for layer in (self.linear_1, self.linear_2):
            draw_linear(layer, layer.in_features, generator)


def build(
    _projector_type: str, tower_grid: TokenGrid, grid: TokenGrid, width: int, hidden: int
) -> PixelShuffleMlpConnector:
    """Build the connector `pixel_shuffle_mlp`."""
    assert not isinstance(tower_grid, int), "checked by connector_grid"
    return PixelShuffleMlpConnector(tower_grid, grid, width, hidden)
