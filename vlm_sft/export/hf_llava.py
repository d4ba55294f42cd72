"""Export a model to transformers, and verify the result by loading it with stock classes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm_sft.config.fields import ImageAspect, ImageProcessing
from vlm_sft.data.hf_tokenizer import exported_tokenizer
from vlm_sft.data.image_layout import ImageLayout, LayoutRule, Size
from vlm_sft.data.images import read_crops, to_crops
from vlm_sft.errors import UserError
from vlm_sft.export.consumers import Consumer, consumers
from vlm_sft.export.folder import (
    atomic_folder,
    build_processor,
    generation_config,
    name_internvl_tokens,
    set_stop_token,
    write_model,
)
from vlm_sft.export.obstacles import export_obstacles
from vlm_sft.export.stock import is_internvl, stock_vision
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


class Sample(NamedTuple):
    """An image and ids, on which the logits of the model and of the export are compared.

    Attributes:
        pixels: Crops of the image, `[N, 3, H, W]` uint8; N = 0 for none.
        ids: `[1, T]`, with `IMAGE_TOKEN_ID` once for each token of the image.
        layout: The layout of the image, if the model divides images.
        size: Width and height of the image, likewise.
    """

    pixels: Tensor
    ids: Tensor
    layout: ImageLayout | None = None
    size: Size | None = None


TOKEN_SIZES: Final = ((336, 336), (640, 480), (480, 640), (161, 184), (700, 840), (1000, 90))
"""Width and height of images whose tokens are counted by the exported processor."""


def export_hf_llava(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    image_aspect: ImageAspect,
    image_processing: ImageProcessing = "fast",
    chat_template: str | None,
    eot_token_ids: Sequence[int] = (),
    image_tokens: tuple[str, str] = ("", ""),
    sample: Sample | tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
    reload: Reload = reload_in_new_process,
) -> ExportReport:
    """Write a folder for a LLaVA class of transformers and `AutoProcessor`, and verify it.

    The class is `LlavaForConditionalGeneration`, for images in crops `LlavaNext...`,
    `LlavaOnevision...` or `InternVL...`, for convolutional towers `FastVlm...`.

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
        image_tokens: Special tokens before and after each image in training. InternVL's processor
            writes them, and the `chat_template` for it must not.
        sample: Pixels and ids on which the logits are compared; None for a noise image and the
            first ids of the vocabulary.
        dtype: Dtype of the exported weights; None for that of the language model.
        max_shard_size: Larger weights are split into several files.
        reload: Loads the folder for the comparison.

    Raises:
        UserError: The directory is not empty, the stock classes cannot hold the model, or the
            reloaded model differs.
    """
    place = require_new_directory(out_dir)
    if obstacles := export_obstacles(model, image_tokens):
        raise UserError("export: " + "; ".join(obstacles))
    tower = stock_vision(model)
    compared = _default_sample(model) if sample is None else Sample(*sample)
    expected = _reference_logits(model, compared)

    language_model = merged_language_model(model)
    dtype = dtype or language_model.get_input_embeddings().weight.dtype
    tokenizer = exported_tokenizer(tokenizer, chat_template)
    image_token_id = int(cast(Any, tokenizer).convert_tokens_to_ids(IMAGE_PLACEHOLDER))
    num_tokens = 0
    if is_internvl(model):
        name_internvl_tokens(tokenizer, image_tokens)
        num_tokens = len(tokenizer)
    llava = build_stock_model(
        model, tower, language_model, image_token_id, dtype, num_tokens=num_tokens
    )
    set_stop_token(tokenizer, eot_token_ids)
    llava.generation_config = generation_config(language_model, tokenizer, eot_token_ids)
    processor = build_processor(model, tower, tokenizer, image_aspect, chat_template)

    with atomic_folder(place) as folder:
        with naming(folder):
            write_model(folder, llava, processor, tower.released_level, max_shard_size)
        inputs = _reload_inputs(model, compared, image_token_id)
        found = reload(folder, inputs)
        _require_same_keys(found)
        _require_same_tokens(model.layout_rule, found)
        report = ExportReport(
            folder=str(out_dir),
            model_class=found.model_class,
            max_abs_logit_difference=_largest_difference(found.logits, expected),
            max_abs_logit=expected.abs().max().item(),
            missing_keys=found.missing_keys,
            unexpected_keys=found.unexpected_keys,
            max_pixel_difference=_pixel_difference(
                found.pixels, inputs["image"], model, image_aspect, image_processing
            ),
            image_token_id=image_token_id,
            dtype=str(dtype).removeprefix("torch."),
            consumers=consumers(llava.config),
        )
        _require_same_logits(report, dtype)
        _write_notes(folder, report, image_aspect, model.layout_rule)
    return report


def _default_sample(model: VisionLanguageModel) -> Sample:
    """Return a noise image, and ids with the image between text tokens."""
    spec, rule = model.vision_tower.image_spec, model.layout_rule
    text = torch.arange(16) % causal_lm(model.language_model).get_input_embeddings().weight.shape[0]
    if rule.needs_sizes:
        noise = Image.fromarray(noise_image(spec.size).numpy())
        crops = to_crops(noise, rule, spec, "pad")
        image = torch.full((crops.layout.num_tokens,), IMAGE_TOKEN_ID)
        ids = torch.cat([text[:4], image, text[4:]])
        return Sample(crops.pixels, ids.unsqueeze(0), crops.layout, noise.size)
    size = spec.size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.uint8)
    image = torch.full((rule.crop_tokens,), IMAGE_TOKEN_ID)
    return Sample(pixels, torch.cat([text[:4], image, text[4:]]).unsqueeze(0))


@torch.no_grad()
def _reference_logits(model: VisionLanguageModel, sample: Sample) -> Tensor:
    """Return the model's logits `[1, T, V]` in float32 on the CPU."""
    training = model.training
    model.eval()
    device = next(model.language_model.parameters()).device
    mask = torch.ones_like(sample.ids, dtype=torch.bool, device=device)
    logits = model.logits(
        sample.ids.to(device),
        pixel_values=sample.pixels,
        layouts=None if sample.layout is None else [sample.layout],
        attention_mask=mask,
    )
    model.train(training)
    return logits.float().cpu()


def _reload_inputs(
    model: VisionLanguageModel, sample: Sample, image_token_id: int
) -> dict[str, Tensor]:
    """Return the sample as the stock class takes it, and an image for the image processor."""
    inputs = {
        "input_ids": sample.ids.masked_fill(sample.ids == IMAGE_TOKEN_ID, image_token_id),
        "pixel_values": model.vision_tower.normalized(sample.pixels).cpu().contiguous(),
        "image": noise_image(model.vision_tower.image_spec.size),
    }
    if sample.size is not None:
        width, height = sample.size
        inputs["token_sizes"] = torch.tensor(TOKEN_SIZES)
        if is_internvl(model):
            return inputs
        inputs["image_sizes"] = torch.tensor([[height, width]])
        if model.layout_rule.max_crops is not None:
            inputs["batch_num_images"] = torch.tensor([1])
    return inputs


def _require_same_tokens(rule: LayoutRule, found: Reloaded) -> None:
    """Check that the exported processor gives images of several sizes the tokens of training.

    Raises:
        UserError: It does not; nothing was written.
    """
    if not rule.needs_sizes:
        return
    expected = [rule.layout(*size).num_tokens for size in TOKEN_SIZES]
    if found.token_counts != expected:
        raise UserError(
            f"export: transformers' processor counts {found.token_counts} tokens for images of "
            f"{TOKEN_SIZES} pixels, training {expected}; nothing was written"
        )


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
    model: VisionLanguageModel,
    aspect: ImageAspect,
    processing: ImageProcessing,
) -> float:
    """Return the largest difference between the image processor and training, of 255 levels.

    Args:
        prepared: The test image from the exported image processor, normalized, `[3, H, W]`, or
            its crops `[N, 3, H, W]`.
        image: The test image, uint8 `[H, W, 3]`.
        model: Gives size and normalization of images, and their crops.
        aspect: How images were made square in training.
        processing: How images were resized in training.
    """
    file = BytesIO()
    Image.fromarray(image.numpy()).save(file, "PNG")
    spec = model.vision_tower.image_spec
    ours = read_crops(file.getvalue(), model.layout_rule, spec, aspect, processing).pixels
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


def _write_notes(folder: Path, report: ExportReport, aspect: ImageAspect, rule: LayoutRule) -> None:
    """Write `export.json` and `README.md`."""
    shape = f"images were made square by `{aspect}`"
    if rule.needs_sizes:
        shape = f"images were divided into crops by `{rule.tiling}`"
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
        f"In training, {shape}; the processor does the same, with a "
        f"difference of at most {report.max_pixel_difference:.0f} of 255 levels on a test image. "
        "The reloaded model was compared with the trained one on one image and prompt: the largest "
        f"difference of logits was {report.max_abs_logit_difference:.3g} (logits up to "
        f"{report.max_abs_logit:.3g}, {report.dtype}).\n",
    )
