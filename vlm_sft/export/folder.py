"""Write the folder of an exported model, which appears complete or not at all."""

import copy
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

from PIL import Image
from tokenizers import AddedToken
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessorPil,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.processing_utils import ProcessorMixin

from vlm_sft.config.fields import ImageAspect
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.data.images import ImageSpec
from vlm_sft.errors import UserError
from vlm_sft.export.stock import StockTower, grid_pinpoints
from vlm_sft.export.weights import released_state, write_weights
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER
from vlm_sft.utils.filesystem import (
    created_above,
    give_ordinary_modes,
    rename_folder,
    temporary_sibling,
)
from vlm_sft.utils.libraries import installed_version
from vlm_sft.utils.ownership import MADE_BY, is_system_file, made_by, set_aside

VIDEO_PLACEHOLDER: Final = "<video>"
"""Special token without a use in these models, which `InternVLProcessor` requires."""


def set_stop_token(tokenizer: PreTrainedTokenizerBase, eot_token_ids: Sequence[int]) -> None:
    """Make the template's stop token the EOS token of the tokenizer.

    Some programs stop only at `tokenizer.eos_token_id` and ignore the generation config. Answers of
    a model that was trained with ChatML on a base tokenizer would continue to the length limit.
    """
    named: Any = tokenizer
    # Before EOS changes: padding with the old EOS stays what it was in training.
    if named.pad_token is None and named.eos_token is not None:
        named.pad_token = named.eos_token
    if eot_token_ids:
        named.eos_token = named.convert_ids_to_tokens(eot_token_ids[0])


def save_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, eot_token_ids: Sequence[int], base: str
) -> PreTrainedTokenizerBase:
    """Save a copy of a run's tokenizer that stops where the template does; return the copy.

    Args:
        folder: Gets the files, with the SentencePiece model of `base` if there is one: the
            original LLaVA code reads no other file of a Llama tokenizer.
        tokenizer: The run's tokenizer, which is not changed.
        eot_token_ids: Ids that end an answer.
        base: Folder of the language model, or another name.
    """
    made = copy.deepcopy(tokenizer)
    set_stop_token(made, eot_token_ids)
    made.save_pretrained(folder)
    model = Path(base) / "tokenizer.model"
    if base and model.is_file() and not (folder / model.name).exists():
        shutil.copyfile(model, folder / model.name)
    return made


def name_internvl_tokens(tokenizer: PreTrainedTokenizerBase, image_tokens: tuple[str, str]) -> None:
    """Name the tokens that `InternVLProcessor` takes from its tokenizer; `<video>` is added."""
    named: Any = tokenizer
    named.add_tokens([AddedToken(VIDEO_PLACEHOLDER, special=True, normalized=False)])
    start, end = image_tokens
    named._set_model_specific_special_tokens(
        {
            "start_image_token": start,
            "end_image_token": end,
            "context_image_token": IMAGE_PLACEHOLDER,
            "video_token": VIDEO_PLACEHOLDER,
        }
    )


def generation_config(
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eot_token_ids: Sequence[int],
) -> GenerationConfig:
    """Return the language model's generation config with the stop tokens of the template."""
    config: Any = copy.deepcopy(language_model.generation_config) or GenerationConfig()
    if eot_token_ids:
        config.eos_token_id = list(eot_token_ids)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if not config.do_sample:
        # transformers does not save sampling settings that have no effect.
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(config, name, None)
    return cast(GenerationConfig, config)


def build_processor(
    model: VisionLanguageModel,
    stock: StockTower,
    tokenizer: PreTrainedTokenizerBase,
    aspect: ImageAspect,
    chat_template: str | None,
) -> ProcessorMixin:
    """Return a processor that prepares images as training does.

    Args:
        model: Its tower gives size and normalization, its layout rule the crops.
        stock: The tower as a class of transformers, for the number of image tokens.
        tokenizer: The exported tokenizer.
        aspect: How images were made square in training.
        chat_template: Jinja text of the chat template.
    """
    spec = model.vision_tower.image_spec
    if model.layout_rule.needs_sizes:
        processor = _tiled_processor(model.layout_rule, spec, stock, tokenizer)
        cast(Any, processor).chat_template = chat_template
        return processor
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
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=stock.patch_size,
        vision_feature_select_strategy=stock.select_strategy,
        num_additional_image_tokens=stock.num_additional_image_tokens,
        image_token=IMAGE_PLACEHOLDER,
    )
    processor.chat_template = chat_template
    return processor


def _tiled_processor(
    rule: LayoutRule, spec: ImageSpec, stock: StockTower, tokenizer: PreTrainedTokenizerBase
) -> ProcessorMixin:
    """Return the processor of LLaVA-NeXT, LLaVA-OneVision or InternVL."""
    square = {"height": spec.size, "width": spec.size}
    options: dict[str, Any] = {
        "resample": Image.Resampling[spec.interpolation.upper()],
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
    }
    if rule.tiling == "dynamic":
        return InternVLProcessor(
            GotOcr2ImageProcessorPil(
                size=square,
                crop_to_patches=True,
                min_patches=rule.min_tiles,
                max_patches=rule.max_tiles,
                **options,
            ),
            tokenizer,
            InternVLVideoProcessor(size=square, **options),
            image_seq_length=rule.crop_tokens,
        )
    options["image_grid_pinpoints"] = grid_pinpoints(rule)
    if rule.max_crops is None:
        return LlavaNextProcessor(
            LlavaNextImageProcessorPil(
                size={"shortest_edge": spec.size}, crop_size=square, **options
            ),
            tokenizer,
            patch_size=stock.patch_size,
            vision_feature_select_strategy=stock.select_strategy,
            num_additional_image_tokens=stock.num_additional_image_tokens,
            image_token=IMAGE_PLACEHOLDER,
        )
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(size=square, **options),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=square),
        # The class token, which its strategy `default` takes off again.
        num_image_tokens=rule.crop_tokens + stock.num_additional_image_tokens,
        vision_feature_select_strategy=stock.select_strategy,
        image_token=IMAGE_PLACEHOLDER,
        vision_aspect_ratio=f"anyres_max_{rule.max_crops}",
    )


def write_model(
    folder: Path,
    stock: PreTrainedModel,
    processor: ProcessorMixin,
    vision_level: str,
    max_shard_size: str,
) -> None:
    """Write weights, configurations, tokenizer and image processor."""
    config: Any = stock.config
    config.architectures = [type(stock).__name__]
    config.save_pretrained(folder)
    add_older_keys(folder / "config.json")
    cast(GenerationConfig, stock.generation_config).save_pretrained(folder)
    processor.save_pretrained(folder)
    # Older programs do not know processor_config.json and look for the image processor here.
    image_processor = {**cast(Any, processor).image_processor.to_dict()}
    image_processor["processor_class"] = type(processor).__name__
    write_json(folder / "preprocessor_config.json", image_processor)
    write_weights(folder, released_state(stock, vision_level), max_shard_size)


def add_older_keys(path: Path) -> None:
    """Add `rope_theta` and `rope_scaling`, which programs before transformers 5 read.

    Without them such a program uses its default and computes other positions.
    """
    tree = json.loads(path.read_text(encoding="utf-8"))
    text = tree.get("text_config", tree)
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope and "rope_theta" not in text:
        text["rope_theta"] = rope.pop("rope_theta")
        if rope.get("rope_type", "default") != "default":
            text["rope_scaling"] = rope
        write_json(path, tree)


def write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `export.json`: the results of the comparison, and versions of libraries."""
    versions = {name: installed_version(name) for name in ("torch", "transformers", "vlm-sft")}
    made = {MADE_BY: made_by("export"), **facts, "versions": versions}
    write_json(folder / "export.json", made)


@contextmanager
def atomic_folder(out_dir: Path) -> Iterator[Path]:
    """Yield a directory next to `out_dir` that replaces it if the block ends without an error.

    Files of file managers in `out_dir`, such as `.DS_Store`, are moved to the new directory.

    Raises:
        OSError: A file cannot be written, for example because the disk is full. The error names
            `out_dir`; the new directory, and those created above it, are deleted.
        UserError: `out_dir` cannot be replaced; see `_move_into_place`.
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


@contextmanager
def _named_by_target(temporary: Path, target: Path) -> Iterator[None]:
    """Replace the temporary directory by `target` in the file name of an OSError."""
    try:
        yield
    except OSError as error:
        if error.filename is None or not Path(str(error.filename)).is_relative_to(temporary):
            raise
        name = target / Path(str(error.filename)).relative_to(temporary)
        raise OSError(error.errno, error.strerror, str(name)) from None


def _move_into_place(exported: Path, out_dir: Path) -> None:
    """Rename a finished export to `out_dir`, which may contain only files of file managers.

    Raises:
        UserError: `out_dir` cannot be replaced, for example because a file was added to it in the
            meantime. It is unchanged, and the export is kept under another name.
    """
    system_files = list(filter(is_system_file, os.listdir(out_dir))) if out_dir.exists() else []
    try:
        for name in system_files:
            os.rename(out_dir / name, exported / name)
        if out_dir.exists():
            out_dir.rmdir()  # fails if another file was added
        rename_folder(exported, out_dir, last="export.json")
    except OSError as error:
        # Undo the moves, so that `out_dir` is as it was.
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
