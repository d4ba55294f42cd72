"""Build a run's model without weights: on the meta device, then as fake CPU tensors."""

import copy
from collections.abc import Set
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from vlm_sft.config.schema import LoraConfig, ModelConfig
from vlm_sft.data.image_layout import layout_rule
from vlm_sft.model.build import build_vision_tower
from vlm_sft.model.connectors.build import build_connector
from vlm_sft.model.dtypes import cast_floating
from vlm_sft.model.image_tokens import new_image_newline
from vlm_sft.model.language_model import decoder_layers
from vlm_sft.model.lora import add_lora
from vlm_sft.model.parts import set_trainable
from vlm_sft.model.vision_tower import VisionTower
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.planning.local_configs import language_model_config, tower_without_weights
from vlm_sft.utils.libraries import library_call


class MetaModel:
    """The shapes of a run's model, and copies of it on the meta device.

    Args:
        config: Tower, projector and language model. Of a `name`, only the model configuration is
            read, from its folder or the local cache.
        dtype: The dtype of the frozen weights.

    Attributes:
        tower: The vision tower on the meta device.
        language_config: Configuration of the language model.
        num_layers: Decoder layers of the language model.
        layout_rule: Gives crops and tokens of every image.
        has_identical_layers: Whether all decoder layers have the same modules, shapes and kind of
            attention, so that the cost of one is the cost of every other.

    Raises:
        UserError: If a configuration is not on this machine, or no model can be built from it.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        self.dtype, self._config = dtype, config
        self.language_config = language_model_config(config.language_model)
        # flash-attention does not run on the CPU; SDPA saves the same tensors for the backward
        # pass. None leaves the choice to transformers.
        attention = config.language_model.attn_implementation
        self._attention = attention if attention in ("eager", "sdpa") else None
        with torch.device("meta"):
            self.tower = build_vision_tower(tower_without_weights(config.vision_tower), dtype=dtype)
            layers = decoder_layers(self._language_model(None))
        self.num_layers = len(layers)
        size = self.tower.image_spec.size
        self.layout_rule = layout_rule(
            config.image_tiling, config.token_grid(self.tower.grid), size
        )
        # Gemma 2 and others alternate between full and sliding-window attention in layers of the
        # same shapes; `layer_types` lists the kind of each.
        kinds = set(getattr(self.language_config, "layer_types", None) or [None])
        self.has_identical_layers = len({_signature(layer) for layer in layers}) == len(kinds) == 1

    def build(
        self, trainable: Set[str], *, lora: LoraConfig | None = None, num_layers: int | None = None
    ) -> VisionLanguageModel:
        """Return the model on the meta device; its tower is replaced by a `FeatureStub`.

        Args:
            trainable: The trainable parts; see `parts.set_trainable`.
            lora: Adapters of the language model; None for none.
            num_layers: Decoder layers to build; None for all.
        """
        with torch.device("meta"):
            language_model = self._language_model(num_layers)
            hidden = language_model.get_input_embeddings().weight.shape[1]
            connector = build_connector(
                self._config.projector_type,
                self.tower.grid,
                self.tower.width,
                hidden,
                seed=0,
                num_queries=self._config.num_queries,
            )
            stub = cast(VisionTower, FeatureStub(self.tower))
            newline = new_image_newline(hidden, seed=0) if self.layout_rule.has_newline else None
            model = VisionLanguageModel(stub, connector, language_model, self.layout_rule, newline)
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
        action = f"build a {config.model_type} model"
        with library_call("transformers", "model.language_model", action):
            model = AutoModelForCausalLM.from_config(
                config,
                attn_implementation=self._attention,
                dtype=torch.float32,
                trust_remote_code=False,
            )
        cast_floating(model, self.dtype)
        return cast(PreTrainedModel, model)


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """Return the class of a layer and the names and shapes of its parameters."""
    shapes = ((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return (type(layer).__name__, *sorted(shapes))


class FeatureStub(nn.Module):
    """A replacement for the vision tower that returns features of the right shape at no cost.

    The frozen tower keeps nothing for the backward pass, so it is simulated apart from the rest of
    the model (`simulate.TowerSimulation`).
    """

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.num_tokens, self.width = tower.num_tokens, tower.width
        self.image_spec, self._dtype = tower.image_spec, tower.dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features `[N, num_tokens, width]` for images `[N, 3, H, W]`."""
        return self.features(len(pixel_values))

    def features(self, num_images: int) -> Tensor:
        """Return features `[num_images, num_tokens, width]`, as a feature cache does."""
        return torch.empty(num_images, self.num_tokens, self.width, dtype=self._dtype)


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the meta tensors of a module by fake CPU tensors of the same shapes, in place.

    Fake CPU tensors dispatch to the CPU's kernels, whose saved tensors are those of real ones; meta
    tensors would select other kernels.
    """
    replaced: dict[Tensor, nn.Parameter] = {}

    def fake(parameter: nn.Parameter) -> nn.Parameter:
        if parameter not in replaced:  # keeps tied weights tied
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            replaced[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        return replaced[parameter]

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
