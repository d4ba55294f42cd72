"""Build a transformers vision-language model from the weights of a trained model."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vlm_sft.export.stock import (
    ROW_MULTIPLE,
    StockTower,
    body_of,
    empty_stock_model,
    exported,
    head_scale,
    stock_config,
    stock_projector,
    stock_text_config,
    tied_config,
)
from vlm_sft.model.vlm import VisionLanguageModel


def build_stock_model(
    model: VisionLanguageModel,
    tower: StockTower,
    language_model: PreTrainedModel,
    image_token_id: int,
    dtype: torch.dtype,
    *,
    num_tokens: int = 0,
) -> PreTrainedModel:
    """Return an instance of the stock class with the model's weights.

    Weights that have `dtype` already are shared with the model, not copied.

    Args:
        model: The trained model.
        tower: Its vision tower as a class of transformers.
        language_model: Its language model, with adapters merged.
        image_token_id: Id of `<image>` in the exported tokenizer.
        dtype: Of all weights.
        num_tokens: Number of tokens of the exported tokenizer that need a row, if more than up to
            `<image>`.
    """
    table = language_model.get_input_embeddings().weight
    rows = table.shape[0]
    wanted = max(image_token_id + 1, num_tokens)
    if rows < wanted:  # `<image>` was added after the last row
        rows = -(-wanted // ROW_MULTIPLE) * ROW_MULTIPLE
    head: Any = language_model.get_output_embeddings()
    config = stock_config(model, tower, stock_text_config(language_model, rows), image_token_id)
    config = tied_config(language_model, tower.model_class, config)
    stock = empty_stock_model(tower.model_class, config)

    state = {f"model.vision_tower.{k}": v for k, v in tower.encoder.state_dict().items()}
    for key, value in stock_projector(model).items():
        state[f"model.multi_modal_projector.{key}"] = value
    if model.image_newline is not None:
        state["model.image_newline"] = model.image_newline
    grown = _add_rows(table.detach(), rows)
    for key, value in body_of(language_model, stock).state_dict().items():
        # Families name their embedding table differently; its memory identifies it.
        is_table = value.data_ptr() == table.data_ptr()
        state[f"model.language_model.{key}"] = grown if is_table else value
    if stock.config.tie_word_embeddings:
        state["lm_head.weight"] = grown
    else:
        # A copy: safetensors does not store two tensors that share memory.
        state["lm_head.weight"] = _add_rows(head.weight.detach() * head_scale(language_model), rows)
    _load(stock, {key: _cast(value, dtype) for key, value in state.items()}, dtype)
    return stock


def _add_rows(table: Tensor, rows: int) -> Tensor:
    """Return the table with new rows that are the mean of all others.

    In the output head, a mean row never has the largest logit, so new tokens are not generated.
    """
    if rows == table.shape[0]:
        return table
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights in `dtype` on the CPU; integer buffers such as counters keep their dtype."""
    value = value.detach().cpu()
    return value.to(dtype) if value.is_floating_point() else value


def _load(stock: PreTrainedModel, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    with exported("the model"):
        stock.load_state_dict(state, strict=True, assign=True)
        stock.tie_weights()
    configs: Any = stock.config
    for config in (configs, configs.text_config, configs.vision_config):
        config.dtype = dtype
