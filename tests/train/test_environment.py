"""What the environment says beside the configuration is refused by name or recorded."""

import os
from pathlib import Path

import pytest
import torch

from tests.tiny_runs import TINY, run
from tests.train.tiny import reset_accelerate
from vlm_sft.checkpoint.format import read_manifest
from vlm_sft.checkpoint.provenance import environment_difference, recorded_environment
from vlm_sft.config.schema import RunConfig, load_config
from vlm_sft.errors import UserError
from vlm_sft.train.distributed import make_accelerator
from vlm_sft.train.environment import (
    REFUSED,
    environment_notes,
    require_environment,
)


def config(*overrides: str) -> RunConfig:
    return load_config(TINY / "stage1.yaml", overrides)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_variable_that_would_change_the_run_is_refused_with_its_setting(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}=4 .*; unset it and (set|save)"):
        require_environment(config(), {name: "4"})
    for harmless in ("", " ", *REFUSED[name].harmless):
        require_environment(config(), {name: harmless.upper()})


def test_what_accelerate_launch_sets_by_itself_is_accepted() -> None:
    launched = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    require_environment(config(), launched)


def test_another_precision_than_the_configurations_is_refused() -> None:
    with pytest.raises(UserError, match=r"ACCELERATE_MIXED_PRECISION=fp16 .*train.precision: fp32"):
        require_environment(config(), {"ACCELERATE_MIXED_PRECISION": "fp16"})
    bf16 = config("train.precision=bf16")
    require_environment(bf16, {"ACCELERATE_MIXED_PRECISION": "bf16"})


def test_variables_that_switch_compiling_off_matter_only_to_a_compiled_run() -> None:
    variables = {"TORCH_COMPILE_DISABLE": "1"}
    require_environment(config(), variables)
    with pytest.raises(UserError, match=r"TORCH_COMPILE_DISABLE=1 switches train\.compile off"):
        require_environment(config("train.compile=true"), variables)


def test_the_accelerator_scales_no_gradient_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    reset_accelerate()
    weight = torch.ones(1, requires_grad=True)
    make_accelerator("fp32").backward(3 * weight.sum())
    assert weight.grad is not None and weight.grad.item() == 3
    reset_accelerate()


@pytest.mark.usefixtures("in_the_repository")
def test_a_run_is_refused_before_it_writes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 divides"):
        run("stage1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tf32_is_reported_where_fp32_was_asked_for() -> None:
    variables = {"NVIDIA_TF32_OVERRIDE": "1"}
    assert environment_notes(config(), variables) == [
        "NVIDIA_TF32_OVERRIDE=1: fp32 matrix products on a GPU are computed in TF32"
    ]
    assert environment_notes(config("train.precision=bf16"), variables) == []


def test_a_checkpoint_records_what_libraries_read_and_no_secret(lora_run: Path) -> None:
    recorded = read_manifest(lora_run / "final")["environment"]
    assert recorded == recorded_environment(os.environ)
    variables = {"OMP_NUM_THREADS": "2", "ACCELERATE_API_KEY": "s3cret", "HOME": "/root"}
    assert recorded_environment(variables) == {"OMP_NUM_THREADS": "2"}


def test_the_difference_of_two_environments_names_each_variable() -> None:
    found = environment_difference({"A": "1", "B": "2"}, {"B": "3", "C": "4"})
    assert found == "A 1, now unset; B 2, now 3; C unset, now 4"
    assert environment_difference({"A": "1"}, {"A": "1"}) is None
