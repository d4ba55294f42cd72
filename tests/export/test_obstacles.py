"""Everything that an export would refuse is reported before training."""

import html
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.tiny import CLIP, COHERE, GEMMA2, GRANITE, LLAMA, VIT, tiny_model
from vlm_sft.commands.train import note_export_obstacles
from vlm_sft.config.schema import LoraConfig
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.errors import UserError
from vlm_sft.export.hf_llava import export_hf_llava
from vlm_sft.export.obstacles import export_consumers, export_obstacles
from vlm_sft.export.verify import reload_here
from vlm_sft.inspection.run_report import write_run_report

GPT2 = {
    "model_type": "gpt2",
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 300,
    "n_positions": 128,
}
OPT = {
    "model_type": "opt",
    "hidden_size": 48,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}
NARROW_OPT = {**OPT, "word_embed_proj_dim": 32}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_key_value_heads": 1, "num_local_experts": 2}
RESNET: dict[str, Any] = {
    "library": "timm",
    "config": {"architecture": "resnet18"},
    "feature_layers": [-1],
    "image_size": 64,
}
LITE: dict[str, Any] = {**RESNET, "config": {"architecture": "tf_efficientnet_lite0"}}
REGISTERS: dict[str, Any] = {
    "library": "transformers",
    "config": {"model_type": "dinov2_with_registers", **VIT},
}


@pytest.mark.parametrize(
    ("parts", "sentences"),
    [
        ({"projector_type": "mlp3x_gelu"}, ["mlp3x_gelu) has 3"]),
        (
            {"projector_type": "pixel_shuffle_mlp"},
            ["only in InternVLForConditionalGeneration, whose vision tower is an InternViT"],
        ),
        (
            {"projector_type": "resampler"},
            ["no class of transformers has this projector (model.projector_type: resampler)"],
        ),
        ({"tower": {**CLIP, "grid_pool": 1}}, ["model.vision_tower.grid_pool is 1"]),
        ({"language_model": GEMMA2}, ["final_logit_softcapping = 0.05"]),
        ({"language_model": {**LLAMA, "model_type": "phi"}}, ["has no bias and PhiForCausalLM's"]),
        (
            {"language_model": NARROW_OPT},
            ["lm_head.weight is [300, 32] in the model and [300, 48] in LLaVA"],
        ),
        ({"tower": REGISTERS}, ["cannot hold the vision tower Dinov2WithRegistersModel"]),
        ({"tower": {**RESNET, "feature_layers": [-2]}}, ["feature_layers: [-1]"]),
        ({"tower": {**RESNET, "grid_pool": 1}}, ["model.vision_tower.grid_pool is 1"]),
        ({"tower": {**LITE, "image_size": 128, "grid_pool": 1}}, ["grid_pool: 2 would be"]),
        (
            {"tower": {**CLIP, "grid_pool": 1}, "projector_type": "mlp3x_gelu"},
            ["grid_pool", "mlp3x_gelu"],
        ),
    ],
)
def test_each_part_that_no_class_holds_is_one_sentence_and_the_export_repeats_it(
    parts: dict[str, Any], sentences: list[str], tmp_path: Path
) -> None:
    model = tiny_model(**parts)
    found = export_obstacles(model)
    assert len(found) == len(sentences)
    for sentence, expected in zip(found, sentences, strict=True):
        assert expected in sentence and "\n" not in sentence
    with pytest.raises(UserError) as refused:
        export_hf_llava(
            model,
            byte_tokenizer(),
            tmp_path / "out",
            image_aspect="pad",
            chat_template=None,
        )
    assert all(sentence in str(refused.value) for sentence in found)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "parts",
    [
        {"lora": LoraConfig(r=2)},
        {"language_model": {**LLAMA, "tie_word_embeddings": True}},
        {"language_model": GRANITE},
        {"language_model": COHERE},
        {"language_model": GPT2},
        {"language_model": OPT},
        {"language_model": MIXTRAL},
        {"tower": RESNET},
        {"tower": {**LITE, "image_size": 64}},
        {"tower": {**LITE, "image_size": 128, "grid_pool": 2}},
        {"tower": {**LITE, "image_size": 96, "grid_pool": 1}},
        {"projector_type": "linear"},
        {"quantization": "nf4", "lora": LoraConfig(r=2)},
    ],
)
def test_what_can_be_exported_has_no_obstacle_and_is_exported_exactly(
    parts: dict[str, Any], tmp_path: Path
) -> None:
    if "quantization" in parts:
        pytest.importorskip("bitsandbytes")
    model = tiny_model(**parts)
    assert export_obstacles(model) == []
    expected = export_consumers(model)
    report = export_hf_llava(
        model,
        byte_tokenizer(),
        tmp_path / "out",
        image_aspect="pad",
        chat_template=None,
        reload=reload_here,
    )
    assert report.max_abs_logit_difference <= 1e-5
    assert report.consumers == expected


def test_a_run_logs_at_its_start_what_an_export_would_refuse_and_draws_no_random_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="vlm_sft")
    model = tiny_model(projector_type="mlp3x_gelu", tower=RESNET)
    before = torch.get_rng_state()
    note_export_obstacles(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    (message,) = caplog.messages
    assert message.startswith("note: this model cannot be exported with --to hf: ")
    assert "mlp3x_gelu" in message
    (obstacle,) = export_obstacles(model)
    words = obstacle.removeprefix("export: ")
    page = html.unescape(write_run_report(tmp_path).read_text())
    assert f"export --to hf: not possible: {words}" in page
    note_export_obstacles(tiny_model(), tmp_path)
    assert "export --to hf: possible" in write_run_report(tmp_path).read_text()
