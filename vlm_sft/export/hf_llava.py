"""Export a model to transformers, and verify the result by loading it with stock classes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Required, TypedDict, Unpack, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from vlm_sft.config.fields import ImageAspect, ImageProcessing
from vlm_sft.data.hf_tokenizer import exported_tokenizer
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.images import read_crops
from vlm_sft.errors import UserError
from vlm_sft.export.consumers import Consumer, hf_consumers
from vlm_sft.export.folder import (
    atomic_folder,
    build_processor,
    generation_config,
    name_internvl_tokens,
    set_stop_token,
    write_facts,
    write_model,
)
from vlm_sft.export.obstacles import export_obstacles
from vlm_sft.export.sample import Sample, noise_sample, sample_logits
from vlm_sft.export.stock import StockTower, is_internvl, stock_vision
from vlm_sft.export.stock_model import build_stock_model
from vlm_sft.export.verify import (
    Reload,
    Reloaded,
    logit_limit,
    noise_image,
    reload_in_new_process,
)
from vlm_sft.model.lora import merged_language_model
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID, MAX_SHARD_SIZE
from vlm_sft.utils.filesystem import naming
from vlm_sft.utils.ownership import require_new_directory
from vlm_sft.utils.progress import waiting


@dataclass(frozen=True)
class ExportReport:
    """Results of the verification of an export.

    Attributes:
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

    model_class: str
    max_abs_logit_difference: float
    max_abs_logit: float
    missing_keys: list[str]
    unexpected_keys: list[str]
    max_pixel_difference: float
    image_token_id: int
    dtype: str
    consumers: list[Consumer]


TOKEN_SIZES: Final = ((336, 336), (640, 480), (480, 640), (161, 184), (700, 840), (1000, 90))
"""Width and height of images whose tokens are counted by the exported processor."""


class HfOptions(TypedDict, total=False):
    """Keyword arguments of `write_hf_llava`."""

    image_aspect: Required[ImageAspect]
    image_processing: ImageProcessing
    chat_template: Required[str | None]
    eot_token_ids: Sequence[int]
    sample: Sample | tuple[Tensor, Tensor] | None
    dtype: torch.dtype | None
    max_shard_size: str
    reload: Reload


def export_hf_llava(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    image_tokens: tuple[str, str] = ("", ""),
    **options: Unpack[HfOptions],
) -> ExportReport:
    """Write and verify a folder as `write_hf_llava` does, which appears complete or not at all.

    Args:
        model: The trained model; it is not changed.
        tokenizer: Tokenizer of the run.
        out_dir: Output directory, which must be new or empty.
        image_tokens: As for `write_hf_llava`.
        **options: As for `write_hf_llava`.

    Raises:
        UserError: The directory is not empty, the stock classes cannot hold the model, or the
            reloaded model differs.
    """
    place = require_new_directory(out_dir)
    if obstacles := export_obstacles(model, image_tokens):
        raise UserError("export: " + "; ".join(obstacles))
    with atomic_folder(place) as folder:
        report = write_hf_llava(model, tokenizer, folder, image_tokens=image_tokens, **options)
        write_facts(folder, asdict(report))
    return report


def write_hf_llava(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
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

    Adapters are merged, and all weights are written in one dtype. The reload must have no missing
    and no unexpected keys and give the same logits.

    Args:
        model: A trained model without `export_obstacles`; it is not changed.
        tokenizer: Tokenizer of the run; a copy is exported (`exported_tokenizer`).
        folder: An existing empty folder.
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
        UserError: The stock classes cannot hold the model, or the reloaded model differs.
    """
    compared = noise_sample(model) if sample is None else Sample(*sample)
    with waiting("computing the logits of the checkpoint"):
        expected = sample_logits(model, compared)
    with waiting("merging adapters"):
        language_model = merged_language_model(model)
    dtype = dtype or language_model.get_input_embeddings().weight.dtype
    with waiting("building the exported model"):
        stock = stock_export(
            model,
            language_model,
            tokenizer,
            image_aspect=image_aspect,
            chat_template=chat_template,
            eot_token_ids=eot_token_ids,
            image_tokens=image_tokens,
            dtype=dtype,
        )
    with naming(folder), waiting("writing the folder"):
        write_model(
            folder, stock.model, stock.processor, stock.tower.released_level, max_shard_size
        )

    inputs = reload_inputs(model, compared, stock.image_token_id)
    with waiting("loading the folder again, and computing its logits"):
        found = reload(folder, inputs)
    _require_same_keys(found)
    _require_same_tokens(model.layout_rule, found)
    report = ExportReport(
        model_class=found.model_class,
        max_abs_logit_difference=_largest_difference(found.logits, expected),
        max_abs_logit=expected.abs().max().item(),
        missing_keys=found.missing_keys,
        unexpected_keys=found.unexpected_keys,
        max_pixel_difference=_pixel_difference(
            found.pixels, inputs["image"], model, image_aspect, image_processing
        ),
        image_token_id=stock.image_token_id,
        dtype=str(dtype).removeprefix("torch."),
        consumers=hf_consumers(stock.model.config),
    )
    _require_same_logits(report, dtype)
    return report


@dataclass(frozen=True)
class StockExport:
    """A trained model as a class of transformers, with its processor.

    Attributes:
        model: Instance of the class, with the model's weights and generation config.
        processor: Its processor, with the exported tokenizer.
        tower: The vision tower that it has.
        image_token_id: Id of `<image>`.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    tower: StockTower
    image_token_id: int


def stock_export(
    model: VisionLanguageModel,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_aspect: ImageAspect,
    chat_template: str | None,
    eot_token_ids: Sequence[int],
    image_tokens: tuple[str, str],
    dtype: torch.dtype,
) -> StockExport:
    """Build the class of transformers for a model without obstacles; see `write_hf_llava`.

    Args:
        model: The trained model; its own language model is not used.
        language_model: The language model as a plain model of transformers.
        tokenizer: Tokenizer of the run, of which a copy is made.
        image_aspect: How images were made square in training.
        chat_template: Jinja text of the chat template.
        eot_token_ids: Ids that end an answer.
        image_tokens: Special tokens around each image.
        dtype: Of all weights.
    """
    tower = stock_vision(model)
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
    return StockExport(llava, processor, tower, image_token_id)


def reload_inputs(
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
    limit = logit_limit(dtype, report.max_abs_logit)
    if not report.max_abs_logit_difference <= limit:  # also refuses NaN
        raise UserError(
            "export: the reloaded model's logits differ by "
            f"{report.max_abs_logit_difference:.3g}, expected at most {limit:.3g} in "
            f"{report.dtype}; nothing was written"
        )
