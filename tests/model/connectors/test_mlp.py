"""`linear` and `mlpNx_gelu`: LLaVA's projectors."""

import pytest
import torch

from tests.rounding import assert_near
from vlm_sft.model.connectors.build import build_connector


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("linear", ["weight", "bias"]),
        ("mlp1x_gelu", ["linear_1.weight", "linear_1.bias"]),
        (
            "mlp2x_gelu",
            ["linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"],
        ),
    ],
)
def test_weights_have_the_names_of_transformers_llava(kind: str, names: list[str]) -> None:
    connector = build_connector(kind, 3, 8, 12, seed=0)
    assert list(connector.state_dict()) == names
    assert connector(torch.zeros(2, 3, 8)).shape == (2, 3, 12)
    for name, parameter in connector.named_parameters():
        bound = (8 if name in ("weight", "bias") or "_1" in name else 12) ** -0.5
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > bound / 2


def test_an_mlp_is_linear_gelu_linear() -> None:
    connector = build_connector("mlp2x_gelu", 3, 8, 12, seed=0)
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    state = connector.state_dict()
    inner = torch.nn.functional.gelu(x @ state["linear_1.weight"].T + state["linear_1.bias"])
    expected = inner @ state["linear_2.weight"].T + state["linear_2.bias"]
    assert_near(connector(x), expected, 8 + 12)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_initial_weights_of_a_seed_never_change(kind: str) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, value in build_connector(kind, 3, 8, 12, seed=7).named_parameters():
        is_first = name.startswith(("weight", "bias", "linear_1"))
        bound = (8 if is_first else 12) ** -0.5
        # Drawn one after another from one generator, in the order of the parameters.
        expected = torch.empty(value.shape).uniform_(-bound, bound, generator=generator)
        assert torch.equal(value, expected), name
