"""What holds for each connector: token counts, crops by themselves, seeds, gradients."""

import subprocess
import sys

import pytest
import torch

from vlm_sft.config.connectors import KINDS, TokenGrid, connector_grid, connector_kind, count_tokens
from vlm_sft.errors import UserError
from vlm_sft.model.connectors.base import Connector
from vlm_sft.model.connectors.build import build_connector
from vlm_sft.model.hashing import named_state, tensors_digest

TYPES = ("linear", "mlp1x_gelu", "mlp2x_gelu", "pixel_shuffle_mlp", "resampler")
GRID, WIDTH, HIDDEN = (4, 6), 8, 16


def built(projector_type: str, *, seed: int = 0) -> Connector:
    queries = 9 if projector_type == "resampler" else None
    return build_connector(projector_type, GRID, WIDTH, HIDDEN, seed=seed, num_queries=queries)


def features(crops: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(crops, 24, WIDTH, generator=generator, dtype=torch.float64)


def test_these_are_all_connectors() -> None:
    assert {connector_kind(name) for name in TYPES} == set(KINDS)


@pytest.mark.parametrize(
    ("projector_type", "grid"),
    [
        ("linear", (4, 6)),
        ("mlp2x_gelu", (4, 6)),
        ("pixel_shuffle_mlp", (2, 3)),
        ("resampler", 9),
    ],
)
def test_tokens_are_counted_without_a_model(projector_type: str, grid: TokenGrid) -> None:
    connector = built(projector_type)
    queries = 9 if projector_type == "resampler" else None
    assert connector.grid == connector_grid(projector_type, GRID, num_queries=queries) == grid
    assert connector.num_tokens == count_tokens(grid)
    assert connector(features(2).float()).shape == (2, count_tokens(grid), HIDDEN)


def test_published_grids() -> None:
    assert connector_grid("mlp2x_gelu", (24, 24)) == (24, 24)
    assert connector_grid("mlp2x_gelu", 577) == 577
    assert connector_grid("pixel_shuffle_mlp", (32, 32)) == (16, 16)
    assert connector_grid("resampler", (32, 32)) == 256


def test_counting_needs_no_torch() -> None:
    code = (
        "import sys; from vlm_sft.config.connectors import connector_grid\n"
        "assert connector_grid('resampler', (32, 32), num_queries=64) == 64\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("projector_type", TYPES)
def test_a_crop_has_the_same_embeddings_in_every_batch(projector_type: str) -> None:
    connector, crops = built(projector_type).double(), features(5)
    together = connector(crops)
    for number, crop in enumerate(crops):
        torch.testing.assert_close(connector(crop[None])[0], together[number], rtol=0, atol=1e-13)


@pytest.mark.parametrize("projector_type", TYPES)
def test_every_parameter_gets_a_gradient_and_no_buffer_is_saved(projector_type: str) -> None:
    connector = built(projector_type)
    target = torch.randn(1, connector.num_tokens, HIDDEN)
    (connector(features(1).float()) * target).sum().backward()
    for name, parameter in connector.named_parameters():
        assert parameter.dtype == torch.float32
        if name == "attn.in_proj_bias":  # a bias of the keys moves all scores of a query alike
            queries, _, values = parameter.grad.chunk(3)
            assert queries.any() and values.any()
        else:
            assert parameter.grad is not None and parameter.grad.any(), name
    assert set(connector.state_dict()) == {name for name, _ in connector.named_parameters()}


@pytest.mark.parametrize("projector_type", TYPES)
def test_a_seed_decides_the_weights_and_the_global_generator_does_not(projector_type: str) -> None:
    def digest(seed: int) -> str:
        return tensors_digest(named_state(built(projector_type, seed=seed)))

    torch.manual_seed(1)
    before, first = torch.get_rng_state(), digest(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert digest(3) == first != digest(4)


@pytest.mark.parametrize("name", ["mlp2x_relu", "mlp0x_gelu", "mlp100x_gelu", "Linear", ""])
def test_an_unknown_connector_is_refused_with_the_list(name: str) -> None:
    message = (
        f"model.projector_type: found {name!r}, expected one of 'linear', 'mlpNx_gelu', "
        "'pixel_shuffle_mlp', 'resampler', with N from 1 to 99"
    )
    with pytest.raises(UserError) as error:
        build_connector(name, (2, 2), 8, 12, seed=0)
    assert str(error.value).startswith(message)
