"""Learning rates by part, and the schedule."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.train.tiny import tiny_model
from vlm_sft.checkpoint.optimizer import optimizer_component
from vlm_sft.config.schema import LearningRates, LoraConfig, OptimConfig
from vlm_sft.errors import CheckpointError, UserError
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.train.optimizer import (
    build_optimizer,
    gradient_norm,
    lr_multiplier,
    optimizer_state_bytes,
    set_learning_rates,
)
from vlm_sft.utils import libraries


def config(**changes: object) -> OptimConfig:
    rates = LearningRates(projector=1e-3, language_model=2e-4)
    return OptimConfig.model_validate({"learning_rate": rates, **changes})


def test_warm_up_is_linear_and_the_cosine_falls_towards_zero() -> None:
    factors = [
        lr_multiplier(step, total_steps=10, config=config(warmup_ratio=0.2)) for step in range(11)
    ]
    assert factors[:4] == pytest.approx([0.5, 1.0, 1.0, 0.9619398], abs=1e-6)
    assert factors[6] == pytest.approx(0.5)
    assert factors[10] == pytest.approx(0.0)


def test_a_line_and_a_constant() -> None:
    linear = config(warmup_ratio=0, schedule="linear")
    constant = config(warmup_ratio=0, schedule="constant")
    assert [lr_multiplier(s, total_steps=4, config=linear) for s in range(4)] == [
        1,
        0.75,
        0.5,
        0.25,
    ]
    assert [lr_multiplier(s, total_steps=4, config=constant) for s in range(4)] == [1, 1, 1, 1]


def test_each_part_has_its_own_rate_and_adapters_take_the_language_models() -> None:
    model = tiny_model("projector", "adapter", lora=LoraConfig(r=2))
    optimizer = build_optimizer(parameters_by_part(model), config())
    assert set_learning_rates(optimizer, 0.5) == {"projector": 5e-4, "adapter": 1e-4}
    names = [name for group in optimizer.param_groups for name in group["names"]]
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(names) == sorted(trainable)


def test_vectors_are_not_decayed() -> None:
    optimizer = build_optimizer(
        parameters_by_part(tiny_model("projector")), config(weight_decay=0.1)
    )
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


def eight_bit(layer: nn.Module) -> torch.optim.Optimizer:
    pytest.importorskip("bitsandbytes")
    parts = {"projector": list(layer.named_parameters())}
    return build_optimizer(parts, config(optimizer="adamw_8bit", weight_decay=0.01))


def learned(steps: int, *, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer with 8-bit moments (weight) and one with 32-bit ones (bias), after some steps."""
    torch.manual_seed(seed)
    layer = nn.Linear(128, 65)
    optimizer = eight_bit(layer)
    for step in range(steps):
        learn(layer, optimizer, step)
    return layer, optimizer


def learn(layer: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs = torch.randn(8, 128, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    layer(inputs).square().sum().backward()
    set_learning_rates(optimizer, 1.0)
    optimizer.step()


def test_eight_bit_moments_resume_bit_for_bit_and_are_named_if_they_differ(tmp_path: Path) -> None:
    layer, optimizer = learned(3)
    optimizer_component(optimizer).snapshot()(tmp_path)
    tensors = load_file(tmp_path / "optimizer.safetensors")
    assert {name: str(t.dtype) for name, t in tensors.items() if name.endswith("/weight")} == {
        "state1/weight": "torch.uint8",
        "state2/weight": "torch.uint8",
        "absmax1/weight": "torch.float32",
        "absmax2/weight": "torch.float32",
        "step/weight": "torch.float32",
    }
    assert tensors["state1/bias"].dtype == torch.float32 and tensors["qmap1"].shape == (256,)
    other, resumed = learned(0, seed=1)
    other.load_state_dict(layer.state_dict())
    load = optimizer_component(resumed).load
    assert load is not None
    load(tmp_path)
    for step in (3, 4):
        learn(layer, optimizer, step)
        learn(other, resumed, step)
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.bias, other.bias)
    live = optimizer_component(optimizer).tensors()
    again = optimizer_component(resumed).tensors()
    assert live.keys() == again.keys() and all(torch.equal(live[k], again[k]) for k in live)


def test_eight_bit_moments_take_a_quarter_of_the_memory_and_learn_alike() -> None:
    layer, optimizer = learned(5)
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not key.startswith("qmap")
    )
    assert held == optimizer_state_bytes(optimizer) == 2 * (8320 + 4 * 33) + 2 * 4 * 65
    torch.manual_seed(0)
    plain = nn.Linear(128, 65)
    before = plain.weight.detach().clone()
    reference = build_optimizer(
        {"projector": list(plain.named_parameters())}, config(weight_decay=0.01)
    )
    for step in range(5):
        learn(plain, reference, step)
    moved = (plain.weight - before).norm()
    assert (layer.weight - plain.weight).norm() < 0.1 * moved
    assert torch.equal(layer.bias, plain.bias) or torch.allclose(layer.bias, plain.bias, atol=1e-6)


def test_bytes_of_another_meaning_or_kind_are_refused(tmp_path: Path) -> None:
    optimizer_component(learned(1)[1]).snapshot()(tmp_path)
    file = tmp_path / "optimizer.safetensors"
    tensors = load_file(file)
    resumed = learned(0)[1]
    load = optimizer_component(resumed).load
    assert load is not None
    save_file({**tensors, "qmap2": tensors["qmap2"].flip(0).contiguous()}, file)
    with pytest.raises(CheckpointError, match=r"quantization codebook \(qmap2\)"):
        load(tmp_path)
    save_file({**tensors, "state1/weight": tensors["state1/weight"].float()}, file)
    with pytest.raises(CheckpointError, match=r"'state1/weight' is torch.float32, expected"):
        load(tmp_path)
    save_file({k: t for k, t in tensors.items() if k != "absmax1/weight"}, file)
    with pytest.raises(CheckpointError, match="'absmax1/weight' is missing"):
        load(tmp_path)


def test_without_bitsandbytes_eight_bit_moments_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(libraries, "is_installed", lambda name: name != "bitsandbytes")
    with pytest.raises(UserError, match=r"adamw_8bit: .* with `pip install 'vlm-sft\[qlora\]'`"):
        build_optimizer({"projector": []}, config(optimizer="adamw_8bit"))


def test_adamw_is_one_fused_kernel_here() -> None:
    optimizer = build_optimizer(parameters_by_part(tiny_model("projector")), config())
    assert optimizer.defaults["fused"] is True
