"""How an image becomes crops and tokens: a pure function of its width and height.

Everything that counts tokens (lengths, packing, the planner) and everything that makes them
(pixels, the model) follows the same `ImageLayout`, which is known before an image is decoded.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from vlm_sft.config.connectors import TokenGrid, count_tokens
from vlm_sft.config.schema import ImageTilingConfig
from vlm_sft.errors import UserError

Size = tuple[int, int]
"""Width and height of an upright image in pixels."""

Tiling = Literal["none", "anyres", "dynamic"]

NEXT_GRIDS: Final = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""Grids of LLaVA-NeXT, rows by columns, in the order of transformers, which decides between two
grids that fit equally well."""

ONEVISION_GRIDS: Final = tuple((rows, columns) for rows in range(1, 7) for columns in range(1, 7))
"""Grids of LLaVA-OneVision."""

_SHRINK_ABOVE: Final = 1.1
"""Factor by which the side of a token map may exceed that of `max_crops` crops."""


@dataclass(frozen=True)
class ImageLayout:
    """The crops and the tokens of one image.

    Attributes:
        crop_tokens: Tokens of a crop after the connector.
        tiles: Rows and columns of tiles; None for an image that is one square crop, made by
            `data.image_aspect`.
        overview: Where the whole image, squeezed into one crop, comes in the order of the crops.
        resized: Height and width to which the image is resized for its tiles, in pixels.
        offset: Row and column of the resized image in the canvas of all tiles; the rest is black.
        grid: Rows and columns of the tokens of a crop, if the tokens of the tiles are arranged as
            one map; None: the tokens of all crops are concatenated.
        window: First row, first column, rows and columns of the map without the padding.
        scaled: Rows and columns to which the map is scaled down; None: it is not.
        newlines: Number of `image_newline` tokens: one after each row of the map, or one at the end
            of a single crop.
    """

    crop_tokens: int
    tiles: tuple[int, int] | None = None
    overview: Literal["none", "first", "last"] = "none"
    resized: tuple[int, int] = (0, 0)
    offset: tuple[int, int] = (0, 0)
    grid: tuple[int, int] | None = None
    window: tuple[int, int, int, int] = (0, 0, 0, 0)
    scaled: tuple[int, int] | None = None
    newlines: int = 0

    @property
    def num_tiles(self) -> int:
        """Number of tiles; 1 for an image that is not divided."""
        return 1 if self.tiles is None else self.tiles[0] * self.tiles[1]

    @property
    def num_crops(self) -> int:
        """Number of images that the vision tower encodes."""
        return self.num_tiles + (self.overview != "none")

    @property
    def map_size(self) -> tuple[int, int]:
        """Rows and columns of the token map, without newlines."""
        return self.window[2:] if self.scaled is None else self.scaled

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the language model, newlines included."""
        if self.grid is None:
            return self.num_crops * self.crop_tokens + self.newlines
        rows, columns = self.map_size
        return self.crop_tokens + rows * columns + self.newlines

    def newline_positions(self) -> list[int]:
        """Return which of the image's tokens are `image_newline`, from 0, in order."""
        if self.grid is None:
            return [self.num_tokens - 1] * self.newlines
        columns = self.map_size[1] + 1
        return [self.crop_tokens + columns * row - 1 for row in range(1, self.newlines + 1)]


@dataclass(frozen=True)
class LayoutRule:
    """Gives the layout of every image under one tiling, vision tower and connector.

    Attributes:
        crop_tokens: Tokens of a crop after the connector.
        crop_grid: Their rows and columns; None if they have no spatial order (resampler, class
            token).
        crop_size: Side of a crop in pixels.
        tiling: How images are divided.
        grids: `anyres`: rows and columns of tiles to choose from.
        max_crops: `anyres`: the map of the tiles is scaled down to at most as many tokens as this
            number of crops has, and the images of a record with several are not divided; None: the
            map keeps its size, and every image is divided.
        min_tiles: `dynamic`: fewest tiles of an image.
        max_tiles: `dynamic`: most tiles of an image.
    """

    crop_tokens: int
    crop_grid: tuple[int, int] | None = None
    crop_size: int = 0
    tiling: Tiling = "none"
    grids: tuple[tuple[int, int], ...] = ()
    max_crops: int | None = None
    min_tiles: int = 1
    max_tiles: int = 1

    @property
    def has_newline(self) -> bool:
        """Whether images have `image_newline` tokens."""
        return self.tiling == "anyres"

    @property
    def needs_sizes(self) -> bool:
        """Whether the layout depends on the size of an image."""
        return self.tiling != "none"

    def layout(self, width: int, height: int, *, num_images: int = 1) -> ImageLayout:
        """Return the layout of an image.

        Args:
            width: Width of the upright image in pixels; any number if not `needs_sizes`.
            height: Its height.
            num_images: Number of images in the record.
        """
        if not self.needs_sizes:
            return _square(self)
        divided = num_images == 1 or self.max_crops is None
        return _layout(self, width, height, divided)

    def layouts(self, sizes: Sequence[Size]) -> tuple[ImageLayout, ...]:
        """Return the layouts of the images of a record, given the size of each."""
        return tuple(self.layout(*size, num_images=len(sizes)) for size in sizes)

    def describe(self) -> str:
        """Return the tokens of an image in words."""
        if not self.needs_sizes:
            return f"{self.crop_tokens:,} image tokens per image"
        if self.tiling == "dynamic":
            crops = f"{self.min_tiles} to {self.max_tiles} tiles and an overview"
        else:
            tiles = [rows * columns for rows, columns in self.grids]
            crops = f"an overview and {min(tiles)} to {max(tiles)} tiles"
            if self.max_crops is not None:
                crops += f" scaled to at most about {self.max_crops} crops' tokens"
        return f"{self.crop_tokens:,} image tokens per crop; an image is {crops}"


def layout_rule(tiling: ImageTilingConfig, token_grid: TokenGrid, crop_size: int) -> LayoutRule:
    """Return the rule of a configuration.

    Args:
        tiling: `model.image_tiling`.
        token_grid: Tokens of a crop after the connector.
        crop_size: Side of the tower's input in pixels.

    Raises:
        UserError: The tokens of a crop have no spatial order, which `anyres` needs.
    """
    crop_tokens = count_tokens(token_grid)
    crop_grid = None if isinstance(token_grid, int) else token_grid
    if tiling.layout == "none":
        return LayoutRule(crop_tokens, crop_grid, crop_size)
    if tiling.layout == "dynamic":
        return LayoutRule(
            crop_tokens,
            crop_grid,
            crop_size,
            "dynamic",
            min_tiles=tiling.min_tiles,
            max_tiles=tiling.max_tiles,
        )
    if crop_grid is None:
        raise UserError(
            f"model.image_tiling.layout: {tiling.layout} joins the tokens of neighboring tiles row "
            f"by row, but the {crop_tokens} tokens of a crop have no rows and columns (a "
            "resampler, or feature_select: cls_patch); use dynamic, or a connector and features "
            "that keep the grid of patches"
        )
    grids = tiling.grids
    if grids is None:
        grids = list(NEXT_GRIDS if tiling.max_crops is None else ONEVISION_GRIDS)
    return LayoutRule(
        crop_tokens, crop_grid, crop_size, "anyres", tuple(grids), max_crops=tiling.max_crops
    )


def num_tokens(layouts: Sequence[ImageLayout]) -> int:
    """Return the tokens of several images."""
    return sum(layout.num_tokens for layout in layouts)


def num_crops(layouts: Sequence[ImageLayout]) -> int:
    """Return the crops of several images."""
    return sum(layout.num_crops for layout in layouts)


@functools.lru_cache(maxsize=64)
def _square(rule: LayoutRule) -> ImageLayout:
    return ImageLayout(rule.crop_tokens)


@functools.lru_cache(maxsize=16_384)
def _layout(rule: LayoutRule, width: int, height: int, divided: bool) -> ImageLayout:
    if rule.tiling == "dynamic":
        return _dynamic(rule, width, height)
    if not divided:
        return ImageLayout(rule.crop_tokens, newlines=1)
    return _anyres(rule, width, height)


def _dynamic(rule: LayoutRule, width: int, height: int) -> ImageLayout:
    """Return the layout of InternVL: tiles of the stretched image, the overview last."""
    columns, rows = _closest_aspect(rule, width, height)
    return ImageLayout(
        rule.crop_tokens,
        tiles=(rows, columns),
        overview="last" if rows * columns > 1 else "none",
        resized=(rows * rule.crop_size, columns * rule.crop_size),
    )


def _closest_aspect(rule: LayoutRule, width: int, height: int) -> tuple[int, int]:
    """Return columns and rows of the canvas whose aspect ratio is closest to the image's.

    Of two that are equally close, the one with more tiles, if the image has more than half as many
    pixels as its canvas.
    """
    most = rule.max_tiles
    canvases = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if rule.min_tiles <= columns * rows <= most
    ]
    best, smallest = (1, 1), math.inf
    for columns, rows in sorted(canvases, key=lambda canvas: canvas[0] * canvas[1]):
        difference = abs(width / height - columns / rows)
        covered = width * height > 0.5 * rule.crop_size**2 * columns * rows
        if difference < smallest or (difference == smallest and covered):
            best, smallest = (columns, rows), difference
    return best


def _anyres(rule: LayoutRule, width: int, height: int) -> ImageLayout:
    """Return the layout of LLaVA-NeXT or LLaVA-OneVision: the overview first, then the tiles.

    The image keeps its aspect ratio in the canvas of the tiles, centered on black.
    """
    assert rule.crop_grid is not None
    size = rule.crop_size
    rows, columns = _best_grid(rule, width, height)
    canvas_height, canvas_width = rows * size, columns * size
    scale_width, scale_height = canvas_width / width, canvas_height / height
    if scale_width < scale_height:
        resized = min(math.ceil(height * scale_width), canvas_height), canvas_width
    else:
        resized = canvas_height, min(math.ceil(width * scale_height), canvas_width)
    window = _unpadded(rows * rule.crop_grid[0], columns * rule.crop_grid[1], width, height)
    scaled = None if rule.max_crops is None else _scaled(rule, window[2], window[3])
    return ImageLayout(
        rule.crop_tokens,
        tiles=(rows, columns),
        overview="first",
        resized=resized,
        offset=((canvas_height - resized[0]) // 2, (canvas_width - resized[1]) // 2),
        grid=rule.crop_grid,
        window=window,
        scaled=scaled,
        newlines=window[2] if scaled is None else scaled[0],
    )


def _best_grid(rule: LayoutRule, width: int, height: int) -> tuple[int, int]:
    """Return the grid that keeps most of the image's pixels, and then wastes least of its own."""
    best, most, least_waste = rule.grids[0], 0, math.inf
    for rows, columns in rule.grids:
        canvas_height, canvas_width = rows * rule.crop_size, columns * rule.crop_size
        scale = min(canvas_width / width, canvas_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        waste = canvas_width * canvas_height - kept
        if kept > most or (kept == most and waste < least_waste):
            best, most, least_waste = (rows, columns), kept, waste
    return best


def _unpadded(rows: int, columns: int, width: int, height: int) -> tuple[int, int, int, int]:
    """Return the part of a map of tokens that the image covers: first row and column, size."""
    if width / height > columns / rows:
        # Rounded like in transformers: 7 digits first, because the product can be just below an
        # integer.
        covered = int(round(height * (columns / width), 7))
        padding = (rows - covered) // 2
        return padding, 0, rows - 2 * padding, columns
    covered = int(round(width * (rows / height), 7))
    padding = (columns - covered) // 2
    return 0, padding, rows, columns - 2 * padding


def _scaled(rule: LayoutRule, rows: int, columns: int) -> tuple[int, int] | None:
    """Return the size to which a map with too many tokens is scaled down; None for all others."""
    assert rule.crop_grid is not None and rule.max_crops is not None
    allowed = rule.max_crops * rule.crop_grid[0] * rule.crop_grid[1]
    factor = math.sqrt(rows * columns / allowed)
    if factor <= _SHRINK_ABOVE:
        return None
    return int(rows // factor), int(columns // factor)
