"""Packed records do not see each other, whichever kernel computes their attention."""

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.rounding import BACKWARD, assert_near, rounding, terms_of
from vlm_sft.errors import UserError
from vlm_sft.model import packed_attention as attention
from vlm_sft.model.packed_attention import (
    PackedLayout,
    choose_backend,
    install_packed_attention,
    packed_attention,
)
from vlm_sft.utils.constants import Segment

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
    "gpt_neox": {},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
}
SEGMENTS: list[Segment] = [(9, -1), (5, -1), (4, 1), (1, -1), (7, 1), (3, 4)]
"""A record, a prefix with two branches, a record of one token, a branch of the second branch."""

LENGTH = sum(length for length, _ in SEGMENTS)
CHAINS = [[0], [1], [1, 2], [3], [1, 4], [1, 4, 5]]
HEAD_DIM = 8


def model_of(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    common = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **common, **FAMILIES.get(family, {}))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that what a token sees makes a difference
    return model.to(dtype).eval()


def gpt2_in_double() -> PreTrainedModel:
    """GPT-2 takes its norms and its softmax in the dtype it is given, Llama always in float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.double().eval()


def rows_of(segments: list[Segment]) -> list[range]:
    starts = [sum(length for length, _ in segments[:i]) for i in range(len(segments))]
    return [range(s, s + n) for s, (n, _) in zip(starts, segments, strict=True)]


def hidden_packed(model: PreTrainedModel, embeds: Tensor, layout: PackedLayout) -> Tensor:
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    options = {"position_ids": layout.position_ids, "packed_layout": layout}
    out = model.base_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **options)
    hidden: Tensor = out.last_hidden_state
    return hidden[0]


def compare_packed_with_alone(
    model: PreTrainedModel, layout: PackedLayout | None = None
) -> tuple[float, float]:
    """Return the largest differences of hidden states and of the embeddings' gradients.

    Both are relative to the largest magnitude.
    """
    install_packed_attention(model)
    dtype = next(model.parameters()).dtype
    layout = layout or PackedLayout(SEGMENTS)
    rows = rows_of(SEGMENTS)
    width = model.get_input_embeddings().weight.shape[1]
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, rows[-1].stop, width, generator=generator, dtype=dtype)
    embeds.requires_grad_()
    weights = torch.randn(rows[-1].stop, width, generator=generator, dtype=dtype)
    packed = hidden_packed(model, embeds, layout)
    (gradient,) = torch.autograd.grad((packed * weights).sum(), embeds)
    worst, expected_gradient = 0.0, torch.zeros_like(embeds)
    for number, chain in enumerate(CHAINS):
        places = [place for segment in chain for place in rows[segment]]
        alone = model.base_model(inputs_embeds=embeds[:, places], use_cache=False)
        own = alone.last_hidden_state[0][-SEGMENTS[number][0] :]
        apart = (own - packed[list(rows[number])]).detach().abs().max()
        worst = max(worst, float(apart / own.detach().abs().max()))
        (part,) = torch.autograd.grad((own * weights[list(rows[number])]).sum(), embeds)
        expected_gradient += part
    return worst, float(
        (gradient - expected_gradient).detach().abs().max() / expected_gradient.abs().max()
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_packed_record_has_the_states_and_gradients_that_it_has_alone(family: str) -> None:
    model = model_of(family)
    difference, of_gradients = compare_packed_with_alone(model)
    bound = rounding(terms_of(model, LENGTH))
    assert difference <= bound and of_gradients <= BACKWARD * bound
    seeing_all = PackedLayout([(LENGTH, -1)])
    assert compare_packed_with_alone(model, seeing_all)[0] > 100 * bound


def test_in_double_precision_packing_changes_nothing_to_ten_digits() -> None:
    model = gpt2_in_double()
    difference, of_gradients = compare_packed_with_alone(model)
    bound = rounding(terms_of(model, LENGTH), torch.float64)
    assert difference <= bound < 1e-10 and of_gradients <= BACKWARD * bound


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_padded_rows_are_computed_as_before_packed_attention_was_installed(family: str) -> None:
    model = model_of(family)
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 8:] = False
    before = model(ids, attention_mask=mask, use_cache=False).logits
    prompted = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    install_packed_attention(model)
    after = model(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(before[0], after[0]) and torch.equal(before[1, :8], after[1, :8])
    assert torch.equal(prompted, model.generate(ids[:1], max_new_tokens=4, do_sample=False))


def plain_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """What variable-length kernels compute, in words: causal, aligned with the last key."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    outputs = []
    for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        assert int(b - a) <= max_q and int(d - c) <= max_k
        group = q.shape[1] // k.shape[1]
        keys, values = (t[c:d].repeat_interleave(group, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[a:b], keys) * scale
        queries = torch.arange(int(d - c) - int(b - a), int(d - c))[:, None]
        places = torch.arange(int(d - c))[None]
        seen = places <= queries
        if window is not None:
            seen &= places > queries - window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


def flash_stand_in(*args: Any, **options: Any) -> Tensor:
    assert options["causal"] is True and options["dropout_p"] == 0
    left, right = options["window_size"]
    window = None if (left, right) == (-1, -1) else left + 1
    return plain_varlen(*args, scale=options["softmax_scale"], window=window)


def new_varlen_stand_in(
    *args: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool = False
) -> Tensor:
    assert enable_gqa or args[0].shape[1] == args[1].shape[1]
    left, right = window_size
    assert right == 0
    return plain_varlen(*args, scale=scale, window=None if left == -1 else left + 1)


def old_varlen_stand_in(*args: Any, is_causal: bool = False) -> Tensor:
    """As torch 2.11 has it: its own scale, as many key heads as query heads, no window."""
    assert is_causal and args[0].shape[1] == args[1].shape[1]
    return plain_varlen(*args, scale=args[0].shape[-1] ** -0.5)


def random_states(segments: list[Segment]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    total = sum(length for length, _ in segments)
    return [torch.randn(1, heads, total, HEAD_DIM, generator=generator) for heads in (4, 2, 2)]


def attend(segments: list[Segment], backend: Any, **options: Any) -> Tensor:
    query, key, value = random_states(segments)
    layout = PackedLayout(segments, backend=backend)
    states = (torch.nn.Identity(), query, key, value, None)
    return packed_attention(*states, scaling=0.3, packed_layout=layout, **options)[0]


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(
    ("backend", "module", "name", "stand_in"),
    [
        ("flash_attn", "flash_attn", "flash_attn_varlen_func", flash_stand_in),
        ("varlen", "torch.nn.attention.varlen", "varlen_attn", new_varlen_stand_in),
        ("varlen", "torch.nn.attention.varlen", "varlen_attn", old_varlen_stand_in),
    ],
)
def test_variable_length_kernels_compute_the_same_as_sdpa_per_segment(
    backend: str,
    module: str,
    name: str,
    stand_in: Callable[..., Tensor],
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys
    import types

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: stand_in}))
    if stand_in is old_varlen_stand_in and window is not None:
        with pytest.raises(UserError, match="sliding window"):
            attend(SEGMENTS, backend, sliding_window=window)
        return
    found = attend(SEGMENTS, backend, sliding_window=window)
    expected = attend(SEGMENTS, "sdpa", sliding_window=window)
    assert_near(found, expected, LENGTH + HEAD_DIM)


def test_kernels_that_autocast_does_not_know_get_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    seen: list[torch.dtype] = []

    @functools.wraps(new_varlen_stand_in)
    def stand_in(*args: Any, **options: Any) -> Tensor:
        seen.extend(state.dtype for state in args[:3])
        return new_varlen_stand_in(*args, **options)

    monkeypatch.setitem(
        sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=stand_in)
    )
    expected = attend(SEGMENTS, "sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(SEGMENTS, "varlen")
    assert seen == [torch.bfloat16] * 3
    bound = rounding(LENGTH + HEAD_DIM, torch.bfloat16)
    assert (found.float() - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("seed", range(5))
def test_flex_attention_computes_the_same_as_sdpa_per_segment(seed: int) -> None:
    chance = random.Random(seed)
    segments = [(chance.randint(1, 9), chance.randint(-1, i - 1)) for i in range(8)]
    with torch.no_grad():
        found, expected = attend(segments, "flex"), attend(segments, "sdpa")
    assert_near(found, expected, LENGTH + HEAD_DIM)


def test_a_segment_must_come_after_what_it_continues() -> None:
    with pytest.raises(ValueError, match="after the one it continues"):
        PackedLayout([(3, 1), (2, -1)])


def test_scores_that_are_capped_and_weights_that_cannot_be_dropped_are_refused() -> None:
    with pytest.raises(UserError, match=r"caps its attention scores.*remove train\.packing"):
        attend(SEGMENTS, "sdpa", softcap=50.0)
    with pytest.raises(UserError, match="varlen has no attention dropout"):
        attend(SEGMENTS, "varlen", dropout=0.1)


def test_the_kernel_is_the_first_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu, torch.float32, 0.0) == "sdpa"
    for name in ("flash_attn", "varlen", "flex"):
        with pytest.raises(UserError, match=f"{name} is not available here"):
            choose_backend(name, cpu, torch.bfloat16, 0.0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    installed = {"flash_attn", "torch.nn.attention.varlen"}
    monkeypatch.setattr(
        attention.importlib.util, "find_spec", lambda name: name if name in installed else None
    )
    assert choose_backend("auto", gpu, torch.bfloat16, 0.0) == "flash_attn"
    installed.remove("flash_attn")
    assert choose_backend("auto", gpu, torch.bfloat16, 0.0) == "varlen"
    assert choose_backend("auto", gpu, torch.bfloat16, 0.1) == "sdpa"
    assert choose_backend("auto", gpu, torch.float32, 0.0) == "flex"
