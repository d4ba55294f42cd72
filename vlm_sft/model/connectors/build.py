"""Build the connector of a model; its weights are random."""

import importlib
from typing import cast

import torch

from vlm_sft.config.connectors import TokenGrid, connector_grid, connector_kind
from vlm_sft.model.connectors.base import Connector


def build_connector(
    projector_type: str,
    tower_grid: TokenGrid,
    width: int,
    hidden: int,
    *,
    seed: int,
    num_queries: int | None = None,
) -> Connector:
    """Build a connector in float32.

    Args:
        projector_type: One of `vlm_sft.config.connectors.KINDS`.
        tower_grid: Tokens of an image crop in the vision tower.
        width: Number of vision features per token.
        hidden: Embedding size of the language model.
        seed: Seed of the weights, which do not depend on the global generator.
        num_queries: Queries of a resampler; None for the default.

    Raises:
        UserError: If there is no such connector, or it does not fit the tower or the language
            model.
    """
    grid = connector_grid(projector_type, tower_grid, num_queries=num_queries)
    module = importlib.import_module(
        f"vlm_sft.model.connectors.{connector_kind(projector_type).module}"
    )
    # The layers draw initial weights from the global generator; `draw_weights` replaces them.
    with torch.random.fork_rng(devices=[]):
        connector = cast(Connector, module.build(projector_type, tower_grid, grid, width, hidden))
    connector.draw_weights(torch.Generator().manual_seed(seed))
    return connector
