"""Generation for many requests, on language models that can and cannot share a batch."""

import dataclasses
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.inference.prompts import as_conversation
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.serving.engine import Engine, Job, Piece, Sampling, can_join

for name in ("openai", "uvicorn", "fastapi"):
    pytest.importorskip(name)

from tests.serving.served import png  # noqa: E402

SIZES = {
    "vocab_size": 261, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}


def with_language_model(loaded: LoadedModel, family: str) -> LoadedModel:
    """Return the model with a random language model of another family."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    language_model = AutoModelForCausalLM.from_config(config).eval()
    old = loaded.model
    model = VisionLanguageModel(old.vision_tower, old.multi_modal_projector, language_model)
    return dataclasses.replace(loaded, model=model.eval())


def run(engine: Engine, loaded: LoadedModel, prompt: str, sampling: Sampling) -> list[str]:
    """Return the text of each choice; the prompt has one image."""
    conversation = as_conversation(prompt, [png("red")])
    events: queue.Queue[Piece | Exception] = queue.Queue()
    images = loaded.load_images(conversation)
    engine.submit(Job(loaded.prompt_ids(conversation), images, sampling, events.put))
    texts = [""] * sampling.num_choices
    unfinished = sampling.num_choices
    while unfinished:
        event = events.get(timeout=120)
        assert isinstance(event, Piece), event
        texts[event.choice] += event.text
        unfinished -= event.finish_reason is not None
    return texts


@pytest.mark.parametrize("family", FAMILIES)
def test_models_with_windows_or_states_answer_one_request_after_another(
    full_run: Path, family: str
) -> None:
    loaded = with_language_model(load_checkpoint(full_run / "final", device="cpu"), family)
    assert not can_join(loaded)
    engine = Engine(loaded, max_batch=8)
    try:
        assert engine.max_batch == 1
        for prompt in ("What is it?", "What is it, and why?"):
            expected = loaded.generate(prompt, [png("red")], max_new_tokens=30)
            found = run(engine, loaded, prompt, Sampling(max_tokens=30))
            assert found[0].strip() == expected
        sampling = Sampling(max_tokens=20, temperature=1.0, seed=3)
        two = run(engine, loaded, "hi", dataclasses.replace(sampling, num_choices=2))
        assert two[0] == run(engine, loaded, "hi", sampling)[0]
        assert two[1] == run(engine, loaded, "hi", dataclasses.replace(sampling, seed=4))[0]
    finally:
        engine.close()
