"""Learned queries that read the features of an image by cross-attention (Qwen-VL's resampler)."""

import math
from typing import Final

import torch
from torch import Tensor, nn

from vlm_sft.config.connectors import TokenGrid
from vlm_sft.errors import UserError
from vlm_sft.model.connectors.base import Connector, draw_linear, draw_uniform

_HEAD_SIZE: Final = 128
"""Of an attention head, where the embedding size is a multiple of it."""

_EPSILON: Final = 1e-6
"""Of every LayerNorm."""


class ResamplerConnector(Connector):
    """One layer of cross-attention from learned queries to features (Qwen-VL, arXiv 2308.12966).

    Queries and features are normalized; both get fixed 2-D sine-cosine positions in the attention,
    the values do not. The queries have the positions of a square grid over the whole image, which
    are interpolated for the features. Normalization and a square matrix follow. Operations, initial
    weights and names of the weights are those of `visual.py` of Qwen-VL.
    """

    query_positions: Tensor
    key_positions: Tensor

    def __init__(
        self, tower_grid: tuple[int, int], num_queries: int, width: int, hidden: int
    ) -> None:
        super().__init__(num_queries)
        self.query = nn.Parameter(torch.empty(num_queries, hidden))
        self.kv_proj = nn.Identity() if width == hidden else nn.Linear(width, hidden, bias=False)
        self.attn = nn.MultiheadAttention(hidden, num_heads(hidden), batch_first=True)
        self.ln_q = nn.LayerNorm(hidden, eps=_EPSILON)
        self.ln_kv = nn.LayerNorm(hidden, eps=_EPSILON)
        self.ln_post = nn.LayerNorm(hidden, eps=_EPSILON)
        self.proj = nn.Parameter(torch.empty(hidden, hidden))
        table = sine_cosine_positions(math.isqrt(num_queries), hidden)
        # Computed from the configuration, so they are not saved.
        self.register_buffer("query_positions", table, persistent=False)
        self.register_buffer("key_positions", _interpolated(table, tower_grid), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map `[crops, rows * columns, width]` to `[crops, num_queries, hidden]`."""
        values = self.ln_kv(self.kv_proj(features))
        keys = values + self.key_positions.to(values.dtype)
        queries = self.ln_q(self.query)
        queries = queries + self.query_positions.to(queries.dtype)
        queries = queries.expand(len(features), -1, -1)
        read, _ = self.attn(queries, keys, values, need_weights=False)
        return self.ln_post(read) @ self.proj

    @torch.no_grad()
    def draw_weights(self, generator: torch.Generator) -> None:
        """See `Connector`."""
        hidden = self.query.shape[1]
        nn.init.trunc_normal_(_fresh(self.query), std=0.02, generator=generator)
        if isinstance(self.kv_proj, nn.Linear):
            draw_linear(self.kv_proj, self.kv_proj.in_features, generator)
        # As `nn.MultiheadAttention` does: Glorot for the input matrix `[3 * hidden, hidden]`.
        draw_uniform(self.attn.in_proj_weight, math.sqrt(6 / (4 * hidden)), generator)
        draw_uniform(self.attn.out_proj.weight, hidden**-0.5, generator)
        _fresh(self.proj).normal_(std=hidden**-0.5, generator=generator)


def num_heads(hidden: int) -> int:
    """Return the number of attention heads: of size 128, or somewhat larger if that must be."""
    return next(n for n in range(max(1, hidden // _HEAD_SIZE), 0, -1) if hidden % n == 0)


def sine_cosine_positions(side: int, width: int) -> Tensor:
    """Return 2-D sine-cosine positions `[side * side, width]` of a square grid, in float32.

    Half of the features are sines and cosines of the column, the other half of the row, as in
    `get_2d_sincos_pos_embed` of the masked autoencoder (MAE).
    """
    quarter = width // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, width / 2]
    columns = line[None].expand(side, -1, -1)
    rows = line[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1).to(torch.float32)


def _interpolated(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the positions of a square grid at the places of another grid over the same image."""
    side = math.isqrt(len(table))
    if grid == (side, side):
        return table.clone()
    square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T.contiguous()


def _fresh(parameter: nn.Parameter) -> Tensor:
    """Replace the values of a parameter by new float32 memory, and return that."""
    parameter.data = torch.empty(parameter.shape, dtype=torch.float32)
    return parameter.data


def build(
    _projector_type: str, tower_grid: TokenGrid, grid: TokenGrid, width: int, hidden: int
) -> ResamplerConnector:
    """Build the connector `resampler`.

    Raises:
        UserError: If the embedding size of the language model has no 2-D positions.
    """
    assert isinstance(grid, int) and not isinstance(tower_grid, int), "checked by connector_grid"
    if hidden % 4:
        raise UserError(
            "model.projector_type: resampler needs a language model whose embedding size is a "
            f"multiple of 4, for the positions of its queries, and this one has {hidden}; use "
            "mlp2x_gelu"
        )
    return ResamplerConnector(tower_grid, grid, width, hidden)
