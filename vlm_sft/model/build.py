"""Build the model from its configuration; the only place that knows how the sizes fit."""

import copy
import importlib
import importlib.util
import os
from typing import Any, Final, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from vlm_sft.config.finished import read_finished, resolve_model
from vlm_sft.config.finished_files import WHERE, FinishedModel
from vlm_sft.config.schema import (
    LanguageModelConfig,
    LoraConfig,
    ModelConfig,
    VisionTowerConfig,
)
from vlm_sft.data.image_layout import layout_rule
from vlm_sft.errors import UserError
from vlm_sft.model.connectors.build import build_connector
from vlm_sft.model.dtypes import cast_floating
from vlm_sft.model.finished import (
    FinishedWeights,
    load_finished_language_model,
    load_finished_projector,
    load_finished_tower,
    merge_adapter,
)
from vlm_sft.model.image_tokens import new_image_newline
from vlm_sft.model.language_model import check_head
from vlm_sft.model.positions import find_position_limit
from vlm_sft.model.pretrained import load_pretrained, require_all_tensors
from vlm_sft.model.quantization import quantize
from vlm_sft.model.vision_tower import VisionTower
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.model_folders import refuse_remote_kernels, report_unused_code

_WHERE: Final = "model.language_model"


def build_model(
    config: ModelConfig, *, dtype: torch.dtype, seed: int, lora: LoraConfig | None = None
) -> VisionLanguageModel:
    """Build the model on the CPU, all of it frozen; see `parts.set_trainable`.

    Args:
        config: Tower, projector and language model.
        dtype: Dtype of tower and language model; projector and adapters are float32.
        seed: Seed of all random weights: projector, adapters, models built from a `config`.
        lora: Adapters for the language model, or None.

    Raises:
        UserError: If a part cannot be loaded or built.
    """
    weights = None
    if config.from_checkpoint is not None:
        found = read_finished(config.from_checkpoint)
        config = resolve_model(config, found)
        weights = FinishedWeights(found)
    language_model = build_language_model(
        config.language_model, dtype=dtype, seed=seed, weights=weights
    )
    tower = build_vision_tower(config.vision_tower, dtype=dtype, seed=seed)
    if weights is not None:
        _require_crop_size(weights.found, tower)
    hidden = language_model.get_input_embeddings().weight.shape[1]
    connector = build_connector(
        config.projector_type,
        tower.grid,
        tower.width,
        hidden,
        seed=seed,
        num_queries=config.num_queries,
    )
    rule = layout_rule(config.image_tiling, connector.grid, tower.image_spec.size)
    newline = new_image_newline(hidden, seed=seed) if rule.has_newline else None
    model = VisionLanguageModel(tower, connector, language_model, rule, newline)
    if weights is not None:
        load_finished_projector(weights, model.projector_state())
        if weights.found.layout == "original":
            load_finished_tower(weights, tower.encoder)
    if lora is not None:
        from vlm_sft.model.lora import add_lora  # peft is needed by LoRA runs only

        add_lora(model, lora, seed=seed)
    model.requires_grad_(False)
    return model


def _require_crop_size(found: FinishedModel, tower: VisionTower) -> None:
    """Check that the images of the tower are the crops of a finished model.

    Raises:
        UserError: They have another size.
    """
    size = tower.image_spec.size
    if found.crop_size not in (None, size):
        raise UserError(
            f"{WHERE}: the canvases of {found.name} (image_grid_pinpoints) consist of squares of "
            f"{found.crop_size} pixels, but its vision tower takes images of {size}; set "
            "model.vision_tower.name to the tower that it was trained with"
        )


def build_vision_tower(
    config: VisionTowerConfig, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> VisionTower:
    """Load an encoder (or build one from `config.config` with random weights) and freeze it.

    Raises:
        UserError: If the name, folder, weights or feature choice do not fit.
    """
    if (config.name is None) == (config.config is None):
        raise UserError("model.vision_tower: give exactly one of `name` and `config`")
    # Imported here: a run needs one of the three libraries, and each takes seconds to import.
    loader = importlib.import_module(f"vlm_sft.model.towers.{config.library}")
    key = f"model.vision_tower.{'config' if config.name is None else 'name'}"
    with library_call(config.library, key, "build this encoder and run it on one image"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loaded = loader.load(
                name=config.name,
                config=config.config,
                weights=config.weights,
                image_size=config.image_size,
            )
        tower = VisionTower(
            loaded,
            library=config.library,
            feature_layers=config.feature_layers,
            feature_select=config.feature_select,
            grid_pool=config.grid_pool,
        )
    cast_floating(tower, dtype)
    return tower


def build_language_model(
    config: LanguageModelConfig,
    *,
    dtype: torch.dtype,
    seed: int,
    weights: FinishedWeights | None = None,
) -> PreTrainedModel:
    """Load a causal language model in `dtype`, or build one with random weights from a `config`.

    With `quantization` its linear layers are stored in 4 bits, the rest in `dtype`.

    Args:
        config: Names or describes the model.
        dtype: Of the weights that are not quantized.
        seed: Seed of random weights.
        weights: The finished model that contains this language model or adapters for it; None if
            it stands alone.

    Raises:
        UserError: If the folder or the hub name cannot be loaded, tensors are missing in it, or it
            was quantized before.
    """
    attention = choose_attention(config.attn_implementation, dtype)
    # Weights to quantize are loaded in the dtype of their file: safetensors then maps the file, so
    # that they are never all in memory, and nothing is rounded twice.
    quantized = config.quantization is not None
    if config.config is not None:
        model = _random(dict(config.config), attention, seed)
        if not quantized:
            cast_floating(model, dtype)
    else:
        assert config.name is not None
        loaded_dtype = "auto" if quantized else dtype
        if weights is not None and weights.found.weights == "full":
            model = load_finished_language_model(weights, dtype=loaded_dtype, attention=attention)
        else:
            model = _pretrained(config.name, attention, loaded_dtype)
        if weights is not None and weights.found.weights == "lora":
            model = merge_adapter(weights, model)
    where = f"{_WHERE}.config" if config.name is None else f"{_WHERE}.name"
    with library_call("transformers", where, f"run {type(model).__name__} on three tokens"):
        check_head(model)
    cast(Any, model).position_limit = find_position_limit(model)
    if config.quantization is not None:
        with library_call("bitsandbytes", f"{_WHERE}.quantization", "quantize this model"):
            quantize(
                model,
                dtype,
                config.quantization,
                double_quantization=config.double_quantization,
            )
    return model


def choose_attention(name: str, dtype: torch.dtype) -> str | None:
    """Return the name of the attention in transformers; None lets transformers choose.

    `auto` is flash-attention if it is installed, there is a CUDA device, and `dtype` has 16 bits
    (flash-attention supports no other).
    """
    if name != "auto":
        return name
    sixteen_bits = dtype in (torch.bfloat16, torch.float16)
    if sixteen_bits and torch.cuda.is_available() and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return None


def _random(tree: dict[str, Any], attention: str | None, seed: int) -> PreTrainedModel:
    model_type = tree.pop("model_type", None)
    if model_type is None:
        raise UserError(f"{_WHERE}.config: key 'model_type' is missing; add it, e.g. llama")
    with library_call("transformers", f"{_WHERE}.config", f"build a {model_type} model"):
        config = AutoConfig.for_model(model_type, **copy.deepcopy(tree))
        with torch.random.fork_rng(devices=[]):
            with torch.device("meta"):
                _require_memory(_from_config(copy.deepcopy(config), attention))
            torch.manual_seed(seed)
            return _from_config(config, attention)


def _from_config(config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
    return cast(
        PreTrainedModel,
        AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=torch.float32, trust_remote_code=False
        ),
    )


def _require_memory(model: PreTrainedModel) -> None:
    """Refuse a model on the meta device whose weights exceed the memory of this machine.

    Allocating it layer by layer would end with the process being killed.

    Raises:
        UserError: Naming both sizes.
    """
    needed = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > total:
        raise UserError(
            f"{_WHERE}.config: its weights take {needed / 1e9:,.0f} GB, but this machine has "
            f"{total / 1e9:,.0f} GB of memory; give fewer layers or smaller ones"
        )


def _pretrained(name: str, attention: str | None, dtype: torch.dtype | str) -> PreTrainedModel:
    where = f"{_WHERE}.name"
    config: PretrainedConfig = load_pretrained(AutoConfig.from_pretrained, name, where)
    _refuse_packed(config, name)
    refuse_remote_kernels(where, name, config)
    report_unused_code(where, name, config)
    model, info = load_pretrained(
        AutoModelForCausalLM.from_pretrained,
        name,
        where,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
    )
    require_all_tensors(info, where, name, f"{config.model_type} model")
    return cast(PreTrainedModel, model)


def _refuse_packed(config: PretrainedConfig, name: str) -> None:
    """Refuse weights that are already quantized: their digest is not that of the base model.

    Raises:
        UserError: If the folder was quantized by bitsandbytes.
    """
    packed = getattr(config, "quantization_config", None) or {}
    if dict(packed).get("quant_method") == "bitsandbytes":
        raise UserError(
            f"{_WHERE}.name: the weights of {name} are quantized by bitsandbytes; take the ones "
            f"that they were made from, and set {_WHERE}.quantization: nf4"
        )
