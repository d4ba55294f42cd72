"""A model that no machine holds is refused before a weight of it is allocated."""

import pytest
import torch

from vlm_sft.config.schema import LanguageModelConfig
from vlm_sft.errors import UserError
from vlm_sft.model.build import build_language_model

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 2**20, "intermediate_size": 2**20},
        {"vocab_size": 10**12},
        {"num_hidden_layers": 900, "hidden_size": 2**15, "intermediate_size": 2**16},
    ],
)
def test_a_model_larger_than_memory_is_refused_before_it_is_built(change: dict[str, int]) -> None:
    config = LanguageModelConfig(config={**TINY, **change}, tokenizer="bytes")
    with pytest.raises(UserError, match=r"its weights take .* GB, but this machine has"):
        build_language_model(config, dtype=torch.float32, seed=0)


def test_looking_at_the_size_first_changes_no_random_weight_and_no_later_number() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    state = torch.get_rng_state()
    config = LanguageModelConfig(config=TINY, tokenizer="bytes")
    built = build_language_model(config, dtype=torch.float32, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    alone = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in TINY.items() if k != "model_type"}))
    found = built.state_dict()
    assert all(torch.equal(found[name], value) for name, value in alone.state_dict().items())
