"""The tensor names in an exported folder are those of the released LLaVA folders.

The lists are literal: programs that read such folders (transformers before 5.6, vLLM, mistral.rs)
know these names and no others.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.export.test_tiled import model_of
from tests.model.tiny import LLAMA, VIT, tiny_model
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.export.hf_llava import export_hf_llava
from vlm_sft.export.verify import reload_here

PROJECTOR = """
multi_modal_projector.linear_1.bias
multi_modal_projector.linear_1.weight
multi_modal_projector.linear_2.bias
multi_modal_projector.linear_2.weight
"""
ENCODER_LAYER = """
vision_tower.vision_model.encoder.layers.0.layer_norm1.bias
vision_tower.vision_model.encoder.layers.0.layer_norm1.weight
vision_tower.vision_model.encoder.layers.0.layer_norm2.bias
vision_tower.vision_model.encoder.layers.0.layer_norm2.weight
vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias
vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight
vision_tower.vision_model.encoder.layers.0.mlp.fc2.bias
vision_tower.vision_model.encoder.layers.0.mlp.fc2.weight
vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.bias
vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.weight
vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.bias
vision_tower.vision_model.encoder.layers.0.self_attn.out_proj.weight
vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.bias
vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight
vision_tower.vision_model.encoder.layers.0.self_attn.v_proj.bias
vision_tower.vision_model.encoder.layers.0.self_attn.v_proj.weight
vision_tower.vision_model.post_layernorm.bias
vision_tower.vision_model.post_layernorm.weight
"""
CLIP_NAMES = f"""
vision_tower.vision_model.embeddings.class_embedding
vision_tower.vision_model.embeddings.patch_embedding.weight
vision_tower.vision_model.embeddings.position_embedding.weight
vision_tower.vision_model.pre_layrnorm.bias
vision_tower.vision_model.pre_layrnorm.weight
{ENCODER_LAYER}"""
SIGLIP_NAMES = f"""
vision_tower.vision_model.embeddings.patch_embedding.bias
vision_tower.vision_model.embeddings.patch_embedding.weight
vision_tower.vision_model.embeddings.position_embedding.weight
vision_tower.vision_model.head.attention.in_proj_bias
vision_tower.vision_model.head.attention.in_proj_weight
vision_tower.vision_model.head.attention.out_proj.bias
vision_tower.vision_model.head.attention.out_proj.weight
vision_tower.vision_model.head.layernorm.bias
vision_tower.vision_model.head.layernorm.weight
vision_tower.vision_model.head.mlp.fc1.bias
vision_tower.vision_model.head.mlp.fc1.weight
vision_tower.vision_model.head.mlp.fc2.bias
vision_tower.vision_model.head.mlp.fc2.weight
vision_tower.vision_model.head.probe
{ENCODER_LAYER}"""
HEADLESS_SIGLIP_NAMES = "\n".join(n for n in SIGLIP_NAMES.split() if ".head." not in n) + "\n"
TIED_LLAMA_NAMES = """
language_model.model.embed_tokens.weight
language_model.model.layers.0.input_layernorm.weight
language_model.model.layers.0.mlp.down_proj.weight
language_model.model.layers.0.mlp.gate_proj.weight
language_model.model.layers.0.mlp.up_proj.weight
language_model.model.layers.0.post_attention_layernorm.weight
language_model.model.layers.0.self_attn.k_proj.weight
language_model.model.layers.0.self_attn.o_proj.weight
language_model.model.layers.0.self_attn.q_proj.weight
language_model.model.layers.0.self_attn.v_proj.weight
language_model.model.norm.weight
"""
LLAMA_NAMES = f"""
language_model.lm_head.weight
{TIED_LLAMA_NAMES}"""
QWEN2_NAMES = f"""
language_model.model.layers.0.self_attn.k_proj.bias
language_model.model.layers.0.self_attn.q_proj.bias
language_model.model.layers.0.self_attn.v_proj.bias
{LLAMA_NAMES}"""
MIXTRAL_NAMES = LLAMA_NAMES.replace(".mlp.down_proj.", ".block_sparse_moe.experts.0.w2.")
MIXTRAL_NAMES = MIXTRAL_NAMES.replace(".mlp.gate_proj.", ".block_sparse_moe.experts.0.w1.")
MIXTRAL_NAMES = MIXTRAL_NAMES.replace(".mlp.up_proj.", ".block_sparse_moe.experts.0.w3.")
MIXTRAL_NAMES += "language_model.model.layers.0.block_sparse_moe.gate.weight\n"

INTERNVL_NAMES = """
multi_modal_projector.layer_norm.bias
multi_modal_projector.layer_norm.weight
vision_tower.embeddings.cls_token
vision_tower.embeddings.patch_embeddings.projection.bias
vision_tower.embeddings.patch_embeddings.projection.weight
vision_tower.embeddings.position_embeddings
vision_tower.encoder.layer.0.attention.k_proj.bias
vision_tower.encoder.layer.0.attention.k_proj.weight
vision_tower.encoder.layer.0.attention.projection_layer.bias
vision_tower.encoder.layer.0.attention.projection_layer.weight
vision_tower.encoder.layer.0.attention.q_proj.bias
vision_tower.encoder.layer.0.attention.q_proj.weight
vision_tower.encoder.layer.0.attention.v_proj.bias
vision_tower.encoder.layer.0.attention.v_proj.weight
vision_tower.encoder.layer.0.lambda_1
vision_tower.encoder.layer.0.lambda_2
vision_tower.encoder.layer.0.layernorm_after.bias
vision_tower.encoder.layer.0.layernorm_after.weight
vision_tower.encoder.layer.0.layernorm_before.bias
vision_tower.encoder.layer.0.layernorm_before.weight
vision_tower.encoder.layer.0.mlp.fc1.bias
vision_tower.encoder.layer.0.mlp.fc1.weight
vision_tower.encoder.layer.0.mlp.fc2.bias
vision_tower.encoder.layer.0.mlp.fc2.weight
"""

ONE_LAYER = {**LLAMA, "num_hidden_layers": 1}
ONE_EXPERT = {
    "model_type": "mixtral",
    "num_key_value_heads": 1,
    "num_local_experts": 1,
    "num_experts_per_tok": 1,
}


def tower(model_type: str) -> dict[str, Any]:
    config = {**VIT, "model_type": model_type, "num_hidden_layers": 1}
    return {"library": "transformers", "config": config, "feature_layers": [-1]}


def export(out: Path, parts: dict[str, Any], **keys: Any) -> None:
    export_hf_llava(
        tiny_model(**parts),
        byte_tokenizer(),
        out,
        image_aspect="pad",
        chat_template=None,
        reload=reload_here,
        **keys,
    )


def names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return sorted(opened.keys())


@pytest.mark.parametrize(
    ("vision", "language_model", "expected"),
    [
        ("clip_vision_model", ONE_LAYER, CLIP_NAMES + LLAMA_NAMES),
        ("siglip_vision_model", ONE_LAYER, SIGLIP_NAMES + LLAMA_NAMES),
        (
            "clip_vision_model",
            {**ONE_LAYER, "tie_word_embeddings": True},
            CLIP_NAMES + TIED_LLAMA_NAMES,
        ),
        (
            "clip_vision_model",
            {**ONE_LAYER, "model_type": "qwen2", "num_key_value_heads": 1},
            CLIP_NAMES + QWEN2_NAMES,
        ),
        ("clip_vision_model", {**ONE_LAYER, **ONE_EXPERT}, CLIP_NAMES + MIXTRAL_NAMES),
    ],
)
def test_the_names_are_those_of_the_released_folders(
    vision: str, language_model: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(out, {"tower": tower(vision), "language_model": language_model})
    assert names(out / "model.safetensors") == sorted((expected + PROJECTOR).split())


@pytest.mark.parametrize(
    ("vision", "layout", "expected"),
    [
        ("clip_vision_model", "anyres", CLIP_NAMES + "image_newline"),
        ("siglip_vision_model", "anyres_max_4", HEADLESS_SIGLIP_NAMES + "image_newline"),
        ("internvl_vision", "dynamic", INTERNVL_NAMES),
    ],
)
def test_the_names_of_models_that_divide_images_are_those_of_the_released_folders(
    vision: str, layout: str, expected: str, tmp_path: Path
) -> None:
    parts = tower(vision)
    if vision == "siglip_vision_model":
        parts["config"]["vision_use_head"] = False  # as in the released LLaVA-OneVision
    if vision == "internvl_vision":
        parts["config"]["attention_bias"] = True  # as in the released InternViT-300M
    export_hf_llava(
        model_of(parts["config"], layout, language_model=ONE_LAYER, feature_layers=[-1]),
        byte_tokenizer(("<img>", "</img>")),
        tmp_path / "out",
        image_aspect="pad",
        chat_template=None,
        image_tokens=("<img>", "</img>") if layout == "dynamic" else ("", ""),
        reload=reload_here,
    )
    wanted = sorted((expected + LLAMA_NAMES + PROJECTOR).split())
    assert names(tmp_path / "out" / "model.safetensors") == wanted


def test_weights_above_the_size_are_several_files_with_an_index_of_all_names(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    export(out, {"tower": tower("clip_vision_model")}, max_shard_size="60KB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("model-*.safetensors"))
    assert len(files) > 1 and sorted(set(index["weight_map"].values())) == files
    for file in files:
        stored = names(out / file)
        assert stored and all(index["weight_map"][name] == file for name in stored)
    assert not (out / "model.safetensors").exists()


def test_weights_are_cast_to_the_requested_dtype_and_compared_in_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, {"tower": tower("clip_vision_model")}, dtype=torch.bfloat16)
    weights = load_file(out / "model.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.bfloat16}
    assert json.loads((out / "export.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
