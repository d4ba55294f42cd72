"""Relative cost of a model's parts, from their numbers of parameters."""

from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.quantization import num_weights
from vlm_sft.model.vlm import VisionLanguageModel


def image_cost(model: VisionLanguageModel) -> float:
    """Return the cost of encoding an image, in tokens of the language model.

    A forward pass takes 2 FLOPs per parameter and token. The tower runs forward only. The language
    model also runs backward: as many FLOPs again if its weights are frozen (gradients of its
    activations), twice as many if they are trainable.
    """
    tower = sum(map(num_weights, model.vision_tower.parameters()))
    weights = list(causal_lm(model.language_model).parameters())
    passes = 3 if all(p.requires_grad for p in weights) else 2
    return tower * model.vision_tower.num_tokens / (passes * sum(map(num_weights, weights)))
