import functools
import gc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizers_for_tests import bpe_tokenizer, sentencepiece_tokenizer
from vlm_sft.data.conversation import Conversation, ImagePart, Part, TextPart, Turn
from vlm_sft.data.hf_tokenizer import byte_tokenizer
from vlm_sft.data.tokenize import ChatTokenizer, TokenizedRecord
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID

TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bpe": bpe_tokenizer(),
    "sentencepiece": sentencepiece_tokenizer(),
}
CHAT = [
    ("bytes", "chatml"),
    ("bytes", "vicuna_v1"),
    ("bytes", "auto"),
    ("bpe", "chatml"),
    ("bpe", "auto"),
    ("sentencepiece", "vicuna_v1"),
]


def turn(role: Any, *parts: str | int, supervised: bool = True) -> Turn:
    made: list[Part] = [TextPart(p) if isinstance(p, str) else ImagePart(p) for p in parts]
    return Turn(role, tuple(made), supervised)


def record(*turns: Turn) -> Conversation:
    images = sum(isinstance(p, ImagePart) for t in turns for p in t.parts)
    return Conversation("r1", turns, (b"",) * images, "file.json[0]")


@functools.cache
def chat_tokenizer(tokenizer: str, template: str, system: str | None = None) -> ChatTokenizer:
    return ChatTokenizer.from_name(template, TOKENIZERS[tokenizer], default_system=system)


def marked(tokenized: TokenizedRecord, by: ChatTokenizer) -> str:
    """Tokens with the supervised ones in brackets, as a person reads them."""
    names = [
        "<image>" if i == IMAGE_TOKEN_ID else by.tokenizer.convert_ids_to_tokens(i)
        for i in tokenized.input_ids
    ]
    return " ".join(
        f"[{name}]" if label != IGNORE_INDEX else name
        for name, label in zip(names, tokenized.labels, strict=True)
    )


TWO_TURNS = record(
    turn("user", 0, "\nWhat color?"),
    turn("assistant", "Red car."),
    turn("user", "Why?"),
    turn("assistant", "Paint."),
)


def test_vicuna_supervises_the_tokens_that_llava_supervises() -> None:
    by = chat_tokenizer("sentencepiece", "vicuna_v1")
    text = marked(by.tokenize(TWO_TURNS), by)
    assert text.startswith("<s> ▁A ▁chat ▁between ▁a ▁curious ▁user")
    assert text.endswith(
        "▁questions . ▁US ER : ▁ <image> <0x0A> What ▁color ? ▁ASS IST ANT : "
        "[▁Red] [▁car] [.] [</s>] USER : ▁Why ? ▁ASS IST ANT : [▁P] [aint] [.] [</s>]"
    )


def test_chatml_supervises_each_answer_and_its_stop_token() -> None:
    by = chat_tokenizer("bpe", "chatml")
    tokenized = by.tokenize(TWO_TURNS)
    words = [
        by.encoder.decode([i for i in tokenized.labels[s.start : s.end - 1]])
        for s in tokenized.answer_spans
    ]
    assert words == ["Red car.", "Paint."]
    stop = by.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [tokenized.labels[s.end - 1] for s in tokenized.answer_spans] == [stop, stop]
    assert sum(label != IGNORE_INDEX for label in tokenized.labels) == sum(
        s.end - s.start for s in tokenized.answer_spans
    )


def test_plain_keeps_the_image_and_the_caption_and_drops_the_instruction() -> None:
    by = chat_tokenizer("sentencepiece", "plain")
    caption = record(turn("user", "Describe.\n", 0), turn("assistant", "Red car."))
    assert marked(by.tokenize(caption), by) == "<s> <image> [Red] [▁car] [.] [</s>]"


def test_plain_refuses_a_second_question() -> None:
    with pytest.raises(RecordError, match=r"file.json\[0\].*'r1'.*takes 1 question and answer"):
        chat_tokenizer("bytes", "plain").tokenize(TWO_TURNS)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_ids_equal_the_models_own_chat_template(name: str, system: str | None) -> None:
    turns = [turn("user", "Is there a dog?"), turn("assistant", "Yes."), turn("user", "Where?")]
    turns += [turn("assistant", "On the left of the table.")]
    if system is not None:
        turns.insert(0, turn("system", system))
    messages = [{"role": t.role, "content": t.text} for t in turns]
    expected = TOKENIZERS[name].apply_chat_template(messages, return_dict=False)
    for template in ("auto", "chatml"):
        assert chat_tokenizer(name, template).tokenize(record(*turns)).input_ids == expected


@pytest.mark.parametrize(("tokenizer", "template"), CHAT)
def test_exported_template_and_prompt_say_what_was_trained(tokenizer: str, template: str) -> None:
    by = chat_tokenizer(tokenizer, template, system="Be brief." if template == "auto" else None)
    question = record(turn("system", "Be brief."), turn("user", 0, "\nIs there a dog?"))
    content = [{"type": "image"}, {"type": "text", "text": "\nIs there a dog?"}]
    text = by.tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}],
        chat_template=by.to_jinja(),
        tokenize=False,
        add_generation_prompt=True,
    )
    expected = "".join(
        "<image>"
        if piece == IMAGE_TOKEN_ID
        else by.tokenizer.convert_ids_to_tokens(piece)
        if piece in by.encoder.special_tokens.values()
        else by.encoder.decode([piece])
        for piece in by.prompt(question)
    )
    assert text == expected


@pytest.mark.parametrize(("tokenizer", "template"), CHAT)
def test_prompt_is_a_prefix_of_the_training_ids_at_every_turn(
    tokenizer: str, template: str
) -> None:
    by = chat_tokenizer(tokenizer, template)
    ids = by.tokenize(TWO_TURNS).input_ids
    for length in (1, 3):
        prompt = by.prompt(record(*TWO_TURNS.turns[:length]))
        assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize(("tokenizer", "template"), CHAT)
def test_answer_ids_are_the_supervised_ids(tokenizer: str, template: str) -> None:
    by = chat_tokenizer(tokenizer, template)
    tokenized = by.tokenize(TWO_TURNS)
    for span, text in zip(tokenized.answer_spans, ("Red car.", "Paint."), strict=True):
        assert tokenized.input_ids[span.start : span.end] == by.answer_ids(text)


def test_a_turn_marked_as_not_trained_carries_no_label() -> None:
    by = chat_tokenizer("bytes", "chatml")
    turns = list(TWO_TURNS.turns)
    turns[1] = turn("assistant", "Red car.", supervised=False)
    labels = by.tokenize(record(*turns)).labels
    assert by.encoder.decode([i for i in labels if i != IGNORE_INDEX][:-1]) == "Paint."


TEXT = st.text(max_size=40) | st.lists(
    st.sampled_from(
        [
            "</s>",
            "<s>",
            "<|im_end|>",
            "<|im_start|>",
            "<|im_",
            "end|>",
            "<image>",
            "<unk>",
            "<tool>",
            "USER:",
            " ASSISTANT: ",
            "[INST]",
            "###",
            "\n",
            " ",
            "é",
            "日本",
            "👩‍👩‍👧",
            "\u202e",
            "a",
            "<pad>",
        ]
    ),
    max_size=6,
).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns: list[Turn] = []
    if draw(st.booleans()):
        turns.append(turn("system", draw(TEXT)))
    images = 0
    for _ in range(draw(st.integers(1, 3))):
        parts: list[str | int] = [draw(TEXT)]
        for _ in range(draw(st.integers(0, 2))):
            parts += [images, draw(TEXT)]
            images += 1
        turns.append(turn("user", *parts))
        turns.append(turn("assistant", draw(TEXT), supervised=draw(st.booleans())))
    return record(*turns)


@pytest.mark.parametrize(("tokenizer", "template"), CHAT)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(conversation=conversations())
def test_all_special_tokens_are_the_templates_whatever_the_text(
    tokenizer: str, template: str, conversation: Conversation
) -> None:
    by = chat_tokenizer(tokenizer, template)
    tokenized = by.tokenize(conversation)
    control = set(by.encoder.special_tokens.values())
    harmless = [
        Turn(t.role, tuple(TextPart("a") if isinstance(p, TextPart) else p for p in t.parts), True)
        for t in conversation.turns
    ]
    expected = by.tokenize(record(*harmless)).input_ids
    assert [i for i in tokenized.input_ids if i in control] == [i for i in expected if i in control]
    assert tokenized.num_images == len(conversation.images)
    for span, answer in zip(
        tokenized.answer_spans,
        (t for t in conversation.turns if t.role == "assistant"),
        strict=True,
    ):
        labels = tokenized.labels[span.start : span.end]
        if not answer.supervised:
            assert set(labels) == {IGNORE_INDEX}
            continue
        assert by.encoder.decode(labels[:-1]) == span.prefix + answer.text
        assert by.tokenizer.convert_ids_to_tokens(labels[-1]) == by.template.eot_token


def test_long_runs_of_combining_characters_are_tokenized() -> None:
    by = chat_tokenizer("bytes", "chatml")
    text = "e" + "\u0301" * 20_000
    answer = by.tokenize(record(turn("user", "?"), turn("assistant", text))).answer_spans[0]
    assert answer.end - answer.start == 40_002


def test_a_checkpoints_description_gives_the_same_ids() -> None:
    for tokenizer, template in CHAT:
        by = chat_tokenizer(tokenizer, template, system=None)
        again = ChatTokenizer.from_description(by.describe(), TOKENIZERS[tokenizer])
        assert again.tokenize(TWO_TURNS) == by.tokenize(TWO_TURNS)


def test_unknown_template_is_refused_with_the_known_names() -> None:
    with pytest.raises(UserError, match=r"no template 'chatlm'.*chatml.*plain.*vicuna_v1"):
        chat_tokenizer("bytes", "chatlm")


def test_a_template_whose_stop_token_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(UserError, match=r"'<\|im_end\|>', which this tokenizer does not have"):
        chat_tokenizer("sentencepiece", "chatml")


def test_a_prompt_that_ends_in_an_answer_is_refused() -> None:
    with pytest.raises(RecordError, match="must end in a user's turn"):
        chat_tokenizer("bytes", "chatml").prompt(TWO_TURNS)


def test_a_chat_template_that_drops_a_message_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    by = ChatTokenizer.from_name("auto", tokenizer)
    with pytest.raises(RecordError, match="does not write the system message exactly once"):
        by.tokenize(record(turn("system", "x"), turn("user", "y"), turn("assistant", "z")))


def test_a_generation_prompt_that_differs_from_training_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    by = ChatTokenizer.from_name("auto", tokenizer)
    with pytest.raises(RecordError, match="generation prompt that its training text"):
        by.tokenize(record(turn("user", "y"), turn("assistant", "z")))


def test_text_that_only_training_writes_before_an_answer_is_trained() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    by = ChatTokenizer.from_name("auto", tokenizer)
    tokenized = by.tokenize(record(turn("user", "y"), turn("assistant", "z")))
    trained = [i for i in tokenized.labels if i != IGNORE_INDEX]
    assert by.encoder.decode(trained[:-1]) == "<think></think>z"


def test_many_are_tokenized_as_one_by_one_with_errors_in_their_places() -> None:
    by = chat_tokenizer("bytes", "plain")
    good = record(turn("user", 0, "\nWhat?"), turn("assistant", "A dog."))
    found = list(by.tokenize_all([good, TWO_TURNS, good] * 200))
    assert found[::3] == found[2::3] == [by.tokenize(good)] * 200
    assert {str(error) for error in found[1::3]} == {
        "file.json[0]: record 'r1': template 'plain' takes 1 question and answer a record, found "
        "2; choose a chat template"
    }
    assert gc.isenabled()
