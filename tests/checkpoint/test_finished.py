"""Finished models of other programs: loaded completely, with the same logits, or refused."""

import json
import math
import re
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, LlamaForCausalLM, LlavaForConditionalGeneration

from tests.export.test_hf_llava import DINO, QUICK, SIGLIP
from tests.finished_models import (
    SMALL_LLAMA,
    OriginalParts,
    change_image_processor,
    change_json,
    change_tensors,
    released_folder,
    rename_tensors,
)
from tests.model.tiny import CLIP, GRANITE, images, rows, tiny_model
from tests.rounding import assert_near, terms_of
from tests.tokenizers_for_tests import sentencepiece_tokenizer
from vlm_sft.checkpoint.base_models import parse_bases
from vlm_sft.config.finished import read_finished
from vlm_sft.config.schema import LanguageModelConfig
from vlm_sft.data.hf_tokenizer import load_tokenizer
from vlm_sft.errors import UserError
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.model.vlm import VisionLanguageModel

MIXTRAL = {
    **SMALL_LLAMA,
    "model_type": "mixtral",
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}
TIED_QWEN2 = {**SMALL_LLAMA, "model_type": "qwen2", "tie_word_embeddings": True}


@torch.no_grad()
def logits(model: VisionLanguageModel) -> Tensor:
    ids, mask, _ = rows([5, 6, -1, 7, 8, 9], [3, -1, 4])
    return model.logits(ids, pixel_values=images(2), attention_mask=mask)[..., :300]


def load(folder: Path, **keys: Any) -> LoadedModel:
    return load_checkpoint(folder, device="cpu", **keys)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "llava"
    released_folder(folder)
    return folder


@pytest.mark.parametrize(
    ("parts", "rounding"),
    [
        ({}, 0.0),
        ({"tower": QUICK}, 1e-6),  # another implementation of CLIP than open_clip's
        ({"tower": SIGLIP, "language_model": TIED_QWEN2}, 0.0),
        ({"tower": DINO, "language_model": MIXTRAL}, 0.0),
        ({"tower": {**CLIP, "feature_layers": [-2, 1]}, "projector_type": "linear"}, 0.0),
        ({"language_model": {**GRANITE, "num_key_value_heads": 2}}, 1e-6),  # a scaled head
    ],
)
def test_a_folder_of_transformers_gives_the_same_logits(
    parts: dict[str, Any], rounding: float, tmp_path: Path
) -> None:
    model = tiny_model(**{"language_model": SMALL_LLAMA, **parts})
    released_folder(tmp_path / "llava", model)
    loaded = load(tmp_path / "llava")
    assert (logits(loaded.model) - logits(model)).abs().max() <= rounding
    assert loaded.image_spec == model.vision_tower.image_spec
    assert (loaded.image_aspect, loaded.config, loaded.manifest) == ("pad", None, {})
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava")
    ids = torch.tensor([[5, 6, *[stock.config.image_token_id] * 4, 7]])
    pixels = loaded.model.vision_tower.normalized(images(1))
    theirs = stock(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits
    ours, mask, _ = rows([5, 6, -1, 7])
    found = loaded.model.logits(ours, pixel_values=images(1), attention_mask=mask)
    assert_near(found, theirs, terms_of(loaded.model, length=found.shape[1]))


@pytest.mark.parametrize(
    "renamed",
    [
        # as transformers has them in memory, from 4.52 to 5.5 and from 5.6 on
        {
            "language_model.model.": "model.language_model.",
            "language_model.lm_head.": "lm_head.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
        {"vision_tower.vision_model.": "vision_tower."},
    ],
)
def test_every_spelling_of_the_tensor_names_is_read(
    renamed: dict[str, str], released: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    rename_tensors(folder, renamed)
    assert torch.equal(logits(load(folder).model), logits(load(released).model))


def test_a_class_token_that_the_model_sees_is_kept(tmp_path: Path) -> None:
    model = tiny_model(tower={**CLIP, "feature_select": "cls_patch"}, language_model=SMALL_LLAMA)
    released_folder(tmp_path / "llava", model)
    assert load(tmp_path / "llava").model.vision_tower.num_tokens == 5


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_an_original_folder_gives_the_same_logits(
    projector: str, pickled: bool, tmp_path: Path
) -> None:
    parts = OriginalParts(tmp_path, projector)
    loaded = load(parts.full(tmp_path / "llava", pickled=pickled), template="vicuna_v1")
    assert torch.equal(logits(loaded.model), logits(parts.model))
    assert loaded.image_aspect == "pad"


@pytest.mark.parametrize("model_type", ["llava_llama", "llava"])
def test_the_sentencepiece_file_of_an_original_folder_is_read_as_llamas(
    model_type: str, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    folder.mkdir()
    model = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    shutil.copy(str(model), folder / "tokenizer.model")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tree = {"model_type": model_type, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (folder / "config.json").write_text(json.dumps(tree))
    text = "USER: What is it?\n ASSISTANT:"
    found = load_tokenizer(LanguageModelConfig(name=str(folder)))
    assert found(text)["input_ids"] == sentencepiece_tokenizer()(text)["input_ids"]


def test_a_tuned_vision_tower_of_an_original_folder_replaces_the_one_that_it_names(
    tmp_path: Path,
) -> None:
    parts = OriginalParts(tmp_path)
    loaded = load(parts.full(tmp_path / "llava", tower=True), template="vicuna_v1")
    for parameter in parts.model.vision_tower.encoder.parameters():
        parameter.data += 0.01
    assert torch.equal(logits(loaded.model), logits(parts.model))


def test_an_original_projector_is_put_on_the_language_model_that_it_names(tmp_path: Path) -> None:
    parts = OriginalParts(tmp_path)
    folder = parts.projector_alone(tmp_path / "stage1")
    assert torch.equal(logits(load(folder, template="plain").model), logits(parts.model))
    change_json(folder / "config.json", _name_or_path=None)
    with pytest.raises(UserError, match=r"set model\.language_model\.name to its folder"):
        load(folder, template="plain")
    bases = parse_bases([f"model.language_model.name={parts.base()}"])
    given = load(folder, template="plain", bases=bases)
    assert torch.equal(logits(given.model), logits(parts.model))


def test_original_lora_adapters_are_merged_into_their_base(tmp_path: Path) -> None:
    parts = OriginalParts(tmp_path)
    before = logits(parts.model)
    folder = parts.lora(tmp_path / "lora")
    found = logits(load(folder, template="vicuna_v1").model)
    assert torch.equal(found, logits(parts.model))
    assert (found - before).abs().max() > 0.01


# --- refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"language_model.model.norm.weight": None},
            r"1 missing \(language_model\.model\.norm\.weight\); nothing was loaded",
        ),
        (
            {"vision_tower.vision_model.pre_layrnorm.bias": None},
            r"1 missing \(vision_tower\.pre_layrnorm\.bias\)",
        ),
        (
            {"multi_modal_projector.linear_2.bias": None},
            r"1 missing \(multi_modal_projector\.linear_2\.bias\)",
        ),
        ({"image_newline": torch.ones(48)}, r"1 unexpected \(image_newline\)"),
        (
            {f"language_model.model.layers.{i}.extra": torch.ones(1) for i in range(7)},
            r"7 unexpected \(language_model\.model\.layers\.0\.extra, .*layers\.4\.extra, \.\.\.\)",
        ),
        (
            {"language_model.model.norm.weight": torch.ones(47)},
            r"of another shape \(language_model\.model\.norm\.weight is 47 instead of 48\)",
        ),
        (
            {"multi_modal_projector.linear_1.weight": torch.ones(48, 31)},
            r"linear_1\.weight is 48x31 instead of 48x32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(
    changes: dict[str, Tensor | None], message: str, released: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    change_tensors(folder, changes)
    with pytest.raises(UserError, match=message) as refused:
        load(folder)
    assert refused.value.reason == "tensors_differ"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MllamaForConditionalGeneration"]}, "is a MllamaForConditionalGenerat"),
        ({"projector_hidden_act": "relu"}, "activation 'relu'"),
        ({"vision_feature_select_strategy": "last"}, "expected 'default' or 'full'"),
        ({"vision_config": {"model_type": "pixtral"}}, "vision tower 'pixtral', expected one of"),
    ],
)
def test_models_that_cannot_be_held_are_refused_by_what_they_have(
    changes: dict[str, Any], message: str, released: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    change_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load(folder)


class Payload:
    def __reduce__(self) -> Any:
        return print, ("code of a weight file was run",)


def test_a_pickle_with_code_is_refused_and_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = OriginalParts(tmp_path)
    folder = parts.projector_alone(tmp_path / "stage1")
    torch.save({**parts.projector(""), "x": Payload()}, folder / "mm_projector.bin")
    with pytest.raises(UserError, match="can run code and is never loaded") as refused:
        load(folder, template="plain")
    assert refused.value.reason == "custom_code"
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end True, which is not supported"),
        ({"model_type": "llava_mpt"}, "model_type 'llava_mpt', expected one of llava"),
    ],
)
def test_features_of_the_original_code_that_do_not_exist_here_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = OriginalParts(tmp_path).full(tmp_path / "llava")
    change_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        load(folder, template="vicuna_v1")


def test_adapters_of_another_language_model_are_refused(tmp_path: Path) -> None:
    parts = OriginalParts(tmp_path)
    folder = parts.lora(tmp_path / "lora")
    state = torch.load(folder / "adapter_model.bin", weights_only=True)
    torch.save(dict(list(state.items())[1:]), folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"1 missing \(base_model\.model\.model\.layers\.0"):
        load(folder, template="vicuna_v1")


def test_a_folder_without_weights_or_preprocessing_is_incomplete(
    released: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors or pytorch_model\.bin"):
        load(folder)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
        load(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_of_two_sets_of_weights_that_of_transformers_is_taken(
    suffix: str, released: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    other = {name: value + 1 for name, value in load_file(folder / "model.safetensors").items()}
    if suffix == "bin":
        index, shard = "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"
        torch.save(other, folder / shard)
    else:
        index, shard = "model.safetensors.index.json", "model-00001-of-00001.safetensors"
        save_file(other, folder / shard)
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(other, shard)}))
    assert torch.equal(logits(load(folder).model), logits(load(released).model))


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("multi_modal_projector.linear_1.bias", "model.multi_modal_projector.linear_1.bias"),
        ("vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
    ],
)
def test_one_tensor_under_two_names_is_refused_with_both(
    name: str, again: str, released: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    change_tensors(folder, {again: load_file(folder / "model.safetensors")[name] + 1})
    with pytest.raises(UserError, match="one tensor under two names, ") as refused:
        load(folder)
    assert {name, again} <= set(re.split(r"[,; ]+", str(refused.value)))


def test_one_tensor_in_two_shards_is_refused_with_both(released: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    name = next(iter(tensors))
    save_file(tensors, folder / "a.safetensors")
    save_file({name: tensors[name] + 1, "image_newline": torch.ones(48)}, folder / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"image_newline": "b.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=rf"b\.safetensors: contains {name}, as a\.safetensors"):
        load(folder)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {1: torch.zeros(2)}, "does not contain tensors by name"),
        (
            lambda state: {k: v.to_sparse() for k, v in state.items()},
            r"0\.weight is sparse, expected a dense tensor",
        ),
        (
            lambda state: {k: v.to("meta") for k, v in state.items()},
            r"0\.weight has no values \(device meta\)",
        ),
        (
            lambda state: {k: v.to(torch.complex64) for k, v in state.items()},
            "is complex64, expected one of float32, bfloat16, float16; ",
        ),
        (
            lambda state: {**state, **{f"base_model.{k}": v + 1 for k, v in state.items()}},
            r"two names, model\.mm_projector\.0\.weight and base_model\.model\.mm_projector\.0\.w",
        ),
    ],
)
def test_odd_tensors_of_a_pickled_projector_are_refused(
    change: Any, message: str, tmp_path: Path
) -> None:
    parts = OriginalParts(tmp_path)
    folder = parts.projector_alone(tmp_path / "stage1")
    torch.save(change(parts.projector("")), folder / "mm_projector.bin")
    with pytest.raises(UserError, match=message):
        load(folder, template="plain")


def test_weights_that_are_not_numbers_are_refused(released: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    change_tensors(folder, {"language_model.model.norm.weight": torch.full((48,), math.nan)})
    with pytest.raises(UserError, match=r"logits that are not finite .* weights are damaged"):
        load(folder)


def test_a_language_model_that_transformers_cannot_describe_is_not_blamed_on_the_tokenizer(
    released: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    change_json(folder / "config.json", text_config={"model_type": "zzz"})
    with pytest.raises(
        UserError, match=r"^model\.from_checkpoint: transformers cannot load the fol"
    ):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_tensors_are_refused(dtype: torch.dtype, released: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    value = load_file(folder / "model.safetensors")[name].to(dtype)
    change_tensors(folder, {name: value})
    with pytest.raises(UserError, match=r"up_proj\.weight is \w+8.*, expected one of float32, .*"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision_feature_layer", value, r"has vision_feature_layer .*, expected a whole number or")
        for value in ("x", [], None, [[1]], 1.5, True)
    ]
    + [
        ("vision_config", "x", "has vision_config 'x', expected an object"),
        ("vision_config", [], r"has vision_config \[\], expected an object"),
        ("vision_config", {"model_type": ["x"]}, r"vision_config\.model_type .* expected a string"),
        ("text_config", None, r"config\.json has no text_config; copy it again"),
        ("text_config", [], r"has text_config \[\], expected an object"),
        ("architectures", {"a": 1}, "has architectures {'a': 1}, expected a list of strings"),
        ("model_type", ["llava"], r"has model_type \['llava'\], expected a string"),
        ("image_token_index", "x", "has image_token_index 'x', expected a whole number"),
        ("quantization_config", {"quant_method": "gptq"}, r"is quantized .*: gptq\); take the"),
    ],
)
def test_malformed_configurations_are_refused_by_their_key(
    key: str, value: Any, message: str, released: Path, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    tree = json.loads((released / "config.json").read_text())
    shutil.copy(released / "preprocessor_config.json", tmp_path)
    path.write_text(json.dumps({**tree, key: value}))
    with pytest.raises(UserError, match=message):
        read_finished(str(tmp_path))


def test_a_configuration_of_a_larger_model_is_refused_before_memory_is_allocated(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    change_json(folder / "config.json", text_config={"model_type": "llama", "num_hidden_layers": 2})
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)
    with pytest.raises(UserError, match=r"of another shape \(language_model\..* instead of .*4096"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("mm_vision_select_layer", "x"), ("mm_projector_type", 3), ("mm_projector_type", "qformer")],
)
def test_malformed_original_configurations_are_refused_by_their_key(
    key: str, value: Any, tmp_path: Path
) -> None:
    folder = OriginalParts(tmp_path).full(tmp_path / "llava")
    change_json(folder / "config.json", **{key: value})
    with pytest.raises(UserError, match=rf"{key.removeprefix('mm_')} (would be )?'?{value}'?"):
        load(folder, template="vicuna_v1")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_resize", False),
        ("do_rescale", False),
        ("do_normalize", False),
        ("rescale_factor", 0.5),
        ("image_mean", [math.nan] * 3),
        ("image_mean", None),
        ("image_std", [0, 0, 0]),
        ("image_std", "x"),
        ("resample", 99),
    ],
)
def test_an_image_processor_that_cannot_be_reproduced_is_refused(
    key: str, value: Any, released: Path, tmp_path: Path
) -> None:
    shutil.copy(released / "config.json", tmp_path)
    tree = json.loads((released / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**tree, key: value}))
    expected = r"NaN is not" if value == [math.nan] * 3 else f"has {key} .*, expected "
    with pytest.raises(UserError, match=expected):
        read_finished(str(tmp_path))


@pytest.mark.parametrize("stretches", [True, False])
def test_a_processor_that_neither_pads_nor_only_crops_is_refused_with_what_to_do(
    stretches: bool, released: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    size = {"height": 28, "width": 28} if stretches else {"shortest_edge": 32}
    change_image_processor(folder, do_pad=False, do_center_crop=not stretches, size=size)
    with pytest.raises(UserError, match=r'neither pads .* set "do_pad": true for the image proc'):
        load(folder)
    change_image_processor(folder, do_pad=True, do_center_crop=False)
    assert load(folder).image_aspect == "pad"


def test_the_image_processor_is_read_where_transformers_reads_it(
    released: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    change_json(folder / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    stock = AutoImageProcessor.from_pretrained(folder)
    assert list(load(folder).image_spec.mean) == list(stock.image_mean)
    (folder / "processor_config.json").unlink()
    assert load(folder).image_spec.mean == (0.1, 0.2, 0.3)


def test_an_image_processor_of_another_size_is_refused(released: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(released, folder)
    change_image_processor(folder, crop_size={"height": 42, "width": 42})
    with pytest.raises(UserError, match="makes images of 42 pixels, but its vision tower takes 28"):
        load(folder)
