"""The components of a checkpoint: projector, adapter, language model, tokenizer, configuration."""

import copy
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import torch
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from vlm_sft.checkpoint.base_models import FILE as BASES
from vlm_sft.checkpoint.base_models import (
    LANGUAGE_MODEL,
    VISION_TOWER,
    absolute_if_local,
    describe_bases,
)
from vlm_sft.checkpoint.format import read_manifest, verify, verify_file
from vlm_sft.checkpoint.shards import (
    consolidate_shards,
    delete_shards,
    has_shards,
    load_shards,
    snapshot_shard,
)
from vlm_sft.checkpoint.snapshot import (
    Component,
    Writer,
    host_copies,
    plain_component,
    tensor_component,
)
from vlm_sft.checkpoint.tensor_files import (
    check_tensors,
    copy_tensors,
    load_tensors,
    save_tensors,
)
from vlm_sft.config.schema import RunConfig, dump_config
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import CheckpointError
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.vlm import IMAGE_NEWLINE, VisionLanguageModel
from vlm_sft.utils.atomic_files import write_json, write_text
from vlm_sft.utils.dtensor import is_sharded
from vlm_sft.utils.libraries import one_line

logger = logging.getLogger(__name__)

PROJECTOR: Final = "projector.safetensors"
ADAPTER: Final = "adapter"
ADAPTER_TENSORS: Final = "adapter_model.safetensors"
SHARDS: Final = "model"
"""NAME of the shards in `language_model/`; see `vlm_sft.checkpoint.shards`."""


def checkpoint_components(
    config: RunConfig,
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_tokenizer: ChatTokenizer,
    trainable: Set[str],
) -> dict[str, Component]:
    """Return all components of a checkpoint except the optimizer, by name.

    Frozen parts are not saved: the configuration names them and a digest identifies them.

    Args:
        config: The run's configuration.
        model: The live model.
        tokenizer: Of the language model.
        chat_tokenizer: Tokenizes conversations.
        trainable: The parts that are trained; the projector is always saved.
    """
    components = {
        "config": plain_component(lambda f: write_text(f / "config.yaml", dump_config(config))),
        "projector": tensor_component(
            model.projector_state,
            lambda f, tensors: save_tensors(f / PROJECTOR, tensors),
            lambda f: _load_projector_file(model, f),
        ),
        "bases": plain_component(lambda f: write_json(f / BASES, describe_bases(config))),
        "tokenizer": plain_component(lambda f: _write_tokenizer(tokenizer, f)),
        "template": plain_component(
            lambda f: write_json(f / "template.json", chat_tokenizer.describe())
        ),
        "processor": plain_component(
            lambda f: write_json(f / "processor.json", processor_settings(config, model))
        ),
    }
    if "adapter" in trainable:
        components["adapter"] = tensor_component(
            lambda: adapter_tensors(model),
            lambda f, tensors: _write_adapter(model, f, tensors),
            lambda f: load_adapter(model, f),
        )
    if "language_model" in trainable:
        components["language_model"] = language_model_component(model)
        if config.model.from_checkpoint is not None:
            # With it the checkpoint is complete: the folder that the run started from holds nothing
            # else that could be needed.
            components["vision_tower"] = plain_component(lambda f: _write_vision_tower(model, f))
    return components


def language_model_component(model: VisionLanguageModel) -> Component:
    """Return the component that writes `language_model/` as transformers does.

    Where the weights are sharded, each rank writes its shard; `final/` then gets the whole model.
    """
    return Component(
        snapshot=lambda: _snapshot_language_model(model),
        load=lambda folder: load_language_model(model, folder),
        tensors=causal_lm(model.language_model).state_dict,
        consolidate=lambda folder: _consolidate_language_model(model, folder),
    )


def processor_settings(config: RunConfig, model: VisionLanguageModel) -> dict[str, Any]:
    """Return `processor.json`: how images become pixels and tokens.

    `num_image_tokens` is the number of tokens of a crop, `image_tiling` the `LayoutRule`.
    """
    return {
        "image_spec": dataclasses.asdict(model.vision_tower.image_spec),
        "image_aspect": config.data.image_aspect,
        "image_processing": config.data.image_processing,
        "num_image_tokens": model.layout_rule.crop_tokens,
        "image_tiling": dataclasses.asdict(model.layout_rule),
    }


def load_trained_model(model: VisionLanguageModel, folder: Path, identity: dict[str, Any]) -> None:
    """Start from the projector and the language model of another checkpoint of full fine-tuning.

    Args:
        model: Both are changed in place.
        folder: The checkpoint.
        identity: The `base_identity` of this run.

    Raises:
        CheckpointError: As `load_projector`; or it is damaged, or has no language model.
    """
    files = verify(folder).manifest["files"]
    if not any(name.startswith(f"{LANGUAGE_MODEL}/") for name in files):
        has_adapter = any(name.startswith(f"{ADAPTER}/") for name in files)
        raise CheckpointError(
            f"start_from={folder}: it has no language model, because that run trained "
            + ("adapters" if has_adapter else "only the projector")
            + "; name a checkpoint of full fine-tuning, or "
            + ("export it and set model.from_checkpoint" if has_adapter else "set projector"),
            code="tensors_differ",
        )
    load_projector(model, folder, identity, setting="start_from")
    load_language_model(model, folder)
    logger.info("starting from the projector and the language model of %s", folder)


def load_projector(
    model: VisionLanguageModel,
    folder: Path,
    identity: dict[str, Any],
    *,
    setting: str = "projector",
) -> None:
    """Start from the projector of another checkpoint, such as that of stage 1.

    Args:
        model: Its projector is changed in place.
        folder: The checkpoint.
        identity: The `base_identity` of this run.
        setting: The setting that names the checkpoint, for errors.

    Raises:
        CheckpointError: The folder is no checkpoint; or the projector was trained with another
            tower, other features or another language model, or has other shapes.
    """
    manifest = read_manifest(folder)
    verify_file(folder, manifest, PROJECTOR)
    tensors, live = load_tensors(folder / PROJECTOR), model.projector_state()
    if IMAGE_NEWLINE in live and IMAGE_NEWLINE not in tensors:
        # Stage 1 without tiles, stage 2 with them: LLaVA-NeXT and LLaVA-OneVision do so.
        logger.info("projector %s: has no image_newline, which therefore begins random", folder)
        del live[IMAGE_NEWLINE]
    copy_tensors(tensors, live, folder / PROJECTOR)
    found = manifest.get("base_model", {})
    for key, what in (
        ("vision_tower", "vision tower"),
        ("features", "choice of vision features"),
        ("language_model", "language model"),
    ):
        if found.get(key) != identity[key]:
            raise CheckpointError(
                f"{setting}={folder}: it was trained with another {what} "
                f"({_brief(found.get(key))}, here {_brief(identity[key])}); use the model section "
                "of the configuration that trained it",
                code="shapes_differ" if key == "features" else "wrong_base",
            )


def unused_parts(projector: str | None) -> str | None:
    """Describe the trained parts of the `projector` checkpoint that a run does not use, if any.

    Raises:
        CheckpointError: The folder is no checkpoint.
    """
    if projector is None:
        return None
    folders = {name.partition("/")[0] for name in read_manifest(Path(projector))["files"]}
    for folder, what in ((LANGUAGE_MODEL, "language model"), (ADAPTER, "adapter")):
        if folder in folders:
            return (
                f"projector {projector}: only its projector is used; its trained {what} is not "
                "(model.language_model names the one that is)"
            )
    return None


def load_adapter(model: VisionLanguageModel, folder: Path) -> None:
    """Load `adapter/` into the LoRA matrices that the model already has.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape.
    """
    from peft.utils import set_peft_model_state_dict

    path = folder / ADAPTER / ADAPTER_TENSORS
    found = load_tensors(path)
    # peft itself ignores missing and unexpected tensors, so names and shapes are compared first.
    check_tensors(found, adapter_tensors(model), path)
    set_peft_model_state_dict(cast(Any, model.language_model), found)


def adapter_tensors(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Return the live LoRA matrices under the names of peft's own files."""
    from peft.utils import get_peft_model_state_dict

    wrapped = cast(Any, model.language_model)
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return found


def load_language_model(model: VisionLanguageModel, folder: Path) -> None:
    """Load `language_model/` into the live language model.

    Raises:
        CheckpointError: transformers cannot load it, or a tensor is missing, unexpected or of
            another shape.
    """
    live = causal_lm(model.language_model)
    place = folder / LANGUAGE_MODEL
    if has_shards(place / SHARDS):
        return load_shards(place / SHARDS, live.state_dict())
    dtype = next(live.parameters()).dtype
    try:
        with _without_progress_bars():
            loaded, info = type(live).from_pretrained(
                place,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:
        raise CheckpointError(
            f"{place}: transformers cannot load this folder: {one_line(error)}",
            code="checkpoint_damaged",
        ) from error
    # transformers only logs these and leaves random weights in place of the missing ones.
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if wrong:
        raise CheckpointError(
            f"{place}: {len(wrong)} tensors are missing, unexpected or of another shape, the first "
            f"being {sorted(wrong)[0]}; it was made for another model",
            code="tensors_differ",
        )
    copy_tensors(dict(loaded.named_parameters()), dict(live.named_parameters()), place)


def _load_projector_file(model: VisionLanguageModel, folder: Path) -> None:
    path = folder / PROJECTOR
    copy_tensors(load_tensors(path), model.projector_state(), path)


def _snapshot_language_model(model: VisionLanguageModel) -> Writer:
    live = causal_lm(model.language_model)
    tensors = live.state_dict()
    if not is_sharded(tensors.values()):
        copies = host_copies(tensors)
        return lambda folder: _write_language_model(live, folder, copies)
    shard = snapshot_shard(tensors)

    def write(folder: Path) -> None:
        shard.write(folder / LANGUAGE_MODEL / SHARDS)
        if shard.rank == 0:
            live.config.save_pretrained(folder / LANGUAGE_MODEL)

    return write


def _consolidate_language_model(model: VisionLanguageModel, folder: Path) -> bool:
    path = folder / LANGUAGE_MODEL / SHARDS
    if not has_shards(path):
        return False
    tensors = consolidate_shards(path)
    delete_shards(path)
    # A hard link into the step checkpoint: writing through it would change that checkpoint.
    (folder / LANGUAGE_MODEL / "config.json").unlink()
    _write_language_model(causal_lm(model.language_model), folder, tensors)
    return True


def _write_language_model(
    live: PreTrainedModel, folder: Path, tensors: Mapping[str, torch.Tensor]
) -> None:
    with _without_progress_bars():
        live.save_pretrained(folder / LANGUAGE_MODEL, state_dict=dict(tensors))


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Disable the progress bars of transformers, which would break the progress line."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _write_vision_tower(model: VisionLanguageModel, folder: Path) -> None:
    """Write the frozen vision tower as transformers does, with the settings of its images."""
    tower, spec = model.vision_tower, model.vision_tower.image_spec
    place = folder / VISION_TOWER
    with _without_progress_bars():
        cast(PreTrainedModel, tower.encoder).save_pretrained(place)
    preprocessing = {
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": int(Image.Resampling[spec.interpolation.upper()]),
        "crop_size": {"height": spec.size, "width": spec.size},
    }
    write_json(place / "preprocessor_config.json", preprocessing)


def _write_adapter(
    model: VisionLanguageModel, folder: Path, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write the two files that `PeftModel.from_pretrained` reads; the base's path is absolute."""
    config = cast(Any, model.language_model).peft_config["default"]
    saved = copy.copy(config)
    saved.inference_mode = True
    saved.base_model_name_or_path = absolute_if_local(saved.base_model_name_or_path)
    saved.save_pretrained(str(folder / ADAPTER))
    save_tensors(folder / ADAPTER / ADAPTER_TENSORS, tensors)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    tokenizer.save_pretrained(folder / "tokenizer")


def _brief(value: Any) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)
