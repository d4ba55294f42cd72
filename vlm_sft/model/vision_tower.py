"""The frozen vision tower: images to features, whichever library the encoder comes from."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vlm_sft.config.connectors import TokenGrid
from vlm_sft.errors import UserError
from vlm_sft.model.hashing import named_state, tensors_digest
from vlm_sft.model.towers.base import FeatureSource, LoadedEncoder


class VisionTower(nn.Module):
    """A frozen encoder and the choice of its features.

    Always in eval mode and outside autograd; its weights never change.

    Args:
        loaded: The encoder.
        library: Library that it comes from: `transformers`, `timm` or `open_clip`.
        feature_layers: States to use, 0 the first, -1 the last; several are concatenated.
        feature_select: `patch` drops class and register tokens, `cls_patch` keeps them.
        grid_pool: Side of the grid that patches are averaged to; None keeps all of them.

    Attributes:
        image_spec: Size and normalization of the input images.
        num_tokens: Features per image.
        grid: The same as `(rows, columns)`, or their number if they are not a square grid.
        width: Size of a feature.

    Raises:
        UserError: If the encoder does not have these features.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        loaded: LoadedEncoder,
        *,
        library: str,
        feature_layers: Sequence[int],
        feature_select: Literal["patch", "cls_patch"] = "patch",
        grid_pool: int | None = None,
    ) -> None:
        super().__init__()
        self.encoder = loaded.encoder
        self.library = library
        self.feature_layers = list(feature_layers)
        self.feature_select = feature_select
        self.grid_pool = grid_pool
        self.image_spec = loaded.image_spec
        self._source = loaded.source
        self._layers = _resolve_layers(feature_layers, loaded.source.num_states)
        self._num_dropped = self._num_tokens_to_drop(loaded.source)
        for name in ("mean", "std"):
            values = torch.tensor(getattr(self.image_spec, name)).view(3, 1, 1)
            self.register_buffer(f"_{name}", values, persistent=False)
        self.requires_grad_(False)
        self.eval()
        # Not every encoder says how many tokens it returns: run it on one image.
        size = self.image_spec.size
        probe = self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        self.num_tokens: int = probe.shape[1]
        self.width: int = probe.shape[2]
        side = math.isqrt(self.num_tokens)
        is_grid = feature_select == "patch" and side * side == self.num_tokens
        self.grid: TokenGrid = (side, side) if is_grid else self.num_tokens

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the encoder's weights."""
        return next(self.encoder.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the encoder's weights."""
        return next(self.encoder.parameters()).device

    def train(self, mode: bool = True) -> "VisionTower":
        """Stay in eval mode whatever `mode` is: dropout and batch statistics are frozen too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features `[N, num_tokens, width]` of `[N, 3, H, W]` uint8 images."""
        states = self._source.states(self.encoder, self.normalized(pixel_values), self._layers)
        _require_same_grid(states)
        features = torch.cat([state[:, self._num_dropped :] for state in states], dim=-1)
        return features if self.grid_pool is None else _pool_grid(features, self.grid_pool)

    def normalized(self, pixel_values: Tensor) -> Tensor:
        """Return `(value / 255 - mean) / std` of `[N, 3, H, W]` uint8 images.

        Computed on the tower's device in float32 (or the tower's dtype, if that is wider) and then
        rounded to the tower's dtype.

        Raises:
            TypeError: If the images are not uint8: they would be normalized a second time.
        """
        if pixel_values.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 in 0..255, found {pixel_values.dtype}")
        pixels = pixel_values.to(self.device).to(self._mean.dtype) / 255
        return ((pixels - self._mean) / self._std).to(self.dtype)

    def digest(self) -> str:
        """Return the sha256 of every parameter and buffer, to check that none has changed."""
        return tensors_digest(named_state(self.encoder))

    def _num_tokens_to_drop(self, source: FeatureSource) -> int:
        if self.feature_select == "patch":
            return source.num_prefix_tokens
        if source.num_prefix_tokens == 0:
            raise UserError(
                "model.vision_tower.feature_select: 'cls_patch' asks for a class token and this "
                "encoder has none; use 'patch'"
            )
        if self.grid_pool is not None:
            raise UserError(
                "model.vision_tower.grid_pool: pools patches only and feature_select 'cls_patch' "
                "keeps the class token; use 'patch'"
            )
        return 0


def _resolve_layers(layers: Sequence[int], num_states: int) -> list[int]:
    for layer in layers:
        if not -num_states <= layer < num_states:
            raise UserError(
                f"model.vision_tower.feature_layers: found {layer}, expected {-num_states} to "
                f"{num_states - 1} (this encoder has {num_states} states, 0 being the first)"
            )
    return [layer % num_states for layer in layers]


def _require_same_grid(states: Sequence[Tensor]) -> None:
    lengths = [state.shape[1] for state in states]
    if len(set(lengths)) > 1:
        raise UserError(
            f"model.vision_tower.feature_layers: the layers have {lengths} tokens per image; only "
            "layers of one grid can be concatenated, choose those"
        )


def _pool_grid(features: Tensor, side: int) -> Tensor:
    """Average the square grid of tokens of `[N, tokens, width]` to `side` x `side` tokens."""
    images, tokens, width = features.shape
    grid = round(tokens**0.5)
    if grid * grid != tokens:
        raise UserError(
            f"model.vision_tower.grid_pool: {tokens} tokens per image are no square grid; remove it"
        )
    if side > grid:
        raise UserError(
            f"model.vision_tower.grid_pool: found {side}, expected at most {grid}, the side of "
            "this tower's grid"
        )
    squares = features.transpose(1, 2).reshape(images, width, grid, grid)
    pooled = nn.functional.adaptive_avg_pool2d(squares, side)
    return pooled.flatten(2).transpose(1, 2)
