"""The tokens of an image from the embeddings of its crops, in the order of its layout."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlm_sft.data.image_layout import ImageLayout


def image_tokens(crops: Tensor, layouts: Sequence[ImageLayout], newline: Tensor | None) -> Tensor:
    """Return the tokens of all images in their order, `[tokens, D]`.

    Args:
        crops: Embeddings of all crops of all images, `[crops, tokens of a crop, D]`.
        layouts: The layout of each image.
        newline: `image_newline`, `[D]`; None if no layout has newlines.
    """
    images = crops.split([layout.num_crops for layout in layouts])
    return torch.cat([_arranged(*pair, newline) for pair in zip(images, layouts, strict=True)])


def _arranged(crops: Tensor, layout: ImageLayout, newline: Tensor | None) -> Tensor:
    """Return the tokens `[num_tokens, D]` of one image's crops `[num_crops, crop_tokens, D]`."""
    if newline is not None:
        newline = newline.to(crops.dtype)
    if layout.grid is None:
        tokens = crops.flatten(0, 1)
        if not layout.newlines:
            return tokens
        assert newline is not None, "this model has no image_newline"
        return torch.cat([tokens, newline[None]])
    assert newline is not None, "this model has no image_newline"
    assert layout.tiles is not None
    overview, width = crops[0], crops.shape[-1]
    # Rows of tiles, columns of tiles, rows and columns in a tile -> one map.
    tiles = crops[1:].view(*layout.tiles, *layout.grid, width).transpose(1, 2)
    rows, columns = layout.tiles[0] * layout.grid[0], layout.tiles[1] * layout.grid[1]
    top, left, height, across = layout.window
    tokens = tiles.reshape(rows, columns, width)[top : top + height, left : left + across]
    if layout.scaled is not None:
        tokens = _scaled(tokens, layout.scaled)
    ends = newline.expand(tokens.shape[0], 1, width)
    return torch.cat([overview, torch.cat([tokens, ends], dim=1).flatten(0, 1)])


def _scaled(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale a map `[rows, columns, D]` to `size` by bilinear interpolation."""
    if 0 in size:
        return tokens.new_empty(*size, tokens.shape[-1])
    channels_first = tokens.permute(2, 0, 1)[None]
    return nn.functional.interpolate(channels_first, size, mode="bilinear")[0].permute(1, 2, 0)


def new_image_newline(hidden: int, *, seed: int) -> nn.Parameter:
    """Return a random `image_newline` `[hidden]` in float32, as LLaVA initializes it."""
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(hidden, generator=generator) * hidden**-0.5)
