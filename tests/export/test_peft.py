"""Adapters and projector that peft alone puts on an exported base."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.export.test_llava import loaded
from tests.model.tiny import tiny_model
from vlm_sft.config.schema import LoraConfig
from vlm_sft.errors import UserError
from vlm_sft.export import peft as peft_format
from vlm_sft.export.formats import ExportOptions
from vlm_sft.export.hf import without_adapters
from vlm_sft.export.hf_llava import export_hf_llava
from vlm_sft.export.sample import noise_sample, sample_logits
from vlm_sft.export.verify import reload_here
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.utils.constants import IMAGE_TOKEN_ID


def adapted(**keys: Any) -> LoadedModel:
    model = tiny_model(**{"lora": LoraConfig(r=2), **keys})
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or "multi_modal_projector" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    return loaded(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"projector_type": "linear", "lora": LoraConfig(r=2, use_dora=True)},
    ],
    ids=["mlp", "dora-linear"],
)
def test_peft_restores_adapters_and_projector_on_the_exported_base(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    checkpoint = adapted(**keys)
    base_model = without_adapters(checkpoint.model)
    # A base with another projector: what is right afterwards came from the folder.
    base_model.multi_modal_projector = tiny_model(
        projector_type=keys.get("projector_type", "mlp2x_gelu"), seed=8
    ).multi_modal_projector
    report = export_hf_llava(
        base_model,
        checkpoint.tokenizer,
        tmp_path / "base",
        image_aspect="pad",
        chat_template=None,
        reload=reload_here,
    )
    out = tmp_path / "adapters"
    out.mkdir()
    result = peft_format.export(checkpoint, out, ExportOptions())
    assert result.facts["max_abs_logit_difference"] < 1e-5

    base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    model: Any = peft.PeftModel.from_pretrained(base, str(out)).eval()
    sample = noise_sample(checkpoint.model)
    ids = sample.ids.masked_fill(sample.ids == IMAGE_TOKEN_ID, report.image_token_id)
    pixels = checkpoint.model.vision_tower.normalized(sample.pixels)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits
    expected = sample_logits(checkpoint.model, sample)
    assert (logits[..., : expected.shape[-1]] - expected).abs().max() < 1e-5
    assert AutoProcessor.from_pretrained(out).tokenizer.eos_token == "</s>"


def test_the_folder_has_only_what_was_trained(tmp_path: Path) -> None:
    checkpoint = adapted()
    peft_format.export(checkpoint, tmp_path, ExportOptions())
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {re.sub(r"layers\.\d\.\w+\.\w+", "X", name) for name in names} == {
        "base_model.model.model.language_model.X.lora_A.weight",
        "base_model.model.model.language_model.X.lora_B.weight",
        *(
            f"base_model.model.model.multi_modal_projector.linear_{layer}.{kind}"
            for layer in (1, 2)
            for kind in ("weight", "bias")
        ),
    }


def test_a_checkpoint_without_adapters_is_refused() -> None:
    assert peft_format.obstacles(loaded(tiny_model())) == [
        "the checkpoint has no adapters; use --to hf"
    ]
    assert peft_format.obstacles(adapted()) == []


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_the_comparison_sees_tensors_that_peft_would_ignore(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = peft_format._state
    monkeypatch.setattr(
        peft_format,
        "_state",
        lambda *a: {k.replace("q_proj", "p_proj"): v for k, v in right(*a).items()},
    )
    with pytest.raises(UserError, match="peft takes other tensors"):
        peft_format.export(adapted(), tmp_path, ExportOptions())
