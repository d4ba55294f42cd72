"""Export to transformers: a folder that stock LLaVA classes load, checked against its origin."""

import copy
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any, Final, cast

import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    CLIPVisionModel,
    Dinov2Model,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from vlm_sft.atomic import write_json, write_text
from vlm_sft.constants import IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID
from vlm_sft.data.images import Aspect, ImageSpec, Processing, read_pixels
from vlm_sft.errors import UserError
from vlm_sft.filesystem import give_ordinary_modes, naming, rename_folder, temporary_sibling
from vlm_sft.model.lora import merged_language_model
from vlm_sft.model.projector import LinearProjector, MlpProjector
from vlm_sft.model.vision import VisionTower
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm, decoder_of

_PATCHES_ONLY: Final = "default"
_ALL_TOKENS: Final = "full"
_RELATIVE_LIMIT: Final = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest logit difference allowed, as a part of the largest logit; merging and casting round."""


@dataclass(frozen=True)
class ExportReport:
    """What the export proved.

    Attributes:
        folder: Where it lies.
        max_abs_logit_difference: Between the model and the reloaded stock class, over one picture
            and prompt, all positions and the whole vocabulary.
        max_abs_logit: Largest logit of the model there, to judge the difference by.
        missing_keys: Of the reload; always empty, else the export fails.
        unexpected_keys: Of the reload; always empty, else the export fails.
        max_pixel_difference: Between the stock image processor and the training's preparation of
            one wide picture, in levels of 0..255.
        image_token_id: Id of `<image>` in the exported tokenizer.
        dtype: Of the exported weights.
    """

    folder: str
    max_abs_logit_difference: float
    max_abs_logit: float
    missing_keys: list[str]
    unexpected_keys: list[str]
    max_pixel_difference: float
    image_token_id: int
    dtype: str


def export_hf_llava(
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    out_dir: str | Path,
    *,
    image_aspect: Aspect,
    image_processing: Processing = "fast",
    renderer_chat_template: str | None,
    stop_token_ids: Sequence[int] = (),
    sample: tuple[Tensor, Tensor] | None = None,
) -> ExportReport:
    """Write a folder for `LlavaForConditionalGeneration` and `AutoProcessor`, and prove it.

    Adapters are merged. All weights are written in the language model's dtype. The folder appears
    only when the reload has 0 missing and 0 unexpected keys and the same logits.

    Args:
        model: Not changed.
        tokenizer: The run's; `<image>` is added to a copy if it lacks it.
        out_dir: Must not exist or be empty.
        image_aspect: How pictures were made square in training.
        image_processing: How exactly they were resized there.
        renderer_chat_template: Jinja text of the run's chat template for the processor, or None.
        stop_token_ids: Ids that end an answer, for the generation settings; empty: the language
            model's own.
        sample: Pixels `[N, 3, H, W]` uint8 and ids `[1, T]` (with `IMAGE_TOKEN_ID`) to compare
            logits on; None: noise and the first ids of the vocabulary.

    Raises:
        UserError: If the folder is not empty, stock LLaVA cannot hold the model, or the reloaded
            model differs.
    """
    out_dir = Path(out_dir)
    _refuse_nonempty(out_dir)
    tower, layout = _stock_tower(model.vision_tower)
    _refuse_scaled_head(causal_lm(model.language_model).config.get_text_config())
    pixels, ids = sample if sample is not None else _made_up_sample(model)
    expected = _reference_logits(model, pixels, ids)

    language_model = merged_language_model(model)
    dtype = language_model.get_input_embeddings().weight.dtype
    tokenizer, image_token_id = _with_image_token(tokenizer)
    state, vocabulary = _state_dict(model, tower, language_model, image_token_id)
    config = _llava_config(model, tower, layout, language_model, image_token_id, vocabulary)
    llava = _assemble(config, {key: value.to(dtype) for key, value in state.items()})
    llava.generation_config = _generation_config(language_model, tokenizer, stop_token_ids)
    processor = _processor(model.vision_tower, layout, tokenizer, image_aspect)
    processor.chat_template = renderer_chat_template

    with _atomic_folder(out_dir) as folder:
        with naming(folder):
            llava.save_pretrained(folder)
            processor.save_pretrained(folder)
        normalised = model.vision_tower.normalised(pixels).cpu()
        found, missing, unexpected = _reload(folder, normalised, ids, image_token_id)
        difference = (found[..., : expected.shape[-1]] - expected).abs().max().item()
        report = ExportReport(
            folder=str(out_dir),
            max_abs_logit_difference=difference,
            max_abs_logit=expected.abs().max().item(),
            missing_keys=missing,
            unexpected_keys=unexpected,
            max_pixel_difference=_pixel_difference(
                folder, model.vision_tower.image_spec, image_aspect, image_processing
            ),
            image_token_id=image_token_id,
            dtype=str(dtype).removeprefix("torch."),
        )
        _refuse_difference(report, dtype)
        _write_notes(folder, report, image_aspect)
    print(
        f"exported to {out_dir}: 0 missing and 0 unexpected keys, largest logit difference "
        f"{report.max_abs_logit_difference:.3g} (logits up to {report.max_abs_logit:.3g}), "
        f"largest pixel difference {report.max_pixel_difference:.0f} of 255"
    )
    return report


@dataclass(frozen=True)
class _Layout:
    """How stock LLaVA picks and counts the tower's tokens."""

    select_strategy: str
    num_additional_image_tokens: int
    patch_size: int


def _stock_tower(tower: VisionTower) -> tuple[PreTrainedModel, _Layout]:
    if tower.config.grid_pool is not None:
        raise UserError(
            "export: stock LLaVA cannot average the feature grid (model.vision_tower.grid_pool is "
            f"{tower.config.grid_pool}); train without grid_pool to export"
        )
    encoder: Any = tower.encoder
    if tower.config.library == "open_clip":
        from vlm_sft.model.clip_weights import clip_from_open_clip

        try:
            encoder = clip_from_open_clip(encoder)
        except UserError as error:
            raise UserError(f"export: transformers cannot hold this tower: {error}") from None
    if not isinstance(encoder, (CLIPVisionModel, SiglipVisionModel, Dinov2Model)):
        raise UserError(
            f"export: transformers cannot hold this {tower.config.library} tower "
            f"({type(encoder).__name__}) in LLaVA's classes; they take CLIP, SigLIP and DINOv2"
        )
    num_class_tokens = 0 if isinstance(encoder, SiglipVisionModel) else 1
    drop = num_class_tokens == 1 and tower.config.feature_select == "patch"
    strategy = _PATCHES_ONLY if drop else _ALL_TOKENS
    return encoder, _Layout(strategy, num_class_tokens, encoder.config.patch_size)


def _refuse_scaled_head(config: PretrainedConfig) -> None:
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1.0):
            raise UserError(
                f"export: stock LLaVA has a plain output head and this {config.model_type} model "
                f"has {name} = {getattr(config, name)}; its answers would differ"
            )


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
    logits = model(
        ids.to(device), torch.ones_like(ids, dtype=torch.bool, device=device), None, pixels
    ).logits
    model.train(training)
    return cast(Tensor, logits).float().cpu()


def _with_image_token(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[PreTrainedTokenizerBase, int]:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)])
    return tokenizer, int(tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER))


def _state_dict(
    model: VisionLanguageModel,
    tower: PreTrainedModel,
    language_model: PreTrainedModel,
    image_token_id: int,
) -> tuple[dict[str, Tensor], int]:
    """Tensors under the names of `LlavaForConditionalGeneration`, and its vocabulary size."""
    head: Any = language_model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(
            "export: stock LLaVA's output head has no bias and "
            f"{type(language_model).__name__}'s has one; it cannot be exported"
        )
    decoder = decoder_of(language_model)
    state = {f"model.vision_tower.{k}": v for k, v in tower.state_dict().items()}
    for key, value in _stock_projector(model.multi_modal_projector).items():
        state[f"model.multi_modal_projector.{key}"] = value
    state |= {f"model.language_model.{k}": v for k, v in decoder.state_dict().items()}
    table = language_model.get_input_embeddings().weight
    rows = table.shape[0]
    if rows <= image_token_id:
        rows = -(-(image_token_id + 1) // 64) * 64
    grown = _grow(table.detach(), rows)
    names = [k for k, v in decoder.state_dict().items() if v.data_ptr() == table.data_ptr()]
    for name in names:
        state[f"model.language_model.{name}"] = grown
    tied = head.weight.data_ptr() == table.data_ptr()
    state["lm_head.weight"] = grown if tied else _grow(head.weight.detach(), rows)
    return {key: value.detach().cpu() for key, value in state.items()}, rows


def _grow(table: Tensor, rows: int) -> Tensor:
    """The table with new rows that are the mean of the old: never the likeliest token."""
    if rows == table.shape[0]:
        return table
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])


def _stock_projector(projector: nn.Module) -> dict[str, Tensor]:
    """The projector as stock LLaVA's two layers; one linear layer is followed by the identity."""
    state = projector.state_dict()
    if isinstance(projector, LinearProjector):
        hidden = projector.weight.shape[0]
        return {
            "linear_1.weight": state["weight"],
            "linear_1.bias": state["bias"],
            "linear_2.weight": torch.eye(hidden),
            "linear_2.bias": torch.zeros(hidden),
        }
    if isinstance(projector, MlpProjector) and projector.depth == 2:
        return dict(state)
    depth = getattr(projector, "depth", "?")
    raise UserError(
        f"export: stock LLaVA's projector has two layers and this one (mlp{depth}x_gelu) has "
        f"{depth}; train with mlp2x_gelu or linear to export"
    )


def _llava_config(
    model: VisionLanguageModel,
    tower: PreTrainedModel,
    layout: _Layout,
    language_model: PreTrainedModel,
    image_token_id: int,
    vocabulary: int,
) -> LlavaConfig:
    # Copies: a configuration that a live model shares would change under it.
    text_config = copy.deepcopy(language_model.config)
    text_config.vocab_size = vocabulary
    layers = list(model.vision_tower.config.feature_layers)
    linear = isinstance(model.multi_modal_projector, LinearProjector)
    head: Any = language_model.get_output_embeddings()
    tied = head.weight.data_ptr() == language_model.get_input_embeddings().weight.data_ptr()
    text_config.tie_word_embeddings = tied
    return LlavaConfig(
        vision_config=copy.deepcopy(tower.config),
        text_config=text_config,
        image_token_index=image_token_id,
        image_seq_length=model.vision_tower.num_tokens,
        projector_hidden_act="linear" if linear else "gelu",
        vision_feature_select_strategy=layout.select_strategy,
        vision_feature_layer=layers[0] if len(layers) == 1 else layers,
        tie_word_embeddings=tied,
    )


def _assemble(config: LlavaConfig, state: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    try:
        llava.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(
            "export: stock LLaVA cannot hold this language model "
            f"({config.text_config.model_type}): {' '.join(str(error).split())[:300]}"
        ) from None
    llava.tie_weights()
    dtype = next(iter(state.values())).dtype
    for part in (llava.config, llava.config.text_config, llava.config.vision_config):
        part.dtype = dtype
    return llava


def _generation_config(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
) -> GenerationConfig:
    config = copy.deepcopy(language_model.generation_config) or GenerationConfig()
    if stop_token_ids:
        config.eos_token_id = list(stop_token_ids)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _processor(
    tower: VisionTower, layout: _Layout, tokenizer: PreTrainedTokenizerBase, aspect: Aspect
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
        patch_size=layout.patch_size,
        vision_feature_select_strategy=layout.select_strategy,
        num_additional_image_tokens=layout.num_additional_image_tokens,
        image_token=IMAGE_PLACEHOLDER,
    )


@torch.no_grad()
def _reload(
    folder: Path, pixels: Tensor, ids: Tensor, image_token_id: int
) -> tuple[Tensor, list[str], list[str]]:
    loaded, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or unexpected:
        raise UserError(
            f"export: the reload has {len(missing)} missing and {len(unexpected)} unexpected "
            f"keys, the first being {(missing or unexpected)[0]}; nothing was written"
        )
    loaded.eval()
    stock_ids = ids.masked_fill(ids == IMAGE_TOKEN_ID, image_token_id)
    logits = loaded(
        input_ids=stock_ids,
        attention_mask=torch.ones_like(stock_ids),
        pixel_values=pixels.to(loaded.dtype) if len(pixels) else None,
    ).logits
    return logits.float(), missing, unexpected


def _pixel_difference(
    folder: Path, spec: ImageSpec, aspect: Aspect, processing: Processing
) -> float:
    """Largest difference on one wide picture between reloaded processor and training, of 255."""
    generator = torch.Generator().manual_seed(0)
    shape = (spec.size, spec.size * 3 // 2, 3)
    noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(noise.numpy())
    processor = AutoProcessor.from_pretrained(folder)
    stock = processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    file = BytesIO()
    picture.save(file, "PNG")
    ours = read_pixels(file.getvalue(), spec, aspect, processing)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return ((stock * std + mean) * 255 - ours).abs().max().item()


def _refuse_difference(report: ExportReport, dtype: torch.dtype) -> None:
    limit = _RELATIVE_LIMIT.get(dtype, 1e-4) * max(1.0, report.max_abs_logit)
    if not report.max_abs_logit_difference <= limit:
        raise UserError(
            "export: the reloaded model's logits differ by "
            f"{report.max_abs_logit_difference:.3g}, expected at most {limit:.3g} in "
            f"{report.dtype}; nothing was written"
        )


def _write_notes(folder: Path, report: ExportReport, aspect: Aspect) -> None:
    libraries = {name: version(name) for name in ("torch", "transformers", "vlm-sft")}
    write_json(folder / "export.json", {**asdict(report), "versions": libraries})
    write_text(
        folder / "README.md",
        "# A LLaVA model, exported by vlm_sft\n\n"
        "```python\n"
        "from transformers import AutoProcessor, LlavaForConditionalGeneration\n\n"
        "model = LlavaForConditionalGeneration.from_pretrained(folder)\n"
        "processor = AutoProcessor.from_pretrained(folder)\n"
        "```\n\n"
        f"Pictures were prepared with `{aspect}` in training; the processor here does the same, "
        f"to {report.max_pixel_difference:.0f} of 255 levels on a test picture. Reloaded and "
        "compared with the trained model on one picture and prompt, the largest logit difference "
        f"was {report.max_abs_logit_difference:.3g} (logits up to {report.max_abs_logit:.3g}, "
        f"{report.dtype}).\n",
    )


def _refuse_nonempty(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"export: {out_dir} is not an empty folder; give a new one")


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

    Raises:
        OSError: The disk is full or refuses; the error names `out_dir`, and nothing is left of the
            directory.
    """
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(out_dir)
    temporary.mkdir()
    try:
        with _named_by_target(temporary, out_dir):
            yield temporary
            give_ordinary_modes(temporary)
        if out_dir.exists():
            out_dir.rmdir()
        rename_folder(temporary, out_dir, last="export.json")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
