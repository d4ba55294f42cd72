"""Folders of the original LLaVA code, read back by `model.from_checkpoint` bit for bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.finished_models import OriginalParts
from tests.model.tiny import CLIP, GEMMA2, LLAMA, images, tiny_model
from vlm_sft.config.schema import (
    ImageTilingConfig,
    LanguageModelConfig,
    LoraConfig,
    ModelConfig,
    VisionTowerConfig,
)
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.export.formats import ExportOptions
from vlm_sft.export.llava import export, has_released_names, obstacles
from vlm_sft.export.sample import noise_sample, sample_logits
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.model.build import build_model
from vlm_sft.model.hashing import named_state
from vlm_sft.model.lora import merged_language_model
from vlm_sft.model.vlm import VisionLanguageModel

TRAINED_PROJECTOR = {"files": {"projector.safetensors": ""}}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> OriginalParts:
    made = OriginalParts(tmp_path_factory.mktemp("parts"))
    made.base()
    return made


def built(parts: OriginalParts, lora: LoraConfig | None = None, **keys: Any) -> LoadedModel:
    """A trained model whose tower and language model are folders."""
    config = ModelConfig(
        vision_tower=VisionTowerConfig(library="transformers", name=str(parts.clip)),
        projector_type=keys.pop("projector_type", "mlp2x_gelu"),
        language_model=LanguageModelConfig(name=str(parts.base())),
    )
    model = build_model(config, dtype=torch.float32, seed=3, lora=lora)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return loaded(model, **keys)


def loaded(model: VisionLanguageModel, **keys: Any) -> LoadedModel:
    tokenizer = byte_tokenizer()
    settings: dict[str, Any] = {
        "tokenizer": tokenizer,
        "chat_tokenizer": ChatTokenizer.from_name("vicuna_v1", tokenizer),
        "image_spec": model.vision_tower.image_spec,
        "image_aspect": "pad",
        "image_processing": "exact",
        "config": None,
        "manifest": {},
        **keys,
    }
    return LoadedModel(model=model.eval(), **settings)


def written(checkpoint: LoadedModel, out: Path, **options: Any) -> dict[str, Any]:
    out.mkdir()
    result = export(checkpoint, out, ExportOptions(**options))
    tree: dict[str, Any] = json.loads((out / "config.json").read_text())
    return {**result.facts, "config": tree}


def require_same_state(found: VisionLanguageModel, expected: VisionLanguageModel) -> None:
    theirs, ours = dict(named_state(found)), dict(named_state(expected))
    assert theirs.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_a_full_folder_is_read_back_bit_for_bit(
    parts: OriginalParts, projector: str, tmp_path: Path
) -> None:
    checkpoint = built(parts, projector_type=projector)
    out = tmp_path / "llava"
    facts = written(checkpoint, out)
    assert facts["max_abs_logit_difference"] == 0.0 and facts["contents"] == "full"
    assert not facts["contains_vision_tower"]
    config = facts["config"]
    assert config["architectures"] == ["LlavaLlamaForCausalLM"]
    assert config["mm_vision_tower"] == str(parts.clip) and config["mm_hidden_size"] == 32
    assert config["image_aspect_ratio"] == "pad" and config["model_type"] == "llava_llama"
    assert not any("vision_tower" in name for name in load_file(out / "model.safetensors"))
    again = load_checkpoint(out, device="cpu", template="vicuna_v1")
    require_same_state(again.model, checkpoint.model)
    assert again.image_aspect == "pad"
    assert again.tokenizer.eos_token_id == checkpoint.chat_tokenizer.eot_token_ids[0]


def test_the_names_are_those_of_the_original_code(parts: OriginalParts, tmp_path: Path) -> None:
    written(built(parts), tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(name for name in names if "mm_projector" in name) == [
        "model.mm_projector.0.bias",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.mm_projector.2.weight",
    ]
    theirs = parts.full(tmp_path / "theirs")
    assert names.keys() == load_file(theirs / "model.safetensors").keys()


def test_a_lora_folder_has_the_adapters_and_the_projector_and_is_read_back(
    parts: OriginalParts, tmp_path: Path
) -> None:
    checkpoint = built(parts, LoraConfig(r=2))
    out = tmp_path / "llava-lora"
    facts = written(checkpoint, out)
    assert facts["contents"] == "lora"
    assert not (out / "model.safetensors").exists()
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(parts.base()) and adapter["r"] == 2
    others = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    assert sorted(others)[0] == "base_model.model.model.mm_projector.0.bias"
    again = load_checkpoint(out, device="cpu", template="vicuna_v1").model
    expected = merged_language_model(checkpoint.model).state_dict()
    for name, tensor in again.language_model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ours = checkpoint.model.projector_state()
    assert all(torch.equal(again.projector_state()[name], ours[name]) for name in ours)


def test_adapters_are_merged_into_a_full_folder_on_request(
    parts: OriginalParts, tmp_path: Path
) -> None:
    checkpoint = built(parts, LoraConfig(r=2))
    facts = written(checkpoint, tmp_path / "out", merge=True, dtype=torch.bfloat16)
    assert facts["contents"] == "full" and facts["config"]["torch_dtype"] == "bfloat16"
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_trained_projector_alone_is_the_file_of_the_original_stage_1(
    parts: OriginalParts, tmp_path: Path
) -> None:
    checkpoint = built(parts, manifest=TRAINED_PROJECTOR)
    out = tmp_path / "out"
    facts = written(checkpoint, out)
    assert facts["contents"] == "projector" and facts["max_abs_logit_difference"] == 0.0
    assert facts["config"]["tune_mm_mlp_adapter"] is True
    assert facts["config"]["_name_or_path"] == str(parts.base())
    assert sorted(torch.load(out / "mm_projector.bin", weights_only=True))[0] == (
        "model.mm_projector.0.bias"
    )
    require_same_state(
        load_checkpoint(out, device="cpu", template="vicuna_v1").model, checkpoint.model
    )


def test_a_vision_tower_that_differs_from_the_named_one_is_in_the_folder(
    parts: OriginalParts, tmp_path: Path
) -> None:
    checkpoint = built(parts)
    encoder: Any = checkpoint.model.vision_tower.encoder
    encoder.embeddings.class_embedding.data += 1
    facts = written(checkpoint, tmp_path / "out")
    assert facts["contains_vision_tower"] and facts["config"]["unfreeze_mm_vision_tower"] is True
    again = load_checkpoint(tmp_path / "out", device="cpu", template="vicuna_v1").model
    require_same_state(again, checkpoint.model)
    trained = dataclasses.replace(checkpoint, manifest=TRAINED_PROJECTOR)
    with pytest.raises(UserError, match="the vision tower was trained"):
        written(trained, tmp_path / "second")


def test_a_tower_without_a_name_is_compared_with_the_one_that_is_given(
    parts: OriginalParts, tmp_path: Path
) -> None:
    model = tiny_model(language_model={**LLAMA, "num_key_value_heads": 2})
    with pytest.raises(UserError, match=r"name the folder or hub repository .* with --tower"):
        written(loaded(model), tmp_path / "first")
    facts = written(loaded(model), tmp_path / "out", tower_name=str(parts.clip))
    assert facts["max_abs_logit_difference"] == 0.0
    other = tiny_model(tower={**CLIP, "image_size": 42}, language_model=LLAMA)
    with pytest.raises(UserError, match="of other names or shapes"):
        written(loaded(other), tmp_path / "second", tower_name=str(parts.clip))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"language_model": GEMMA2}, "no class for the language model gemma2"),
        ({"projector_type": "pixel_shuffle_mlp"}, "no PixelShuffleMlp projector"),
        ({"tower": {**CLIP, "feature_layers": [-2, -1]}}, "one layer of the vision tower"),
        ({"tower": {**CLIP, "grid_pool": 1}}, "grid_pool is 1"),
    ],
)
def test_what_the_original_code_cannot_express_is_refused_by_name(
    keys: dict[str, Any], message: str
) -> None:
    found = obstacles(loaded(tiny_model(**keys)))
    assert len(found) == 1 and message in found[0]


def test_a_part_that_was_trained_on_an_unnamed_model_is_refused(
    parts: OriginalParts, tmp_path: Path
) -> None:
    model = tiny_model(language_model={**LLAMA, "num_key_value_heads": 2})
    checkpoint = loaded(model, manifest=TRAINED_PROJECTOR)
    with pytest.raises(UserError, match=r"has no name .* with --merge"):
        written(checkpoint, tmp_path / "out", tower_name=str(parts.clip))


def test_the_comparison_sees_a_projector_that_is_stored_wrongly(
    parts: OriginalParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vlm_sft.export.llava as module

    right = module.projector_names
    monkeypatch.setattr(
        module, "projector_names", lambda *a: {k: v + 1 for k, v in right(*a).items()}
    )
    with pytest.raises(UserError, match="expected at most 0"):
        written(built(parts), tmp_path / "out")


def test_logits_of_the_folder_are_those_of_the_checkpoint_on_other_images(
    parts: OriginalParts, tmp_path: Path
) -> None:
    checkpoint = built(parts)
    sample = noise_sample(checkpoint.model)._replace(pixels=images(1, seed=9))
    written(checkpoint, tmp_path / "out", sample=sample)
    again = load_checkpoint(tmp_path / "out", device="cpu", template="vicuna_v1").model
    assert torch.equal(sample_logits(again, sample), sample_logits(checkpoint.model, sample))


def test_a_tower_saved_by_newer_versions_of_transformers_is_recognized(
    parts: OriginalParts, tmp_path: Path
) -> None:
    assert not has_released_names(str(parts.clip))
    assert has_released_names("openai/clip-vit-large-patch14-336")
    released = {"vision_model.x": torch.zeros(1)}
    save_file(released, tmp_path / "model.safetensors")
    assert has_released_names(str(tmp_path))


def test_images_in_crops_are_those_of_llava_1_6(parts: OriginalParts, tmp_path: Path) -> None:
    config = ModelConfig(
        vision_tower=VisionTowerConfig(library="transformers", name=str(parts.clip)),
        image_tiling=ImageTilingConfig(layout="anyres", grids=[[1, 2], [2, 1], [1, 3]]),
        language_model=LanguageModelConfig(name=str(parts.base())),
    )
    checkpoint = loaded(build_model(config, dtype=torch.float32, seed=3))
    facts = written(checkpoint, tmp_path / "out")
    assert facts["max_abs_logit_difference"] == 0.0
    tree = facts["config"]
    assert tree["image_aspect_ratio"] == "anyres" and tree["mm_patch_merge_type"] == "spatial_unpad"
    # Width and height, unlike transformers' list.
    assert tree["image_grid_pinpoints"] == [[56, 28], [28, 56], [84, 28]]
    assert "model.image_newline" in load_file(tmp_path / "out" / "model.safetensors")
    again = load_checkpoint(tmp_path / "out", device="cpu", template="vicuna_v1").model
    assert again.layout_rule == checkpoint.model.layout_rule
    require_same_state(again, checkpoint.model)
