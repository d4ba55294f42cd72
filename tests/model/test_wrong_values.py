"""Wrong values handed to a library are user errors with the configuration key and the cause."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.tiny import CLIP, LLAMA, OPEN_CLIP, tiny_model
from vlm_sft.config.schema import LanguageModelConfig, VisionTowerConfig
from vlm_sft.data.hf_tokenizer import load_tokenizer
from vlm_sft.data.records import open_raw_records
from vlm_sft.errors import UserError
from vlm_sft.model.build import build_language_model, build_vision_tower
from vlm_sft.utils.libraries import library_call

GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 1, "n_head": 2, "vocab_size": 300}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 5},
        {"num_attention_heads": 0},
        {"num_attention_heads": "two"},
        {"hidden_act": "gleu"},
        {"hidden_size": 64.0},
        {"hidden_size": -48},
        {"hidden_size": None},
        {"vocab_size": -1},
        {"vocab_size": 2},
        {"num_hidden_layers": "deep"},
        {"num_key_value_heads": 7},
        {"rms_norm_eps": "small"},
        {"rope_parameters": {"rope_type": "spiral"}},
        {"rope_parameters": {"rope_type": "yarn", "factor": "four", "rope_theta": 1e4}},
        {"model_type": "lama"},
        {"model_type": "clip"},
        {"model_type": 7},
        {"dtype": "float7"},
        {"pad_token_id": 4000},
    ],
    ids=str,
)
def test_a_wrong_value_of_the_language_models_config_is_one_sentence(
    changes: dict[str, Any],
) -> None:
    config = LanguageModelConfig(config={**LLAMA, **changes}, tokenizer="bytes")
    with pytest.raises(UserError, match=r"^model\.language_model\.config: ") as caught:
        build_language_model(config, dtype=torch.float32, seed=0)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flsh"])
def test_an_attention_that_is_not_available_is_one_sentence(name: str) -> None:
    config = LanguageModelConfig(config=LLAMA, tokenizer="bytes", attn_implementation=name)
    with pytest.raises(UserError, match=r"model\.language_model"):
        build_language_model(config, dtype=torch.float32, seed=0)


def test_a_model_that_fails_only_when_it_runs_is_one_sentence() -> None:
    config = LanguageModelConfig(config={**GPT2, "n_positions": 2}, tokenizer="bytes")
    with pytest.raises(UserError, match=r"model\.language_model\.config: transformers cannot run"):
        build_language_model(config, dtype=torch.float32, seed=0)


@pytest.mark.parametrize(
    "tower",
    [
        {**CLIP, "config": {**CLIP["config"], "num_attention_heads": 5}},
        {**CLIP, "config": {**CLIP["config"], "hidden_act": "gleu"}},
        {**CLIP, "config": {**CLIP["config"], "hidden_size": -32}},
        {**CLIP, "config": {**CLIP["config"], "image_size": 7}},
        {**CLIP, "config": {**CLIP["config"], "patch_size": 0}},
        {**OPEN_CLIP, "config": {"vision_cfg": {"layers": 2, "width": 33, "head_width": 16}}},
        {**OPEN_CLIP, "config": {"vision_cfg": {"layers": "two", "width": 32}}},
        {**OPEN_CLIP, "config": {"vision_cfg": ["layers"]}},
        {"library": "open_clip", "name": "ViT-Z-99", "weights": "openai"},
        {"library": "timm", "config": {"architecture": "vit_tiny_patch16_224", "depth": "two"}},
        {"library": "timm", "config": {"architecture": "vit_tiny_patch16_224", "embed_dim": 7}},
        {"library": "timm", "config": {"architecture": 7}},
        {"library": "timm", "config": {"architecture": "vit_tny"}},
        {"library": "transformers", "config": {"model_type": ["clip"]}},
    ],
    ids=str,
)
def test_a_wrong_value_of_the_towers_config_is_one_sentence(tower: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^model\.vision_tower") as caught:
        build_vision_tower(VisionTowerConfig(**tower))
    assert "\n" not in str(caught.value)


def test_damaged_files_of_a_model_folder_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    config = LanguageModelConfig(name=str(tmp_path))
    with pytest.raises(UserError, match=r"^model\.language_model\.name: "):
        build_language_model(config, dtype=torch.float32, seed=0)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(UserError, match=r"^model\.language_model\.name: "):
        build_language_model(config, dtype=torch.float32, seed=0)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 5')
    with pytest.raises(UserError, match=r"^model\.language_model\.name: "):
        build_language_model(config, dtype=torch.float32, seed=0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"^model\.language_model\.name: "):
        load_tokenizer(config)


def test_a_damaged_table_of_records_is_one_sentence(tmp_path: Path) -> None:
    parquet = tmp_path / "a.parquet"
    parquet.write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(UserError, match=r"a\.parquet: pyarrow cannot read this Parquet file"):
        open_raw_records(parquet)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("[]")
    (folder / "state.json").write_text("[]")
    with pytest.raises(UserError, match="saved: datasets cannot load this folder"):
        open_raw_records(folder)


def test_any_exception_inside_a_library_keeps_its_cause() -> None:
    class Odd(Exception):
        pass

    with (
        pytest.raises(UserError, match=r"^some\.key: lib cannot do it: what\? no$") as caught,
        library_call("lib", "some.key", "do it"),
    ):
        raise Odd("what?\n  no")
    assert isinstance(caught.value.__cause__, Odd)
    with pytest.raises(UserError, match=r"^mine$"), library_call("lib", "some.key", "do it"):
        raise UserError("mine")


def test_a_good_model_is_built_as_before() -> None:
    assert tiny_model().vision_tower.num_tokens == 4
