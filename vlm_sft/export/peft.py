"""The format `peft`: adapters and projector, which peft puts on an exported base.

The base is a folder of `--to hf --without-adapters`. The projector is one of peft's
`modules_to_save`, so that `PeftModel.from_pretrained(base, folder)` alone restores the model.
"""

from pathlib import Path
from typing import Any, Final, cast

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from vlm_sft.checkpoint.components import adapter_tensors
from vlm_sft.errors import UserError
from vlm_sft.export.consumers import peft_consumers
from vlm_sft.export.formats import ExportOptions, ExportResult
from vlm_sft.export.hf_llava import StockExport, reload_inputs, stock_export
from vlm_sft.export.obstacles import export_obstacles
from vlm_sft.export.sample import noise_sample, sample_logits
from vlm_sft.export.stock import body_of, exported, is_internvl, stock_projector
from vlm_sft.export.verify import logit_limit
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.model.lora import base_language_model, without_known_warnings
from vlm_sft.model.vlm import IMAGE_NEWLINE, VisionLanguageModel
from vlm_sft.utils.filesystem import naming
from vlm_sft.utils.progress import waiting

PROJECTOR: Final = "multi_modal_projector"
NEWLINE_FILE: Final = "image_newline.safetensors"
_BODY: Final = "model.language_model"
_WRAPPED: Final = "base_model.model."


def obstacles(checkpoint: LoadedModel) -> list[str]:
    """Return one sentence for each reason why there is no such folder; empty if none."""
    found = export_obstacles(checkpoint.model, checkpoint.chat_tokenizer.image_tokens)
    if not isinstance(checkpoint.model.language_model, peft.PeftModel):
        found.append("the checkpoint has no adapters; use --to hf")
    return found


def export(checkpoint: LoadedModel, out: Path, options: ExportOptions) -> ExportResult:
    """Write the folder, put it on the base with peft and compare logits; see `FormatModule`."""
    model, chat = checkpoint.model, checkpoint.chat_tokenizer
    base = base_language_model(model)
    dtype = options.dtype or base.get_input_embeddings().weight.dtype
    with waiting("building the base of the adapters"):
        stock = stock_export(
            model,
            base,
            checkpoint.tokenizer,
            image_aspect=checkpoint.image_aspect,
            chat_template=chat.to_jinja(image_tokens=not is_internvl(model)),
            eot_token_ids=chat.eot_token_ids,
            image_tokens=chat.image_tokens,
            dtype=dtype,
        )
    state = _state(model, base, stock.model)
    with naming(out), waiting("writing the folder"):
        _config(model, base, stock.model).save_pretrained(str(out))
        save_file(state, out / "adapter_model.safetensors", metadata={"format": "pt"})
        cast(GenerationConfig, stock.model.generation_config).save_pretrained(out)
        stock.processor.save_pretrained(out)
        if model.image_newline is not None:
            newline = model.image_newline.detach().cpu().contiguous()
            save_file({IMAGE_NEWLINE: newline}, out / NEWLINE_FILE)
    with waiting("loading the folder again, and comparing logits"):
        difference, scale = _compare(checkpoint, stock, out, set(state), options)
    limit = logit_limit(dtype, scale)
    if not difference <= limit:
        raise UserError(
            "export --to peft: with peft on the base, logits differ by "
            f"{difference:.3g}, expected at most {limit:.3g}; nothing was written"
        )
    class_name = type(stock.model).__name__
    return ExportResult(
        summary=f"adapters and projector; put by peft {peft.__version__} on {class_name} without "
        f"them, largest logit difference {difference:.2e} (largest logit {scale:.2f})",
        consumers=peft_consumers(stock.model.config),
        usage=_usage(class_name, has_newline=model.image_newline is not None),
        facts={
            "model_class": class_name,
            "max_abs_logit_difference": difference,
            "max_abs_logit": scale,
            "peft": peft.__version__,
        },
        library="peft",
    )


def _body_prefix(base: PreTrainedModel, stock: PreTrainedModel) -> str:
    """Return the path of the decoder in a causal language model, such as `model`."""
    body = body_of(base, stock)
    return next(name for name, module in base.named_modules() if module is body)


def _config(
    model: VisionLanguageModel, base: PreTrainedModel, stock: PreTrainedModel
) -> peft.LoraConfig:
    """Return the adapters' configuration with the paths that the class of transformers has."""
    own = cast(Any, model.language_model).peft_config["default"]
    prefix = _body_prefix(base, stock)
    paths = sorted(_BODY + path.removeprefix(prefix) for path in own.target_modules)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=own.r,
        lora_alpha=own.lora_alpha,
        lora_dropout=own.lora_dropout,
        use_dora=own.use_dora,
        use_rslora=own.use_rslora,
        target_modules=paths,
        modules_to_save=[PROJECTOR],
        bias="none",
        inference_mode=True,
    )


def _state(
    model: VisionLanguageModel, base: PreTrainedModel, stock: PreTrainedModel
) -> dict[str, Tensor]:
    """Return the tensors of adapters and projector under peft's names on the stock class."""
    ours = f"{_WRAPPED}{_body_prefix(base, stock)}."
    state = {
        f"{_WRAPPED}{_BODY}.{name.removeprefix(ours)}": tensor
        for name, tensor in adapter_tensors(model).items()
    }
    for name, tensor in stock_projector(model).items():
        state[f"{_WRAPPED}model.{PROJECTOR}.{name}"] = tensor
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


@torch.no_grad()
def _compare(
    checkpoint: LoadedModel,
    stock: StockExport,
    out: Path,
    names: set[str],
    options: ExportOptions,
) -> tuple[float, float]:
    """Put the folder on the base with another projector; return the difference and largest logit.

    Raises:
        UserError: peft takes other tensors than those in the folder.
    """
    sample = options.sample or noise_sample(checkpoint.model)
    expected = sample_logits(checkpoint.model, sample)
    base = _computable(stock.model)
    with without_known_warnings():
        wrapped: Any = peft.PeftModel.from_pretrained(base, str(out), trust_remote_code=False)
    taken = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if taken != names:
        raise UserError(
            f"export --to peft: peft takes other tensors than were written, the first being "
            f"{sorted(taken ^ names)[0]}; nothing was written"
        )
    inputs = reload_inputs(checkpoint.model, sample, stock.image_token_id)
    pixels = inputs["pixel_values"].to(base.dtype)
    sizes = {key: inputs[key] for key in ("image_sizes", "batch_num_images") if key in inputs}
    logits = wrapped(
        input_ids=inputs["input_ids"],
        attention_mask=torch.ones_like(inputs["input_ids"]),
        pixel_values=(pixels[None] if sizes else pixels) if len(pixels) else None,
        **sizes,
    ).logits.float()
    difference = (logits[..., : expected.shape[-1]] - expected).abs().max().item()
    return difference, expected.abs().max().item()


def _computable(stock: PreTrainedModel) -> Any:
    """Return a model of the stock class that computes, with a projector of zeros.

    `stock` holds weights only. What is compared of the projector must come from the folder.

    Raises:
        UserError: transformers does not take all weights.
    """
    state = {
        name: torch.zeros_like(tensor) if f".{PROJECTOR}." in name else tensor
        for name, tensor in stock.state_dict().items()
    }
    with exported("the base of the adapters"):
        base, info = type(stock).from_pretrained(
            None,
            config=stock.config,
            state_dict=state,
            dtype=cast(Any, stock.config).dtype,
            output_loading_info=True,
            trust_remote_code=False,
        )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise UserError(
            f"export --to peft: the base has {len(info['missing_keys'])} missing and "
            f"{len(info['unexpected_keys'])} unexpected tensors; nothing was written"
        )
    return base.eval()


def _usage(class_name: str, *, has_newline: bool) -> str:
    lines = [
        "from peft import PeftModel",
        f"from transformers import AutoProcessor, {class_name}",
        "",
        f'base = {class_name}.from_pretrained("BASE")  # written with --without-adapters',
        'model = PeftModel.from_pretrained(base, "FOLDER")',
        'processor = AutoProcessor.from_pretrained("FOLDER")',
    ]
    if has_newline:  # a parameter, which peft does not save
        lines.insert(2, "from safetensors.torch import load_file")
        lines.append(
            f'base.model.image_newline.data.copy_(load_file("FOLDER/{NEWLINE_FILE}")'
            f'["{IMAGE_NEWLINE}"])'
        )
    return "\n".join(lines) + "\n"
