"""The registry of connectors: names, and how many tokens of an image each gives.

The modules are in `vlm_sft.model.connectors`, one file each. Nothing here needs torch, so that
data, planning and `show` count tokens without a model.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vlm_sft.errors import UserError

TokenGrid = tuple[int, int] | int
"""Tokens of one image crop: a grid `(rows, columns)` in reading order, or a number of tokens that
are not arranged in a grid."""

DEFAULT_QUERIES: Final = 256
"""Queries of a resampler (Qwen-VL)."""


@dataclass(frozen=True)
class ConnectorKind:
    """A kind of connector.

    Attributes:
        name: As messages and documentation show it.
        pattern: Regular expression that a `model.projector_type` of this kind matches.
        module: Module of `vlm_sft.model.connectors` whose `build` makes it.
        output_grid: Returns the tokens of a crop in the language model, given those of the tower
            and the number of queries. Raises `UserError` if it cannot take the tower's tokens.
    """

    name: str
    pattern: str
    module: str
    output_grid: Callable[[TokenGrid, int], TokenGrid]


def connector_kind(projector_type: str) -> ConnectorKind:
    """Return the kind of a `model.projector_type`.

    Raises:
        UserError: If there is no such connector; the message lists all.
    """
    for kind in KINDS:
        if re.fullmatch(kind.pattern, projector_type):
            return kind
    names = ", ".join(f"'{kind.name}'" for kind in KINDS)
    raise UserError(
        f"model.projector_type: found {projector_type!r}, expected one of {names}, with N from 1 "
        "to 99 (mlp2x_gelu is LLaVA-1.5's)"
    )


def connector_grid(
    projector_type: str, tower_grid: TokenGrid, *, num_queries: int | None = None
) -> TokenGrid:
    """Return the tokens that an image crop takes in the language model.

    Args:
        projector_type: `model.projector_type`.
        tower_grid: Tokens of the crop in the vision tower; see `VisionTower.grid`.
        num_queries: `model.num_queries`; None for the default.

    Raises:
        UserError: If the connector is unknown or cannot take the tower's tokens.
    """
    kind = connector_kind(projector_type)
    return kind.output_grid(tower_grid, num_queries or DEFAULT_QUERIES)


def count_tokens(grid: TokenGrid) -> int:
    """Return the number of tokens in a grid."""
    return grid if isinstance(grid, int) else math.prod(grid)


def _same(tower_grid: TokenGrid, _queries: int) -> TokenGrid:
    return tower_grid


def _halved(tower_grid: TokenGrid, _queries: int) -> TokenGrid:
    rows, columns = _require_grid("pixel_shuffle_mlp", tower_grid)
    if rows % 2 or columns % 2:
        raise UserError(
            "model.projector_type: pixel_shuffle_mlp joins 2 x 2 tokens into one, and the vision "
            f"tower has {rows} x {columns} tokens per image; set model.vision_tower.image_size or "
            "grid_pool for an even grid"
        )
    return rows // 2, columns // 2


def _queries(tower_grid: TokenGrid, queries: int) -> TokenGrid:
    _require_grid("resampler", tower_grid)
    return queries


def _require_grid(name: str, tower_grid: TokenGrid) -> tuple[int, int]:
    if isinstance(tower_grid, int):
        raise UserError(
            f"model.projector_type: {name} needs a grid of patches, and the {tower_grid} features "
            "of this vision tower are not one; set model.vision_tower.feature_select: patch, or "
            "use mlp2x_gelu"
        )
    return tower_grid


KINDS: Final = (
    ConnectorKind("linear", "linear", "linear", _same),
    ConnectorKind("mlpNx_gelu", r"mlp[1-9]\d?x_gelu", "mlp", _same),
    ConnectorKind("pixel_shuffle_mlp", "pixel_shuffle_mlp", "pixel_shuffle_mlp", _halved),
    ConnectorKind("resampler", "resampler", "resampler", _queries),
)
"""All connectors. A new one is an entry here and a module in `vlm_sft.model.connectors`."""
