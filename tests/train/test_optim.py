"""Learning rates by part, and the schedule."""

import pytest
import torch
from torch import nn

from tests.train.tiny import tiny_model
from vlm_sft.config import LearningRates, LoraConfig, OptimConfig
from vlm_sft.model.parts import named_parts
from vlm_sft.train.optim import build_optimizer, gradient_norm, rate_factor, set_rates


def config(**changes: object) -> OptimConfig:
    rates = LearningRates(projector=1e-3, language_model=2e-4)
    return OptimConfig.model_validate({"learning_rate": rates, **changes})


def test_warm_up_is_linear_and_the_cosine_falls_towards_zero() -> None:
    factors = [
        rate_factor(step, total_steps=10, config=config(warmup_ratio=0.2)) for step in range(11)
    ]
    assert factors[:4] == pytest.approx([0.5, 1.0, 1.0, 0.9619398], abs=1e-6)
    assert factors[6] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(0.0)


def test_a_line_and_a_constant() -> None:
    linear = config(warmup_ratio=0, schedule="linear")
    constant = config(warmup_ratio=0, schedule="constant")
    assert [rate_factor(s, total_steps=4, config=linear) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [rate_factor(s, total_steps=4, config=constant) for s in range(4)] == [1, 1, 1, 1]


def test_each_part_has_its_own_rate_and_adapters_take_the_language_models() -> None:
    model = tiny_model("projector", "adapter", lora=LoraConfig(r=2))
    optimizer = build_optimizer(named_parts(model), config())
    assert set_rates(optimizer, 0.5) == {"projector": 5e-4, "adapter": 1e-4}
    names = [name for group in optimizer.param_groups for name in group["names"]]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(names) == sorted(trainable)


def test_vectors_are_not_decayed() -> None:
    optimizer = build_optimizer(named_parts(tiny_model("projector")), config(weight_decay=0.1))
    decay = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["names"]}
    assert decay["multi_modal_projector.linear_1.weight"] == 0.1
    assert decay["multi_modal_projector.linear_1.bias"] == 0.0


def test_the_norm_is_taken_before_clipping_and_clipping_can_be_left_out() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(gradient_norm([parameter], None)) == 5.0
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert float(gradient_norm([parameter], 1.0)) == 5.0
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], abs=1e-5)
