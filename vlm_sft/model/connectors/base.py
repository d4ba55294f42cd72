"""What all connectors have in common, and drawing their initial weights."""

import torch
from torch import Tensor, nn

from vlm_sft.config.connectors import TokenGrid, count_tokens


class Connector(nn.Module):
    """A module from features of the vision tower to embeddings of the language model.

    `forward` maps features `[crops, tower tokens, width]` to embeddings `[crops, tokens, hidden]`;
    each crop by itself, whatever else is in the batch.

    Args:
        grid: Tokens of a crop in the language model; see `connector_grid`.

    Attributes:
        grid: As given.
        num_tokens: Their number.
    """

    def __init__(self, grid: TokenGrid) -> None:
        super().__init__()
        self.grid = grid
        self.num_tokens = count_tokens(grid)

    def draw_weights(self, generator: torch.Generator) -> None:
        """Draw all initial weights from a generator, in float32."""
        raise NotImplementedError


def draw_linear(linear: nn.Module, fan_in: int, generator: torch.Generator) -> None:
    """Draw weight and bias of a linear layer as `nn.Linear.reset_parameters` does."""
    for parameter in linear.parameters(recurse=False):
        draw_uniform(parameter, fan_in**-0.5, generator)


@torch.no_grad()
def draw_uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    """Replace a parameter by float32 values between `-bound` and `bound`."""
    parameter.data = torch.empty(parameter.shape, dtype=torch.float32)
    parameter.data.uniform_(-bound, bound, generator=generator)
