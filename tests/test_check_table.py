"""Configurations that must fail later and that `check` must catch, and odd ones that are fine.

Every bad one was run once without `check`: it ends with an error or a wrong result.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.model.tiny import LLAMA
from tests.train.tiny import reset_accelerate
from vlm_sft import check, stage1, stage2
from vlm_sft.checks.trial_step import report_out_of_memory
from vlm_sft.errors import UserError
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.ownership import own_directory

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny"
LANGUAGE = "model.language_model.config"
PACKED = {"train.micro_batch_size": None}
OUTLOOK = "would load the exported folder: transformers >= 5.6, transformers 5.5"
PLACES = ("LOCKED", "FILE", "OTHERS", "CACHE", "DAMAGED", "NEW")
"""Values that stand for directories and files of the fixture `places`."""
Changes = dict[str, Any]

SMALL: Changes = {**LLAMA, "vocab_size": 261, "num_key_value_heads": 2}
MOE: Changes = {
    **SMALL,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 24,
    "output_router_logits": True,
}
GEMMA2 = {**SMALL, "model_type": "gemma2", "head_dim": 24, "attn_logit_softcapping": 0.5}
GPT_OSS = {
    **SMALL,
    "model_type": "gpt_oss",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 24,
}


def gpt2(positions: int) -> Changes:
    return {
        "model_type": "gpt2",
        "vocab_size": 261,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": positions,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def opt(positions: int) -> Changes:
    return {
        "model_type": "opt",
        "vocab_size": 261,
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": positions,
    }


def packing(tokens: int = 256, **more: Any) -> Changes:
    return {**PACKED, "train.packing": {"max_tokens": tokens, **more}}


BAD: dict[str, tuple[str, Changes, str]] = {
    "ordinary and control ids have no row": (
        "stage2",
        {
            f"{LANGUAGE}.vocab_size": 257,
            f"{LANGUAGE}.eos_token_id": 0,
            f"{LANGUAGE}.bos_token_id": 0,
        },
        "has only 257 rows",
    ),
    "the stop token has no row": (
        "stage2",
        {f"{LANGUAGE}.vocab_size": 260},
        "'<|im_end|>' = 260",
    ),
    "padding has no row": (
        "stage1",
        {
            f"{LANGUAGE}.vocab_size": 258,
            f"{LANGUAGE}.eos_token_id": 0,
            f"{LANGUAGE}.bos_token_id": 0,
        },
        "for padding",
    ),
    "records beyond GPT-2's table": ("stage1", {LANGUAGE: gpt2(20)}, "records are longer than"),
    "records beyond OPT's table": ("stage1", {LANGUAGE: opt(20)}, "records are longer than"),
    "packed records beyond a table": (
        "stage1",
        {LANGUAGE: gpt2(20), **packing()},
        "records are longer than",
    ),
    "a tracker is not installed": ("stage1", {"train.trackers": ["wandb"]}, "wandb is not"),
    "fp16 without a GPU": ("stage1", {"train.precision": "fp16"}, "fp16 needs"),
    "fp8 without a GPU": ("stage1", {"train.fp8": True, "train.precision": "bf16"}, "train.fp8"),
    "flash-attention is not installed": (
        "stage1",
        {"model.language_model.attn_implementation": "flash_attention_2"},
        "model.language_model",
    ),
    "a kernel for packs is not available": (
        "stage1",
        packing(attention="flash_attn"),
        "train.packing.attention",
    ),
    "heads do not divide the width": (
        "stage1",
        {f"{LANGUAGE}.num_attention_heads": 5},
        "model.language_model.config",
    ),
    "an unknown activation": ("stage1", {f"{LANGUAGE}.hidden_act": "gleu"}, "gleu"),
    "a width that is no integer": ("stage1", {f"{LANGUAGE}.hidden_size": 64.0}, "hidden_size"),
    "an unknown family": ("stage1", {f"{LANGUAGE}.model_type": "lama"}, "lama"),
    "an unknown rope": (
        "stage1",
        {f"{LANGUAGE}.rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
        "spiral",
    ),
    "more experts per token than experts": (
        "stage1",
        {LANGUAGE: {**MOE, "num_experts_per_tok": 9}},
        "model.language_model.config",
    ),
    "an initializer_range that is no number": (
        "stage1",
        {f"{LANGUAGE}.initializer_range": "wide"},
        "model.language_model",
    ),
    "the tower's heads do not divide its width": (
        "stage1",
        {"model.vision_tower.config.num_attention_heads": 5},
        "model.vision_tower.config",
    ),
    "a feature layer that is not there": (
        "stage1",
        {"model.vision_tower.feature_layers": [-9]},
        "feature_layers",
    ),
    "a pooled grid larger than the grid": (
        "stage1",
        {"model.vision_tower.grid_pool": 7},
        "grid_pool",
    ),
    "timm has no such model": (
        "stage1",
        {"model.vision_tower": {"library": "timm", "config": {"architecture": "vit_tny"}}},
        "timm has no model",
    ),
    "weights of timm that are not there": (
        "stage1",
        {
            "model.vision_tower": {
                "library": "timm",
                "name": "test_vit",
                "weights": "/nowhere/weights.safetensors",
            }
        },
        "no such file",
    ),
    "open_clip has no such model": (
        "stage1",
        {"model.vision_tower": {"library": "open_clip", "name": "ViT-Z", "weights": "openai"}},
        "model.vision_tower",
    ),
    "no such projector": ("stage2", {"projector": "/nowhere/final"}, "/nowhere/final"),
    "a target that names nothing": ("lora", {"lora.targets": ["q_prj"]}, "did you mean 'q_proj'"),
    "a target inside fused experts": (
        "lora",
        {LANGUAGE: MOE, "lora.targets": ["gate_proj"]},
        "get no adapter",
    ),
    "LoRA on a model without linear layers": ("lora", {LANGUAGE: gpt2(256)}, "no nn.Linear layer"),
    "LoRA without a learning rate": (
        "lora",
        {"optim.learning_rate": {"projector": 1e-3}},
        "language_model is missing",
    ),
    "full fine-tuning of 4-bit weights": (
        "stage2",
        {"model.language_model.quantization": "nf4"},
        "model.language_model.quantization",
    ),
    "sharding of what is small": ("lora", {"train.sharding": "zero3"}, "train.sharding"),
    "no record has an image": ("stage1", {"data.train": "TEXT_ONLY"}, "no record has an image"),
    "an image is missing": ("stage1", {"data.train": "NO_IMAGE"}, "0 of 1 records can be used"),
    "records are longer than max_length": ("stage1", {"data.max_length": 25}, "do not fit"),
    "packing ignores capped attention": (
        "stage1",
        {LANGUAGE: GEMMA2, **packing()},
        "train.packing",
    ),
    "packing ignores attention sinks": (
        "stage1",
        {LANGUAGE: GPT_OSS, **packing()},
        "train.packing",
    ),
    "the template's tokens are not the tokenizer's": (
        "stage2",
        {"data.template": "llama_3"},
        "special token",
    ),
    "another run trains there": ("stage1", {"output_dir": "LOCKED"}, "is locked"),
    "output_dir is a file": ("stage1", {"output_dir": "FILE"}, "output_dir"),
    "output_dir holds files of others": (
        "stage1",
        {"output_dir": "OTHERS"},
        "not empty ('metrics.jsonl')",
    ),
    "output_dir is a cache": ("stage1", {"output_dir": "CACHE"}, "the directory holds a cache"),
    "the run would replace what it reads": (
        "stage2",
        {"output_dir": "OTHERS", "projector": "OTHERS"},
        "is read by this command",
    ),
    "the feature cache holds files of others": (
        "stage1",
        {"data.feature_cache": "OTHERS"},
        "data.feature_cache",
    ),
    "the feature cache is a file": ("stage1", {"data.feature_cache": "FILE"}, "not a directory"),
    "the feature cache cannot be created": (
        "stage1",
        {"data.feature_cache": "FILE/features"},
        "cannot be written",
    ),
    "the feature cache has too low a limit": (
        "stage1",
        {"data.feature_cache": "NEW", "data.feature_cache_gb": 1e-6},
        "but data.feature_cache_gb allows",
    ),
    "cache_dir holds files of others": ("stage1", {"data.cache_dir": "OTHERS"}, "data.cache_dir"),
    "cache_dir cannot be created": (
        "stage1",
        {"data.cache_dir": "FILE/rendered"},
        "cannot be used",
    ),
    "cache_dir has a damaged file": ("stage1", {"data.cache_dir": "DAMAGED"}, "data.cache_dir"),
}

GOOD: dict[str, tuple[str, Changes]] = {
    "unused control tokens have no row": ("stage1", {f"{LANGUAGE}.vocab_size": 259}),
    "records beyond what RoPE was trained on": (
        "stage1",
        {f"{LANGUAGE}.max_position_embeddings": 16},
    ),
    "max_length far beyond the positions": (
        "stage1",
        {LANGUAGE: gpt2(64), "data.max_length": 100_000},
    ),
    "a pack longer than the table of positions": (
        "stage1",
        {LANGUAGE: gpt2(64), **packing(512), "data.max_length": 60},
    ),
    "answers that would run beyond the table": ("stage1", {LANGUAGE: gpt2(30)}),
    "a model that cannot be exported": ("stage1", {"model.projector_type": "mlp3x_gelu"}),
    "experts without adapters and a router loss": ("lora", {LANGUAGE: MOE}),
    "a warm-up as long as the run": ("stage1", {"optim.warmup_ratio": 1.0}),
    "evaluation after the last step, of nothing": (
        "stage1",
        {"data.eval": [], "train.eval_every_steps": 10_000},
    ),
    "a batch larger than the data": (
        "stage1",
        {"train.global_batch_size": 1000, "train.micro_batch_size": 30},
    ),
    "one image among many texts": (
        "stage1",
        {"data.train": "ONE_IMAGE", "train.global_batch_size": 1, "data.template": "chatml"},
    ),
    "a projector that is not to learn": ("stage2", {"optim.learning_rate.projector": 0.0}),
}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def records(kind: str, folder: Path) -> list[dict[str, Any]]:
    """A data file for the configurations that name one of these kinds."""

    def record(number: int, image: str | None) -> dict[str, Any]:
        question = "<image>\nWhat?" if image else "What?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}]
        return {"id": f"r{number}", "conversations": turns} | ({"image": image} if image else {})

    images = {"TEXT_ONLY": [], "NO_IMAGE": ["gone.png"], "ONE_IMAGE": ["red-circle-0.png"]}[kind]
    texts = 0 if kind == "NO_IMAGE" else 9
    rows = [record(i, image) for i, image in enumerate([*images, *[None] * texts])]
    path = folder / f"{kind}.json"
    path.write_text(json.dumps(rows))
    return [{"path": str(path), "image_root": str(TINY / "data" / "images")}]


def configuration(folder: Path, stage: str, changes: Changes) -> str:
    """The file of a tiny run with some changes, named by dotted keys."""
    tree = yaml.safe_load(
        (TINY / f"{'stage2_lora' if stage == 'lora' else stage}.yaml").read_text()
    )
    started = {"projector": None, "output_dir": str(folder / "run")}
    quick = {"train.trackers": [], "train.max_steps": 1, "train.eval_samples": 1}
    for key, value in {**started, **quick, **changes}.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        if key == "data.train" and isinstance(value, str):
            value = records(value, folder)
        first, slash, rest = str(value).partition("/")
        if first in PLACES:
            value = str(folder / first.lower()) + slash + rest
        node[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Path]:
    """A folder with a file, directories of others, and a run that another process has locked."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "metrics.jsonl").write_text("mine")
    for name, kind in (("locked", "training run"), ("cache", "cache"), ("damaged", "cache")):
        own_directory(tmp_path / name, kind)
    (tmp_path / "damaged" / "rendered.sqlite").write_text("no database, but long enough" * 50)
    with (tmp_path / "locked" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path
        os.unlink(lock.name)


def everything(folder: Path) -> dict[Path, bytes | None]:
    """All files with their content, and all directories, below a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def run_and_read(run: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a command, and all that it printed on one line."""
    try:
        code, error = run(), ""
    except UserError as caught:
        code, error = 2, str(caught)
    printed = capsys.readouterr()
    text = " ".join((printed.out + printed.err + error).replace("│", " ").split())
    return code, text


@pytest.mark.parametrize("name", BAD)
def test_what_must_fail_later_is_found(
    name: str, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, changes, words = BAD[name]
    if torch.cuda.is_available() and ("GPU" in name or "kernel" in name):
        pytest.skip("this is available here")
    path = configuration(places, stage, changes)
    reset_accelerate()
    before = everything(places)
    code, text = run_and_read(lambda: check.main([path]), capsys)
    assert code == 2, text
    assert words in text
    assert everything(places) == before


def test_memory_that_is_not_there_is_one_sentence() -> None:
    with (
        pytest.raises(UserError, match="not enough memory for the run's longest batch") as caught,
        library_call("transformers", "model", "train on the longest batch"),
        report_out_of_memory(),
    ):
        torch.empty(1 << 55)
    assert caught.value.reason == "out_of_memory"


@pytest.mark.parametrize("name", GOOD)
def test_what_only_looks_odd_passes_and_trains(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, changes = GOOD[name]
    path = configuration(tmp_path, stage, changes)
    code, text = run_and_read(lambda: check.main([path, "--all"]), capsys)
    assert code == 0, text
    export = "export --to hf note not possible" if "exported" in name else OUTLOOK
    assert export in text
    reset_accelerate()
    main = stage1.main if stage == "stage1" else stage2.main
    assert main([path]) == 0


def test_a_run_that_is_already_there_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reset_accelerate()
    assert stage1.main([configuration(tmp_path, "stage1", {"data.eval": []})]) == 0
    path = configuration(tmp_path, "stage1", {"data.eval": []})
    code, text = run_and_read(lambda: check.main([path, "--no-model"]), capsys)
    assert code == 0
    assert "already finished" in text
    path = configuration(tmp_path, "stage1", {"data.eval": [], "seed": 7})
    code, text = run_and_read(lambda: check.main([path, "--no-model"]), capsys)
    assert code == 2
    assert "seed" in text
    other = {"projector": str(tmp_path / "run" / "final"), "output_dir": str(tmp_path / "next")}
    wider = {LANGUAGE: {**SMALL, "hidden_size": 96, "intermediate_size": 64}}
    path = configuration(tmp_path, "stage2", {**other, **wider})
    code, text = run_and_read(lambda: check.main([path]), capsys)
    assert code == 2
    assert "but this model's is" in text


SAVED: Changes = {
    "data.eval": [],
    "data.train": "ONE_IMAGE",
    "data.template": "chatml",
    "train.max_steps": 4,
    "train.save_every_steps": 1,
    "train.global_batch_size": 2,
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that has two checkpoints and no `final`."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        reset_accelerate()
        assert stage1.main([configuration(folder, "stage1", SAVED)]) == 0
    shutil.rmtree(folder / "run" / "final")
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    return folder


def damage(checkpoint: Path) -> None:
    path = checkpoint / "projector.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nothing", None),
        ("the newest is damaged", None),
        ("all are damaged", "none of the 1 checkpoints is complete"),
        ("other records", "gave 10 records, now it gives 9"),
        ("fewer steps", "the run is already at step 3, beyond the 1"),
    ],
)
def test_a_resume_that_the_stage_would_refuse_is_bad_in_the_same_words(
    fault: str,
    words: str | None,
    interrupted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    if "damaged" in fault:
        shutil.copytree(checkpoints[-1], checkpoints[-1].with_name("step-00000009"))
        damage(checkpoints[-1].with_name("step-00000009"))
    if fault == "all are damaged":
        for folder in checkpoints:
            shutil.rmtree(folder)
    config = configuration(tmp_path, "stage1", SAVED)
    own = tmp_path / "run" / "config.yaml"
    own.write_text(own.read_text().replace(str(interrupted), str(tmp_path)))
    if fault == "other records":
        data = tmp_path / "ONE_IMAGE.json"
        data.write_text(json.dumps(json.loads(data.read_text())[:-1]))
    if fault == "fewer steps":
        config = configuration(tmp_path, "stage1", {**SAVED, "train.max_steps": 1})
        own.write_text(own.read_text().replace("max_steps: 4", "max_steps: 1"))
    before = everything(tmp_path)
    code, text = run_and_read(lambda: check.main([config]), capsys)
    assert everything(tmp_path) == before
    assert code == (2 if words else 0), text
    assert (words or "a run would resume") in text
    assert ("skipped: " in text) == ("damaged" in fault)
    reset_accelerate()
    if words:
        with pytest.raises(UserError) as error:
            stage1.main([config])
        assert "".join(str(error.value).split()) in "".join(text.split())
    else:
        assert stage1.main([config]) == 0
