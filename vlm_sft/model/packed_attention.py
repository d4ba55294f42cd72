"""Attention over packed records: a token attends to its own record and the prefix it shares."""

import functools
import importlib.util
import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vlm_sft.errors import UserError
from vlm_sft.utils.constants import Segment

Backend = Literal["flash_attn", "varlen", "flex", "sdpa"]
"""Attention kernel. `flash_attn`: the package of that name; `varlen`: torch's variable-length
attention; `flex`: torch's FlexAttention; `sdpa`: one call of scaled_dot_product_attention for each
segment."""

NAME: Final = "vlm_sft_packed"
"""Name under which `packed_attention` is registered in transformers."""


class PackedLayout:
    """Which tokens of a packed row `[1, T]` attend to which, and their positions.

    The segments of a row form a forest: a record of its own is a root, and where records share a
    prefix, the prefix is a root and each record's rest a child of it. A token attends to the
    earlier tokens of its own segment and to all tokens of the segment's ancestors. What kernels
    need is derived from that on first use and shared by all layers.

    Args:
        segments: All segments of the row in order, padding included; parents before children.
        device: Device of the row.
        backend: The kernel to use.
        target_positions: int64, positions whose hidden states predict a token, without duplicates;
            None: the hidden states of all positions are needed.

    Raises:
        ValueError: If a segment comes before the one it continues.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        device: torch.device | str = "cpu",
        backend: Backend = "sdpa",
        target_positions: Tensor | None = None,
    ) -> None:
        self.target_positions = target_positions
        self.lengths = [length for length, _ in segments]
        self.parents = [parent for _, parent in segments]
        self.device, self.backend = torch.device(device), backend
        self._masks: dict[tuple[int, int, int | None], Tensor] = {}
        if any(parent >= number for number, parent in enumerate(self.parents)):
            raise ValueError("a segment must come after the one it continues")

    @cached_property
    def ancestors(self) -> list[list[int]]:
        """For each segment the path from its root to itself: the segments it attends to."""
        ancestors: list[list[int]] = []
        for number, parent in enumerate(self.parents):
            ancestors.append([*(ancestors[parent] if parent >= 0 else []), number])
        return ancestors

    @cached_property
    def num_keys(self) -> list[int]:
        """Number of keys of each segment: its own tokens and those of its ancestors."""
        return [sum(self.lengths[number] for number in path) for path in self.ancestors]

    @cached_property
    def position_ids(self) -> Tensor:
        """`[1, T]` int64: positions in each record; a branch continues those of its prefix."""
        ranges = [
            torch.arange(keys - length, keys)
            for keys, length in zip(self.num_keys, self.lengths, strict=True)
        ]
        return torch.cat(ranges).unsqueeze(0).to(self.device, non_blocking=True)

    @cached_property
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """Cumulative number of queries and of keys of the segments, `[segments + 1]` int32 each."""
        queries = self._cumulated(self.lengths)
        return queries, queries if self.key_index is None else self._cumulated(self.num_keys)

    @cached_property
    def key_index(self) -> Tensor | None:
        """Positions in the row of the keys of each segment, concatenated over the segments.

        A variable-length kernel takes contiguous keys, but a branch's prefix may lie anywhere
        before it in the row, so keys and values are gathered: prefixes are repeated for every
        branch. None if no segment has a parent; the row is then used as it is.
        """
        if max(self.parents) < 0:
            return None
        starts = [0, *itertools.accumulate(self.lengths)]
        ranges = [
            torch.arange(starts[number], starts[number + 1])
            for path in self.ancestors
            for number in path
        ]
        return torch.cat(ranges).to(self.device, non_blocking=True)

    def mask(self, num_queries: int, num_keys: int, window: int | None) -> Tensor:
        """Return a causal mask `[num_queries, num_keys]` bool, true where a query sees a key.

        Aligned at the end: the queries are the last `num_queries` of the `num_keys` tokens.

        Args:
            num_queries: Tokens of a segment.
            num_keys: Tokens of the segment and its ancestors.
            window: Size of a sliding window in tokens, or None.
        """
        key = (num_queries, num_keys, window)
        if key not in self._masks:
            queries = torch.arange(num_keys - num_queries, num_keys, device=self.device)[:, None]
            keys = torch.arange(num_keys, device=self.device)[None]
            visible = keys <= queries
            self._masks[key] = visible if window is None else visible & (keys > queries - window)
        return self._masks[key]

    @cached_property
    def segment_of_token(self) -> Tensor:
        """`[T]` int64: the segment of each token."""
        numbers = torch.arange(len(self.lengths))
        return torch.repeat_interleave(numbers, torch.tensor(self.lengths)).to(self.device)

    @cached_property
    def visible(self) -> Tensor:
        """`[segments, segments]` bool: whether segment i attends to segment j."""
        visible = torch.zeros(len(self.lengths), len(self.lengths), dtype=torch.bool)
        for number, path in enumerate(self.ancestors):
            visible[number, path] = True
        return visible.to(self.device)

    @cached_property
    def mask_mod(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Mask function for FlexAttention: whether token `query` attends to token `key`."""
        segment, visible = self.segment_of_token, self.visible

        # Ancestors come earlier in the row, so `key <= query` holds for all of their tokens.
        def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & visible[segment[query], segment[key]]

        return mask_mod

    @cached_property
    def block_mask(self) -> Any:
        """`mask_mod` as the block mask that FlexAttention takes."""
        from torch.nn.attention.flex_attention import create_block_mask

        num_tokens = sum(self.lengths)
        return create_block_mask(
            self.mask_mod, None, None, num_tokens, num_tokens, device=self.device
        )

    def _cumulated(self, lengths: Sequence[int]) -> Tensor:
        values = [0, *itertools.accumulate(lengths)]
        return torch.tensor(values, dtype=torch.int32).to(self.device, non_blocking=True)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: PackedLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer (an attention function of transformers).

    Args:
        module: Attention module of the layer.
        query: `[1, H, T, D]`.
        key: `[1, H_kv, T, D]`.
        value: `[1, H_kv, T, D]`.
        attention_mask: Mask for SDPA, unused with a layout.
        dropout: Dropout probability of the attention weights.
        scaling: Factor of the scores; None: 1 / sqrt(D).
        packed_layout: Layout of the row, passed by the model's forward; None computes SDPA as
            transformers does, for padded rows.
        options: `sliding_window` is used and `softcap` refused; others are for other kernels.

    Returns:
        `[1, T, H, D]`, and None in place of the attention weights.

    Raises:
        UserError: If the model uses a feature of attention that packed kernels do not have.
    """
    if packed_layout is None:
        return cast(
            tuple[Tensor, None],
            sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **options
            ),
        )
    if options.get("softcap") is not None:
        raise UserError(
            f"train.packing: {type(module).__name__} caps its attention scores, which packed "
            "attention does not; remove train.packing"
        )
    scale = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
    window = cast("int | None", options.get("sliding_window"))
    if dropout and packed_layout.backend in ("varlen", "flex"):
        raise UserError(
            f"train.packing.attention: {packed_layout.backend} has no attention dropout, which "
            f"{type(module).__name__} uses; set it to sdpa"
        )
    kernel = _KERNELS[packed_layout.backend]
    return kernel(_Call(packed_layout, query, key, value, scale, window, dropout)), None


class _Call(NamedTuple):
    """Arguments of a kernel; query, key and value are `[1, heads, T, D]`."""

    layout: PackedLayout
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None
    dropout: float


def _sdpa_per_segment(call: _Call) -> Tensor:
    """Call SDPA for each segment, so that cross-segment scores are never computed."""
    layout, query, key, value, scale, window, dropout = call
    # `split`, not slices: the backward of each slice would allocate the gradient of a whole row.
    queries, keys, values = (t.split(layout.lengths, dim=2) for t in (query, key, value))
    outputs = []
    for number, path in enumerate(layout.ancestors):
        is_root = len(path) == 1
        k = keys[number] if is_root else torch.cat([keys[i] for i in path], dim=2)
        v = values[number] if is_root else torch.cat([values[i] for i in path], dim=2)
        num_queries, num_keys = layout.lengths[number], layout.num_keys[number]
        narrow = window if window is not None and window < num_keys else None
        # `is_causal` aligns queries and keys at the start, so only a root can use it.
        causal = is_root and narrow is None
        outputs.append(
            scaled_dot_product_attention(
                queries[number],
                k,
                v,
                attn_mask=None if causal else layout.mask(num_queries, num_keys, narrow),
                is_causal=causal,
                dropout_p=dropout,
                scale=scale,
                enable_gqa=k.shape[1] != query.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _of_one_dtype(*states: Tensor) -> list[Tensor]:
    """Cast states to one dtype, as autocast does for SDPA.

    Autocast does not know these kernels, and rotary embeddings may return float32.
    """
    kind = states[0].device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else states[-1].dtype
    return [state.to(dtype) for state in states]


def _varlen_inputs(call: _Call) -> list[Tensor]:
    """Return `[T, H, D]` queries, and keys and values gathered by `key_index` `[keys, H_kv, D]`."""
    states = _of_one_dtype(call.query, call.key, call.value)
    query, *others = (state[0].transpose(0, 1) for state in states)
    if call.layout.key_index is not None:
        others = [state.index_select(0, call.layout.key_index) for state in others]
    return [query.contiguous(), *(state.contiguous() for state in others)]


def _flash_attn(call: _Call) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    layout, window = call.layout, call.window
    output = flash_attn_varlen_func(
        *_varlen_inputs(call),
        *layout.cu_seqlens,
        max(layout.lengths),
        max(layout.num_keys),
        dropout_p=call.dropout,
        softmax_scale=call.scale,
        causal=True,  # aligned at the last key since flash-attn 2.1
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return cast(Tensor, output).unsqueeze(0)


def _varlen(call: _Call) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    layout, window = call.layout, call.window
    q, k, v = _varlen_inputs(call)
    known = _parameters(varlen_attn)
    options: dict[str, Any] = {}
    if "scale" in known:
        options["scale"] = call.scale
    else:  # torch 2.11 always uses 1 / sqrt(D): compensate in the queries
        q = q * (call.scale * math.sqrt(q.shape[-1]))
    if "window_size" in known:
        options["window_size"] = (-1, 0) if window is None else (window - 1, 0)
    elif window is not None and window < max(layout.num_keys):
        raise UserError(
            "train.packing: this torch has no variable-length attention with a sliding window; "
            "install a newer torch, or set train.packing.attention: sdpa"
        )
    else:
        options["is_causal"] = True
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    lengths = (max(layout.lengths), max(layout.num_keys))
    output = varlen_attn(q, k, v, *layout.cu_seqlens, *lengths, **options)
    return cast(Tensor, output).unsqueeze(0)


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return the parameter names of a function; cached, since every layer of a step calls this."""
    return frozenset(inspect.signature(function).parameters)


def _flex(call: _Call) -> Tensor:
    layout, window = call.layout, call.window
    if window is not None and window < max(layout.num_keys):
        raise UserError(
            f"train.packing.attention: flex does not support this model's sliding window of "
            f"{window} tokens; set it to sdpa"
        )
    query, key, value = _of_one_dtype(call.query, call.key, call.value)
    output = _flex_attention(compiled=query.is_cuda)(
        query,
        key,
        value,
        block_mask=layout.block_mask,
        scale=call.scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return cast(Tensor, output).transpose(1, 2)


@functools.cache
def _flex_attention(*, compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    attend: Callable[..., Any] = flex_attention
    return torch.compile(attend, dynamic=True) if compiled else attend


_KERNELS: Final[dict[str, Callable[[_Call], Tensor]]] = {
    "flash_attn": _flash_attn,
    "varlen": _varlen,
    "flex": _flex,
    "sdpa": _sdpa_per_segment,
}


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, dropout: float) -> Backend:
    """Return the kernel that `train.packing.attention` selects.

    `auto` takes the first that is available of: flash-attn (a GPU, bf16 or fp16, the package);
    torch's variable-length attention (a GPU of compute capability 8.0, bf16 or fp16, no attention
    dropout); FlexAttention (a GPU, no attention dropout); SDPA per segment.

    Args:
        name: `auto` or a `Backend`.
        device: Device of the run.
        dtype: Dtype in which attention is computed.
        dropout: Dropout probability of the attention weights.

    Raises:
        UserError: If the kernel is not available here.
    """
    on_gpu, sixteen = device.type == "cuda", dtype in (torch.bfloat16, torch.float16)
    flash = on_gpu and sixteen and importlib.util.find_spec("flash_attn") is not None
    varlen = (
        on_gpu
        and sixteen
        and dropout == 0
        and importlib.util.find_spec("torch.nn.attention.varlen") is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    can = {"flash_attn": flash, "varlen": varlen, "flex": on_gpu and dropout == 0, "sdpa": True}
    if name == "auto":
        return cast(Backend, next(backend for backend in get_args(Backend) if can[backend]))
    if not can[name]:
        raise UserError(
            f"train.packing.attention: {name} is not available here (flash_attn needs a GPU, bf16 "
            "or fp16, and the package flash-attn; varlen a GPU of compute capability 8.0, bf16 or "
            "fp16, and no attention dropout; flex a GPU and no attention dropout); set it to auto "
            "or sdpa"
        )
    return cast(Backend, name)


def install_packed_attention(language_model: PreTrainedModel) -> None:
    """Make a model of transformers compute its attention by `packed_attention`.

    Rows without a layout are still computed by SDPA. `train.packing_check.check_no_leakage` then
    checks that the model really computes its attention there.
    """
    # A graph break for compiled layers: segment lengths differ in every batch, and guards on them
    # would compile again each time.
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    language_model.set_attn_implementation(NAME)
