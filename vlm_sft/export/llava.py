"""The format `llava`: a folder of the original LLaVA code, which LLaVA-NeXT's code reads, too.

Names and settings are those of `llava/model/builder.py`, `llava_arch.py` and
`multimodal_encoder/builder.py` in LLaVA 1.2.2, which reads three kinds of folders: all weights,
`non_lora_trainables.bin` beside adapters, and `mm_projector.bin` alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, SiglipVisionModel

from vlm_sft.config.fields import ImageAspect
from vlm_sft.config.finished import read_finished, resolve_model
from vlm_sft.config.finished_files import is_hub_name
from vlm_sft.config.schema import ModelConfig, VisionTowerConfig, means_folder
from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.errors import UserError
from vlm_sft.export.consumers import llava_consumers
from vlm_sft.export.folder import add_older_keys, generation_config, save_tokenizer
from vlm_sft.export.formats import ExportOptions, ExportResult
from vlm_sft.export.sample import Sample, noise_sample, sample_logits
from vlm_sft.export.stock import stock_tower
from vlm_sft.export.verify import logit_limit
from vlm_sft.export.weights import write_weights
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.model.build import build_model, build_vision_tower
from vlm_sft.model.connectors.linear import LinearConnector
from vlm_sft.model.connectors.mlp import MlpConnector
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.lora import merged_language_model
from vlm_sft.model.quantization import is_quantized
from vlm_sft.model.vlm import IMAGE_NEWLINE, VisionLanguageModel
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.filesystem import naming
from vlm_sft.utils.progress import waiting

CLASSES: Final[Mapping[str, tuple[str, str]]] = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
    "qwen2": ("llava_qwen", "LlavaQwenForCausalLM"),
}
"""`model_type` and class of the original code, by language model (LLaVA-NeXT for Qwen2)."""

_NAMES: Final = {
    "LlavaLlamaForCausalLM": "llava",
    "LlavaMistralForCausalLM": "llava-mistral",
    "LlavaQwenForCausalLM": "llava-qwen",
}
"""Names by which the original code chooses each class."""

Contents = Literal["full", "lora", "projector"]

_TOWER_PREFIX: Final = "model.vision_tower.vision_tower.vision_model."


def obstacles(checkpoint: LoadedModel) -> list[str]:
    """Return one sentence for each part that the original code cannot express; empty if none."""
    model, found = checkpoint.model, []
    kind = causal_lm(model.language_model).config.model_type
    if kind not in CLASSES:
        found.append(
            f"the original code has no class for the language model {kind} that could be read "
            f"back; it has {', '.join(name for _, name in CLASSES.values())}"
        )
    if not isinstance(model.multi_modal_projector, LinearConnector | MlpConnector):
        name = type(model.multi_modal_projector).__name__.removesuffix("Connector")
        found.append(f"the original code has no {name} projector; it has linear and mlpNx_gelu")
    if len(model.vision_tower.feature_layers) != 1:
        found.append("the original code reads one layer of the vision tower (feature_layers)")
    if model.layout_rule.tiling == "dynamic" or model.layout_rule.max_crops is not None:
        found.append(
            "of the ways to divide images (model.image_tiling.layout) the original folder is "
            "written for none and anyres; use --to hf"
        )
    if any(checkpoint.chat_tokenizer.image_tokens):
        found.append(
            "the original code writes no tokens around images as this chat template does "
            "(image_start, image_end)"
        )
    try:
        _require_tower(model)
    except UserError as error:
        found.append(str(error))
    return found


def export(checkpoint: LoadedModel, out: Path, options: ExportOptions) -> ExportResult:
    """Write the folder, load it by `model.from_checkpoint` and compare; see `FormatModule`."""
    contents = _contents(checkpoint, options)
    model = checkpoint.model
    tower_name, tower_differs = _named_tower(model, options.tower_name)
    if tower_differs and contents != "full":
        raise UserError(
            f"export --to llava: the vision tower was trained, so it is not the one of "
            f"{tower_name}; write all weights with --merge"
        )
    with waiting("merging adapters"):
        language_model = (
            merged_language_model(model) if contents == "full" else causal_lm(model.language_model)
        )
    own_dtype = language_model.get_input_embeddings().weight.dtype
    dtype = options.dtype or own_dtype
    base = None if contents == "full" else _base_name(language_model)
    tree = _config(checkpoint, language_model, dtype, tower_name, base)
    tree["unfreeze_mm_vision_tower"] = tower_differs
    with naming(out), waiting("writing the folder"):
        write_json(out / "config.json", tree)
        add_older_keys(out / "config.json")
        stop = checkpoint.chat_tokenizer.eot_token_ids
        tokenizer = save_tokenizer(out, checkpoint.tokenizer, stop, language_model.name_or_path)
        if contents == "full":
            settings: GenerationConfig = generation_config(language_model, tokenizer, stop)
            settings.save_pretrained(out)
            state = _full_state(model, language_model, tower_differs)
            cast_state = {name: _cast(value, dtype) for name, value in state.items()}
            write_weights(out, cast_state, options.max_shard_size)
        else:
            _write_trained(out, model, contents, cast(str, base))
    with waiting("loading the folder again, and comparing logits"):
        difference, scale = _compare(checkpoint, out, contents, options)
    exact = dtype == own_dtype and contents == "full" and language_model is model.language_model
    limit = 0.0 if exact else logit_limit(dtype, scale)
    if not difference <= limit:
        raise UserError(
            f"export --to llava: logits of the folder, loaded again, differ by {difference:.3g}, "
            f"expected at most {limit:.3g}; nothing was written"
        )
    class_name = tree["architectures"][0]
    what = {"full": "all weights", "lora": "adapters and projector", "projector": "the projector"}
    return ExportResult(
        summary=f"{class_name}, {what[contents]}; loaded again by model.from_checkpoint, largest "
        f"logit difference {difference:.2e} (largest logit {scale:.2f})",
        consumers=llava_consumers(tree, contents, tower_is_readable=has_released_names(tower_name)),
        usage=_usage(class_name, contents, base),
        facts={
            "model_class": class_name,
            "contents": contents,
            "max_abs_logit_difference": difference,
            "max_abs_logit": scale,
            "mm_vision_tower": tower_name,
            "contains_vision_tower": tower_differs,
        },
        library="llava",
    )


def projector_names(projector: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a projector's tensors (`projector_state`) under the original names.

    The original MLP is a `Sequential` with GELUs between its layers: `linear_N` is number 2(N-1).
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        if name == IMAGE_NEWLINE:
            renamed[f"model.{IMAGE_NEWLINE}"] = tensor
        elif layer:
            number = 2 * (int(layer.removeprefix("linear_")) - 1)
            renamed[f"model.mm_projector.{number}.{kind}"] = tensor
        else:
            renamed[f"model.mm_projector.{kind}"] = tensor
    return renamed


def has_released_names(tower: str) -> bool:
    """Return whether transformers before 5.6, which LLaVA's code needs, reads a tower's weights.

    In a folder that newer versions saved, names lack the level `vision_model`; older ones would
    begin with random weights and only log it.
    """
    file = Path(tower) / "model.safetensors"
    if not file.is_file():
        return True  # a hub name, or a folder of torch.save
    with safe_open(file, "pt") as opened:
        return any(name.startswith("vision_model.") for name in opened.keys())  # noqa: SIM118


def _contents(checkpoint: LoadedModel, options: ExportOptions) -> Contents:
    """Return what the folder contains: what was trained, or everything with `--merge`.

    Raises:
        UserError: The base of what was trained cannot be named.
    """
    model, files = checkpoint.model, checkpoint.manifest.get("files", {})
    has_adapter = hasattr(model.language_model, "peft_config")
    trained_alone = bool(files) and not any(name.startswith("language_model/") for name in files)
    if options.merge or not (has_adapter or trained_alone):
        return "full"
    remedy = "write all weights with --merge"
    language_model = causal_lm(model.language_model)
    if any(map(is_quantized, model.language_model.parameters())):
        raise UserError(
            "export --to llava: the adapters or the projector were trained on quantized weights, "
            f"and the original code would put them on those from before quantization; {remedy}"
        )
    config = checkpoint.config
    if config is not None and config.model.from_checkpoint is not None:
        raise UserError(
            "export --to llava: the run started from a finished model (model.from_checkpoint), "
            f"which is no base for the original code; {remedy}"
        )
    if not language_model.name_or_path:
        raise UserError(
            "export --to llava: the language model has no name (model.language_model.config), so "
            f"that no folder could say on which one it is based; {remedy}"
        )
    return "lora" if has_adapter else "projector"


def _base_name(language_model: PreTrainedModel) -> str:
    name = language_model.name_or_path
    return str(Path(name).expanduser().absolute()) if Path(name).is_dir() else name


def _require_tower(model: VisionLanguageModel) -> None:
    """Check that the original code computes the features of the vision tower.

    Raises:
        UserError: It has no such encoder, or takes another layer.
    """
    tower = stock_tower(model.vision_tower)
    if not tower.released_level:  # DINOv2, FastVLM's networks
        raise UserError(
            f"the original code has no {tower.encoder.config.model_type} vision tower; it has CLIP "
            "and, in LLaVA-NeXT, SigLIP"
        )
    layer, depth = tower.feature_layer, tower.encoder.config.num_hidden_layers
    if isinstance(tower.encoder, SiglipVisionModel) and layer not in (-2, depth - 1):
        raise UserError(
            f"LLaVA-NeXT's code reads layer -2 of a SigLIP vision tower, this model {layer}"
        )


def _named_tower(model: VisionLanguageModel, given: str | None) -> tuple[str, bool]:
    """Return the name of the vision tower, and whether the model's weights differ from it.

    Raises:
        UserError: It has no name, or the named one is of another shape or preprocessing.
    """
    encoder = stock_tower(model.vision_tower).encoder
    own = cast(Any, model.vision_tower.encoder)
    name = given or getattr(own, "name_or_path", None)
    if not name:
        raise UserError(
            "export --to llava: the original code loads its vision tower by name (mm_vision_tower) "
            "and this one has none; name the folder or hub repository of a CLIP of the same shape "
            "with --tower, such as openai/clip-vit-large-patch14-336"
        )
    if means_folder(name) or Path(name).is_dir():
        name = str(Path(name).expanduser().absolute())
    named = build_vision_tower(
        VisionTowerConfig(library="transformers", name=name), dtype=model.vision_tower.dtype
    )
    theirs, ours = named.encoder.state_dict(), encoder.state_dict()
    if {k: v.shape for k, v in theirs.items()} != {k: v.shape for k, v in ours.items()}:
        raise UserError(
            f"export --to llava: the vision tower {name} has tensors of other names or shapes than "
            "the model's; name another one with --tower"
        )
    if named.image_spec != model.vision_tower.image_spec:
        raise UserError(
            f"export --to llava: the images of {name} are {named.image_spec}, those of this model "
            f"{model.vision_tower.image_spec}; name another vision tower with --tower"
        )
    differs = any(not torch.equal(theirs[key], ours[key].cpu()) for key in ours)
    return name, differs


def _config(
    checkpoint: LoadedModel,
    language_model: PreTrainedModel,
    dtype: torch.dtype,
    tower_name: str,
    base: str | None,
) -> dict[str, Any]:
    """Return `config.json`: that of the language model, with the original code's keys."""
    model = checkpoint.model
    tower, rule = model.vision_tower, model.layout_rule
    tree = language_model.config.to_dict()
    model_type, class_name = CLASSES[tree["model_type"]]
    for key in ("_name_or_path", "transformers_version", "quantization_config"):
        tree.pop(key, None)
    spelled = str(dtype).removeprefix("torch.")
    tree |= {
        "model_type": model_type,
        "architectures": [class_name],
        "dtype": spelled,
        "torch_dtype": spelled,
        "use_mm_proj": True,
        "mm_vision_tower": tower_name,
        "mm_hidden_size": tower.width,
        "mm_projector_type": _projector_type(model.multi_modal_projector),
        "mm_vision_select_layer": tower.feature_layers[0],
        "mm_vision_select_feature": tower.feature_select,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": base is not None
        and not hasattr(model.language_model, "peft_config"),
        "freeze_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": tree.get("max_position_embeddings"),
        **_image_settings(rule, checkpoint.image_aspect),
    }
    if base is not None:
        tree["_name_or_path"] = base
    return cast(dict[str, Any], tree)


def _image_settings(rule: LayoutRule, aspect: ImageAspect) -> dict[str, Any]:
    if rule.tiling == "none":
        return {"image_aspect_ratio": "pad" if aspect == "pad" else "square"}
    pinpoints = [[columns * rule.crop_size, rows * rule.crop_size] for rows, columns in rule.grids]
    return {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": pinpoints,  # width and height
        "mm_patch_merge_type": "spatial_unpad",
    }


def _projector_type(projector: nn.Module) -> str:
    if isinstance(projector, LinearConnector):
        return "linear"
    return f"mlp{cast(MlpConnector, projector).depth}x_gelu"


def _full_state(
    model: VisionLanguageModel, language_model: PreTrainedModel, with_tower: bool
) -> dict[str, Tensor]:
    state = dict(language_model.state_dict())
    if language_model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    state |= projector_names(model.multi_modal_projector, model.projector_state())
    if with_tower:
        encoder = stock_tower(model.vision_tower).encoder
        state |= {_TOWER_PREFIX + name: value for name, value in encoder.state_dict().items()}
    return state


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().cpu()
    return (value.to(dtype) if value.is_floating_point() else value).contiguous()


def _write_trained(out: Path, model: VisionLanguageModel, contents: Contents, base: str) -> None:
    """Write what was trained on a base: the projector, and adapters if there are any."""
    state = {
        name: value.detach().cpu().contiguous()
        for name, value in projector_names(
            model.multi_modal_projector, model.projector_state()
        ).items()
    }
    if contents == "projector":
        torch.save(state, out / "mm_projector.bin")
        return
    prefixed = {f"base_model.model.{name}": value for name, value in state.items()}
    torch.save(prefixed, out / "non_lora_trainables.bin")
    from safetensors.torch import save_file

    from vlm_sft.checkpoint.components import adapter_tensors

    tensors = {k: v.detach().cpu().contiguous() for k, v in adapter_tensors(model).items()}
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    write_json(out / "adapter_config.json", _adapter_config(model, base))


def _adapter_config(model: VisionLanguageModel, base: str) -> dict[str, Any]:
    """Return `adapter_config.json` with no more keys than old versions of peft accept."""
    config = cast(Any, model.language_model).peft_config["default"]
    tree = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    return tree | {key: True for key in ("use_rslora", "use_dora") if getattr(config, key)}


def _compare(
    checkpoint: LoadedModel, out: Path, contents: Contents, options: ExportOptions
) -> tuple[float, float]:
    """Load the folder as `model.from_checkpoint` does; return the largest difference and logit."""
    sample: Sample = options.sample or noise_sample(checkpoint.model)
    expected = sample_logits(checkpoint.model, sample)
    found = read_finished(str(out))
    config = resolve_model(ModelConfig.model_validate({"from_checkpoint": str(out)}), found)
    language_model = causal_lm(checkpoint.model.language_model)
    own = language_model.get_input_embeddings().weight.dtype
    dtype = options.dtype if options.dtype is not None and contents == "full" else own
    reloaded = build_model(config, dtype=dtype, seed=0).eval()
    logits = sample_logits(reloaded, sample)
    return (logits - expected).abs().max().item(), expected.abs().max().item()


def _usage(class_name: str, contents: Contents, base: str | None) -> str:
    # The original code chooses the class by words in the name that it is given.
    name = _NAMES[class_name] + ("-lora" if contents == "lora" else "")
    if base is not None and not is_hub_name(base):
        base = Path(base).name
    return (
        "from llava.model.builder import load_pretrained_model\n\n"
        "tokenizer, model, image_processor, context_len = load_pretrained_model(\n"
        f'    "FOLDER", {base!r}, "{name}"\n)\n'
    )
