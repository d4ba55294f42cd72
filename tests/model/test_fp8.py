"""Which layers multiply in fp8, that they do, and where it is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.model.tiny import LLAMA, batch_of, images, rows, tiny_model
from tests.tiny_runs import run
from vlm_sft.config.schema import LoraConfig
from vlm_sft.errors import ConfigError
from vlm_sft.model import fp8
from vlm_sft.model.fp8 import fp8_layers, require_fp8, use_fp8
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.parts import set_trainable
from vlm_sft.model.vlm import VisionLanguageModel

LORA = LoraConfig(r=32, alpha=8, dropout=0.0, targets=["q_proj"])
TREE = {
    **LLAMA,
    "hidden_size": 64,
    "intermediate_size": 136,  # 16 does not divide it
    "num_attention_heads": 4,
    "num_key_value_heads": 1,  # 16 wide
    "vocab_size": 304,
    "num_hidden_layers": 1,
}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> VisionLanguageModel:
    monkeypatch.setattr(fp8, "MIN_WIDTH", 64)
    model = tiny_model(language_model=TREE, lora=LORA)
    set_trainable(model, {"projector", "adapter"})
    return model.train()


def test_wide_layers_of_the_decoder_are_chosen_and_no_head_adapter_or_narrow_one(
    model: VisionLanguageModel,
) -> None:
    assert fp8_layers(model) == [
        "model.layers.0.self_attn.q_proj.base_layer",
        "model.layers.0.self_attn.o_proj",
    ]


def test_they_multiply_in_fp8_under_the_same_names_and_with_the_same_weights(
    model: VisionLanguageModel,
) -> None:
    pytest.importorskip("torchao")
    batch, names = batch_of(*rows([5, -1, 6, 100, 101]), images(1)), list(model.state_dict())
    weights = {id(parameter) for parameter in model.parameters()}
    exact = model(batch).loss_sum
    exact.backward()
    gradients = [p.grad.clone() for p in model.multi_modal_projector.parameters()]
    model.zero_grad()
    assert use_fp8(model, emulate=True) == [
        "model.layers.0.self_attn.q_proj.base_layer",
        "model.layers.0.self_attn.o_proj",
    ]
    assert list(model.state_dict()) == names
    assert {id(parameter) for parameter in model.parameters()} == weights
    rounded = model(batch).loss_sum
    rounded.backward()
    assert rounded.item() != exact.item()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.01)
    for parameter, gradient in zip(
        model.multi_modal_projector.parameters(), gradients, strict=True
    ):
        assert (parameter.grad - gradient).norm() < 0.1 * gradient.norm()
    kinds = {type(m).__name__ for m in causal_lm(model.language_model).modules()}
    assert {"Float8Linear", "Linear"} <= kinds
    assert type(causal_lm(model.language_model).lm_head) is nn.Linear


def test_a_model_too_narrow_for_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no linear layer of at least 2048"):
        use_fp8(tiny_model())


def test_it_is_refused_by_name_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    with pytest.raises(ConfigError, match=r"compute capability 8.9 or more .*, found cpu; set"):
        require_fp8(torch.device("cpu"), "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ConfigError, match=r"found A100 \(8.0\)"):
        require_fp8(cuda, "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ConfigError, match=r"needs train\.precision: bf16, found fp32"):
        require_fp8(cuda, "fp32")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm-sft\[fp8\]'"):
        require_fp8(cuda, "bf16")


@pytest.mark.usefixtures("in_the_repository")
def test_a_run_on_a_cpu_is_refused_before_a_model_is_built(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.fp8: needs an NVIDIA GPU"):
        run("stage1", tmp_path, "train.fp8=true")
