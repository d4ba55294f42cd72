"""The format `gguf`: two files for llama.cpp, the language model and the image encoder (mmproj)."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from transformers import CLIPVisionModel

from vlm_sft.errors import UserError
from vlm_sft.export.consumers import Consumer, gguf_consumers
from vlm_sft.export.formats import ExportOptions, ExportResult
from vlm_sft.export.gguf.compare import Comparison, compare_with_llama_cpp
from vlm_sft.export.gguf.files import GgufFile, write_gguf
from vlm_sft.export.gguf.language_model import language_model_file, require_architecture
from vlm_sft.export.gguf.template import llama_cpp_template
from vlm_sft.export.gguf.tokenizer import tokenizer_fields
from vlm_sft.export.gguf.vision import vision_file
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.inference.prompts import user_message
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.lora import merged_language_model
from vlm_sft.utils.progress import waiting

_NAME: Final = "vlm_sft"


def obstacles(checkpoint: LoadedModel) -> list[str]:
    """Return one sentence for each part that llama.cpp cannot express; empty if none."""
    language_model = causal_lm(checkpoint.model.language_model)
    found = []
    for check in (
        lambda: vision_file(checkpoint.model, checkpoint.image_aspect, _NAME),
        lambda: require_architecture(language_model.config.get_text_config()),
        lambda: _tokenizer(checkpoint),
    ):
        try:
            check()
        except UserError as error:
            found.append(str(error))
    return found


def export(checkpoint: LoadedModel, out: Path, options: ExportOptions) -> ExportResult:
    """Write `model-TYPE.gguf` and `mmproj-f16.gguf`, and compare them through llama.cpp.

    The matrices of the language model are f16 or q8_0; those of the much smaller tower are f16.

    Raises:
        UserError: llama.cpp is not installed or computes something else, without
            `options.unverified`.
    """
    model, mmproj = out / f"model-{options.outtype}.gguf", out / "mmproj-f16.gguf"
    with waiting(f"writing {model.name}"):
        write_gguf(model, text_file(checkpoint), options.outtype)
    with waiting(f"writing {mmproj.name}"):
        write_gguf(mmproj, vision_file(checkpoint.model, checkpoint.image_aspect, _NAME), "f16")
    comparison, fault = None, ""
    try:
        comparison = compare_with_llama_cpp(
            checkpoint, model, mmproj, options.outtype, image=options.image, prompt=options.prompt
        )
        fault = comparison.fault
    except UserError as error:
        fault = str(error)
    if fault and not options.unverified:
        raise UserError(f"export --to gguf: {fault}{_advice(checkpoint, comparison)}")
    return ExportResult(
        summary=_summary(comparison, fault),
        consumers=_consumers(comparison, fault),
        usage=f"llama-server -m FOLDER/{model.name} --mmproj FOLDER/{mmproj.name} --jinja\n",
        facts={
            "files": [model.name, mmproj.name],
            "outtype": options.outtype,
            "comparison": None if comparison is None else asdict(comparison),
            "fault": fault,
        },
        library="gguf",
    )


def _advice(checkpoint: LoadedModel, comparison: Comparison | None) -> str:
    if comparison is None:  # the fault says what to do
        return "; nothing was written"
    clip = isinstance(checkpoint.model.vision_tower.encoder, CLIPVisionModel)
    cause = " (llama.cpp computes CLIP towers wrongly)" if clip else ""
    return f"{cause}; nothing was written; --unverified keeps such files"


def text_file(checkpoint: LoadedModel) -> GgufFile:
    """Return the GGUF file of the language model with its tokenizer and chat template."""
    language_model = merged_language_model(checkpoint.model)
    return language_model_file(language_model, _tokenizer(checkpoint), _NAME)


def _tokenizer(checkpoint: LoadedModel) -> dict[str, Any]:
    chat, tokenizer = checkpoint.chat_tokenizer, checkpoint.tokenizer
    table = causal_lm(checkpoint.model.language_model).get_input_embeddings().weight
    ids = chat.prompt(user_message("a"))
    return tokenizer_fields(
        tokenizer,
        table.shape[0],
        chat_template=llama_cpp_template(chat.to_jinja(), chat.image_separator),
        stop_token_ids=chat.eot_token_ids,
        begins_with_bos=ids[0] == tokenizer.bos_token_id,
    )


def _summary(comparison: Comparison | None, fault: str) -> str:
    if comparison is None:
        return f"WARNING: not compared with llama.cpp: {fault}"
    text = (
        f"compared through {comparison.runtime} on {comparison.num_images} images of different "
        "aspect ratios: largest difference of log-probabilities, over the whole vocabulary, "
        f"{comparison.prepared:.4f} on the square images of training and {comparison.as_given:.4f} "
        "where llama.cpp makes them square itself (two images differ by "
        f"{comparison.between_images:.3f})"
    )
    return f"WARNING: {fault}; {text}" if fault else text


def _consumers(comparison: Comparison | None, fault: str) -> list[Consumer]:
    if comparison is None:
        return gguf_consumers(True, "it was not compared", tried=False)
    reason = fault or f"these files were compared through {comparison.runtime}"
    return gguf_consumers(not fault, reason, tried=True)
