"""Export to transformers: a folder that stock LLaVA classes load, checked against its origin."""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Final, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlm_sft.config.fields import ImageAspect, ImageProcessing
from vlm_sft.data.images import ImageSpec, read_pixels
from vlm_sft.data.text_encoder import exported_tokenizer
from vlm_sft.errors import UserError
from vlm_sft.export.consumers import Consumer, consumers
from vlm_sft.export.obstacles import export_obstacles
from vlm_sft.export.stock import (
    ROW_MULTIPLE,
    StockTower,
    body_of,
    can_tie,
    empty_stock_model,
    exported,
    head_scale,
    stock_config,
    stock_projector,
    stock_text_config,
    stock_tower,
    tie,
)
from vlm_sft.export.verify import Reload, Reloaded, noise_image, reload_in_new_process
from vlm_sft.export.weights import released_state, write_weights
from vlm_sft.model.lora import merged_language_model
from vlm_sft.model.vision_tower import VisionTower
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm
from vlm_sft.utils.atomic_files import write_json, write_text
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID, MAX_SHARD_SIZE
from vlm_sft.utils.filesystem import (
    created_above,
    give_ordinary_modes,
    naming,
    rename_folder,
    temporary_sibling,
)
from vlm_sft.utils.libraries import installed_version
from vlm_sft.utils.ownership import (
    MADE_BY,
    is_system_file,
    made_by,
    require_new_directory,
    set_aside,
)

_RELATIVE_LIMIT: Final = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest logit difference allowed, as a part of the largest logit; merging and casting round.

Norms of small activations amplify rounding, on some CPU kernels to 2e-4 with tiny fp32 models.
A tensor that is missing, renamed or swapped makes a difference as large as the logits themselves.
"""


@dataclass(frozen=True)
class ExportReport:
    """What the export proved.

    Attributes:
        folder: Where it lies.
        model_class: The class of transformers that loads it.
        max_abs_logit_difference: Between the model and the reloaded stock class, over one image
            and prompt, all positions and the whole vocabulary.
        max_abs_logit: Largest logit of the model there, to judge the difference by.
        missing_keys: Of the reload; always empty, else the export fails.
        unexpected_keys: Of the reload; always empty, else the export fails.
        max_pixel_difference: Between the stock image processor and the training's preparation of
            one wide image, in levels of 0..255.
        image_token_id: Id of `<image>` in the exported tokenizer.
        dtype: Of the exported weights.
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
    """Write a folder for `LlavaForConditionalGeneration` and `AutoProcessor`, and prove it.

    Adapters are merged. All weights are written in one dtype. The folder appears
    only when the reload has 0 missing and 0 unexpected keys and the same logits.

    Args:
        model: Not changed.
        tokenizer: The run's; a copy is exported (`exported_tokenizer`).
        out_dir: Must not exist or be empty.
        image_aspect: How images were made square in training.
        image_processing: How exactly they were resized there.
        chat_template: Jinja text of the run's chat template for the processor, or None.
        eot_token_ids: Ids that end an answer, for the generation settings; empty: the language
            model's own.
        sample: Pixels `[N, 3, H, W]` uint8 and ids `[1, T]` (with `IMAGE_TOKEN_ID`) to compare
            logits on; None: noise and the first ids of the vocabulary.
        dtype: Of the exported weights; None: the language model's.
        max_shard_size: Weights larger than this are written as several files.
        reload: How the folder is loaded to compare it.

    Raises:
        UserError: If the folder is not empty, stock LLaVA cannot hold the model, or the reloaded
            model differs.
    """
    place = require_new_directory(out_dir)
    _refuse_obstacles(model)
    tower = stock_tower(model.vision_tower)
    pixels, ids = sample if sample is not None else _made_up_sample(model)
    expected = _reference_logits(model, pixels, ids)

    language_model = merged_language_model(model)
    dtype = dtype or language_model.get_input_embeddings().weight.dtype
    tokenizer = exported_tokenizer(tokenizer, chat_template)
    image_token_id = int(cast(Any, tokenizer).convert_tokens_to_ids(IMAGE_PLACEHOLDER))
    llava = _stock_model(model, tower, language_model, image_token_id, dtype)
    _set_stop_token(tokenizer, eot_token_ids)
    llava.generation_config = _generation_config(language_model, tokenizer, eot_token_ids)
    processor = _processor(model.vision_tower, tower, tokenizer, image_aspect)
    processor.chat_template = chat_template

    with _atomic_folder(place) as folder:
        with naming(folder):
            _write(folder, llava, processor, tower.released_level, max_shard_size)
        inputs = _compared_inputs(model, pixels, ids, image_token_id)
        found = reload(folder, inputs)
        _refuse_other_keys(found)
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
        _refuse_difference(report, dtype)
        _write_notes(folder, report, image_aspect)
    return report


def _refuse_obstacles(model: VisionLanguageModel) -> None:
    if obstacles := export_obstacles(model):
        raise UserError("export: " + "; ".join(obstacles))


def _made_up_sample(model: VisionLanguageModel) -> tuple[Tensor, Tensor]:
    tower = model.vision_tower
    size = tower.image_spec.size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (1, 3, size, size), generator=generator, dtype=torch.uint8)
    text = torch.arange(16) % causal_lm(model.language_model).get_input_embeddings().weight.shape[0]
    ids = torch.cat([text[:4], torch.full((tower.num_tokens,), IMAGE_TOKEN_ID), text[4:]])
    return pixels, ids.unsqueeze(0)


@torch.no_grad()
def _reference_logits(model: VisionLanguageModel, pixels: Tensor, ids: Tensor) -> Tensor:
    training = model.training
    model.eval()
    device = next(model.language_model.parameters()).device
    mask = torch.ones_like(ids, dtype=torch.bool, device=device)
    logits = model.logits(ids.to(device), pixel_values=pixels, attention_mask=mask)
    model.train(training)
    return logits.float().cpu()


def _stock_model(
    model: VisionLanguageModel,
    tower: StockTower,
    language_model: PreTrainedModel,
    image_token_id: int,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Build the stock class around the model's own weights, cast to `dtype` where they differ."""
    table = language_model.get_input_embeddings().weight
    rows = table.shape[0]
    if rows <= image_token_id:
        rows = -(-(image_token_id + 1) // ROW_MULTIPLE) * ROW_MULTIPLE
    head: Any = language_model.get_output_embeddings()
    scale = head_scale(language_model)
    shared = head.weight.data_ptr() == table.data_ptr() and scale == 1.0
    config = stock_config(model, tower, stock_text_config(language_model, rows), image_token_id)
    stock = empty_stock_model(tower.model_class, config)
    if shared and can_tie(stock):
        tie(config)
        stock = empty_stock_model(tower.model_class, config)

    state = {f"model.vision_tower.{k}": v for k, v in tower.encoder.state_dict().items()}
    for key, value in stock_projector(model.multi_modal_projector).items():
        state[f"model.multi_modal_projector.{key}"] = value
    grown = _grow(table.detach(), rows)
    for key, value in body_of(language_model, stock).state_dict().items():
        is_table = value.data_ptr() == table.data_ptr()
        state[f"model.language_model.{key}"] = grown if is_table else value
    if stock.config.tie_word_embeddings:
        state["lm_head.weight"] = grown
    else:  # a copy: files hold no two tensors in the same memory
        state["lm_head.weight"] = _grow(head.weight.detach() * scale, rows)
    _fill(stock, {key: _cast(value, dtype) for key, value in state.items()}, dtype)
    return stock


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast weights to `dtype`, on the CPU; counters stay integers."""
    value = value.detach().cpu()
    return value.to(dtype) if value.is_floating_point() else value


def _grow(table: Tensor, rows: int) -> Tensor:
    """The table with new rows that are the mean of the old: never the likeliest token."""
    if rows == table.shape[0]:
        return table
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])


def _fill(stock: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    with exported("the model"):
        stock.load_state_dict(state, strict=True, assign=True)
        stock.tie_weights()
    parts: Any = stock.config
    for part in (parts, parts.text_config, parts.vision_config):
        part.dtype = dtype


def _set_stop_token(tokenizer: PreTrainedTokenizerBase, eot_token_ids: Sequence[int]) -> None:
    """Make the template's stop token the tokenizer's EOS, which programs stop at.

    Some read `tokenizer.eos_token_id` alone, not the generation settings: answers of a model
    trained with ChatML on a base tokenizer would go on to the last token allowed.
    """
    named: Any = tokenizer
    if named.pad_token is None and named.eos_token is not None:
        named.pad_token = named.eos_token
    if eot_token_ids:
        named.eos_token = named.convert_ids_to_tokens(eot_token_ids[0])


def _generation_config(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eot_token_ids: Sequence[int],
) -> GenerationConfig:
    config: Any = copy.deepcopy(language_model.generation_config) or GenerationConfig()
    if eot_token_ids:
        config.eos_token_id = list(eot_token_ids)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if not config.do_sample:  # transformers refuses to write settings that have no effect
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(config, name, None)
    return cast(GenerationConfig, config)


def _processor(
    tower: VisionTower, stock: StockTower, tokenizer: PreTrainedTokenizerBase, aspect: ImageAspect
) -> LlavaProcessor:
    spec = tower.image_spec
    image_processor = LlavaImageProcessorPil(
        do_pad=aspect == "pad",
        do_resize=True,
        size={"shortest_edge": spec.size},
        do_center_crop=True,
        crop_size={"height": spec.size, "width": spec.size},
        resample=Image.Resampling[spec.interpolation.upper()],
        do_normalize=True,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=stock.patch_size,
        vision_feature_select_strategy=stock.select_strategy,
        num_additional_image_tokens=stock.num_additional_image_tokens,
        image_token=IMAGE_PLACEHOLDER,
    )


def _write(
    folder: Path,
    stock: PreTrainedModel,
    processor: LlavaProcessor,
    vision_level: str,
    max_shard_size: str,
) -> None:
    """Write weights, configurations, tokenizer and image processor."""
    config: Any = stock.config
    config.architectures = [type(stock).__name__]
    config.save_pretrained(folder)
    _add_older_keys(folder / "config.json")
    cast(GenerationConfig, stock.generation_config).save_pretrained(folder)
    processor.save_pretrained(folder)
    # Programs older than processor_config.json look for the image processor here.
    image_processor = {**cast(Any, processor).image_processor.to_dict()}
    image_processor["processor_class"] = type(processor).__name__
    write_json(folder / "preprocessor_config.json", image_processor)
    write_weights(folder, released_state(stock, vision_level), max_shard_size)


def _add_older_keys(path: Path) -> None:
    """Add `rope_theta` and `rope_scaling`, which programs before transformers 5 read.

    Without them such a program takes its default and computes other positions.
    """
    tree = json.loads(path.read_text(encoding="utf-8"))
    text = tree["text_config"]
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope and "rope_theta" not in text:
        text["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = rope
        write_json(path, tree)


def _compared_inputs(
    model: VisionLanguageModel, pixels: Tensor, ids: Tensor, image_token_id: int
) -> dict[str, Tensor]:
    """Return the sample as the stock class takes it, and an image for the image processor."""
    return {
        "input_ids": ids.masked_fill(ids == IMAGE_TOKEN_ID, image_token_id),
        "pixel_values": model.vision_tower.normalized(pixels).cpu().contiguous(),
        "image": noise_image(model.vision_tower.image_spec.size),
    }


def _refuse_other_keys(found: Reloaded) -> None:
    missing, unexpected = found.missing_keys, found.unexpected_keys
    if missing or unexpected:
        raise UserError(
            f"export: the reload has {len(missing)} missing and {len(unexpected)} unexpected "
            f"keys, the first being {(missing or unexpected)[0]}; nothing was written"
        )


def _largest_difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the vocabulary of the model, which may have grown."""
    return (logits[..., : expected.shape[-1]] - expected).abs().max().item()


def _pixel_difference(
    prepared: Tensor,
    image: Tensor,
    spec: ImageSpec,
    aspect: ImageAspect,
    processing: ImageProcessing,
) -> float:
    """Return the largest difference of the image processor's pixels from training's, of 255."""
    file = BytesIO()
    Image.fromarray(image.numpy()).save(file, "PNG")
    ours = read_pixels(file.getvalue(), spec, aspect, processing)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return ((prepared * std + mean) * 255 - ours).abs().max().item()


def _refuse_difference(report: ExportReport, dtype: torch.dtype) -> None:
    limit = _RELATIVE_LIMIT.get(dtype, 1e-4) * max(1.0, report.max_abs_logit)
    if not report.max_abs_logit_difference <= limit:
        raise UserError(
            "export: the reloaded model's logits differ by "
            f"{report.max_abs_logit_difference:.3g}, expected at most {limit:.3g} in "
            f"{report.dtype}; nothing was written"
        )


def _write_notes(folder: Path, report: ExportReport, aspect: ImageAspect) -> None:
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
        f"Images were prepared with `{aspect}` in training; the processor here does the same, "
        f"to {report.max_pixel_difference:.0f} of 255 levels on a test image. Reloaded and "
        "compared with the trained model on one image and prompt, the largest logit difference "
        f"was {report.max_abs_logit_difference:.3g} (logits up to {report.max_abs_logit:.3g}, "
        f"{report.dtype}).\n",
    )


@contextmanager
def _named_by_target(temporary: Path, target: Path) -> Iterator[None]:
    """Name a failed write below the temporary directory by the place that the user gave."""
    try:
        yield
    except OSError as error:
        if error.filename is None or not Path(str(error.filename)).is_relative_to(temporary):
            raise
        name = target / Path(str(error.filename)).relative_to(temporary)
        raise OSError(error.errno, error.strerror, str(name)) from None


@contextmanager
def _atomic_folder(out_dir: Path) -> Iterator[Path]:
    """Create a directory next to `out_dir` that replaces it when the block ends without an error.

    What file managers left in `out_dir` is moved along.

    Raises:
        OSError: The disk is full or refuses; the error names `out_dir`, and nothing is left of the
            directory or of those created above it.
        UserError: As `_move_into_place`.
    """
    temporary = temporary_sibling(out_dir)
    with created_above(out_dir):
        temporary.mkdir()
        try:
            with _named_by_target(temporary, out_dir):
                yield temporary
                give_ordinary_modes(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _move_into_place(temporary, out_dir)


def _move_into_place(exported: Path, out_dir: Path) -> None:
    """Rename a finished export to `out_dir`, which may hold only what file managers leave.

    Raises:
        UserError: `out_dir` cannot be replaced, for example since a file was added to it meanwhile.
            It holds what it held before, and the export is kept under another name.
    """
    system_files = list(filter(is_system_file, os.listdir(out_dir))) if out_dir.exists() else []
    try:
        for name in system_files:
            os.rename(out_dir / name, exported / name)
        if out_dir.exists():
            out_dir.rmdir()
        rename_folder(exported, out_dir, last="export.json")
    except OSError as error:
        for name in system_files:
            out_dir.mkdir(exist_ok=True)
            if os.path.lexists(exported / name):
                os.rename(exported / name, out_dir / name)
        kept = set_aside(exported, out_dir)
        raise UserError(
            f"{out_dir}: cannot be replaced by the export ({error.strerror}); nothing in it was "
            f"changed, and the finished export is now {kept}",
            code="not_ours",
        ) from None
