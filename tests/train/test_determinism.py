"""Deterministic kernels are asked for while a run trains, and what has none is named."""

import os
from pathlib import Path

import pytest
import torch

from tests.tiny_runs import ROOT, run
from vlm_sft.errors import ConfigError
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.train.determinism import ENVIRONMENT, deterministic


def put_one() -> None:
    """An operation that torch knows to have no deterministic kernel on any device."""
    torch.zeros(3).put_(torch.tensor([1]), torch.ones(1))


def test_an_operation_without_such_a_kernel_is_named() -> None:
    named = r"train\.deterministic: put_ has no deterministic"
    with pytest.raises(ConfigError, match=named), deterministic(True):
        put_one()


def test_nothing_is_asked_for_unless_enabled() -> None:
    with deterministic(False):
        put_one()
        assert not torch.are_deterministic_algorithms_enabled()


def test_everything_is_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the caller's own choice"
        assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
    assert not torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert set(ENVIRONMENT) - set(os.environ) == {"FLASH_ATTENTION_DETERMINISTIC"}


def test_other_errors_pass_through() -> None:
    with pytest.raises(RuntimeError, match=r"^something else$"), deterministic(True):
        raise RuntimeError("something else")


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_trains_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    monkeypatch.chdir(ROOT)
    seen: list[bool] = []
    forward = VisionLanguageModel.forward

    def noting(*arguments: object) -> object:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(VisionLanguageModel, "forward", noting)
    options = ["train.max_steps=1", f"train.deterministic={str(asked).lower()}"]
    assert run("stage1", tmp_path / "run", *options) == 0
    assert seen and set(seen) == {asked}
    assert not torch.are_deterministic_algorithms_enabled()
