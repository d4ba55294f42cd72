"""NEFTune (arXiv 2310.05914): noise on the embeddings of text while a model is being trained."""

import torch
from torch import Tensor

from vlm_sft.model.packed_attention import PackedLayout


def add_noise(embeds: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Embeddings with noise, uniform in +-alpha / sqrt(L * D), at every position of text.

    L is the number of text tokens of the position's record, so that a record's noise has the norm
    of the paper (about alpha / sqrt(3)) however many images, how much padding or which other
    records stand beside it. Image embeddings have none: the projector learns where they lie, and
    with them in L the noise of a short question beside 576 of them would all but vanish.

    Drawn for text positions alone, row by row, from torch's generator: a pure function of the seed
    that was set before it, and the same whether records are padded or packed in the same order.

    Args:
        embeds: `[B, T, D]`.
        lengths: `[B, T]`, as `text_lengths` gives them.
        alpha: Strength.
    """
    rows, columns = lengths.nonzero(as_tuple=True)
    width = embeds.shape[-1]
    noise = torch.rand(len(rows), width, device=embeds.device) * 2 - 1
    scale = alpha / (lengths[rows, columns] * width).sqrt()
    spread = torch.zeros_like(embeds)
    spread[rows, columns] = (noise * scale.unsqueeze(1)).to(embeds.dtype)
    return embeds + spread


def text_lengths(is_text: Tensor, layout: PackedLayout | None = None) -> Tensor:
    """At every position of text the number of its record's text tokens, 0 elsewhere, `[B, T]`.

    Args:
        is_text: `[B, T]` bool: neither image nor padding.
        layout: The segments of a packed row; a shared prefix takes the length of the longest
            record that begins with it. None: one record a row.
    """
    if layout is None:
        return is_text.sum(dim=1, keepdim=True) * is_text
    segments, sees = layout.segment_of_token, layout.related
    own = torch.zeros(len(sees), dtype=torch.int64, device=is_text.device)
    own = own.index_add(0, segments, is_text[0].long())
    whole = (sees * own).sum(dim=1)
    longest = (sees * whole.unsqueeze(1)).amax(dim=0)
    return longest[segments] * is_text
