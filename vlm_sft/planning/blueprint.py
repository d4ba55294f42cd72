"""A run's model as shapes alone: built on the meta device from configurations, then made fake."""

import copy
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from vlm_sft.config.schema import (
    LanguageModelConfig,
    LoraConfig,
    ModelConfig,
    VisionTowerConfig,
    means_folder,
)
from vlm_sft.errors import UserError
from vlm_sft.model.build import build_vision_tower
from vlm_sft.model.dtypes import cast_floating
from vlm_sft.model.lora import add_lora
from vlm_sft.model.parts import set_trainable
from vlm_sft.model.projector import build_projector
from vlm_sft.model.vision_tower import VisionTower
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm, decoder_of
from vlm_sft.utils.libraries import library_call
from vlm_sft.utils.model_folders import custom_code_refused, require_plain_folder
from vlm_sft.utils.reading import read_json

_TOWER = "model.vision_tower"
_LANGUAGE = "model.language_model"


class Blueprint:
    """The shapes of a run's model.

    Args:
        config: Tower, projector and language model; a `name` is looked up in its folder or in the
            local cache, for its configuration alone.
        dtype: Of the frozen weights.

    Raises:
        UserError: A configuration is not on this machine, or no model can be built from it.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        self.dtype, self._projector_type = dtype, config.projector_type
        self.language_config = language_model_config(config.language_model)
        asked = config.language_model.attn_implementation
        # Flash-attention runs on GPUs alone, and keeps what SDPA keeps; None: transformers' choice.
        self._attention = asked if asked in ("eager", "sdpa") else None
        with torch.device("meta"):
            self.tower = build_vision_tower(tower_without_weights(config.vision_tower), dtype=dtype)
            layers = layers_of(self._language_model(None))
        self.num_layers = len(layers)
        self.layers_are_alike = len({_signature(layer) for layer in layers}) == 1 and (
            len(set(getattr(self.language_config, "layer_types", None) or [None])) == 1
        )

    def model(
        self, trainable: Set[str], *, lora: LoraConfig | None = None, num_layers: int | None = None
    ) -> VisionLanguageModel:
        """The model on the meta device with these parts thawed; its tower only gives features.

        Args:
            trainable: See `parts.set_trainable`.
            lora: Adapters, where `adapter` is trained.
            num_layers: Of the language model; None: all.
        """
        with torch.device("meta"):
            language_model = self._language_model(num_layers)
            hidden = language_model.get_input_embeddings().weight.shape[1]
            projector = build_projector(self._projector_type, self.tower.width, hidden, seed=0)
            stand_in = cast(VisionTower, GivenFeatures(self.tower))
            model = VisionLanguageModel(stand_in, projector, language_model)
            if lora is not None:
                add_lora(model, lora, seed=0)
        model.requires_grad_(False)
        set_trainable(model, trainable)
        return model

    def _language_model(self, num_layers: int | None) -> PreTrainedModel:
        config = copy.deepcopy(self.language_config)
        if num_layers is not None:
            config.num_hidden_layers = num_layers
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:num_layers]
        with library_call("transformers", _LANGUAGE, f"build a {config.model_type} model"):
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=self._attention,
                dtype=torch.float32,
                trust_remote_code=False,
            )
        cast_floating(model, self.dtype)
        return cast(PreTrainedModel, model)


def layers_of(language_model: nn.Module) -> list[nn.Module]:
    """The decoder's stack: its first module list of as many entries as the model has layers."""
    depth = causal_lm(language_model).config.get_text_config().num_hidden_layers
    for module in decoder_of(language_model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise UserError(
        f"{_LANGUAGE}: {type(causal_lm(language_model)).__name__} has no stack of {depth} layers, "
        "so its memory cannot be planned; take a model of another family"
    )


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    shapes = ((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return (type(layer).__name__, *sorted(shapes))


class GivenFeatures(nn.Module):
    """Stands for a tower: features of the right shape, without the work of making them."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.num_tokens, self.width = tower.num_tokens, tower.width
        self.image_spec, self._dtype = tower.image_spec, tower.dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        """`[N, 3, H, W]` to `[N, num_tokens, width]`."""
        return self.features(len(pixel_values))

    def features(self, images: int) -> Tensor:
        """`[N, num_tokens, width]`, as a feature cache gives them."""
        return torch.empty(images, self.num_tokens, self.width, dtype=self._dtype)


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Put fake CPU tensors of the same shapes in the place of a module's meta tensors."""
    made: dict[Tensor, nn.Parameter] = {}

    def fake(parameter: nn.Parameter) -> nn.Parameter:
        if parameter not in made:  # tied weights stay tied
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        return made[parameter]

    with mode:
        for child in module.modules():
            for name, parameter in child._parameters.items():
                if parameter is not None:
                    child._parameters[name] = fake(parameter)
            for name, buffer in child._buffers.items():
                if buffer is not None:
                    child._buffers[name] = torch.empty(
                        buffer.shape, dtype=buffer.dtype, device="cpu"
                    )


# --- configurations without weights


def tower_without_weights(config: VisionTowerConfig) -> VisionTowerConfig:
    """The same tower to be drawn at random, its shape read from configurations on this machine.

    Raises:
        UserError: The configuration is not here.
    """
    if config.config is not None:
        return config
    assert config.name is not None
    tree, size = _TOWER_CONFIGS[config.library](config.name)
    changes: dict[str, Any] = {"name": None, "weights": None, "config": tree}
    if config.image_size is None and size is not None:
        changes["image_size"] = size
    return config.model_copy(update=changes)


def _transformers_tower(name: str) -> tuple[dict[str, Any], int | None]:
    config = _local_config(name, f"{_TOWER}.name")
    tree: dict[str, Any] = config.to_dict()
    if "vision_config" in tree:  # a whole two-tower folder gives its vision part
        tree = {**config.vision_config.to_dict(), "model_type": config.model_type}
    preprocessing = _local_json(name, "preprocessor_config.json")
    size: Any = preprocessing.get("crop_size") or preprocessing.get("size")
    if not str(tree["model_type"]).startswith("dinov2"):
        return tree, None
    side = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    return tree, side


def _timm_tower(name: str) -> tuple[dict[str, Any], int | None]:
    if means_folder(name) or Path(name).expanduser().is_dir():
        saved = _local_json(name, "config.json")
        if "architecture" not in saved:
            raise UserError(f"{_TOWER}.name: {name} has no timm config.json with an 'architecture'")
        model_args = {k: v for k, v in saved.get("model_args", {}).items() if k != "num_classes"}
        return {"architecture": saved["architecture"], **model_args}, None
    return {"architecture": _registered(name)}, None


def _open_clip_tower(name: str) -> tuple[dict[str, Any], int | None]:
    if name.startswith("local-dir:"):
        folder = name.removeprefix("local-dir:")
        saved = _local_json(folder, "open_clip_config.json").get("model_cfg")
        if saved is None:
            raise UserError(f"{_TOWER}.name: {folder} has no open_clip_config.json; add it")
        return saved, None
    return {"model_name": _registered(name)}, None


_TOWER_CONFIGS: dict[str, Callable[[str], tuple[dict[str, Any], int | None]]] = {
    "transformers": _transformers_tower,
    "timm": _timm_tower,
    "open_clip": _open_clip_tower,
}


def _registered(name: str) -> str:
    if name.startswith(("hf-hub:", "hf_hub:")):
        raise UserError(
            f"{_TOWER}.name: the shape of {name!r} is only known to the hub, and planning "
            "downloads nothing; give its architecture's name or a local folder instead"
        )
    return name


def language_model_config(config: LanguageModelConfig) -> PretrainedConfig:
    """The language model's configuration, from the run's file, a folder, or the local cache.

    Raises:
        UserError: It is not on this machine, or of an unknown kind.
    """
    if config.name is not None:
        return _local_config(config.name, f"{_LANGUAGE}.name")
    tree = dict(cast(dict[str, Any], config.config))
    model_type = tree.pop("model_type", None)
    if model_type is None:
        raise UserError(f"{_LANGUAGE}.config: key 'model_type' is missing; add it, e.g. llama")
    with library_call("transformers", f"{_LANGUAGE}.config", f"build a {model_type} model"):
        return AutoConfig.for_model(model_type, **copy.deepcopy(tree))


def require_local_tokenizer(config: LanguageModelConfig) -> None:
    """Refuse a tokenizer that would have to be downloaded.

    Raises:
        UserError: It is neither a folder nor in the local cache.
    """
    name = config.tokenizer or config.name
    assert name is not None
    if name == "bytes" or means_folder(name) or Path(name).expanduser().is_dir():
        return  # a folder that is not there is told when it is loaded
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if not any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        raise _not_here(name, _LANGUAGE, "tokenizer", "config.json 'tokenizer*'")


def _local_config(name: str, where: str) -> PretrainedConfig:
    folder = Path(name).expanduser()
    if means_folder(name) and not folder.is_dir():
        raise UserError(f"{where}: no such folder {name!r}; give a model folder or a hub name")
    if folder.is_dir():
        action = f"read the config.json of {name!r}"
        with library_call("transformers", where, action), custom_code_refused(where, name):
            require_plain_folder(folder)
            return AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
    try:
        with custom_code_refused(where, name):
            return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise _not_here(name, where, "configuration", "'*.json'") from error


def _local_json(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a folder or of the local cache; empty where there is none."""
    folder = Path(name).expanduser()
    path: Any = folder / file if folder.is_dir() else try_to_load_from_cache(name, file)
    try:
        return cast(dict[str, Any], read_json(Path(path)))
    except (OSError, TypeError, ValueError):
        return {}


def _not_here(name: str, where: str, what: str, files: str) -> UserError:
    return UserError(
        f"{where}: the {what} of {name!r} is not on this machine and planning downloads nothing; "
        f"fetch these small files with `hf download {name} --include {files}`, or name a local "
        "folder or a `config:` of the same shape"
    )
