"""Which programs load an export, by the rules of their sources; no weights are needed."""

from typing import Any

import pytest
from transformers import LlavaConfig, LlavaNextConfig

from vlm_sft.export.consumers import (
    LMMS_EVAL,
    MISTRAL_RS,
    PROGRAMS,
    SGLANG,
    VLLM,
    Consumer,
    describe_consumers,
    hf_consumers,
    llava_consumers,
    peft_consumers,
)

CLIP = {"model_type": "clip_vision_model"}
SIGLIP = {"model_type": "siglip_vision_model"}
LLAMA = {"model_type": "llama"}


def table(**keys: Any) -> dict[str, Consumer]:
    kind = LlavaNextConfig if keys.pop("tiled", False) else LlavaConfig
    settings = {"vision_config": CLIP, "text_config": LLAMA, "vision_feature_layer": -2, **keys}
    return {consumer.name: consumer for consumer in hf_consumers(kind(**settings))}


@pytest.mark.parametrize(
    ("keys", "program", "missing"),
    [
        ({}, VLLM, None),
        ({}, SGLANG, None),
        ({}, MISTRAL_RS, None),
        ({"tiled": True}, VLLM, None),
        ({"tiled": True}, LMMS_EVAL, None),
        ({"tiled": True}, SGLANG, "llava_next"),
        ({"vision_config": SIGLIP}, VLLM, None),
        ({"vision_config": SIGLIP}, SGLANG, "CLIP towers"),
        ({"vision_config": {"model_type": "dinov2"}}, VLLM, "CLIP and SIGLIP towers"),
        ({"vision_feature_layer": [-2, -1]}, VLLM, "one feature layer"),
        ({"projector_hidden_act": "linear"}, VLLM, "no linear projector"),
        ({"text_config": {"model_type": "qwen2"}}, MISTRAL_RS, "this one is qwen2"),
        ({"vision_config": {**CLIP, "hidden_act": "gelu"}}, MISTRAL_RS, "this one has gelu"),
        ({"tie_word_embeddings": True}, MISTRAL_RS, "output head"),
    ],
)
def test_a_program_loads_what_its_source_can_hold(
    keys: dict[str, Any], program: str, missing: str | None
) -> None:
    found = table(**keys)[program]
    assert found.loads == (missing is None) and (found.evidence == "tried here") == (
        program == MISTRAL_RS and not keys
    )
    assert missing is None or missing in found.reason


def test_every_table_has_every_program_and_only_what_was_run_is_called_tried() -> None:
    original = {"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "clip"}
    tables = [
        hf_consumers(LlavaConfig(vision_config=CLIP, text_config=LLAMA)),
        *(llava_consumers(original, contents) for contents in ("full", "lora", "projector")),
        peft_consumers(LlavaConfig(vision_config=CLIP, text_config=LLAMA)),
    ]
    for found in tables:
        assert [name for name in PROGRAMS if name in {c.name for c in found}] == list(PROGRAMS)
        assert all(consumer.reason for consumer in found)
        assert {"tried here"} == {c.evidence for c in found[:1]}
        assert all(c.evidence == "by its source" for c in found if c.name in (VLLM, SGLANG))


def test_the_sentence_of_check_names_the_programs_that_would_not_load_a_folder() -> None:
    sentence = describe_consumers(list(table(projector_hidden_act="linear").values()))
    loading, _, others = sentence.partition("; would not: ")
    assert "transformers >= 5.6" in loading and "vLLM" in others and "llama.cpp" in others


def test_a_vision_tower_that_older_versions_cannot_read_is_named() -> None:
    tree = {"architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "/mine/clip"}
    good, bad = (
        llava_consumers(tree, "full", tower_is_readable=readable)[1] for readable in (True, False)
    )
    assert good.loads and good.evidence == "tried here"
    assert not bad.loads and bad.reason.startswith("clip was saved by transformers 5.6 or newer")
    mistral = {**tree, "architectures": ["LlavaMistralForCausalLM"]}
    assert llava_consumers(mistral, "full")[1].name == "LLaVA 1.2"
    assert llava_consumers(mistral, "lora")[1].name == "LLaVA-NeXT's code"
