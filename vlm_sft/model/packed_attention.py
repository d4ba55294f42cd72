"""Attention over packed records: a token sees its own record and the prefix it shares, no other."""

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
"""`flash_attn`: the package; `varlen`: torch's own variable-length kernels; `flex`: torch's
FlexAttention; `sdpa`: one call of scaled_dot_product_attention for every segment."""

NAME: Final = "vlm_sft_packed"
"""Under which transformers knows `packed_attention`."""


class PackedLayout:
    """Which tokens of a packed row `[1, T]` see which, and at what positions they stand.

    Args:
        segments: All of the row, one behind the other; a parent stands before its children.
        device: Where the row is.
        backend: The kernel that computes it.
        target_positions: int64, the positions whose hidden states predict a token, without
            duplicates; None: all hidden states are needed.
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
            raise ValueError("a segment must stand behind the one it continues")

    @cached_property
    def chains(self) -> list[list[int]]:
        """For each segment what it sees: its ancestors from the first on, then itself."""
        chains: list[list[int]] = []
        for number, parent in enumerate(self.parents):
            chains.append([*(chains[parent] if parent >= 0 else []), number])
        return chains

    @cached_property
    def num_keys(self) -> list[int]:
        """Tokens that the last token of each segment sees, itself included."""
        return [sum(self.lengths[number] for number in chain) for chain in self.chains]

    @cached_property
    def position_ids(self) -> Tensor:
        """`[1, T]`: a branch goes on counting where its prefix ended."""
        ranges = [
            torch.arange(keys - length, keys)
            for keys, length in zip(self.num_keys, self.lengths, strict=True)
        ]
        return torch.cat(ranges).unsqueeze(0).to(self.device, non_blocking=True)

    @cached_property
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """Where each segment's queries and keys begin, `[segments + 1]` int32 each."""
        queries = self._cumulated(self.lengths)
        return queries, queries if self.key_index is None else self._cumulated(self.num_keys)

    @cached_property
    def key_index(self) -> Tensor | None:
        """Tokens of the row as each segment sees them, one behind the other; None: as they lie."""
        if max(self.parents) < 0:
            return None
        starts = [0, *itertools.accumulate(self.lengths)]
        ranges = [
            torch.arange(starts[number], starts[number + 1])
            for chain in self.chains
            for number in chain
        ]
        return torch.cat(ranges).to(self.device, non_blocking=True)

    def mask(self, num_queries: int, num_keys: int, window: int | None) -> Tensor:
        """`[num_queries, num_keys]` bool: causal, the last query seeing the last key."""
        key = (num_queries, num_keys, window)
        if key not in self._masks:
            queries = torch.arange(num_keys - num_queries, num_keys, device=self.device)[:, None]
            keys = torch.arange(num_keys, device=self.device)[None]
            seen = keys <= queries
            self._masks[key] = seen if window is None else seen & (keys > queries - window)
        return self._masks[key]

    @cached_property
    def segment_of_token(self) -> Tensor:
        """The segment that each token of the row is in, `[T]` int64."""
        numbers = torch.arange(len(self.lengths))
        return torch.repeat_interleave(numbers, torch.tensor(self.lengths)).to(self.device)

    @cached_property
    def related(self) -> Tensor:
        """`[segments, segments]` bool: whether the first sees the second."""
        related = torch.zeros(len(self.lengths), len(self.lengths), dtype=torch.bool)
        for number, chain in enumerate(self.chains):
            related[number, chain] = True
        return related.to(self.device)

    @cached_property
    def sees(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """FlexAttention's `mask_mod`: whether query token q sees key token k of the row."""
        of_token, related = self.segment_of_token, self.related

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & related[of_token[query], of_token[key]]

        return sees

    @cached_property
    def block_mask(self) -> Any:
        """`sees` as FlexAttention wants it."""
        from torch.nn.attention.flex_attention import create_block_mask

        num_tokens = sum(self.lengths)
        return create_block_mask(self.sees, None, None, num_tokens, num_tokens, device=self.device)

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
    """An attention of transformers' kind: SDPA as ever, or by `packed_layout` where one is given.

    Args:
        module: The layer's attention.
        query: `[1, H, T, D]`.
        key: `[1, H_kv, T, D]`.
        value: `[1, H_kv, T, D]`.
        attention_mask: For SDPA; a layout needs none.
        dropout: Of the attention weights.
        scaling: Of the scores; None: one over the root of D.
        packed_layout: Of the row; comes from the model's forward.
        options: `sliding_window` is heeded, `softcap` refused; others belong to other kernels.

    Returns:
        `[1, T, H, D]`, and None in place of the weights.
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
    """What a kernel is asked: `[1, heads, T, D]` each, and how."""

    layout: PackedLayout
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None
    dropout: float


def _segment_by_segment(call: _Call) -> Tensor:
    layout, query, key, value, scale, window, dropout = call
    # split, not slices: its backward pass writes each gradient once, not a whole row for each.
    queries, keys, values = (t.split(layout.lengths, dim=2) for t in (query, key, value))
    outputs = []
    for number, chain in enumerate(layout.chains):
        alone = len(chain) == 1
        k = keys[number] if alone else torch.cat([keys[i] for i in chain], dim=2)
        v = values[number] if alone else torch.cat([values[i] for i in chain], dim=2)
        num_queries, num_keys = layout.lengths[number], layout.num_keys[number]
        narrow = window if window is not None and window < num_keys else None
        causal = alone and narrow is None
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
    """As autocast hands them to SDPA: it does not know these kernels, and rotation may widen."""
    kind = states[0].device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else states[-1].dtype
    return [state.to(dtype) for state in states]


def _rows(call: _Call) -> list[Tensor]:
    """`[1, H, T, D]` to `[T, H, D]`: queries as they lie, then keys and values as they are seen."""
    states = _of_one_dtype(call.query, call.key, call.value)
    query, *others = (state[0].transpose(0, 1) for state in states)
    if call.layout.key_index is not None:
        others = [state.index_select(0, call.layout.key_index) for state in others]
    return [query.contiguous(), *(state.contiguous() for state in others)]


def _flash_attn(call: _Call) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    layout, window = call.layout, call.window
    output = flash_attn_varlen_func(
        *_rows(call),
        *layout.cu_seqlens,
        max(layout.lengths),
        max(layout.num_keys),
        dropout_p=call.dropout,
        softmax_scale=call.scale,
        causal=True,  # aligned with the last key, since flash-attn 2.1
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )
    return cast(Tensor, output).unsqueeze(0)


def _varlen(call: _Call) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    layout, window = call.layout, call.window
    q, k, v = _rows(call)
    known = _parameters(varlen_attn)
    options: dict[str, Any] = {}
    if "scale" in known:
        options["scale"] = call.scale
    else:  # torch 2.11 always divides by the root of the width
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
    """Names of what a function takes; every layer of every step asks."""
    return frozenset(inspect.signature(function).parameters)


def _flex(call: _Call) -> Tensor:
    layout, window = call.layout, call.window
    if window is not None and window < max(layout.num_keys):
        raise UserError(
            f"train.packing.attention: flex does not know this model's sliding window of {window} "
            "tokens; set it to sdpa"
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
    "sdpa": _segment_by_segment,
}


def choose_backend(name: str, device: torch.device, dtype: torch.dtype, dropout: float) -> Backend:
    """The kernel that `train.packing.attention` means.

    `auto`: with 16-bit numbers on a GPU flash-attn where it is installed, else torch's variable-
    length attention (it needs compute capability 8.0); with others FlexAttention; on a CPU, and
    where the model drops attention weights that these cannot drop, segment by segment.

    Raises:
        UserError: A kernel was asked for that is not to be had here.
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
            f"train.packing.attention: {name} is not to be had here (flash_attn needs a GPU, "
            "16-bit numbers and the package flash-attn; varlen a GPU from 2020 on, 16-bit numbers "
            "and no attention dropout; flex a GPU and no attention dropout); set it to auto or sdpa"
        )
    return cast(Backend, name)


def install_packed_attention(language_model: PreTrainedModel) -> None:
    """Make a transformers model compute its attention by `packed_attention` from now on.

    Rows without a layout are computed by SDPA. `train.preflight.prove_isolation` then shows
    whether the model really asks for its attention there.
    """
    # Compiled layers step out of their code for it: a row's segments are not theirs to know.
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    AttentionMaskInterface.register(NAME, sdpa_mask)
    language_model.set_attn_implementation(NAME)
