"""NEFTune (arXiv 2310.05914): noise on text embeddings during training."""

import torch
from torch import Tensor

from vlm_sft.model.packed_attention import PackedLayout


def add_noise(embeds: Tensor, lengths: Tensor, alpha: float) -> Tensor:
    """Return embeddings with noise, uniform in +-alpha / sqrt(L * D), at every text position.

    L is the number of text tokens of the position's record, so the noise of a record has the norm
    of the paper (about alpha / sqrt(3)) whatever its images, its padding, or the other records of
    the batch. Image embeddings get no noise: they come from the projector, which is trained, and
    576 image tokens counted in L would reduce the noise of a short question to almost nothing.

    Noise is drawn for text positions only, row by row, from torch's generator: it is a pure
    function of the seed, and the same for records padded or packed in the same order.

    Args:
        embeds: `[B, T, D]`.
        lengths: `[B, T]` int64; see `text_lengths`.
        alpha: Strength of the noise (5 to 15 in the paper).
    """
    rows, columns = lengths.nonzero(as_tuple=True)
    width = embeds.shape[-1]
    noise = torch.rand(len(rows), width, device=embeds.device) * 2 - 1
    scale = alpha / (lengths[rows, columns] * width).sqrt()
    spread = torch.zeros_like(embeds)
    spread[rows, columns] = (noise * scale.unsqueeze(1)).to(embeds.dtype)
    return embeds + spread


def text_lengths(is_text: Tensor, layout: PackedLayout | None = None) -> Tensor:
    """Return `[B, T]` int64: number of text tokens of each text position's record, 0 elsewhere.

    Args:
        is_text: `[B, T]` bool: neither image nor padding.
        layout: Segments of a packed row; a shared prefix takes the length of the longest record
            that begins with it. None: every row is a record.
    """
    if layout is None:
        return is_text.sum(dim=1, keepdim=True) * is_text
    segments, visible = layout.segment_of_token, layout.visible
    own = torch.zeros(len(visible), dtype=torch.int64, device=is_text.device)
    own = own.index_add(0, segments, is_text[0].long())  # text tokens of each segment
    record = (visible * own).sum(dim=1)  # and with those of its ancestors
    longest = (visible * record.unsqueeze(1)).amax(dim=0)  # over the segments that attend to it
    return longest[segments] * is_text
