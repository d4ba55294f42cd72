"""`pixel_shuffle_mlp`: InternVL's projector."""

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, InternVLConfig, InternVLModel, LlamaConfig

from vlm_sft.config.connectors import connector_grid
from vlm_sft.errors import UserError
from vlm_sft.model.connectors.build import build_connector

WIDTH, HIDDEN = 8, 12


@torch.no_grad()
def transformers_projection(features: Tensor, side: int, state: dict[str, Tensor]) -> Tensor:
    """The part of `InternVLModel.get_image_features` after its vision tower."""
    model = InternVLModel(
        InternVLConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=8,
                num_attention_heads=1,
                num_hidden_layers=1,
                image_size=28,
                patch_size=14,
            ).to_dict(),
            text_config=LlamaConfig(
                hidden_size=HIDDEN,
                intermediate_size=8,
                num_attention_heads=1,
                num_hidden_layers=1,
                vocab_size=8,
            ).to_dict(),
        )
    )
    model.multi_modal_projector.load_state_dict(state)
    shuffled = model.pixel_shuffle(features.reshape(len(features), side, side, WIDTH), 0.5)
    projected: Tensor = model.multi_modal_projector(shuffled.reshape(len(features), -1, 4 * WIDTH))
    return projected


def test_embeddings_are_those_of_transformers_internvl() -> None:
    connector = build_connector("pixel_shuffle_mlp", (6, 6), WIDTH, HIDDEN, seed=0)
    with torch.no_grad():  # the initial norm would hide a wrong order of its weights
        for parameter in connector.layer_norm.parameters():
            parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    features = torch.randn(3, 36, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = transformers_projection(features, 6, connector.state_dict())
    assert torch.equal(connector(features), expected)
    assert connector.layer_norm.eps == 1e-5


def test_a_token_is_made_from_its_square_of_a_grid_that_is_wider_than_high() -> None:
    connector = build_connector("pixel_shuffle_mlp", (2, 6), WIDTH, HIDDEN, seed=0)
    features = torch.randn(1, 12, WIDTH, generator=torch.Generator().manual_seed(0))
    changed = features.clone()
    changed[0, 6 + 2] += 1  # row 1, column 2
    differs = (connector(features) != connector(changed)).any(dim=2)
    assert connector.grid == (1, 3)
    assert differs.tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((27, 27), "joins 2 x 2 tokens into one, and the vision tower has 27 x 27 tokens"),
        ((4, 3), "the vision tower has 4 x 3 tokens"),
        (577, "needs a grid of patches, and the 577 features of this vision tower are not one"),
    ],
)
def test_what_has_no_squares_is_refused(grid: tuple[int, int] | int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        connector_grid("pixel_shuffle_mlp", grid)
