"""What a checkpoint is made of, and how each piece is written and read back strictly."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from vlm_sft.checkpoint.base_models import FILE as BASES
from vlm_sft.checkpoint.base_models import absolute_if_local, describe_bases
from vlm_sft.checkpoint.shards import assemble, has_pieces, hold, read_pieces, remove_pieces
from vlm_sft.checkpoint.store import (
    Component,
    Writer,
    check_tensors,
    copy_tensors,
    host_copies,
    load_tensors,
    plain_component,
    read_manifest,
    save_tensors,
    tensor_component,
    verify_file,
)
from vlm_sft.config.schema import RunConfig, dump_config
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import CheckpointError
from vlm_sft.model.hashing import named_state, sample_digest, tensors_digest
from vlm_sft.model.parts import named_parts
from vlm_sft.model.quantization import unquantized_digest
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm
from vlm_sft.train.fsdp import is_sharded
from vlm_sft.utils.atomic_files import write_json, write_text
from vlm_sft.utils.libraries import one_line

PROJECTOR = "projector.safetensors"
ADAPTER = "adapter"
ADAPTER_TENSORS = "adapter_model.safetensors"
LANGUAGE_MODEL = "language_model"
PIECES = "model"
"""Name of the pieces in `language_model/`."""


def checkpoint_components(
    config: RunConfig,
    model: VisionLanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    chat_tokenizer: ChatTokenizer,
    trainable: Set[str],
) -> dict[str, Component]:
    """Everything that a checkpoint holds, the optimizer apart.

    Frozen parts are not among it: they are named by the configuration and known by their digest.
    """
    components = {
        "config": plain_component(lambda f: write_text(f / "config.yaml", dump_config(config))),
        "projector": tensor_component(
            model.multi_modal_projector.state_dict,
            lambda f, tensors: save_tensors(f / PROJECTOR, tensors),
            lambda f: _read_projector(model, f),
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
            lambda f: read_adapter(model, f),
        )
    if "language_model" in trainable:
        components["language_model"] = language_model_component(model)
    return components


def language_model_component(model: VisionLanguageModel) -> Component:
    """`language_model/` as transformers has it, or in pieces where processes share it."""
    return Component(
        capture=lambda: _capture_language_model(model),
        read=lambda folder: read_language_model(model, folder),
        tensors=causal_lm(model.language_model).state_dict,
        unite=lambda folder: _unite_language_model(model, folder),
    )


def processor_settings(config: RunConfig, model: VisionLanguageModel) -> dict[str, Any]:
    """`processor.json`: how images become pixels, and how many tokens each takes."""
    return {
        "image_spec": dataclasses.asdict(model.vision_tower.image_spec),
        "image_aspect": config.data.image_aspect,
        "image_processing": config.data.image_processing,
        "num_image_tokens": model.vision_tower.num_tokens,
    }


def base_identity(config: RunConfig, model: VisionLanguageModel) -> dict[str, Any]:
    """Which frozen tower, which of its features, and which language model a run starts from.

    Sampled digests of weights and shapes, so that a moved folder is the same model and another
    model under the same name is not. Call it before anything is loaded into the model.
    """
    tower = config.model.vision_tower
    return {
        "vision_tower": sample_digest(named_state(model.vision_tower.encoder)),
        "features": {
            "feature_layers": list(tower.feature_layers),
            "feature_select": tower.feature_select,
            "grid_pool": tower.grid_pool,
            "image_size": model.vision_tower.image_spec.size,
        },
        "language_model": _base_digest(model),
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what decides a tokenizer's ids: vocabulary, added tokens, a fast one's rules."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for passing in ("padding", "truncation"):  # set anew by every call
        rules.pop(passing, None)
    added = sorted((index, str(token)) for index, token in tokenizer.added_tokens_decoder.items())
    known = "" if rules else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(json.dumps([rules, known, added]).encode()).hexdigest()


def template_digest(chat_tokenizer: ChatTokenizer) -> str:
    """sha256 of the template, the system text and the recipe that texts are tokenized by.

    The image separator is left out: runs made before there was one can be resumed. What it does to
    a record is in the digest of the data.
    """
    described = {k: v for k, v in chat_tokenizer.describe().items() if k != "image_separator"}
    plain = json.dumps(described, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()


def frozen_digests(model: VisionLanguageModel) -> dict[str, str]:
    """sha256 over every byte of each part that must not move."""
    digests = {"vision_tower": model.vision_tower.digest()}
    for part, named in named_parts(model).items():
        if part != "vision_tower" and named and not any(p.requires_grad for _, p in named):
            digests[part] = tensors_digest(named)
    return digests


def load_projector(model: VisionLanguageModel, folder: Path, identity: dict[str, Any]) -> None:
    """Start from the projector of another checkpoint, e.g. that of stage 1.

    Raises:
        CheckpointError: No checkpoint there; it was trained with another tower, other features or
            another language model; or its shapes differ (tensor and both shapes are named).
    """
    manifest = read_manifest(folder)
    verify_file(folder, manifest, PROJECTOR)
    _read_projector(model, folder)
    found = manifest.get("base_model", {})
    for key, what in (
        ("vision_tower", "vision tower"),
        ("features", "choice of vision features"),
        ("language_model", "language model"),
    ):
        if found.get(key) != identity[key]:
            raise CheckpointError(
                f"projector={folder}: it was trained with another {what} "
                f"({_brief(found.get(key))}, here {_brief(identity[key])}); use the model section "
                "of the configuration that trained it",
                code="shapes_differ" if key == "features" else "wrong_base",
            )


def unused_parts(projector: str | None) -> str | None:
    """Return the line about trained parts of the `projector` checkpoint that a run does not use.

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


def read_adapter(model: VisionLanguageModel, folder: Path) -> None:
    """Load `adapter/` into the LoRA matrices that are already in the model, strictly.

    Raises:
        CheckpointError: A tensor is missing, too many, or of another shape.
    """
    from peft.utils import set_peft_model_state_dict

    path = folder / ADAPTER / ADAPTER_TENSORS
    found = load_tensors(path)
    check_tensors(found, adapter_tensors(model), path)
    set_peft_model_state_dict(cast(Any, model.language_model), found)


def adapter_tensors(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """The live LoRA matrices under the names of peft's own files."""
    from peft.utils import get_peft_model_state_dict

    wrapped = cast(Any, model.language_model)
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    return found


def read_language_model(model: VisionLanguageModel, folder: Path) -> None:
    """Load `language_model/` into the live language model, strictly.

    Raises:
        CheckpointError: It cannot be loaded, or a tensor is missing, too many, or of another shape.
    """
    live = causal_lm(model.language_model)
    place = folder / LANGUAGE_MODEL
    if has_pieces(place / PIECES):
        return read_pieces(place / PIECES, live.state_dict())
    dtype = next(live.parameters()).dtype
    try:
        with _without_bars():
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
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    if wrong:
        raise CheckpointError(
            f"{place}: {len(wrong)} tensors are missing, too many or of another shape, the first "
            f"being {sorted(wrong)[0]}; it was made for another model",
            code="tensors_differ",
        )
    copy_tensors(dict(loaded.named_parameters()), dict(live.named_parameters()), place)


def _read_projector(model: VisionLanguageModel, folder: Path) -> None:
    path = folder / PROJECTOR
    copy_tensors(load_tensors(path), model.multi_modal_projector.state_dict(), path)


def _capture_language_model(model: VisionLanguageModel) -> Writer:
    live = causal_lm(model.language_model)
    tensors = live.state_dict()
    if not is_sharded(tensors.values()):
        held = host_copies(tensors)
        return lambda folder: _write_language_model(live, folder, held)
    piece = hold(tensors)

    def write(folder: Path) -> None:
        piece.write(folder / LANGUAGE_MODEL / PIECES)
        if piece.process == 0:
            live.config.save_pretrained(folder / LANGUAGE_MODEL)

    return write


def _unite_language_model(model: VisionLanguageModel, folder: Path) -> bool:
    path = folder / LANGUAGE_MODEL / PIECES
    if not has_pieces(path):
        return False
    tensors = assemble(path)
    remove_pieces(path)
    (folder / LANGUAGE_MODEL / "config.json").unlink()  # a link into the checkpoint it came from
    _write_language_model(causal_lm(model.language_model), folder, tensors)
    return True


def _write_language_model(
    live: PreTrainedModel, folder: Path, tensors: Mapping[str, torch.Tensor]
) -> None:
    with _without_bars():
        live.save_pretrained(folder / LANGUAGE_MODEL, state_dict=dict(tensors))


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the progress bars of transformers, which would break the live line."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


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


def _base_digest(model: VisionLanguageModel) -> str:
    """The same for a base that is quantized and one that is not."""
    found = unquantized_digest(causal_lm(model.language_model))
    return sample_digest(_base_parameters(model)) if found is None else found


def _base_parameters(model: VisionLanguageModel) -> Iterator[tuple[str, nn.Parameter]]:
    """The language model's own parameters under the names they have without adapters."""
    live: PreTrainedModel = causal_lm(model.language_model)
    for name, parameter in live.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter


def _brief(value: Any) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)


def dtype_of(config: RunConfig) -> torch.dtype:
    """The dtype that frozen weights are held in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
        config.train.precision
    ]
