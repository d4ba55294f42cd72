"""Image sizes and layout rules that the tests of tiling share."""

import random

from vlm_sft.config.schema import ImageTilingConfig
from vlm_sft.data.image_layout import ONEVISION_GRIDS, LayoutRule, layout_rule

CROP = 28
"""Side of a crop of the tiny towers in pixels; patches have 14."""


def sizes(count: int = 300, *, crop: int = CROP) -> list[tuple[int, int]]:
    """Return `count` random (width, height), then the ones that broke other implementations.

    Half of the random ones are near the size of the canvases, where rounding decides.
    """
    random_numbers = random.Random(0)
    found = []
    for number in range(count):
        low, high = (1, 2000) if number % 2 else (1, 7 * crop)
        found.append((random_numbers.randint(low, high), random_numbers.randint(low, high)))
    odd = [(161, 184), (184, 161), (700, 840), (840, 700), (1, 2000), (2000, 1), (1, 1)]
    on_a_canvas = [(columns * crop, rows * crop) for rows, columns in ONEVISION_GRIDS]
    return [*found, *odd, *on_a_canvas]


def pinpoints(rule: LayoutRule) -> list[list[int]]:
    """Return the grids as transformers takes them: height and width in pixels."""
    return [[rows * rule.crop_size, columns * rule.crop_size] for rows, columns in rule.grids]


def rule(layout: str, *, grid: int = 2, crop: int = CROP, **options: object) -> LayoutRule:
    tiling = ImageTilingConfig.model_validate({"layout": layout, **options})
    return layout_rule(tiling, (grid, grid), crop)
