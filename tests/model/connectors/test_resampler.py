"""`resampler`: Qwen-VL's cross-attention from learned queries."""

import math

import pytest
import torch
from torch import Tensor

from tests.rounding import rounding
from vlm_sft.config.connectors import connector_grid
from vlm_sft.errors import UserError
from vlm_sft.model.connectors.base import Connector
from vlm_sft.model.connectors.build import build_connector
from vlm_sft.model.connectors.resampler import num_heads

WIDTH, HIDDEN, HEADS = 24, 256, 2


def positions(side: int) -> list[list[float]]:
    """Half of the features for the column, half for the row; sines, then cosines."""
    quarter = HIDDEN // 4

    def line(place: int) -> list[float]:
        angles = [place / 10000 ** (i / quarter) for i in range(quarter)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    return [line(column) + line(row) for row in range(side) for column in range(side)]


def reference(connector: Connector, features: Tensor, *, side: int, grid: int) -> Tensor:
    """Qwen-VL's resampler step by step, one image and one head at a time."""
    state = connector.state_dict()

    def norm(name: str, x: Tensor) -> Tensor:
        variance = x.var(-1, correction=0, keepdim=True)
        normal = (x - x.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
        return normal * state[f"{name}.weight"] + state[f"{name}.bias"]

    table = torch.tensor(positions(side), dtype=features.dtype)
    square = table.T.reshape(1, HIDDEN, side, side)
    resized = torch.nn.functional.interpolate(square, (grid, grid), mode="bicubic")
    key_table = resized.reshape(HIDDEN, grid * grid).T
    weights = state["attn.in_proj_weight"].chunk(3)
    biases = state["attn.in_proj_bias"].chunk(3)
    images = []
    for image in features:
        values = norm("ln_kv", image @ state["kv_proj.weight"].T)
        inputs = norm("ln_q", state["query"]) + table, values + key_table, values
        q, k, v = (x @ w.T + b for x, w, b in zip(inputs, weights, biases, strict=True))
        heads = []
        for part in torch.arange(HIDDEN).chunk(HEADS):
            scores = q[:, part] @ k[:, part].T / math.sqrt(len(part))
            heads.append(scores.softmax(-1) @ v[:, part])
        read = torch.cat(heads, 1) @ state["attn.out_proj.weight"].T + state["attn.out_proj.bias"]
        images.append(norm("ln_post", read) @ state["proj"])
    return torch.stack(images)


@pytest.mark.parametrize(("side", "grid"), [(3, 5), (4, 4), (5, 3)])
def test_embeddings_are_those_of_a_plain_computation(side: int, grid: int) -> None:
    connector = build_connector(
        "resampler", (grid, grid), WIDTH, HIDDEN, seed=0, num_queries=side**2
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms and biases that change something
        for parameter in connector.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape, generator=generator))
    connector.double()
    features = torch.randn(2, grid**2, WIDTH, generator=generator, dtype=torch.float64)
    expected = reference(connector, features, side=side, grid=grid)
    found = connector(features)
    assert found.shape == (2, side**2, HIDDEN)
    # The positions are float32; every other value is float64.
    assert (found - expected).abs().max() <= rounding(10) * expected.abs().max()


def test_initial_weights_are_those_of_qwen_vl() -> None:
    connector = build_connector("resampler", (4, 4), WIDTH, HIDDEN, seed=0)
    shapes = {name: tuple(value.shape) for name, value in connector.state_dict().items()}
    assert shapes == {
        "query": (256, HIDDEN),
        "kv_proj.weight": (HIDDEN, WIDTH),
        "attn.in_proj_weight": (3 * HIDDEN, HIDDEN),
        "attn.in_proj_bias": (3 * HIDDEN,),
        "attn.out_proj.weight": (HIDDEN, HIDDEN),
        "attn.out_proj.bias": (HIDDEN,),
        **{f"{n}.{p}": (HIDDEN,) for n in ("ln_q", "ln_kv", "ln_post") for p in ("weight", "bias")},
        "proj": (HIDDEN, HIDDEN),
    }
    state = connector.state_dict()
    assert state["query"].std() == pytest.approx(0.02, rel=0.02)
    assert state["proj"].std() == pytest.approx(HIDDEN**-0.5, rel=0.02)
    assert not state["attn.in_proj_bias"].any()
    bound = math.sqrt(6 / (4 * HIDDEN))  # Glorot's, of a [3 D, D] matrix
    assert 0.99 * bound < state["attn.in_proj_weight"].abs().max() <= bound
    assert state["kv_proj.weight"].abs().max() <= WIDTH**-0.5


def test_features_as_wide_as_the_embeddings_are_not_projected() -> None:
    connector = build_connector("resampler", (4, 4), 32, 32, seed=0, num_queries=4)
    assert not any(name.startswith("kv_proj") for name in connector.state_dict())
    assert connector(torch.zeros(1, 16, 32)).shape == (1, 4, 32)


@pytest.mark.parametrize(
    ("hidden", "heads"), [(4096, 32), (896, 7), (960, 6), (576, 4), (64, 1), (252, 1)]
)
def test_heads_have_the_size_128_or_the_next_that_divides(hidden: int, heads: int) -> None:
    assert num_heads(hidden) == heads


def test_what_has_no_positions_is_refused() -> None:
    with pytest.raises(UserError, match="the 17 features of this vision tower are not one"):
        connector_grid("resampler", 17)
    with pytest.raises(UserError, match=r"a multiple of 4, .* and this one has 30"):
        build_connector("resampler", (4, 4), 8, 30, seed=0)
