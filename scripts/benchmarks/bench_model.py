"""The model that every peer starts from: shapes, tokenizer and one folder with the same weights.

A folder made by `make_model` holds

    language_model/  vision_tower/  tokenizer/     what vlm_sft's configuration names
    llava/                                         the same weights and the same projector as
                                                   transformers' LlavaForConditionalGeneration,
                                                   with its processor and chat template
    model_section.json, seed.json, system.json     what the peers' drivers need to know
    size.json                                      the shapes, for counting operations
"""

import dataclasses
import gc
import json
import shutil
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from bench_sizes import IMAGE, PATCH, Size
from tokenizers import AddedToken, Tokenizer, decoders
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlm_sft.config.schema import LanguageModelConfig, ModelConfig, VisionTowerConfig
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.export.hf_llava import export_hf_llava
from vlm_sft.model.build import build_model
from vlm_sft.utils.atomic_files import write_json

SEED = 42
"""Of the weights, of the rows and of the runs; the projector is drawn from it in every run."""

TEMPLATE = "vicuna_v1"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}{{ 'SYSTEM' }}{% endif %}{{ ' ' }}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ ' ' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT:' }}{% generation %}{{ ' ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{{ message['content'][0]['text'] }}{% endif %}{{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
"""`vicuna_v1` as transformers and TRL need it: answers marked, images as parts."""


def make_model(size: Size, folder: Path, *, device: str, dtype: torch.dtype) -> None:
    """Draw the weights on `device` and write the folder; nothing if it is there already."""
    if (folder / "size.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    _language_model(size, device, dtype).save_pretrained(folder / "language_model")
    _vision_tower(size, device, dtype).save_pretrained(folder / "vision_tower")
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()  # the peers' processes need the room
    _write_image_processor(folder / "vision_tower")
    _write_llava(folder, tokenizer, dtype)
    write_json(folder / "system.json", system_text(tokenizer))
    write_json(folder / "seed.json", SEED)
    write_json(folder / "model_section.json", model_section(folder))
    write_json(folder / "size.json", dataclasses.asdict(size))


def read_size(folder: Path) -> Size:
    """The shapes of a folder made by `make_model`."""
    return Size(**json.loads((folder / "size.json").read_text()))


def model_section(folder: Path) -> dict[str, Any]:
    """The `model` section of a configuration that starts from the folder's weights."""
    return {
        "vision_tower": {
            "library": "transformers",
            "name": str(folder / "vision_tower"),
            "feature_layers": [-2],
            "feature_select": "patch",
        },
        "projector_type": "mlp2x_gelu",
        "language_model": {
            "name": str(folder / "language_model"),
            "tokenizer": str(folder / "tokenizer"),
        },
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The 32,000 SentencePiece pieces of Mistral v1 (mistral-common), Llama's and Vicuna's kind.

    Without the space that SentencePiece puts before a text: some peers tokenize a conversation in
    one go and others in stretches, and only so do all get the same ids.
    """
    source = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    with tempfile.TemporaryDirectory() as name:
        Path(name, "tokenizer.model").write_bytes(source.read_bytes())
        state = json.loads(LlamaTokenizer.from_pretrained(name).backend_tokenizer.to_str())
    state["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["pre_tokenizer"] = state["post_processor"] = None
    backend = Tokenizer.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken("<image>", normalized=False, special=True)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>"},
    )
    tokenizer.chat_template = chat_template(tokenizer)
    return tokenizer


def chat_template(tokenizer: PreTrainedTokenizerFast) -> str:
    """`CHAT_TEMPLATE` with the system text that our template has."""
    return CHAT_TEMPLATE.replace("'SYSTEM'", repr(system_text(tokenizer)))


def system_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """What `vicuna_v1` begins with."""
    chat_tokenizer = ChatTokenizer.from_name(TEMPLATE, tokenizer)
    text = chat_tokenizer.template.default_system
    assert text is not None
    return text


def _language_model(size: Size, device: str, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _vision_tower(size: Size, device: str, dtype: torch.dtype) -> Any:
    config = CLIPVisionConfig(
        hidden_size=size.vision_width,
        intermediate_size=4 * size.vision_width,
        num_hidden_layers=size.vision_layers,
        num_attention_heads=size.vision_heads,
        image_size=IMAGE,
        patch_size=PATCH,
        projection_dim=size.vision_width,
    )
    torch.manual_seed(SEED + 1)
    with torch.device(device):
        return CLIPVisionModel(config).to(dtype)


def _image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}
    )


def _write_image_processor(folder: Path) -> None:
    _image_processor().save_pretrained(folder)


def _write_llava(folder: Path, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype) -> None:
    """The parts and the projector of seed `SEED` as one transformers folder, by our export."""
    section = model_section(folder)
    config = ModelConfig(
        vision_tower=VisionTowerConfig(**section["vision_tower"]),
        projector_type=section["projector_type"],
        language_model=LanguageModelConfig(**section["language_model"]),
    )
    model = build_model(config, dtype=dtype, seed=SEED)
    text_alone = (
        torch.zeros(0, 3, IMAGE, IMAGE, dtype=torch.uint8),
        torch.arange(3, 11).unsqueeze(0),
    )
    export_hf_llava(
        model,
        tokenizer,
        folder / "llava",
        image_aspect="crop",
        chat_template=tokenizer.chat_template,
        sample=text_alone,
    )
    # The processor that users get by default (torchvision's resize) instead of the export's own.
    processor = LlavaProcessor(
        image_processor=_image_processor(),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder / "llava")
