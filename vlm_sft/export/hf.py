"""The format `hf`: a folder of a vision-language class of transformers, with adapters merged."""

from dataclasses import asdict
from pathlib import Path
from typing import Final

from vlm_sft.export.formats import ExportOptions, ExportResult
from vlm_sft.export.hf_llava import write_hf_llava
from vlm_sft.export.obstacles import export_obstacles
from vlm_sft.export.stock import is_internvl
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.model.lora import base_language_model
from vlm_sft.model.vlm import VisionLanguageModel

_USAGE: Final = """\
from PIL import Image
from transformers import pipeline

chat = pipeline("image-text-to-text", model="FOLDER")
image, text = Image.open("image.jpg"), "What is in the image?"
content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
reply = chat(text=[{"role": "user", "content": content}], return_full_text=False)
print(reply[0]["generated_text"])
"""


def obstacles(checkpoint: LoadedModel) -> list[str]:
    """Return one sentence for each part that no class of transformers holds; empty if none."""
    return export_obstacles(checkpoint.model, checkpoint.chat_tokenizer.image_tokens)


def export(checkpoint: LoadedModel, out: Path, options: ExportOptions) -> ExportResult:
    """Write the folder, load it in a new process and compare logits; see `FormatModule`."""
    chat, model = checkpoint.chat_tokenizer, checkpoint.model
    if options.without_adapters:
        model = without_adapters(model)
    report = write_hf_llava(
        model,
        checkpoint.tokenizer,
        out,
        image_aspect=checkpoint.image_aspect,
        image_processing=checkpoint.image_processing,
        chat_template=chat.to_jinja(image_tokens=not is_internvl(model)),
        eot_token_ids=chat.eot_token_ids,
        image_tokens=chat.image_tokens,
        sample=options.sample,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    return ExportResult(
        summary=f"{report.dtype}; reloaded by stock {report.model_class} in a new process with "
        f"{len(report.missing_keys)} missing and {len(report.unexpected_keys)} unexpected keys; "
        f"largest logit difference {report.max_abs_logit_difference:.2e} (largest logit "
        f"{report.max_abs_logit:.2f}); images differ by at most {report.max_pixel_difference:.1f} "
        "of 255 levels",
        consumers=report.consumers,
        usage=_USAGE,
        facts=asdict(report),
    )


def without_adapters(model: VisionLanguageModel) -> VisionLanguageModel:
    """Return a model with the same tower and projector, whose language model has no adapters."""
    return VisionLanguageModel(
        model.vision_tower,
        model.multi_modal_projector,
        base_language_model(model),
        model.layout_rule,
        model.image_newline,
    ).eval()
