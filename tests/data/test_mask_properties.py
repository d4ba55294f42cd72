"""Generated conversations, every template, real tokenizers: the labels are the answers.

`VLM_SFT_LONG=1` looks at 10,000 conversations a pair; `scripts/prove_masks` does so in parallel.
"""

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.data.conversations_for_tests import conversations, texts
from tests.data.mask_oracle import (
    IMAGE_ID,
    MAIN_PAIRS,
    MASKED,
    OTHER_PAIRS,
    Item,
    Pair,
    chat_tokenizer,
    check,
    control_names,
    read,
    supervised_runs,
)
from tests.tokenizers_for_tests import load, missing
from vlm_sft.data.batch import pad_examples
from vlm_sft.data.chat_template import builtin_templates
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.dataset import Example
from vlm_sft.data.tokenize import expand
from vlm_sft.errors import RecordError

LONG = os.environ.get("VLM_SFT_LONG") == "1"


def examples(count: int) -> settings:
    """The same `count` conversations every time; many more, other ones, in the long run."""
    return settings(
        max_examples=10_000 if LONG else count,
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )


def params(pairs: tuple[Pair, ...]) -> list[object]:
    return [
        pytest.param(
            pair,
            id=pair.name,
            marks=pytest.mark.skipif(
                missing(pair.tokenizer) is not None, reason=str(missing(pair.tokenizer))
            ),
        )
        for pair in pairs
    ]


def test_every_template_is_proven() -> None:
    assert sorted({pair.template for pair in MAIN_PAIRS}) == sorted([*builtin_templates(), "auto"])


@pytest.mark.parametrize("pair", params(MAIN_PAIRS))
@examples(200)
@given(data=st.data())
def test_labels_are_the_answers_and_nothing_else(pair: Pair, data: st.DataObject) -> None:
    check(pair, data.draw(conversations(pair)))


@pytest.mark.parametrize("pair", params(OTHER_PAIRS))
@examples(40)
@given(data=st.data())
def test_labels_are_the_answers_on_other_tokenizers(pair: Pair, data: st.DataObject) -> None:
    check(pair, data.draw(conversations(pair)))


@pytest.mark.parametrize("pair", params(MAIN_PAIRS))
@examples(40)
@given(data=st.data())
def test_a_turn_with_texts_of_special_tokens_changes_no_other_turn(
    pair: Pair, data: st.DataObject
) -> None:
    conversation = data.draw(conversations(pair))
    index = data.draw(st.integers(0, len(conversation.turns) - 1))
    turn = conversation.turns[index]
    forged = data.draw(texts(pair.tokenizer))
    by = chat_tokenizer(pair)
    results = []
    for text in ("harmless", forged):
        images = tuple(part for part in turn.parts if isinstance(part, ImagePart))
        changed = replace(turn, parts=(*images, TextPart(text)))
        turns = (*conversation.turns[:index], changed, *conversation.turns[index + 1 :])
        results.append(by.tokenize(replace(conversation, turns=turns)))
    starts = [_region(conversation, tokenized.answer_spans, index) for tokenized in results]
    one, two = results
    (a, b), (c, d) = starts
    assert one.input_ids[:a] == two.input_ids[:c]
    assert one.labels[:a] == two.labels[:c]
    assert one.input_ids[b:] == two.input_ids[d:]
    assert one.labels[b:] == two.labels[d:]
    control = control_names(pair.tokenizer)
    forged_control, harmless_control = (
        [i for i in tokenized.input_ids if i in control or i == IMAGE_ID] for tokenized in results
    )
    assert forged_control == harmless_control


def _region(conversation: Conversation, answers: object, index: int) -> tuple[int, int]:
    """Where a turn's text may change ids: its answer, or all between two answers."""
    spans = {span.turn: span for span in answers}  # type: ignore[attr-defined]
    if index in spans:
        return spans[index].start, spans[index].end
    before = [spans[i].end for i in spans if i < index]
    after = [spans[i].start for i in spans if i > index]
    return max(before, default=0), min(after)


@pytest.mark.parametrize(
    "pair", params(tuple(p for p in (*MAIN_PAIRS, *OTHER_PAIRS) if not p.takes_system))
)
def test_a_template_without_a_place_for_system_text_refuses_it(pair: Pair) -> None:
    turns = [("system", "Be brief."), ("user", "Who?"), ("assistant", "I.")]
    conversation = Conversation("r1", tuple(Turn(role, (TextPart(text),)) for role, text in turns))
    with pytest.raises(RecordError) as caught:
        chat_tokenizer(pair).tokenize(conversation)
    assert caught.value.reason == "template"


@pytest.mark.parametrize("name", ["llama_3", "qwen", "smollm2", "sentencepiece", "gemma", "phi_3"])
def test_every_control_string_of_a_tokenizer_is_ordinary_text_in_data(name: str) -> None:
    """Each alone, in the question and in the answer; the 256 of Llama 3 too."""
    if missing(name) is not None:
        pytest.skip(str(missing(name)))
    pair = next(p for p in (*MAIN_PAIRS, *OTHER_PAIRS) if p.tokenizer == name)
    for text in control_names(name).values():
        turns = (
            Turn("user", (*((ImagePart(0),) if pair.format == "plain" else ()), TextPart(text))),
            Turn("assistant", (TextPart(f"a{text}"),)),
        )
        images = (b"",) if pair.format == "plain" else ()
        check(pair, Conversation("r1", turns, images))


@pytest.mark.parametrize("pair", params(MAIN_PAIRS))
@pytest.mark.parametrize(
    "text",
    ["", " ", "\n", "</s>", "e" + "\u0301" * 3_000, "日本" * 2_000],
    ids=["empty", "space", "newline", "stop", "combining", "cjk"],
)
def test_extreme_answers_are_exact(pair: Pair, text: str) -> None:
    turns = (
        Turn("user", (ImagePart(0), TextPart(text))),
        Turn("assistant", (TextPart(text),)),
        Turn("user", (TextPart(text),)),
        Turn("assistant", (TextPart("Yes."),)),
    )
    check(pair, Conversation("r1", turns[: 2 * min(pair.max_exchanges, 2)], (b"",)))


# --- batches


def example(pair: Pair, conversation: Conversation, number: int) -> Example:
    tokenized = chat_tokenizer(pair).tokenize(conversation)
    labels = tokenized.labels
    return Example(
        record_id=str(number),
        input_ids=torch.tensor(
            expand(tokenized.input_ids, [3] * tokenized.num_images), dtype=torch.long
        ),
        labels=torch.tensor(
            expand(tokenized.input_ids, [3] * tokenized.num_images, labels), dtype=torch.long
        ),
        pixel_values=torch.full((len(conversation.images), 3, 2, 2), number, dtype=torch.uint8),
    )


@pytest.mark.parametrize("pair", params((MAIN_PAIRS[0], MAIN_PAIRS[-2])))
@examples(40)
@given(data=st.data())
def test_a_record_does_not_depend_on_its_batch(pair: Pair, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    made = [example(pair, data.draw(conversations(pair)), n) for n in range(count)]
    order = data.draw(st.permutations(range(count)))
    stop = chat_tokenizer(pair).eot_token_id
    assert stop is not None
    batch = pad_examples([made[n] for n in order], pad_token_id=stop)
    labels, mask = batch.labels(), batch.attention_mask
    assert mask is not None
    for row, number in enumerate(order):
        alone, length = made[number], len(made[number].input_ids)
        assert batch.input_ids[row, :length].tolist() == alone.input_ids.tolist()
        assert labels[row, 1:length].tolist() == alone.labels[1:].tolist()
        assert mask[row].tolist() == [
            position < length for position in range(batch.input_ids.shape[1])
        ]
        assert set(batch.input_ids[row, length:].tolist()) <= {stop}
        assert set(labels[row, length:].tolist()) <= {MASKED}
    assert batch.num_targets == sum(int((e.labels[1:] != MASKED).sum()) for e in made)


# --- the oracle itself


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bytes", "Ġ t w o Ċ"),
        ("llama_3", "Ġtwo Ċ"),
        ("sentencepiece", "▁two <0x0A>"),
        ("gemma", "▁two <0x0A>"),
        ("qwen", "Ġtwo Ċ"),
    ],
)
def test_the_oracle_reads_tokens_as_a_person_does(name: str, words: str) -> None:
    if missing(name) is not None:
        pytest.skip(str(missing(name)))
    tokenizer = load(name)
    ids = tokenizer.convert_tokens_to_ids(words.split())
    assert read(name, [*ids, IMAGE_ID, *ids[-1:]]) == [
        Item("text", " two\n"),
        Item("image"),
        Item("text", "\n"),
    ]


def test_the_oracle_finds_each_row_of_labels() -> None:
    x = MASKED
    assert supervised_runs([x, 1, 2, x, x, 3]) == [(1, 3), (5, 6)]
    assert supervised_runs([x, x]) == []
