"""The longest sequence of a language model, and whether it fails on longer ones."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_NAMES: Final = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


@dataclass(frozen=True)
class PositionLimit:
    """Longest sequence of a language model.

    Attributes:
        tokens: Longest sequence in tokens, according to the configuration.
        key: Name of that setting in the configuration.
        is_hard: The model fails on longer sequences because it has a table of positions. Otherwise
            (RoPE, ALiBi) it computes positions, but was not trained on longer sequences.
    """

    tokens: int
    key: str
    is_hard: bool


def find_position_limit(model: PreTrainedModel) -> PositionLimit | None:
    """Return the limit of a model on the CPU, or None; runs one position beyond the limit."""
    config = model.config.get_text_config()
    key = next((name for name in _NAMES if isinstance(getattr(config, name, None), int)), None)
    if key is None:
        return None
    table = int(getattr(config, key))
    is_hard = _runs_at(model, table - 1) and not _runs_at(model, table)
    return PositionLimit(table if is_hard else _scaled(config, table), key, is_hard)


def position_limit(model: nn.Module) -> PositionLimit | None:
    """Return what `find_position_limit` found when the model was built."""
    found: PositionLimit | None = getattr(model, "position_limit", None)
    return found


def _scaled(config: PretrainedConfig, tokens: int) -> int:
    """Return the length after RoPE scaling, which some configurations already include."""
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict) or not isinstance(rope.get("factor"), (int, float)):
        return tokens
    original = rope.get("original_max_position_embeddings")
    if isinstance(original, int):
        return max(tokens, int(original * rope["factor"]))
    is_plain = rope.get("rope_type", rope.get("type")) in ("linear", "dynamic")
    return int(tokens * rope["factor"]) if is_plain else tokens


@torch.no_grad()
def _runs_at(model: PreTrainedModel, position: int) -> bool:
    """Return whether the decoder can compute a token at `position` (from 0)."""
    table: Any = model.get_input_embeddings()
    embeds = table.weight[:1].detach().to(model.dtype)[None]
    decoder: Any = model.get_decoder() or model.base_model
    training = model.training
    model.eval()
    try:
        decoder(inputs_embeds=embeds, position_ids=torch.tensor([[position]]), use_cache=False)
    except (IndexError, RuntimeError):
        return False
    except (TypeError, ValueError):  # it takes no positions, so it has no table of them
        return True
    finally:
        model.train(training)
    return True
