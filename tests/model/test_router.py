"""Mixtures of experts are trained on their own loss, and what gets no adapter is reported."""

from typing import Any

import pytest
import torch

from tests.model.tiny import CLIP, LLAMA, batch_of, images, tiny_model
from vlm_sft.config.schema import LoraConfig
from vlm_sft.data.batch import Batch, pack_examples, pad_examples
from vlm_sft.data.dataset import Example
from vlm_sft.errors import UserError
from vlm_sft.model.activation_checkpointing import set_activation_checkpointing
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.notes import model_notes
from vlm_sft.model.packed_attention import install_packed_attention
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID

SHARED: dict[str, Any] = {
    **LLAMA,
    "num_key_value_heads": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
    "num_experts_per_tok": 2,
}
QWEN3: dict[str, Any] = {
    **SHARED,
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "head_dim": 24,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": QWEN3,
    "qwen2_moe": {
        **QWEN3,
        "model_type": "qwen2_moe",
        "shared_expert_intermediate_size": 32,
    },
    "mixtral": {**SHARED, "model_type": "mixtral", "num_local_experts": 4},
    "olmoe": {**SHARED, "model_type": "olmoe", "num_experts": 4, "eos_token_id": 2},
    "granitemoe": {**SHARED, "model_type": "granitemoe", "num_local_experts": 4},
    "jetmoe": {
        **SHARED,
        "model_type": "jetmoe",
        "num_local_experts": 4,
        "kv_channels": 24,
        "aux_loss_coef": 0.1,
    },
}
DEEPSEEK: dict[str, Any] = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 24,
    "first_k_dense_replace": 1,
}


def example(name: str, length: int) -> Example:
    ids = torch.arange(length) * 7 % 250
    labels = ids.clone()
    labels[: length // 2] = IGNORE_INDEX
    return Example(name, ids, labels, torch.empty(0, 3, 28, 28, dtype=torch.uint8), None)


def run(model: VisionLanguageModel, batch: Batch) -> tuple[float, int]:
    output = model(batch)
    return float(output.loss_sum), int(output.num_targets)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_models_own_loss_with_its_router_loss(family: str) -> None:
    model = tiny_model(language_model=FAMILIES[family]).eval()
    batch = pad_examples([example("a", 9), example("b", 14)], 0)
    own = causal_lm(model.language_model)(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=batch.labels()
    )
    assert float(own.aux_loss) > 0
    loss, targets = run(model, batch)
    assert loss / targets == pytest.approx(float(own.loss), rel=1e-5)


def test_without_output_router_logits_it_is_cross_entropy_as_in_the_model_itself() -> None:
    off = {**QWEN3, "output_router_logits": False}
    model = tiny_model(language_model=off).eval()
    batch = pad_examples([example("a", 9)], 0)
    own = causal_lm(model.language_model)(input_ids=batch.input_ids, labels=batch.labels())
    loss, targets = run(model, batch)
    assert loss / targets == pytest.approx(float(own.loss), rel=1e-5)
    (note,) = model_notes(model)
    assert note == "router loss: off (output_router_logits is false in the model's configuration)"


def test_packed_rows_have_the_router_loss_of_their_real_tokens() -> None:
    model = tiny_model(language_model=QWEN3).eval()
    padded, targets = run(model, pad_examples([example("a", 9), example("b", 14)], 0))
    install_packed_attention(causal_lm(model.language_model))
    records = [example("a", 9), example("b", 14)]
    for round_to in (1, 32):
        packed, count = run(model, pack_examples(records, 0, round_to))
        assert count == targets
        assert packed == pytest.approx(padded, rel=1e-5)


def test_the_router_learns_from_it_whatever_is_recomputed() -> None:
    model = tiny_model(language_model=QWEN3)
    model.language_model.requires_grad_(True)
    gate = "model.layers.0.mlp.gate.weight"
    batch, gradients = pad_examples([example("a", 9)], 0), []
    for policy in ("none", "full", "selective"):
        set_activation_checkpointing(model, policy)
        model.zero_grad()
        model(batch).loss_sum.backward()
        gradients.append(causal_lm(model.language_model).get_parameter(gate).grad)
    assert gradients[0] is not None
    assert bool(gradients[0].any())
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def test_a_batch_with_an_image_and_one_without_targets_have_finite_losses() -> None:
    model = tiny_model(tower=CLIP, language_model=QWEN3)
    ids = torch.tensor([[5, *[IMAGE_TOKEN_ID] * 4, 7, 8]])
    labels = torch.tensor([[IGNORE_INDEX] * 5 + [7, 8]])
    output = model(batch_of(ids, torch.ones_like(ids), labels, images(1)))
    assert torch.isfinite(output.loss_sum)
    nothing = model(batch_of(ids, torch.ones_like(ids), None, images(1)))
    assert float(nothing.loss_sum) == 0


def test_the_start_of_a_run_reports_the_router_loss_and_experts_without_adapters() -> None:
    with_loss, adapters = model_notes(tiny_model(language_model=QWEN3, lora=LoraConfig()))
    assert with_loss.startswith("router loss: included with coefficient 0.1")
    assert adapters.startswith("experts: no adapter")
    assert "experts.gate_up_proj, experts.down_proj" in adapters
    none, _ = model_notes(tiny_model(language_model=DEEPSEEK, lora=LoraConfig()))
    assert none == "router loss: none; transformers defines none for DeepseekV3ForCausalLM"


def test_adapters_stay_on_the_linear_layers_that_were_asked_for() -> None:
    def adapted(family: dict[str, Any], targets: Any = "all-linear") -> set[str]:
        model = tiny_model(language_model=family, lora=LoraConfig(targets=targets))
        return {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}

    shared = adapted(FAMILIES["qwen2_moe"], ["gate_proj"])
    assert len(shared) == 2
    assert all(name.endswith("mlp.shared_expert.gate_proj") for name in shared)
    # peft would give the routed experts what is meant for deepseek's dense layers.
    names = adapted(DEEPSEEK)
    assert names
    assert not any(".experts" in name or "gate_proj" in name for name in names)
    model = tiny_model(language_model=DEEPSEEK, lora=LoraConfig())
    assert "gate_proj.weight" in model_notes(model)[1]
    with pytest.raises(UserError, match="peft applies gate_proj of DeepseekV3ForCausalLM"):
        tiny_model(language_model=DEEPSEEK, lora=LoraConfig(targets=["gate_proj"]))


def test_a_dense_model_reports_nothing() -> None:
    assert model_notes(tiny_model(lora=LoraConfig())) == []


def test_a_target_inside_fused_experts_is_not_taken_for_a_misspelling() -> None:
    with pytest.raises(UserError) as caught:
        tiny_model(language_model=QWEN3, lora=LoraConfig(targets=["gate_proj"]))
    assert "did you mean" not in str(caught.value)
    assert "weights are fused (down_proj, gate_up_proj) and get no adapter" in str(caught.value)
    with pytest.raises(UserError, match="did you mean 'q_proj'"):
        tiny_model(language_model=QWEN3, lora=LoraConfig(targets=["q_prj"]))
    with pytest.raises(UserError, match="module of another kind"):
        tiny_model(language_model=QWEN3, lora=LoraConfig(targets=["gate"]))


def test_a_model_whose_own_loss_has_another_term_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import LlamaForCausalLM

    class WithPenalty(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.loss = None if output.loss is None else output.loss + 0.5
            return output

    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_config",
        lambda config, **_: WithPenalty(config),
    )
    with pytest.raises(UserError, match="has a term that is not supported"):
        tiny_model()


def test_dropout_of_the_models_own_configuration_is_reported() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 300}
    (note,) = model_notes(tiny_model(language_model=gpt2))
    assert note.endswith("is active: attn_pdrop 0.1, embd_pdrop 0.1, resid_pdrop 0.1")
    still = {**gpt2, "attn_pdrop": 0, "embd_pdrop": 0.0, "resid_pdrop": 0}
    assert model_notes(tiny_model(language_model=still)) == []
