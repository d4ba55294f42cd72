"""Arithmetic cost of a model's parts, from their parameter counts."""

from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.quantization import num_weights
from vlm_sft.model.vlm import VisionLanguageModel


def image_cost(model: VisionLanguageModel) -> float:
    """What encoding an image costs, in tokens through the language model, by their parameters.

    The tower runs forward only; the language model forward and backward, which is twice as much
    where its weights are frozen and three times where they learn (2 FLOP a parameter and token).
    """
    tower = sum(map(num_weights, model.vision_tower.parameters()))
    weights = list(causal_lm(model.language_model).parameters())
    passes = 3 if all(p.requires_grad for p in weights) else 2
    return tower * model.vision_tower.num_tokens / (passes * sum(map(num_weights, weights)))
