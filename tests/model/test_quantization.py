"""A base in 4 bits: what is packed, that it stays as it is, and that adapters learn beside it."""

import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.model.tiny import LLAMA, batch_of, images, rows, sums_of, tiny_model
from tests.rounding import BACKWARD, assert_near
from vlm_sft.config.schema import LanguageModelConfig, LoraConfig
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.model.activation_checkpointing import set_activation_checkpointing
from vlm_sft.model.build import build_language_model
from vlm_sft.model.hashing import tensors_digest
from vlm_sft.model.lora import merged_language_model
from vlm_sft.model.parts import parameters_by_part, set_trainable
from vlm_sft.model.quantization import (
    dtype_name,
    is_quantized,
    linear_layers,
    num_bytes,
    num_weights,
    require_quantization,
    unquantized_digest,
)
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils import libraries

BATCH = rows([5, -1, 6, 100, 101], [7, 102])
LORA = LoraConfig(r=2, dropout=0.0)
BIASED = {**LLAMA, "attention_bias": True}


def quantized(lora: LoraConfig | None = LORA, **keys: Any) -> VisionLanguageModel:
    return tiny_model(lora=lora, **{"quantization": "nf4", "language_model": BIASED, **keys})


def trained(model: VisionLanguageModel) -> VisionLanguageModel:
    """With adapters that do something."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parameters_by_part(model)["adapter"]:
        if ".lora_B." in name:
            parameter.data.normal_(std=0.2, generator=generator)
        elif "magnitude" in name:
            parameter.data.mul_(1.1)
    return model


def language_model(dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    config = LanguageModelConfig(**{"tokenizer": "bytes", "quantization": "nf4", **keys})
    return build_language_model(config, dtype=dtype, seed=3)


@torch.no_grad()
def logits(model: VisionLanguageModel) -> torch.Tensor:
    return model.eval().logits(BATCH[0], pixel_values=images(1), attention_mask=BATCH[1]).float()


@pytest.mark.parametrize("tied", [True, False])
def test_linear_layers_are_packed_and_embeddings_norms_biases_and_head_are_not(tied: bool) -> None:
    model = language_model(torch.bfloat16, config={**BIASED, "tie_word_embeddings": tied})
    packed = {name for name, p in model.named_parameters() if is_quantized(p)}
    assert packed == {f"{name}.weight" for name in linear_layers(model)}
    assert len(packed) == 2 * 7
    others = {p.dtype for name, p in model.named_parameters() if name not in packed}
    assert others == {torch.bfloat16}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_packed_layer_counts_its_weights_and_takes_a_quarter_of_bf16s_bytes() -> None:
    wide = {**LLAMA, "hidden_size": 512, "num_hidden_layers": 1}
    (layer, *_) = linear_layers(language_model(torch.bfloat16, config=wide)).values()
    assert (num_weights(layer.weight), dtype_name(layer.weight)) == (512 * 512, "nf4")
    # 4 bits a weight, 8 a block of 64, 32 for each 256 of those, and two tables.
    assert num_bytes(layer.weight) < 1.03 * 512 * 512 * (4 + 8 / 64 + 32 / 64 / 256) / 8 + 1500
    single = language_model(torch.bfloat16, config=wide, double_quantization=False)
    assert num_bytes(layer.weight) < num_bytes(next(iter(linear_layers(single).values())).weight)


def test_the_packed_weights_and_the_bases_identity_are_those_of_the_stored_weights(
    tmp_path: Path,
) -> None:
    language_model(quantization=None, config=BIASED).save_pretrained(tmp_path)
    made = language_model(config=BIASED)
    for dtype in (torch.float32, torch.bfloat16):
        model = language_model(dtype, name=str(tmp_path))
        assert unquantized_digest(model) == unquantized_digest(made) is not None
        for name, parameter in made.named_parameters():
            if is_quantized(parameter):
                other = model.get_parameter(name)
                assert torch.equal(other, parameter)
                assert other.quant_state.dtype == dtype
                assert torch.equal(other.quant_state.absmax, parameter.quant_state.absmax)


def use_the_plain_kernel(model: torch.nn.Module) -> None:
    """Keep a stock model's 4-bit layers as they were stored, as ours are.

    On a CPU with AVX-512 BF16, bitsandbytes repacks them at the first forward pass for a kernel of
    its own that rounds the scales to bfloat16 and takes multiples of 32 outputs only.
    """
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


@pytest.mark.parametrize("has_avx512bf16", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_stock_transformers_and_peft_give_the_same_logits_from_base_folder_and_adapter(
    kind: str, has_avx512bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: has_avx512bf16)
    tiny_model(language_model=BIASED).language_model.save_pretrained(tmp_path / "base")
    adapted: Any = trained(quantized(quantization=kind)).language_model
    adapted.save_pretrained(tmp_path / "adapter")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=True
    )
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=config, device_map={"": "cpu"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        stock = PeftModel.from_pretrained(base, tmp_path / "adapter")
    use_the_plain_kernel(stock)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(adapted.eval()(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_adapters_and_projector_and_nothing_else(checkpointing: bool) -> None:
    model = quantized()
    set_trainable(model, {"projector", "adapter"})
    if checkpointing:
        set_activation_checkpointing(model, "full")
    trained(model).train()(batch_of(*BATCH, images(1))).loss_sum.backward()
    for part, named in parameters_by_part(model).items():
        learns = part in ("projector", "adapter")
        assert [p.grad is not None and bool(p.grad.any()) for _, p in named] == [learns] * len(
            named
        )


def test_gradient_checkpointing_changes_no_gradient() -> None:
    found = []
    for checkpointing in (False, True):
        model = trained(quantized())
        set_trainable(model, {"projector", "adapter"})
        if checkpointing:
            set_activation_checkpointing(model, "full")
        model.train()(batch_of(*BATCH, images(1))).loss_sum.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_gradient_is_that_beside_the_weights_that_the_packed_ones_stand_for() -> None:
    model = trained(quantized())
    plain = trained(tiny_model(lora=LORA, language_model=BIASED))
    merged = merged_language_model(quantized(lora=None))
    for name, layer in linear_layers(merged).items():
        plain.language_model.get_submodule(
            f"base_model.model.{name}"
        ).base_layer.weight.data = layer.weight.data
    gradients = []
    for held in (model, plain):
        set_trainable(held, {"projector", "adapter"})
        held.train()(batch_of(*BATCH, images(1))).loss_sum.backward()
        gradients.append({n: p.grad for n, p in held.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_near(gradient, gradients[1][name], BACKWARD * sums_of(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_use_in_training_and_without_gradient_leaves_every_bit_of_the_base(
    dtype: torch.dtype,
) -> None:
    model = trained(quantized(dtype=dtype))
    set_trainable(model, {"projector", "adapter"})
    before = tensors_digest(parameters_by_part(model)["language_model"])
    model.train()(batch_of(*BATCH, images(1))).loss_sum.backward()
    logits(model)
    assert tensors_digest(parameters_by_part(model)["language_model"]) == before


@pytest.mark.parametrize("double", [True, False])
def test_the_digest_sees_a_moved_scale(double: bool) -> None:
    model = quantized(double_quantization=double)
    before = tensors_digest(parameters_by_part(model)["language_model"])
    layer: Any = next(p for p in model.parameters() if is_quantized(p))
    layer.quant_state.absmax[0] += 1
    assert tensors_digest(parameters_by_part(model)["language_model"]) != before


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("nf4", {}),
        ("nf4", {"use_dora": True}),
        ("nf4", {"use_rslora": True}),
        ("fp4", {}),
        (None, {"use_dora": True}),
        (None, {"use_rslora": True}),
    ],
)
def test_merged_weights_give_the_logits_of_the_adapters_on_dequantized_weights(
    kind: str | None, variant: dict[str, bool]
) -> None:
    lora = LORA.model_copy(update=variant)
    model = trained(quantized(lora, quantization=kind))
    before = tensors_digest(parameters_by_part(model)["language_model"])
    merged = merged_language_model(model)
    assert tensors_digest(parameters_by_part(model)["language_model"]) == before
    assert not any(is_quantized(p) or "lora" in name for name, p in merged.named_parameters())
    whole = VisionLanguageModel(model.vision_tower, model.multi_modal_projector, merged)
    expected = logits(model)
    assert_near(logits(whole), expected, sums_of(whole))
    base = logits(quantized(None, quantization=kind))
    original = logits(trained(quantized(lora, quantization=None)))
    assert (expected - base).abs().max() > 0.1
    if kind is not None:
        assert (expected - original).abs().max() > 0.005


def test_a_quantized_base_without_adapters_merges_to_its_dequantized_weights() -> None:
    model = quantized(None)
    merged = merged_language_model(model)
    assert merged is not model.language_model and not any(map(is_quantized, merged.parameters()))
    whole = VisionLanguageModel(model.vision_tower, model.multi_modal_projector, merged)
    assert_near(logits(whole), logits(model), sums_of(whole))


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    # alpha / sqrt(r) with r = 4 is alpha / r with twice the alpha.
    root = trained(quantized(LoraConfig(r=4, alpha=8, dropout=0, use_rslora=True)))
    plain = trained(quantized(LoraConfig(r=4, alpha=16, dropout=0)))
    assert torch.equal(logits(root), logits(plain))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["nf4", None])
def test_fresh_dora_adapters_change_nothing_and_are_held_in_float32(
    dtype: torch.dtype, kind: str | None
) -> None:
    model = quantized(LORA.model_copy(update={"use_dora": True}), quantization=kind, dtype=dtype)
    adapters = parameters_by_part(model)["adapter"]
    assert {p.dtype for _, p in adapters} == {torch.float32}
    assert sum("magnitude" in name for name, _ in adapters) == 2 * 7
    assert torch.equal(logits(model), logits(quantized(None, quantization=kind, dtype=dtype)))


def test_packed_layers_get_pefts_own_kind_of_adapter() -> None:
    found = [m for m in quantized().modules() if isinstance(m, Linear4bit)]
    assert len(found) == 2 * 7


def test_a_quantized_model_refuses_full_fine_tuning() -> None:
    config = LanguageModelConfig(config=LLAMA, tokenizer="bytes", quantization="nf4")
    with pytest.raises(ConfigError, match=r"quantization: nf4 weights .* add a `lora` section"):
        require_quantization(config.quantization, {"projector", "language_model"})
    require_quantization(config.quantization, {"projector", "adapter"})
    require_quantization(config.quantization, {"projector"})


def test_without_bitsandbytes_the_error_has_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(libraries, "is_installed", lambda name: name != "bitsandbytes")
    with pytest.raises(UserError, match=r"pip install 'vlm-sft\[qlora\]'"):
        quantized()
    assert isinstance(quantized(quantization=None), VisionLanguageModel)


def test_a_model_without_linear_layers_and_a_folder_packed_before_are_refused(
    tmp_path: Path,
) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50}
    with pytest.raises(ConfigError, match=r"GPT2LMHeadModel has no nn\.Linear layer to quantize"):
        language_model(config=gpt2)
    model = language_model(config=LLAMA)
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="are quantized by bitsandbytes; take the ones that they"):
        language_model(name=str(tmp_path), quantization=None)
