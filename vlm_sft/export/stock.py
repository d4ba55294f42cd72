"""Map a model to the stock classes of transformers: tower, projector, language model and head.

Every function raises a `UserError` if the classes of transformers cannot hold a part of the model;
`obstacles.export_obstacles` collects these errors without exporting anything.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Model,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)

from vlm_sft.data.image_layout import LayoutRule
from vlm_sft.errors import UserError
from vlm_sft.model.connectors.base import Connector
from vlm_sft.model.connectors.linear import LinearConnector
from vlm_sft.model.connectors.mlp import MlpConnector
from vlm_sft.model.connectors.pixel_shuffle_mlp import PixelShuffleMlpConnector
from vlm_sft.model.vision_tower import VisionTower
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.libraries import one_line

ROW_MULTIPLE: Final = 64
"""A vocabulary that grows is padded to a multiple of this, which GPU kernels prefer."""

_VISION_LEVEL: Final = "vision_model."
"""Level in the released names of CLIP and SigLIP that transformers has dropped in memory."""


@dataclass(frozen=True)
class StockTower:
    """A vision tower as a class of transformers, and how its image tokens are selected there.

    Attributes:
        encoder: Encoder with the same features as the tower.
        model_class: Vision-language class for this encoder.
        feature_layer: `vision_feature_layer` of the configuration.
        select_strategy: `vision_feature_select_strategy`: "default" drops the class token.
        num_additional_image_tokens: Number of class tokens, before any is dropped.
        patch_size: Patch size from which the processor computes the number of image tokens.
        released_level: Prefix of the encoder's tensor names in released folders, after
            `vision_tower.`.
    """

    encoder: PreTrainedModel
    model_class: type[PreTrainedModel]
    feature_layer: int | list[int]
    select_strategy: str
    num_additional_image_tokens: int
    patch_size: int
    released_level: str = ""


def stock_vision(model: VisionLanguageModel) -> StockTower:
    """Return the tower of a model, with the class that divides images as the model does.

    Raises:
        UserError: No class has the same features, or divides images in the same way.
    """
    rule = model.layout_rule
    if rule.tiling == "dynamic":
        return _internvl_tower(model.vision_tower)
    tower = stock_tower(model.vision_tower)
    if not rule.needs_sizes:
        return tower
    if tower.model_class is not LlavaForConditionalGeneration:
        raise UserError(
            "transformers' LLaVA-NeXT and LLaVA-OneVision hold CLIP, SigLIP and DINOv2 towers, and "
            f"{tower.model_class.__name__} does not divide images (model.image_tiling); train with "
            "such a tower to export"
        )
    onevision = rule.max_crops is not None
    return replace(
        tower,
        model_class=LlavaOnevisionForConditionalGeneration
        if onevision
        else LlavaNextForConditionalGeneration,
    )


def _internvl_tower(tower: VisionTower) -> StockTower:
    """Return the tower for the one class that divides images by `dynamic`.

    Raises:
        UserError: It is another tower, or InternVL reads other features of it.
    """
    encoder: Any = tower.encoder
    if tower.library != "transformers" or not isinstance(encoder, InternVLVisionModel):
        name = getattr(getattr(encoder, "config", None), "model_type", tower.library)
        raise UserError(
            "of the classes of transformers, only InternVLForConditionalGeneration divides images "
            "by model.image_tiling.layout: dynamic, and it holds only internvl_vision towers: a "
            f"{name} tower would be replaced by a random one on reload; transformers holds images "
            "in anyres and anyres_max_N (LLaVA-NeXT, LLaVA-OneVision)"
        )
    _refuse_pooling(tower)
    layers = list(tower.feature_layers)
    if len(layers) != 1:
        raise UserError(
            "transformers' InternVL reads one layer of the vision tower (model.vision_tower."
            f"feature_layers is {layers}); train with feature_layers: [-1] to export"
        )
    if not encoder.config.use_mean_pooling:
        raise UserError(
            "transformers' InternVL puts a norm after the last layer of this vision tower "
            "(use_mean_pooling: false), which training does not; take a tower with "
            "use_mean_pooling: true to export"
        )
    return StockTower(
        encoder=encoder,
        model_class=InternVLForConditionalGeneration,
        feature_layer=layers[0],
        select_strategy="default",  # without the class token, as pixel shuffle needs it
        num_additional_image_tokens=1,
        patch_size=encoder.config.patch_size[0],
    )


def is_internvl(model: VisionLanguageModel) -> bool:
    """Return whether the model's class in transformers can only be InternVL's."""
    return model.layout_rule.tiling == "dynamic"


def require_image_tokens(model: VisionLanguageModel, image_tokens: tuple[str, str]) -> None:
    """Check that a model for InternVL's processor was trained with what it writes around images.

    Args:
        model: Any model.
        image_tokens: The chat template's `image_start` and `image_end`.

    Raises:
        UserError: One of the tokens is missing.
    """
    if is_internvl(model) and not all(image_tokens):
        raise UserError(
            "InternVLProcessor writes a start and an end token around every image (<img>, </img>), "
            "with which this model was not trained: its chat template does not name both "
            "image_start and image_end; train with data.template: internvl2_5 to export"
        )


def stock_tower(tower: VisionTower) -> StockTower:
    """Return the tower as a class of transformers; weights are shared where possible.

    Raises:
        UserError: No class has the same features.
    """
    if tower.library == "timm":
        return _timm_tower(tower)
    _refuse_pooling(tower)
    encoder: Any = tower.encoder
    if tower.library == "open_clip":
        from vlm_sft.export.clip_weights import clip_from_open_clip

        encoder = clip_from_open_clip(encoder)
    if not isinstance(encoder, (CLIPVisionModel, SiglipVisionModel, Dinov2Model)):
        raise UserError(
            f"transformers' LLaVA classes cannot hold the vision tower {type(encoder).__name__}; "
            "they hold CLIP, SigLIP and DINOv2"
        )
    num_class_tokens = 0 if isinstance(encoder, SiglipVisionModel) else 1
    drops = num_class_tokens == 1 and tower.feature_select == "patch"
    layers = list(tower.feature_layers)
    return StockTower(
        encoder=encoder,
        model_class=LlavaForConditionalGeneration,
        feature_layer=layers[0] if len(layers) == 1 else layers,
        select_strategy="default" if drops else "full",
        num_additional_image_tokens=num_class_tokens,
        patch_size=encoder.config.patch_size,
        released_level="" if isinstance(encoder, Dinov2Model) else _VISION_LEVEL,
    )


def _refuse_pooling(tower: VisionTower) -> None:
    if tower.grid_pool is not None:
        raise UserError(
            "no class of transformers averages the feature grid of this vision tower "
            f"(model.vision_tower.grid_pool is {tower.grid_pool}); train without grid_pool "
            "to export"
        )


def _timm_tower(tower: VisionTower) -> StockTower:
    """Return a convolutional network of timm for FastVLM, which reads its last feature map."""
    from vlm_sft.model.towers.timm import FeatureMaps, timm_source

    model: Any = tower.encoder
    source = timm_source(model)
    if not isinstance(source, FeatureMaps):
        raise UserError(
            f"transformers' LLaVA classes cannot hold timm's {type(model).__name__}; of timm they "
            "hold convolutional networks; load a ViT with library: transformers or open_clip"
        )
    if [layer % source.num_states for layer in tower.feature_layers] != [source.num_stages]:
        raise UserError(
            "transformers' FastVlm reads only the last feature map of a timm network "
            f"(model.vision_tower.feature_layers is {tower.feature_layers}); train with "
            "feature_layers: [-1] to export"
        )
    pools = tower.grid_pool is not None
    encoder = _pooled_timm(model, tower) if pools else _wrapped_timm(model, tower)
    _require_same_features(encoder, tower)
    return StockTower(
        encoder=encoder,
        model_class=FastVlmForConditionalGeneration,
        feature_layer=-1,
        select_strategy="full",
        num_additional_image_tokens=0,
        patch_size=_patch_size(tower.image_spec.size, tower.num_tokens),
    )


def _pooled_timm(model: Any, tower: VisionTower) -> PreTrainedModel:
    """Return an EfficientNet of transformers that also averages its feature map."""
    from vlm_sft.export.efficientnet import pooled_efficientnet

    pooled = tower.grid_pool
    try:
        with exported(f"timm's {type(model).__name__}"):
            return pooled_efficientnet(model, tower.image_spec.size, cast(int, pooled))
    except UserError as error:
        raise UserError(
            "no class of transformers averages the feature grid of this vision tower "
            f"(model.vision_tower.grid_pool is {pooled}): {error}; train without grid_pool to "
            "export, or with an EfficientNet-Lite and half its grid"
        ) from None


def _wrapped_timm(model: Any, tower: VisionTower) -> TimmWrapperModel:
    arguments = dict(model.creation_arguments)
    config = TimmWrapperConfig(
        architecture=model.pretrained_cfg["architecture"],
        model_args=arguments or None,
        do_pooling=False,
        num_labels=0,
        hidden_size=tower.width,
    )
    with exported(f"timm's {type(model).__name__}"), torch.device("meta"):
        wrapper = TimmWrapperModel(config)
    wrapper.timm_model = model
    return wrapper


@torch.no_grad()
def _require_same_features(encoder: PreTrainedModel, tower: VisionTower) -> None:
    """Compare the features that FastVLM reads with those of the tower, on a noise image."""
    if tower.device.type == "meta":
        return  # no weights to compare with, e.g. in `plan`
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, tower.image_spec.size, tower.image_spec.size)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    expected = tower(pixels)
    with exported(f"timm's {type(tower.encoder).__name__}"):
        found = cast(Any, encoder)(tower.normalized(pixels)).last_hidden_state
        found = found.flatten(2).permute(0, 2, 1)
    limit = 1e-3 if tower.dtype == torch.float32 else 5e-2
    same = found.shape == expected.shape
    if not same or not (found - expected).abs().max() <= limit * expected.abs().max():
        raise UserError(
            f"transformers' FastVlm reads other features of timm's {type(tower.encoder).__name__} "
            "than training does; to export, use a tower of transformers"
        )


def _patch_size(side: int, num_tokens: int) -> int:
    """Return the patch size from which LLaVA's processor computes `num_tokens`."""
    grid = round(num_tokens**0.5)
    patch = side // grid
    if grid * grid != num_tokens or (side // patch) ** 2 != num_tokens:
        raise UserError(
            f"LLaVA's processor cannot count the {num_tokens} tokens of an image of {side} pixels; "
            "choose a model.vision_tower.image_size that is a multiple of the tower's stride"
        )
    return patch


def stock_projector(model: VisionLanguageModel) -> dict[str, Tensor]:
    """Return the weights of the stock projector, by name.

    A linear projector becomes its one layer and an identity.

    Raises:
        UserError: It has more than two layers, is not an MLP, or is not InternVL's for InternVL.
    """
    projector = model.multi_modal_projector
    state = projector.state_dict()
    if is_internvl(model):
        if not isinstance(projector, PixelShuffleMlpConnector):
            raise UserError(
                "transformers' InternVL (model.image_tiling.layout: dynamic) has one projector; "
                "train with model.projector_type: pixel_shuffle_mlp to export"
            )
        return dict(state)
    if is_linear(projector):
        names = ("weight", "bias") if "weight" in state else ("linear_1.weight", "linear_1.bias")
        weight, bias = (state[name] for name in names)
        hidden = weight.shape[0]
        return {
            "linear_1.weight": weight,
            "linear_1.bias": bias,
            "linear_2.weight": torch.eye(hidden, device=weight.device),
            "linear_2.bias": torch.zeros(hidden, device=weight.device),
        }
    if isinstance(projector, PixelShuffleMlpConnector):
        raise UserError(
            "transformers has pixel shuffle (model.projector_type: pixel_shuffle_mlp) only in "
            "InternVLForConditionalGeneration, whose vision tower is an InternViT and whose images "
            "are in tiles (model.image_tiling.layout: dynamic); train with mlp2x_gelu or linear to "
            "export"
        )
    if not isinstance(projector, MlpConnector):
        name = type(projector).__name__.removesuffix("Connector").lower()
        raise UserError(
            f"no class of transformers has this projector (model.projector_type: {name}); train "
            "with mlp2x_gelu or linear to export"
        )
    if projector.depth != 2:
        raise UserError(
            f"the projector of transformers' LLaVA has two layers and this one (model."
            f"projector_type: mlp{projector.depth}x_gelu) has {projector.depth}; train with "
            "mlp2x_gelu or linear to export"
        )
    return dict(state)


def is_linear(projector: Connector) -> bool:
    """Return whether the projector is one linear layer, without activation."""
    return isinstance(projector, LinearConnector) or (
        isinstance(projector, MlpConnector) and projector.depth == 1
    )


def head_scale(language_model: PreTrainedModel) -> float:
    """Return the factor by which the output head scales its logits, to be put into its weights.

    Cohere multiplies its logits by `logit_scale`, Granite divides them by `logits_scaling`.

    Raises:
        UserError: The head is more than a matrix: it has a bias, or soft-caps its logits.
    """
    config = language_model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        raise UserError(
            "transformers' LLaVA has a plain output head and this "
            f"{config.model_type} model has final_logit_softcapping = {cap}; its answers would "
            "differ"
        )
    head: Any = language_model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(
            "the output head of transformers' LLaVA has no bias and "
            f"{type(language_model).__name__}'s has one"
        )
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return (1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor))


def stock_text_config(language_model: PreTrainedModel, rows: int) -> Any:
    """Return a copy of the language model's configuration with a plain, untied head."""
    config: Any = copy.deepcopy(language_model.config.get_text_config())
    config.vocab_size = rows
    config.tie_word_embeddings = False
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 1.0)  # the scale is in the weights of the head
    return config


def stock_config(
    model: VisionLanguageModel,
    tower: StockTower,
    text_config: PretrainedConfig,
    image_token_id: int,
) -> PretrainedConfig:
    """Return the configuration of the vision-language class that holds the model."""
    if model.layout_rule.needs_sizes:
        return _tiled_config(model, tower, text_config, image_token_id)
    fast = tower.model_class is FastVlmForConditionalGeneration
    config_class: Any = FastVlmConfig if fast else LlavaConfig
    return cast(
        PretrainedConfig,
        config_class(
            # A copy: LlavaConfig changes the object, which the model uses, too.
            vision_config=copy.deepcopy(tower.encoder.config),
            text_config=text_config,
            image_token_index=image_token_id,
            image_seq_length=model.vision_tower.num_tokens,
            projector_hidden_act="linear" if is_linear(model.multi_modal_projector) else "gelu",
            vision_feature_select_strategy=tower.select_strategy,
            vision_feature_layer=tower.feature_layer,
            tie_word_embeddings=False,
        ),
    )


def _tiled_config(
    model: VisionLanguageModel,
    tower: StockTower,
    text_config: PretrainedConfig,
    image_token_id: int,
) -> PretrainedConfig:
    rule = model.layout_rule
    options: dict[str, Any] = {
        "vision_config": copy.deepcopy(tower.encoder.config),
        "text_config": text_config,
        "projector_hidden_act": "linear" if is_linear(model.multi_modal_projector) else "gelu",
        "vision_feature_select_strategy": tower.select_strategy,
        "vision_feature_layer": tower.feature_layer,
        "tie_word_embeddings": False,
    }
    if is_internvl(model):
        tokens = rule.crop_tokens
        return InternVLConfig(image_token_id=image_token_id, image_seq_length=tokens, **options)
    options |= {
        "image_token_index": image_token_id,
        "image_grid_pinpoints": grid_pinpoints(rule),
    }
    if rule.max_crops is None:
        return LlavaNextConfig(image_seq_length=rule.crop_tokens, **options)
    # An id that no text has: there are no videos.
    video = int(cast(Any, text_config).vocab_size)
    name = f"anyres_max_{rule.max_crops}"
    return LlavaOnevisionConfig(video_token_index=video, vision_aspect_ratio=name, **options)


def grid_pinpoints(rule: LayoutRule) -> list[list[int]]:
    """Return the grids of a rule as transformers takes them: height and width in pixels."""
    return [[rows * rule.crop_size, columns * rule.crop_size] for rows, columns in rule.grids]


def empty_stock_model(
    model_class: type[PreTrainedModel], config: PretrainedConfig
) -> PreTrainedModel:
    """Build a vision-language model on the meta device, without memory for weights.

    Raises:
        UserError: transformers cannot build it.
    """
    kind = cast(Any, config).text_config.model_type
    with exported(f"the language model ({kind})"), torch.device("meta"):
        return cast(PreTrainedModel, cast(Any, model_class)(config))


def body_of(language_model: PreTrainedModel, stock: PreTrainedModel) -> nn.Module:
    """Return the part of a causal language model that is `language_model` in the stock class.

    Raises:
        UserError: The language model has no such part.
    """
    wanted = type(cast(Any, stock).model.language_model)
    base = language_model.base_model
    if isinstance(base, wanted):
        return cast(nn.Module, base)
    decoder = language_model.get_decoder()
    if isinstance(decoder, wanted):
        return cast(nn.Module, decoder)
    raise UserError(
        f"transformers' LLaVA takes {wanted.__name__} for a {language_model.config.model_type} "
        f"model and this one has {type(base).__name__}"
    )


def tied_config(
    language_model: PreTrainedModel,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
) -> PretrainedConfig:
    """Return `config`, with the head tied to the embeddings if the language model's is.

    The head stays its own matrix where the stock class cannot tie it for this family, and where the
    logits are scaled: the stock head has no scale, so the weights of the exported head include it.

    Args:
        language_model: A causal language model.
        model_class: The vision-language class.
        config: As `stock_config` returns it; it is changed.
    """
    head: Any = language_model.get_output_embeddings()
    table = language_model.get_input_embeddings().weight
    if head.weight.data_ptr() != table.data_ptr() or head_scale(language_model) != 1.0:
        return config
    stock: Any = empty_stock_model(model_class, config)
    if "embed_tokens.weight" in stock.model.language_model.state_dict():
        both: Any = config  # both levels must agree
        both.tie_word_embeddings = both.text_config.tie_word_embeddings = True
    return config


def require_language_model(language_model: PreTrainedModel) -> None:
    """Check by names and shapes that the stock classes hold the language model.

    Raises:
        UserError: They do not.
    """
    head_scale(language_model)
    table = language_model.get_input_embeddings().weight
    text_config = stock_text_config(language_model, table.shape[0])
    vision = CLIPVisionConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    stock = empty_stock_model(
        LlavaForConditionalGeneration, LlavaConfig(vision_config=vision, text_config=text_config)
    )
    with exported(f"the language model ({text_config.model_type})"), torch.device("meta"):
        # A new model: with adapters or 4-bit weights, names and shapes are different.
        plain = AutoModelForCausalLM.from_config(language_model.config, trust_remote_code=False)
    found = {f"language_model.{k}": v.shape for k, v in body_of(plain, stock).state_dict().items()}
    found["lm_head.weight"] = cast(Any, plain.get_output_embeddings()).weight.shape
    wanted = {
        name.removeprefix("model."): value.shape
        for name, value in stock.state_dict().items()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            ours, theirs = _shape(found.get(name)), _shape(wanted.get(name))
            raise UserError(
                f"transformers' LLaVA cannot hold the language model ({text_config.model_type}): "
                f"{name} is {ours} in the model and {theirs} in LLaVA"
            )


def _shape(shape: Any) -> str:
    return "missing" if shape is None else str(list(shape))


@contextmanager
def exported(part: str) -> Iterator[None]:
    """Turn any exception of transformers about a part of a model into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"transformers cannot export {part}: {one_line(error)}") from error
