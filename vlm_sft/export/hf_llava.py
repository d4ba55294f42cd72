"""Export a model to transformers, and verify the result by loading it with stock classes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm_sft.config.fields import ImageAspect, ImageProcessing
from vlm_sft.data.hf_tokenizer import exported_tokenizer
from vlm_sft.data.images import ImageSpec, read_pixels
from vlm_sft.errors import UserError
from vlm_sft.export.consumers import Consumer, consumers
from vlm_sft.export.folder import (
    atomic_folder,
    build_processor,
    generation_config,
    set_stop_token,
    write_model,
)
from vlm_sft.export.obstacles import export_obstacles
from vlm_sft.export.stock import stock_tower
from vlm_sft.export.stock_model import build_stock_model
from vlm_sft.export.verify import Reload, Reloaded, noise_image, reload_in_new_process
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.lora import merged_language_model
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.atomic_files import write_json, write_text
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID, MAX_SHARD_SIZE
from vlm_sft.utils.filesystem import naming
from vlm_sft.utils.libraries import installed_version
from vlm_sft.utils.ownership import MADE_BY, made_by, require_new_directory

_RELATIVE_LIMIT: Final = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest allowed difference of logits, relative to the largest logit, by exported dtype.

Merging adapters and casting round; norms of small activations amplify that, on some CPU kernels to
2e-4 with tiny fp32 models. A tensor that is missing, renamed or swapped makes a difference as large
as the logits themselves.
"""


@dataclass(frozen=True)
class ExportReport:
    """Results of the verification of an export.

    Attributes:
        folder: Path of the exported folder.
        model_class: Class of transformers that loads it.
        max_abs_logit_difference: Between the model and the reloaded stock class, on one image and
            prompt, over all positions and the whole vocabulary.
        max_abs_logit: Largest logit of the model there, as a scale for the difference.
        missing_keys: Tensors that the reload did not find; always empty, else the export fails.
        unexpected_keys: Tensors that the reload did not use; always empty, else the export fails.
        max_pixel_difference: Between the stock image processor and the preparation of training,
            on one wide image, in levels of 0..255.
        image_token_id: Id of `<image>` in the exported tokenizer.
        dtype: Dtype of the exported weights.
        consumers: Programs, and whether they load the folder.
    """

    folder: str
    model_class: str
    max_abs_logit_difference: float
    max_abs_logit: float
    missing_keys: list[str]
    unexpected_keys: list[str]
    max_pixel_difference: float
    image_token_id: int
    dtype: str
    consumers: list[Consumer]


def export_hf_llava(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    image_aspect: ImageAspect,
    image_processing: ImageProcessing = "fast",
    chat_template: str | None,
    eot_token_ids: Sequence[int] = (),
    sample: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    reload: Reload = reload_in_new_process,
) -> ExportReport:
    """Write a folder for `LlavaForConditionalGeneration` and `AutoProcessor`, and verify it.

    Adapters are merged, and all weights are written in one dtype. The folder appears only if its
    reload has no missing and no unexpected keys and gives the same logits.

    Args:
        model: The trained model; it is not changed.
        tokenizer: Tokenizer of the run; a copy is exported (`exported_tokenizer`).
        out_dir: Output directory, which must be new or empty.
        image_aspect: How images were made square in training.
        image_processing: How images were resized in training.
        chat_template: Jinja text of the run's chat template for the processor, or None.
        eot_token_ids: Ids that end an answer, for the generation config; empty for those of the
            language model.
        sample: Pixels `[N, 3, H, W]` uint8 and ids `[1, T]` (with `IMAGE_TOKEN_ID`) on which the
            logits are compared; None for a noise image and the first ids of the vocabulary.
        dtype: Dtype of the exported weights; None for that of the language model.
        max_shard_size: Larger weights are split into several files.
        reload: Loads the folder for the comparison.

    Raises:
        UserError: The directory is not empty, the stock classes cannot hold the model, or the
            reloaded model differs.
    """
    place = require_new_directory(out_dir)
    if obstacles := export_obstacles(model):
        raise UserError("export: " + "; ".join(obstacles))
    tower = stock_tower(model.vision_tower)
    pixels, ids = sample if sample is not None else _default_sample(model)
    expected = _reference_logits(model, pixels, ids)

    language_model = merged_language_model(model)
    dtype = dtype or language_model.get_input_embeddings().weight.dtype
    tokenizer = exported_tokenizer(tokenizer, chat_template)
    image_token_id = int(cast(Any, tokenizer).convert_tokens_to_ids(IMAGE_PLACEHOLDER))
    llava = build_stock_model(model, tower, language_model, image_token_id, dtype)
    set_stop_token(tokenizer, eot_token_ids)
    llava.generation_config = generation_config(language_model, tokenizer, eot_token_ids)
    processor = build_processor(model.vision_tower, tower, tokenizer, image_aspect, chat_template)

    with atomic_folder(place) as folder:
        with naming(folder):
            write_model(folder, llava, processor, tower.released_level, max_shard_size)
        inputs = _reload_inputs(model, pixels, ids, image_token_id)
        found = reload(folder, inputs)
        _require_same_keys(found)
        spec, image = model.vision_tower.image_spec, inputs["image"]
        report = ExportReport(
            folder=str(out_dir),
            model_class=found.model_class,
            max_abs_logit_difference=_largest_difference(found.logits, expected),
            max_abs_logit=expected.abs().max().item(),
            missing_keys=found.missing_keys,
            unexpected_keys=found.unexpected_keys,
            max_pixel_difference=_pixel_difference(
                found.pixels, image, spec, image_aspect, image_processing
            ),
            image_token_id=image_token_id,
            dtype=str(dtype).removeprefix("torch."),
            consumers=consumers(llava.config),
        )
        _require_same_logits(report, dtype)
        _write_notes(folder, report, image_aspect)
    return report


def _default_sample(model: VisionLanguageModel) -> tuple[Tensor, Tensor]:
    """Return a noise image, and ids with the image between text tokens."""
    tower = model.vision_tower
    size = tower.image_spec.size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.uint8)
    text = torch.arange(16) % causal_lm(model.language_model).get_input_embeddings().weight.shape[0]
    ids = torch.cat(
        [text[:4], torch.full((model.layout_rule.crop_tokens,), IMAGE_TOKEN_ID), text[4:]]
    )
    return pixels, ids.unsqueeze(0)


@torch.no_grad()
def _reference_logits(model: VisionLanguageModel, pixels: Tensor, ids: Tensor) -> Tensor:
    """Return the model's logits `[1, T, V]` in float32 on the CPU."""
    training = model.training
    model.eval()
    device = next(model.language_model.parameters()).device
    mask = torch.ones_like(ids, dtype=torch.bool, device=device)
    logits = model.logits(ids.to(device), pixel_values=pixels, attention_mask=mask)
    model.train(training)
    return logits.float().cpu()


def _reload_inputs(
    model: VisionLanguageModel, pixels: Tensor, ids: Tensor, image_token_id: int
) -> dict[str, Tensor]:
    """Return the sample as the stock class takes it, and an image for the image processor."""
    return {
        "input_ids": ids.masked_fill(ids == IMAGE_TOKEN_ID, image_token_id),
        "pixel_values": model.vision_tower.normalized(pixels).cpu().contiguous(),
        "image": noise_image(model.vision_tower.image_spec.size),
    }


def _require_same_keys(found: Reloaded) -> None:
    missing, unexpected = found.missing_keys, found.unexpected_keys
    if missing or unexpected:
        raise UserError(
            f"export: the reload has {len(missing)} missing and {len(unexpected)} unexpected "
            f"keys, the first being {(missing or unexpected)[0]}; nothing was written"
        )


def _largest_difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference of logits, over the vocabulary of the trained model."""
    # The exported vocabulary can have additional rows, for `<image>`.
    return (logits[..., : expected.shape[-1]] - expected).abs().max().item()


def _pixel_difference(
    prepared: Tensor,
    image: Tensor,
    spec: ImageSpec,
    aspect: ImageAspect,
    processing: ImageProcessing,
) -> float:
    """Return the largest difference between the image processor and training, of 255 levels.

    Args:
        prepared: The test image from the exported image processor, normalized, `[3, H, W]`.
        image: The test image, uint8 `[H, W, 3]`.
        spec: Size and normalization of the tower's images.
        aspect: How images were made square in training.
        processing: How images were resized in training.
    """
    file = BytesIO()
    Image.fromarray(image.numpy()).save(file, "PNG")
    ours = read_pixels(file.getvalue(), spec, aspect, processing)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return ((prepared * std + mean) * 255 - ours).abs().max().item()


def _require_same_logits(report: ExportReport, dtype: torch.dtype) -> None:
    limit = _RELATIVE_LIMIT.get(dtype, 1e-4) * max(1.0, report.max_abs_logit)
    if not report.max_abs_logit_difference <= limit:  # also refuses NaN
        raise UserError(
            "export: the reloaded model's logits differ by "
            f"{report.max_abs_logit_difference:.3g}, expected at most {limit:.3g} in "
            f"{report.dtype}; nothing was written"
        )


def _write_notes(folder: Path, report: ExportReport, aspect: ImageAspect) -> None:
    """Write `export.json` and `README.md`."""
    libraries = {name: installed_version(name) for name in ("torch", "transformers", "vlm-sft")}
    made = {MADE_BY: made_by("export"), **asdict(report), "versions": libraries}
    write_json(folder / "export.json", made)
    write_text(
        folder / "README.md",
        "# A LLaVA model, exported by vlm_sft\n\n"
        "```python\n"
        f"from transformers import AutoProcessor, {report.model_class}\n\n"
        f"model = {report.model_class}.from_pretrained(folder)\n"
        "processor = AutoProcessor.from_pretrained(folder)\n"
        "```\n\n"
        f"In training, images were made square by `{aspect}`; the processor does the same, with a "
        f"difference of at most {report.max_pixel_difference:.0f} of 255 levels on a test image. "
        "The reloaded model was compared with the trained one on one image and prompt: the largest "
        f"difference of logits was {report.max_abs_logit_difference:.3g} (logits up to "
        f"{report.max_abs_logit:.3g}, {report.dtype}).\n",
    )
