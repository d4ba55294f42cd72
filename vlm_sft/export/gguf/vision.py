"""Describe a vision tower with its projector as llama.cpp's image encoder loads it (mmproj)."""

from typing import Any, Final

from torch import Tensor
from transformers import CLIPVisionModel, SiglipVisionModel

from vlm_sft.config.fields import ImageAspect
from vlm_sft.data.images import ImageSpec
from vlm_sft.errors import UserError
from vlm_sft.export.gguf.files import GgufFile
from vlm_sft.export.stock import is_linear, stock_tower
from vlm_sft.model.connectors.mlp import MlpConnector
from vlm_sft.model.vlm import VisionLanguageModel

PAD_COLORS: Final = {(122, 116, 104): "mlp", (127, 127, 127): "janus_pro"}
"""llama.cpp's projector of two layers, by the color with which its images are made square."""

_EMBEDDINGS: Final = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding.weight": "v.patch_embd.weight",
    "embeddings.patch_embedding.bias": "v.patch_embd.bias",
    "embeddings.position_embedding.weight": "v.position_embd.weight",
    "pre_layrnorm.weight": "v.pre_ln.weight",
    "pre_layrnorm.bias": "v.pre_ln.bias",
}
_IN_LAYER: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_UNUSED: Final = ("post_layernorm.", "head.")
"""Parts of the encoder after the last state, which LLaVA does not use."""


def vision_file(model: VisionLanguageModel, aspect: ImageAspect, name: str) -> GgufFile:
    """Return the GGUF file of a model's vision tower and projector.

    Args:
        model: Has one crop an image, a CLIP or SigLIP tower and a projector of two layers.
        aspect: How images were made square in training.
        name: `general.name`.

    Raises:
        UserError: llama.cpp computes something else than the model; names what.
    """
    _require_expressible(model, aspect)
    tower = model.vision_tower
    encoder: Any = stock_tower(tower).encoder
    config = encoder.config
    kind = projector_type(model, encoder)
    states = config.num_hidden_layers + 1
    layers = [layer % states for layer in tower.feature_layers]
    # llama.cpp's siglip has no choice of the layer: it ends with the one that is used.
    depth = layers[0] if kind == "janus_pro" else config.num_hidden_layers
    fields: dict[str, Any] = {
        "general.type": "mmproj",
        "general.name": name,
        "clip.has_vision_encoder": True,
        "clip.projector_type": kind,
        "clip.use_gelu": config.hidden_act != "quick_gelu",
        "clip.vision.image_size": tower.image_spec.size,
        "clip.vision.patch_size": config.patch_size,
        "clip.vision.embedding_length": config.hidden_size,
        "clip.vision.feed_forward_length": config.intermediate_size,
        "clip.vision.projection_dim": _projection(model)["linear_2.weight"].shape[0],
        "clip.vision.block_count": depth,
        "clip.vision.attention.head_count": config.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": float(config.layer_norm_eps),
        "clip.vision.image_mean": list(map(float, tower.image_spec.mean)),
        "clip.vision.image_std": list(map(float, tower.image_spec.std)),
    }
    if kind == "mlp":
        fields["clip.vision.feature_layer"] = layers
    second = {"mlp": "mm.2", "janus_pro": "mm.1"}[kind]
    tensors = _encoder_tensors(encoder, depth)
    for key, value in _projection(model).items():
        layer, part = key.split(".")
        tensors[f"{'mm.0' if layer == 'linear_1' else second}.{part}"] = value
    exact = frozenset({"v.position_embd.weight"})
    return GgufFile("clip", fields, tensors, exact)


def projector_type(model: VisionLanguageModel, encoder: Any) -> str:
    """Return llama.cpp's name of the projector, which also decides how it prepares images.

    Raises:
        UserError: llama.cpp pads with another color, or does not read this tower's layers.
    """
    spec, layers = model.vision_tower.image_spec, model.vision_tower.feature_layers
    color = pad_color(spec)
    if color not in PAD_COLORS:
        raise UserError(
            f"llama.cpp makes images square with the colors {' and '.join(map(str, PAD_COLORS))}, "
            f"and this model was trained with {color} (image_mean {spec.mean})"
        )
    kind = PAD_COLORS[color]
    if kind == "janus_pro" and not isinstance(encoder, SiglipVisionModel):
        raise UserError(
            f"llama.cpp makes images square with {color} for SigLIP towers only, and this one is "
            f"{type(encoder).__name__}"
        )
    if kind == "janus_pro" and (len(layers) != 1 or encoder.config.hidden_act == "quick_gelu"):
        raise UserError(
            "llama.cpp reads one layer of a SigLIP tower whose images are padded with "
            f"{color}, and its activation must be gelu; this model has feature_layers "
            f"{layers} and {encoder.config.hidden_act}"
        )
    return kind


def pad_color(spec: ImageSpec) -> tuple[int, int, int]:
    """Return the color with which training makes images square."""
    red, green, blue = (int(255 * value) for value in spec.mean)
    return red, green, blue


def _require_expressible(model: VisionLanguageModel, aspect: ImageAspect) -> None:
    """Check everything but the padding color.

    Raises:
        UserError: llama.cpp cannot express the first thing that is named.
    """
    tower, projector, rule = model.vision_tower, model.multi_modal_projector, model.layout_rule
    if rule.needs_sizes:
        raise UserError(
            f"llama.cpp joins the crops of divided images (model.image_tiling: {rule.tiling}) "
            "without image_newline and with other grids than training; export with --to hf"
        )
    if is_linear(projector):
        raise UserError(
            "llama.cpp puts GELU after the first layer of a projector, so it has none for "
            "model.projector_type: linear; train with mlp2x_gelu"
        )
    if not isinstance(projector, MlpConnector) or projector.depth != 2:
        raise UserError(
            "llama.cpp's LLaVA has a projector of two layers (model.projector_type: mlp2x_gelu), "
            f"and this model has {type(projector).__name__} with other layers"
        )
    if tower.library == "timm":
        raise UserError(
            f"llama.cpp's LLaVA has CLIP and SigLIP towers, and this one is timm's "
            f"{type(tower.encoder).__name__}"
        )
    encoder: Any = stock_tower(tower).encoder
    if not isinstance(encoder, (CLIPVisionModel, SiglipVisionModel)):
        raise UserError(
            "llama.cpp's LLaVA has CLIP and SigLIP towers, and this one is "
            f"{type(encoder).__name__}"
        )
    if tower.feature_select == "cls_patch" and isinstance(encoder, CLIPVisionModel):
        raise UserError(
            "llama.cpp drops the class token, and this model was trained with it "
            "(model.vision_tower.feature_select: cls_patch)"
        )
    config = encoder.config
    states = config.num_hidden_layers + 1
    layers = [layer % states for layer in tower.feature_layers]
    if layers != sorted(set(layers)) or layers[0] == 0:
        raise UserError(
            "llama.cpp joins feature layers in ascending order, each once and none before the "
            f"first block; model.vision_tower.feature_layers is {tower.feature_layers}"
        )
    if config.hidden_act not in ("gelu", "gelu_pytorch_tanh", "quick_gelu"):
        raise UserError(f"llama.cpp's towers have no activation {config.hidden_act}")
    if config.intermediate_size == config.hidden_size:
        raise UserError(
            "llama.cpp takes the two layers of a block's MLP for each other when they are square "
            f"(intermediate_size = hidden_size = {config.hidden_size})"
        )
    if aspect != "pad":
        raise UserError(
            "llama.cpp pads images to a square, and this model was trained with data.image_aspect: "
            f"{aspect}"
        )
    if tower.image_spec.interpolation != "bicubic":
        raise UserError(
            "llama.cpp resizes images by bicubic interpolation, and this model was trained with "
            f"{tower.image_spec.interpolation}"
        )


def _projection(model: VisionLanguageModel) -> dict[str, Tensor]:
    return model.multi_modal_projector.state_dict()


def _encoder_tensors(encoder: Any, depth: int) -> dict[str, Tensor]:
    """Return the tensors of the first `depth` blocks and what is before them."""
    tensors: dict[str, Tensor] = {}
    for key, value in encoder.state_dict().items():
        key = key.removeprefix("vision_model.")
        if key.startswith(_UNUSED):
            continue
        if key in _EMBEDDINGS:
            tensors[_EMBEDDINGS[key]] = value
            continue
        encoder_name, layers, number, *inner, part = key.split(".")
        assert (encoder_name, layers) == ("encoder", "layers"), key
        if int(number) < depth:
            tensors[f"v.blk.{number}.{_IN_LAYER['.'.join(inner)]}.{part}"] = value
    return tensors
