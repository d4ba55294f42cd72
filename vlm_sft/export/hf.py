"""The format `hf`: a folder of a vision-language class of transformers, with adapters merged."""

from dataclasses import asdict
from pathlib import Path

from vlm_sft.export.formats import ExportOptions, ExportResult
from vlm_sft.export.hf_llava import write_hf_llava
from vlm_sft.export.obstacles import export_obstacles
from vlm_sft.export.stock import is_internvl
from vlm_sft.inference.loaded_model import LoadedModel


def obstacles(checkpoint: LoadedModel) -> list[str]:
    """Return one sentence for each part that no class of transformers holds; empty if none."""
    return export_obstacles(checkpoint.model, checkpoint.chat_tokenizer.image_tokens)


def export(checkpoint: LoadedModel, out: Path, options: ExportOptions) -> ExportResult:
    """Write the folder, load it in a new process and compare logits; see `FormatModule`."""
    chat = checkpoint.chat_tokenizer
    report = write_hf_llava(
        checkpoint.model,
        checkpoint.tokenizer,
        out,
        image_aspect=checkpoint.image_aspect,
        image_processing=checkpoint.image_processing,
        chat_template=chat.to_jinja(image_tokens=not is_internvl(checkpoint.model)),
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
        usage=f"from transformers import AutoProcessor, {report.model_class}\n\n"
        f'model = {report.model_class}.from_pretrained("FOLDER")\n'
        'processor = AutoProcessor.from_pretrained("FOLDER")\n',
        facts=asdict(report),
    )
