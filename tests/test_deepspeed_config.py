"""DeepSpeed's files are followed or refused, each word of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_runs import ROOT, run
from vlm_sft import check
from vlm_sft.config.schema import RunConfig, load_config
from vlm_sft.deepspeed_config import ZeroRequest, read_deepspeed
from vlm_sft.errors import ConfigError

AUTO = "auto"

ZERO3: dict[str, Any] = {
    "fp16": {
        "enabled": AUTO,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": AUTO},
    "train_micro_batch_size_per_gpu": AUTO,
    "train_batch_size": AUTO,
    "gradient_accumulation_steps": AUTO,
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": AUTO,
        "stage3_prefetch_bucket_size": AUTO,
        "stage3_param_persistence_threshold": AUTO,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
"""The settings that LLaVA's `scripts/zero3.json` has."""

Reader = Callable[..., ZeroRequest | None]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """Reads a file of these settings beside the tiny stage-2 configuration."""
    monkeypatch.chdir(ROOT)

    def read(tree: Any, *overrides: str, num_processes: int | None = 2) -> ZeroRequest | None:
        path = tmp_path / "zero.json"
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
        return read_deepspeed(tiny(path, *overrides), num_processes=num_processes)

    return read


def tiny(path: Path, *overrides: str) -> RunConfig:
    return load_config("configs/tiny/stage2.yaml", [f"train.deepspeed={path}", *overrides])


def test_llavas_file_is_followed_and_what_it_tunes_is_named(read: Reader) -> None:
    found = read(ZERO3)
    assert found is not None
    assert (found.stage, found.shares, found.reshard_after_forward) == (3, True, True)
    told = found.told(in_full=True, num_processes=8)
    assert "ZeRO stage 3 is done by FSDP2" in told
    zero, scale = ZERO3["zero_optimization"], ZERO3["fp16"]
    tuned = {f"zero_optimization.{name}" for name in zero if name != "stage"}
    tuned |= {f"fp16.{name}" for name in scale if name != "enabled"}
    assert set(found.without_meaning) == tuned
    assert all(name in told for name in tuned)


@pytest.mark.parametrize(
    ("stage", "shares", "reshards"), [(0, False, False), (1, True, False), (2, True, False)]
)
def test_lower_stages_keep_gathered_weights(
    read: Reader, stage: int, shares: bool, reshards: bool
) -> None:
    found = read({"zero_optimization": {"stage": stage}})
    assert found is not None
    assert (found.shares, found.reshard_after_forward) == (shares, reshards)


def test_what_it_comes_to_is_told(read: Reader) -> None:
    found = read(ZERO3)
    assert found is not None
    assert "nobody to share with" in found.told(in_full=True, num_processes=1)
    assert "every process holds the whole" in found.told(in_full=False, num_processes=8)


def test_no_file_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert read_deepspeed(load_config("configs/tiny/stage2.yaml")) is None


AGREES: list[dict[str, Any]] = [
    {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2},
    {"bf16": {"enabled": False}, "fp16": {"enabled": False}},
    {"gradient_clipping": 1.0, "steps_per_print": 2000, "wall_clock_breakdown": False},
    {"optimizer": {"type": "AdamW", "params": {"lr": AUTO, "betas": [0.9, 0.999], "eps": 1e-8}}},
    {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": AUTO}}},
    {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}},
]


@pytest.mark.parametrize("tree", AGREES, ids=lambda tree: next(iter(tree)))
def test_what_agrees_is_accepted(read: Reader, tree: dict[str, Any]) -> None:
    same = ["train.global_batch_size=8", "train.micro_batch_size=2", "train.precision=fp32"]
    assert read(tree, *same) is not None


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train_batch_size": 64}, r"train_batch_size: found 64, but train\.global_batch_size is 8"),
    ({"train_micro_batch_size_per_gpu": 4}, r"but train\.micro_batch_size is 2"),
    ({"gradient_accumulation_steps": 3}, "2 processes take 2 micro-batches a step"),
    ({"bf16": {"enabled": True}}, r"bf16\.enabled: found True, but train\.precision is fp32"),
    ({"gradient_clipping": 0.5}, r"but optim\.max_grad_norm is 1\.0"),
    ({"zero_optimization": {"stage": 4}}, r"stage: found 4, expected 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": True}}, "found True, expected 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "not built"),
    ({"zero_optimization": 3}, "zero_optimization: found 3, expected a section"),
    ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, "not understood"),
    ({"optimizer": {"type": "OneBitAdam"}}, "'OneBitAdam'; only AdamW is built"),
    ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.3}}}, r"but optim\.weight_decay"),
    ({"scheduler": {"params": {"warmup_num_steps": 3}}}, r"follows optim\.schedule"),
    ({"sparse_attention": {}}, "sparse_attention: is not understood here"),
]


@pytest.mark.parametrize(("tree", "message"), REFUSED)
def test_what_contradicts_or_is_not_built_is_refused(
    read: Reader, tree: dict[str, Any], message: str
) -> None:
    same = ["train.global_batch_size=8", "train.micro_batch_size=2", "train.precision=fp32"]
    with pytest.raises(ConfigError, match=rf"zero\.json: .*{message}"):
        read(tree, *same)


def test_a_file_that_is_none_is_refused(read: Reader, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid JSON"):
        read("{")
    with pytest.raises(ConfigError, match="expected a JSON object"):
        read("[]")
    with pytest.raises(ConfigError, match="no such file"):
        read_deepspeed(tiny(tmp_path / "missing.json"))


def test_two_ways_of_sharing_at_once_are_refused(read: Reader) -> None:
    with pytest.raises(ConfigError, match=r"train\.sharding: fsdp2 is set beside"):
        read(ZERO3, "train.sharding=fsdp2")


def test_a_run_tells_what_became_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps(ZERO3))
    assert run("stage1", tmp_path / "run", f"train.deepspeed={path}", "train.max_steps=1") == 0
    assert f"{path}: ZeRO stage 3 has little to share" in capsys.readouterr().err


def test_the_check_refuses_what_the_run_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"train_batch_size": 1000}))
    arguments = ["configs/tiny/stage2.yaml", f"train.deepspeed={path}", "--no-model"]
    assert check.main(arguments) == 2
    assert "train_batch_size: found 1000" in " ".join(capsys.readouterr().out.split())
