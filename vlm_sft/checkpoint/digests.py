"""Digests of what a run trains from, by which a resumed run recognizes the same model and text.

They do not depend on names and paths: a moved folder is the same model, and another model under the
same name is not.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vlm_sft.config.schema import RunConfig
from vlm_sft.model.hashing import named_state, sample_digest, tensors_digest
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.parts import parameters_by_part
from vlm_sft.model.quantization import unquantized_digest
from vlm_sft.model.vlm import VisionLanguageModel


def base_identity(config: RunConfig, model: VisionLanguageModel) -> dict[str, Any]:
    """Return what identifies the vision tower, its features, and the language model of a run.

    Call it before a checkpoint is loaded into the model: the language model is identified by its
    weights, which stage 2 changes.

    Returns:
        `vision_tower` and `language_model` are digests of sampled weights; `features` holds the
        settings that choose the features.
    """
    tower = config.model.vision_tower
    return {
        "vision_tower": sample_digest(named_state(model.vision_tower.encoder)),
        "features": {
            "feature_layers": list(tower.feature_layers),
            "feature_select": tower.feature_select,
            "grid_pool": tower.grid_pool,
            "image_size": model.vision_tower.image_spec.size,
        },
        "language_model": _language_model_digest(model),
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 of what determines token ids: vocabulary, added tokens and rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for per_call in ("padding", "truncation"):  # set by every call; not part of the tokenizer
        rules.pop(per_call, None)
    added = sorted((index, str(token)) for index, token in tokenizer.added_tokens_decoder.items())
    vocabulary = "" if rules else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(json.dumps([rules, vocabulary, added]).encode()).hexdigest()


def template_digest(described: Mapping[str, Any]) -> str:
    """Return a sha256 of the chat template, the system text and the LLaVA quirks.

    The image separator is not part of it: runs of versions without that setting can be resumed.
    What it does to a record is in the digest of the data. The template's description is not part of
    it either.

    Args:
        described: As `ChatTokenizer.describe` returns it and `template.json` holds it.
    """
    counted = {key: value for key, value in described.items() if key != "image_separator"}
    template = counted.get("template", {})
    if "file" in template:
        file = {key: value for key, value in template["file"].items() if key != "description"}
        counted["template"] = {**template, "file": file}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def frozen_digests(model: VisionLanguageModel) -> dict[str, str]:
    """Return a sha256 over every byte of each frozen part, by part; it must never change."""
    digests = {"vision_tower": model.vision_tower.digest()}
    for part, named in parameters_by_part(model).items():
        if part != "vision_tower" and named and not any(p.requires_grad for _, p in named):
            digests[part] = tensors_digest(named)
    return digests


def _language_model_digest(model: VisionLanguageModel) -> str:
    """Return the digest of the unquantized weights, so that QLoRA and LoRA of one base agree."""
    found = unquantized_digest(causal_lm(model.language_model))
    return sample_digest(_base_parameters(model)) if found is None else found


def _base_parameters(model: VisionLanguageModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the language model's own parameters under the names they have without adapters."""
    live: PreTrainedModel = causal_lm(model.language_model)
    for name, parameter in live.named_parameters():
        if ".lora_" not in name:
            # peft moves each adapted weight from `X.weight` to `X.base_layer.weight`.
            yield name.replace(".base_layer.", "."), parameter
