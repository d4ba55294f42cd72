from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.model.tiny import CLIP, LLAMA, model_config, tiny_model
from vlm_sft.config.schema import LanguageModelConfig, LoraConfig
from vlm_sft.errors import UserError
from vlm_sft.model.build import build_language_model, choose_attention
from vlm_sft.model.hashing import named_state, sample_digest, tensors_digest
from vlm_sft.model.parts import parameters_by_part, set_trainable


def language_model(dtype: torch.dtype = torch.float32, seed: int = 0, **keys: Any) -> Any:
    config = LanguageModelConfig(**{"tokenizer": "bytes", **keys})
    return build_language_model(config, dtype=dtype, seed=seed)


def test_the_same_seed_builds_the_same_model_and_another_seed_another() -> None:
    lora = LoraConfig(r=2)
    first, again, other = (tiny_model(lora=lora, seed=seed) for seed in (1, 1, 2))
    assert tensors_digest(named_state(first)) == tensors_digest(named_state(again))
    parts, other_parts = parameters_by_part(first), parameters_by_part(other)
    for part in parts:
        assert tensors_digest(parts[part]) != tensors_digest(other_parts[part]), part


def test_building_leaves_the_global_random_generator_alone() -> None:
    before = torch.get_rng_state()
    tiny_model(lora=LoraConfig(r=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_built_model_is_wholly_frozen() -> None:
    assert not any(p.requires_grad for p in tiny_model(lora=LoraConfig(r=2)).parameters())


@pytest.mark.parametrize(
    "trainable", [{"projector"}, {"projector", "language_model"}, {"projector", "adapter"}]
)
def test_only_what_trains_is_thawed_and_held_in_float32(trainable: set[str]) -> None:
    lora = LoraConfig(r=2) if "adapter" in trainable else None
    model = tiny_model(lora=lora, dtype=torch.bfloat16)
    set_trainable(model, trainable)
    for part, parameters in parameters_by_part(model).items():
        assert {p.requires_grad for _, p in parameters} <= {part in trainable}
        if part in trainable:
            assert {p.dtype for _, p in parameters} == {torch.float32}
        elif part in ("vision_tower", "language_model"):
            assert {p.dtype for _, p in parameters} == {torch.bfloat16}


def test_every_parameter_is_in_exactly_one_part() -> None:
    model = tiny_model(lora=LoraConfig(r=2))
    named = [name for part in parameters_by_part(model).values() for name, _ in part]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())


def test_rotary_tables_stay_in_float32_in_a_sixteen_bit_model() -> None:
    model = language_model(torch.bfloat16, config=LLAMA)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_tied_embeddings_stay_tied_when_they_train() -> None:
    model = tiny_model(language_model={**LLAMA, "tie_word_embeddings": True}, dtype=torch.bfloat16)
    set_trainable(model, {"language_model"})
    inner = model.language_model
    assert inner.lm_head.weight is inner.model.embed_tokens.weight


def test_a_saved_language_model_loads_from_its_folder(tmp_path: Path) -> None:
    made = language_model(config=LLAMA)
    made.save_pretrained(tmp_path)
    loaded = language_model(name=str(tmp_path))
    assert tensors_digest(loaded.named_parameters()) == tensors_digest(made.named_parameters())
    assert type(loaded) is type(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    language_model(config=LLAMA).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj\.weight"):
        language_model(name=str(tmp_path))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "/no/such"}, "language_model.name: no such folder '/no/such'"),
        ({"config": {"hidden_size": 8}}, "key 'model_type' is missing"),
        ({"config": {"model_type": "lama"}}, "language_model.config: "),
        ({"config": LLAMA, "attn_implementation": "fast"}, "language_model.config: .*fast"),
    ],
)
def test_a_wrong_language_model_is_told_in_one_sentence(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        language_model(**keys)
    assert "\n" not in str(error.value)


def test_an_empty_folder_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load the folder") as error:
        language_model(name=str(tmp_path))
    assert "\n" not in str(error.value)


def test_attention_is_sdpa_unless_flash_attention_can_run() -> None:
    assert language_model(config=LLAMA).config._attn_implementation == "sdpa"
    assert choose_attention("eager", torch.float32) == "eager"
    assert choose_attention("auto", torch.float32) is None


def test_a_projector_fits_the_concatenated_layers() -> None:
    model = tiny_model(tower={**CLIP, "feature_layers": [-2, 1]}, projector_type="linear")
    assert model.multi_modal_projector.weight.shape == (48, 64)
    assert model_config().projector_type == "mlp2x_gelu"


def test_a_digest_sees_one_bit_and_a_name_but_not_the_order() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3], dtype=torch.int64)
    digest = tensors_digest([("a", a), ("b", b)])
    assert digest == tensors_digest([("b", b), ("a", a)])
    assert digest != tensors_digest([("a", torch.nextafter(a, a + 1)), ("b", b)])
    assert digest != tensors_digest([("a", a), ("c", b)])
    assert digest != tensors_digest([("a", a.reshape(2, 1)), ("b", b)])


def test_a_sampled_digest_is_the_same_in_every_dtype_and_tells_models_apart() -> None:
    whole, half = language_model(config=LLAMA), language_model(torch.bfloat16, config=LLAMA)
    other = language_model(config=LLAMA, seed=1)
    assert sample_digest(whole.named_parameters()) == sample_digest(half.named_parameters())
    assert sample_digest(whole.named_parameters()) != sample_digest(other.named_parameters())
