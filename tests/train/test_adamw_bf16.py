"""Weights kept in bfloat16 alone: rounding that is right in the mean, and runs that use it."""

import copy
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.rounding import rounding
from tests.tiny_runs import ROOT, run
from tests.train.tiny import example, reset_accelerate, tiny_config, tiny_model
from vlm_sft import check
from vlm_sft.checkpoint.optimizer import optimizer_component
from vlm_sft.config.resume import resume_policy
from vlm_sft.config.schema import LearningRates, LoraConfig, OptimConfig, load_config
from vlm_sft.data.batch import pad_examples
from vlm_sft.errors import ConfigError
from vlm_sft.export.__main__ import main as export
from vlm_sft.model.build import build_model
from vlm_sft.model.parts import parameters_by_part, set_trainable
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.adamw_bf16 import StochasticAdamW, round_stochastically
from vlm_sft.train.fsdp import choose_sharding
from vlm_sft.train.optimizer import build_optimizer, gradient_norm, optimizer_state_bytes

floats = st.floats(width=32, allow_nan=True, allow_infinity=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(rate: float = 1e-3, **changes: Any) -> OptimConfig:
    rates = LearningRates(projector=rate, language_model=rate)
    return OptimConfig(learning_rate=rates, **changes)


@given(st.lists(floats, min_size=1, max_size=20), st.integers(0, 2**63 - 1))
def test_a_value_becomes_one_of_its_two_neighbors_and_stays_if_it_is_one(
    numbers: list[float], seed: int
) -> None:
    values = torch.tensor(numbers)
    before = values.clone()
    found = round_stochastically(values, generator(seed))
    assert found.dtype == torch.bfloat16 and torch.equal(values.view(torch.int32), _bits(before))
    toward_zero = (_bits(before) >> 16 << 16).view(torch.float32)
    away = ((_bits(before) >> 16 << 16) + (1 << 16)).view(torch.float32)
    for value, low, high, got in zip(before, toward_zero, away, found.float(), strict=True):
        if value.isnan():
            assert got.isnan()
        elif float(value) == float(low) or value.isinf():
            assert float(got) == float(value)
        else:
            assert float(got) in (float(low), float(high))


def _bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


@given(st.floats(2.0**-100, 2.0**100, width=32), st.booleans(), st.integers(0, 2**32))
def test_the_mean_of_many_roundings_is_the_value(value: float, negative: bool, seed: int) -> None:
    exact = torch.tensor(-value if negative else value)
    count = 1 << 14
    found = round_stochastically(exact.expand(count).contiguous(), generator(seed)).double()
    gap = 2.0 ** (math.frexp(value)[1] - 8)
    # The choice between two neighbors is a coin's: at most 6 standard errors of its mean.
    assert abs(float(found.mean() - exact)) <= 6 * 0.5 * gap / math.sqrt(count)


def test_a_quarter_of_the_way_is_gone_up_a_quarter_of_the_time() -> None:
    values = torch.full((1 << 16,), 1 + 2**-9)  # bfloat16 knows 1 and 1 + 2**-7
    found = round_stochastically(values, generator())
    assert set(found.tolist()) == {1.0, 1 + 2**-7}
    assert float((found > 1).float().mean()) == pytest.approx(0.25, abs=0.01)


def test_zeros_infinities_and_the_largest_number_keep_their_bits() -> None:
    kept = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.3895314e38, 2.0**-133])
    found = round_stochastically(kept, generator())
    assert torch.equal(found.view(torch.int16), kept.to(torch.bfloat16).view(torch.int16))


def updates(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: int) -> None:
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()


def test_updates_that_the_nearest_number_loses_move_the_mean_as_float32_does() -> None:
    """1e-4 of weights of 1, whose neighbors are 3.9e-3 and 7.8e-3 away."""
    parameters = [nn.Parameter(torch.ones(1 << 14, dtype=torch.bfloat16)) for _ in range(2)]
    wide = nn.Parameter(torch.ones(1 << 14))
    for weight in (parameters[0], wide):
        optimizer = build_optimizer({"language_model": [("w", weight)]}, config(1e-4), seed=3)
        updates(optimizer, weight, 20)
    updates(torch.optim.AdamW([parameters[1]], lr=1e-4, weight_decay=0.0), parameters[1], 20)
    assert parameters[1].eq(1).all()
    assert float(wide.detach().double().mean()) == pytest.approx(0.998, abs=1e-5)
    assert float(parameters[0].detach().double().mean()) == pytest.approx(0.998, abs=1.5e-4)


def test_bits_follow_from_seed_step_and_name_alone_and_float32_learns_as_in_torch() -> None:
    def learned(seed: int, name: str, of_process: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(of_process)
        narrow = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        wide = nn.Parameter(torch.full((64,), 0.5))
        parts = {"language_model": [(name, narrow)], "projector": [("p", wide)]}
        optimizer = build_optimizer(parts, config(weight_decay=0.1), seed=seed)
        assert isinstance(optimizer, StochasticAdamW)
        for step in range(3):
            torch.rand(of_process)
            narrow.grad = torch.full_like(narrow, 1.0 + step)
            wide.grad = torch.linspace(-1, 1, 64)
            optimizer.step()
        return narrow.detach(), wide.detach()

    narrow, wide = learned(1, "w", 0)
    again, _ = learned(1, "w", 7)
    assert torch.equal(narrow, again)
    assert not torch.equal(narrow, learned(2, "w", 0)[0])
    assert not torch.equal(narrow, learned(1, "v", 0)[0])
    plain = nn.Parameter(torch.full((64,), 0.5))
    reference = build_optimizer({"projector": [("p", plain)]}, config(weight_decay=0.1))
    assert type(reference) is torch.optim.AdamW
    for _ in range(3):
        plain.grad = torch.linspace(-1, 1, 64)
        reference.step()
    assert torch.equal(wide, plain)


def test_moments_stay_float32_on_disk_and_come_back_bit_for_bit(tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        weight = nn.Parameter(torch.ones(32, 8, dtype=torch.bfloat16))
        return weight, build_optimizer({"language_model": [("w", weight)]}, config(), seed=1)

    def learn(weight: nn.Parameter, optimizer: torch.optim.Optimizer, step: int) -> None:
        weight.grad = torch.randn(32, 8, generator=generator(step)).to(torch.bfloat16)
        optimizer.step()

    weight, optimizer = fresh()
    for step in range(2):
        learn(weight, optimizer, step)
    assert optimizer_state_bytes(optimizer) == 8 * 32 * 8
    optimizer_component(optimizer).snapshot()(tmp_path)
    saved = load_file(tmp_path / "optimizer.safetensors")
    assert {name: t.dtype for name, t in saved.items()} == {
        "exp_avg/w": torch.float32,
        "exp_avg_sq/w": torch.float32,
        "step/w": torch.float32,
    }
    other, resumed = fresh()
    other.data.copy_(weight.data)
    load = optimizer_component(resumed).load
    assert load is not None
    load(tmp_path)
    for step in (2, 3):
        learn(weight, optimizer, step)
        learn(other, resumed, step)
    assert torch.equal(weight, other)
    live, again = optimizer_component(optimizer).tensors(), optimizer_component(resumed).tensors()
    assert live.keys() == again.keys() and all(torch.equal(live[k], again[k]) for k in live)


def test_the_norm_of_narrow_gradients_is_taken_and_clipped_in_float32() -> None:
    narrow = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.zeros(1))
    narrow.grad, wide.grad = torch.full_like(narrow, 0.1), torch.ones(1)
    expected = math.sqrt(1000 * float(torch.tensor(0.1).to(torch.bfloat16)) ** 2 + 1)
    assert float(gradient_norm([narrow, wide], None)) == pytest.approx(expected, rel=rounding(1001))
    assert float(gradient_norm([narrow, wide], 1.0)) == pytest.approx(expected, rel=rounding(1001))
    assert float(wide.grad) == pytest.approx(1 / expected, rel=rounding(1001))
    assert float(narrow.grad[0]) == float(torch.tensor(0.10009765625 / expected).to(torch.bfloat16))


def losses(kind: str, rate: float, steps: int = 30) -> Tensor:
    """Of a tiny stage 2 in bf16, by what its weights are kept as; taken in float32."""
    model = build_model(tiny_config(), dtype=torch.bfloat16, seed=1)
    learning = {"projector", "language_model"}
    set_trainable(model, learning, widen_language_model=kind == "fp32")
    optimizer = build_optimizer(parameters_by_part(model), config(rate), seed=5)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if kind == "nearest":
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    batch = pad_examples([example(number, length=16) for number in range(4)], 0)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch)
        (output.loss_sum / output.num_targets).backward()
        gradient_norm(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            output = copy.deepcopy(model).float()(batch)
        found.append(float(output.loss_sum / output.num_targets))
    return torch.tensor(found)


def test_the_loss_falls_as_with_float32_weights_where_the_nearest_number_falls_behind() -> None:
    wide, rounded, nearest = (losses(kind, 3e-5) for kind in ("fp32", "none", "nearest"))
    fallen = float(wide[0] - wide[-1])
    assert fallen > 0.01
    assert float((rounded - wide).abs().max()) < 0.1 * fallen
    assert float((nearest - wide).abs().max()) > 0.5 * fallen


NONE = ("train.precision=bf16", "train.master_weights=none", "projector=null")


@pytest.fixture
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("_in_the_repository")
def test_a_run_goes_on_bit_for_bit_in_half_the_bytes_and_is_exported_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run("stage2", whole, *NONE) == 0
    shutil.copytree(whole, cut)
    for lost in ("final", "checkpoints/step-00000004"):
        shutil.rmtree(cut / lost, ignore_errors=True)
    assert run("stage2", cut, *NONE) == 0
    assert "resuming from" in capsys.readouterr().err
    for file in ("language_model/model", "projector", "optimizer"):
        before, after = (load_file(r / "final" / f"{file}.safetensors") for r in (whole, cut))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        kept = torch.bfloat16 if file.startswith("language_model") else torch.float32
        assert {tensor.dtype for tensor in after.values()} == {kept}
    start = load_file(cut / "checkpoints/step-00000002/language_model/model.safetensors")
    end = load_file(cut / "final/language_model/model.safetensors")
    assert all(not torch.equal(start[name], end[name]) for name in start)
    assert '"bfloat16"' in (cut / "parts.json").read_text()
    out = tmp_path / "exported"
    assert export([str(cut / "final"), str(out), "--to", "hf"]) == 0
    exported = load_file(out / "model.safetensors")
    [table] = [t for name, t in exported.items() if name.endswith("embed_tokens.weight")]
    ours = end["model.embed_tokens.weight"]
    assert table.dtype == torch.bfloat16 and torch.equal(table[: len(ours)], ours)


@pytest.mark.usefixtures("_in_the_repository")
@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("stage1", ["train.precision=bf16"], "is for full fine-tuning in stage 2"),
        ("stage2_lora", ["train.precision=bf16"], "is for full fine-tuning in stage 2"),
        ("stage2", [], "but train.precision is fp32; set that to bf16"),
        (
            "stage2",
            ["train.precision=bf16", "optim.optimizer=adamw_8bit"],
            "does not work with optim.optimizer: adamw_8bit",
        ),
    ],
)
def test_where_it_has_no_meaning_it_is_refused_before_anything_is_read(
    stage: str,
    changes: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["train.master_weights=none", "projector=null", *changes]
    with pytest.raises(ConfigError, match=message) as caught:
        run(stage[:6], tmp_path / "run", *asked, config=stage)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    reset_accelerate()
    assert check.main([f"configs/tiny/{stage}.yaml", "--no-model", *asked]) == 2
    out = capsys.readouterr().out.replace("│", " ")
    assert re.search(message, " ".join(out.split()))


@pytest.mark.usefixtures("_in_the_repository")
def test_it_is_refused_where_processes_share_the_weights_and_cannot_change_within_a_run() -> None:
    asked = load_config("configs/tiny/stage2.yaml", NONE)
    with pytest.raises(ConfigError, match=r"master_weights: none does not work with sharded"):
        choose_sharding(asked, {"projector", "language_model"}, world_size=2)
    alone = load_config("configs/tiny/stage2.yaml", [*NONE, "train.sharding=none"])
    assert choose_sharding(alone, {"projector", "language_model"}, world_size=2) == "none"
    assert resume_policy("train.master_weights") == "forbidden"


def test_only_the_language_model_stays_narrow() -> None:
    def dtypes(model: VisionLanguageModel) -> dict[str, set[torch.dtype]]:
        return {
            part: {p.dtype for _, p in named} for part, named in parameters_by_part(model).items()
        }

    model = build_model(tiny_config(), dtype=torch.bfloat16, seed=1)
    set_trainable(model, {"projector", "language_model"}, widen_language_model=False)
    assert dtypes(model) == {
        "vision_tower": {torch.bfloat16},
        "projector": {torch.float32},
        "language_model": {torch.bfloat16},
        "adapter": set(),
    }
    assert dtypes(tiny_model("adapter", lora=LoraConfig(r=2)))["adapter"] == {torch.float32}
