"""Linear layers with GELU between them (LLaVA 1.5: two)."""

import torch
from torch import Tensor, nn

from vlm_sft.config.connectors import TokenGrid
from vlm_sft.model.connectors.base import Connector, draw_linear


class MlpConnector(Connector):
    """`depth` linear layers with GELU between them, named `linear_1` to `linear_N`.

    These are the names in `LlavaForConditionalGeneration`.
    """

    def __init__(self, grid: TokenGrid, width: int, hidden: int, depth: int) -> None:
        super().__init__(grid)
        self.depth = depth
        for index in range(1, depth + 1):
            layer = nn.Linear(width if index == 1 else hidden, hidden)
            self.add_module(f"linear_{index}", layer)

    def forward(self, features: Tensor) -> Tensor:
        """Map `[crops, tokens, width]` to `[crops, tokens, hidden]`."""
        for index in range(1, self.depth + 1):
            if index > 1:
                features = nn.functional.gelu(features)
            features = self.get_submodule(f"linear_{index}")(features)
        return features

    def draw_weights(self, generator: torch.Generator) -> None:
        """See `Connector`."""
        for layer in self.children():
            assert isinstance(layer, nn.Linear)
            draw_linear(layer, layer.in_features, generator)


def build(
    projector_type: str, _tower_grid: TokenGrid, grid: TokenGrid, width: int, hidden: int
) -> MlpConnector:
    """Build the connector `mlpNx_gelu`."""
    depth = int(projector_type.removeprefix("mlp").partition("x")[0])
    return MlpConnector(grid, width, hidden, depth)
