from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model.tiny import (
    COHERE,
    GEMMA2,
    GRANITE,
    LLAMA,
    TOKENS,
    batch_of,
    images,
    rows,
    sums_of,
    tiny_model,
)
from tests.rounding import BACKWARD, assert_near
from vlm_sft.config.schema import LoraConfig
from vlm_sft.errors import UserError
from vlm_sft.model import loss
from vlm_sft.model.language_model import check_head
from vlm_sft.model.parts import parameters_by_part, set_trainable
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.constants import IGNORE_INDEX

LORA = LoraConfig(r=2, dropout=0.0)


def reference_loss(model: VisionLanguageModel, batch: Any, pixels: Tensor | None) -> Tensor:
    """Summed loss the plain way: the language model's own logits everywhere, then shift."""
    ids, mask, labels = batch
    embeds = model.embed(ids, None if pixels is None else model.encode_images(pixels))
    logits = model.language_model(inputs_embeds=embeds, attention_mask=mask.long()).logits.float()
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


@pytest.mark.parametrize("language_model", [LLAMA, GEMMA2, COHERE, GRANITE])
@pytest.mark.parametrize("lora", [None, LORA])
def test_loss_is_that_of_the_language_models_own_logits(
    language_model: dict[str, Any], lora: LoraConfig | None
) -> None:
    model = tiny_model(language_model=language_model, lora=lora)
    batch = rows([5, -1, 6, 100, 101], [7, 102, -1, -1, 8, 103], [9, 104, 105])
    output = model(batch_of(*batch, images(3)))
    expected = reference_loss(model, batch, images(3))
    assert_near(output.loss_sum, expected, sums_of(model))
    assert output.loss_sum.dtype == torch.float32
    assert output.num_targets.item() == 6
    assert_near(output.per_record_loss.sum(), output.loss_sum.detach(), 6)
    assert output.per_record_loss.shape == (3,)


def test_loss_in_several_chunks_has_the_same_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = rows([5, -1, 6, 100, 101, 102, 103, 104], [9, 104, 105])
    found = []
    for chunk in (2048, 3):
        monkeypatch.setattr(loss, "CHUNK", chunk)
        model = tiny_model()
        set_trainable(model, {"projector", "language_model"})
        output = model(batch_of(*batch, images(1)))
        output.loss_sum.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((output.loss_sum, gradients))
    terms = sums_of(tiny_model())
    assert_near(found[0][0], found[1][0], terms)
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert_near(gradient, found[1][1][name], BACKWARD * terms)


def test_no_logits_are_made_where_no_label_is() -> None:
    model = tiny_model()
    seen: list[torch.Size] = []
    model.language_model.lm_head.register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    model(batch_of(*rows([5, -1, 6, 7, 8, 100, 101]), images(1)))
    assert seen == [(2, 300)]


def test_records_are_independent_of_their_neighbors_and_of_padding() -> None:
    model = tiny_model()
    records = [[5, -1, 6, 100, 101], [7, -1, 8, -1, 9, 102], [9, 104, 105]]
    together = model(batch_of(*rows(*records), images(3))).per_record_loss
    alone = [
        model(batch_of(*rows(records[0]), images(3)[:1])).loss_sum,
        model(batch_of(*rows(records[1]), images(3)[1:])).loss_sum,
        model(batch_of(*rows(records[2]))).loss_sum,
    ]
    assert_near(together, torch.stack(alone).detach(), sums_of(model))


def test_images_fill_placeholders_in_order_across_turns_and_records() -> None:
    model = tiny_model()
    ids, _, _ = rows([5, -1, 6, -1], [7, -1])
    pixels = images(3)
    embedded = model.multi_modal_projector(model.vision_tower(pixels))
    embeds = model.embed(ids, model.encode_images(pixels))
    assert torch.equal(embeds[0, 1 : 1 + TOKENS], embedded[0])
    assert torch.equal(embeds[0, 2 + TOKENS : 2 + 2 * TOKENS], embedded[1])
    assert torch.equal(embeds[1, 1 : 1 + TOKENS], embedded[2])
    text = model.language_model.get_input_embeddings()(torch.tensor([5, 6, 7]))
    assert torch.equal(embeds[[0, 0, 1], [0, 1 + TOKENS, 0]], text)


def test_an_image_matters_to_the_answer() -> None:
    model = tiny_model()
    batch = rows([5, -1, 6, 100, 101])
    first, second = (model(batch_of(*batch, images(1, seed=s))).loss_sum for s in (1, 2))
    assert first != second


@pytest.mark.parametrize("pixels", [None, torch.zeros(0, 3, 28, 28)])
def test_a_text_only_batch_gives_the_projector_gradients_of_exactly_zero(
    pixels: Tensor | None,
) -> None:
    model = tiny_model()
    set_trainable(model, {"projector"})
    batch = rows([5, 6, 100, 101])
    output = model(batch_of(*batch, pixels))
    output.loss_sum.backward()
    for parameter in model.multi_modal_projector.parameters():
        assert parameter.grad is not None
        assert torch.count_nonzero(parameter.grad) == 0
    assert_near(output.loss_sum, reference_loss(model, batch, None), sums_of(model))


@pytest.mark.parametrize("part", ["projector", "language_model"])
def test_no_target_at_all_gives_exactly_zero_with_a_graph(part: str) -> None:
    model = tiny_model()
    set_trainable(model, {part})
    output = model(batch_of(*rows([5, -1, 6, 7], [8]), images(1)))
    assert (output.loss_sum.item(), output.num_targets.item()) == (0.0, 0)
    assert output.per_record_loss.tolist() == [0.0, 0.0]
    output.loss_sum.backward()
    for name, parameter in parameters_by_part(model)[part]:
        if "embed_tokens" not in name or part == "language_model":
            assert parameter.grad is not None, name
            assert torch.count_nonzero(parameter.grad) == 0, name


@pytest.mark.parametrize(
    ("records", "count", "message"),
    [
        ([[5, -1, 6]], 2, "found 4 image placeholders for 2 images of 4 tokens each"),
        ([[5, -1, -1]], 1, "found 8 image placeholders for 1 images"),
        ([[5, -1]], 0, "found 4 image placeholders for 0 images"),
        ([[5, 6]], 1, "found 0 image placeholders for 1 images"),
    ],
)
def test_images_that_do_not_match_their_placeholders_are_refused(
    records: list[list[int]], count: int, message: str
) -> None:
    ids, mask, labels = rows(*records)
    with pytest.raises(UserError, match=message):
        tiny_model()(batch_of(ids, mask, labels, images(count)))


def test_an_image_split_over_two_records_is_refused() -> None:
    ids, mask, labels = rows([5, -1], [5, -1])
    ids[0, 1], ids[1, 0] = 6, ids[1, 1]
    with pytest.raises(UserError, match="row 0 of the batch has 3 image placeholders"):
        tiny_model()(batch_of(ids, mask, labels, images(2)))


def test_logits_are_those_of_the_language_model_at_every_position() -> None:
    model = tiny_model(language_model=GEMMA2)
    ids, mask, _ = rows([5, -1, 6, 100])
    logits = model.logits(ids, pixel_values=images(1), attention_mask=mask)
    embeds = model.embed(ids, model.encode_images(images(1)))
    assert_near(logits, model.language_model(inputs_embeds=embeds).logits, sums_of(model))
    assert logits.abs().max() <= 0.05


@pytest.mark.parametrize("lora", [None, LORA])
def test_generation_continues_greedily_from_the_prompt_and_ignores_left_padding(
    lora: LoraConfig | None,
) -> None:
    model = tiny_model(lora=lora).eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids, mask, _ = rows([5, -1, 6])
    answer = model.generate(ids, mask, images(1), **settings)
    assert answer.shape == (1, 5)
    grown = torch.cat([ids, answer], dim=1)
    logits = model.logits(grown, pixel_values=images(1))
    assert torch.equal(logits[0, -6:-1].argmax(-1), answer[0])
    short = torch.tensor([[0] * 4 + [9, 8]])
    padded = torch.cat([ids, short]), torch.cat([mask, torch.tensor([[0] * 4 + [1, 1]]).bool()])
    both = model.generate(*padded, images(1), **settings)
    alone = model.generate(short[:, 4:], torch.ones(1, 2).bool(), None, **settings)
    assert torch.equal(both[0], answer[0])
    assert torch.equal(both[1], alone[0])


def test_generation_refuses_prompts_padded_on_the_right() -> None:
    ids, mask, _ = rows([5, 6, 7], [5])
    with pytest.raises(UserError, match="padded on the left"):
        tiny_model().generate(ids, mask, None, max_new_tokens=1)


def test_a_model_that_treats_its_logits_in_an_unknown_way_is_refused() -> None:
    language_model = tiny_model(language_model=COHERE).language_model
    language_model.logit_scale = 3.0  # as if its forward did something new
    with pytest.raises(UserError, match="computes its logits in a way"):
        check_head(language_model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_work_with_float32_projector_and_adapters(dtype: torch.dtype) -> None:
    model = tiny_model(lora=LORA, dtype=dtype)
    set_trainable(model, {"projector", "adapter"})
    output = model(batch_of(*rows([5, -1, 6, 100]), images(1)))
    output.loss_sum.backward()
    assert output.loss_sum.dtype == torch.float32
    parts = parameters_by_part(model)
    assert {p.dtype for _, p in parts["vision_tower"] + parts["language_model"]} == {dtype}
    for _, parameter in parts["projector"] + parts["adapter"]:
        assert parameter.dtype == torch.float32 == parameter.grad.dtype


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([-1, 5, 6, 100, 101, 102]), min_size=1, max_size=6),
        min_size=1,
        max_size=3,
    )
)
def test_any_mixture_of_images_and_text_has_the_reference_loss(
    records: list[list[int]],
) -> None:
    model = _SHARED[0] if _SHARED else _SHARED.append(tiny_model()) or _SHARED[0]
    count = sum(record.count(-1) for record in records)
    batch = rows(*records)
    batch[2][:, 0] = IGNORE_INDEX
    output = model(batch_of(*batch, images(count) if count else None))
    expected = reference_loss(model, batch, images(count) if count else None)
    assert_near(output.loss_sum, expected, sums_of(model))
    assert output.num_targets.item() == (batch[2] != IGNORE_INDEX).sum().item()


_SHARED: list[VisionLanguageModel] = []


def test_the_head_is_checked_on_a_cpu_although_flash_attention_is_meant_for_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model().language_model
    set_to: list[str] = []

    def set_attention(name: str) -> None:
        set_to.append(name)
        model.config._attn_implementation_internal = name

    monkeypatch.setattr(model, "set_attn_implementation", set_attention)
    model.config._attn_implementation_internal = "flash_attention_2"
    check_head(model)
    assert set_to == ["eager", "flash_attention_2"]
