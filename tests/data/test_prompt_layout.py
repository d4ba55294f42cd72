"""The same question gives the same ids, in whatever form a record or a caller has it.

Training (`ChatTokenizer.tokenize`), `chat` and `evaluate` (`ChatTokenizer.prompt`), and the
exported chat template, applied by transformers to plain strings and to content parts.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from tests.data.mask_oracle import IMAGE_ID, MAIN_PAIRS, OTHER_PAIRS, Pair
from tests.tokenizers_for_tests import load, missing
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.hf_tokenizer import byte_tokenizer, exported_tokenizer
from vlm_sft.data.image_separator import ImageLayoutCheck, separated_parts
from vlm_sft.data.record_formats import Form, RawRecord, parse_record
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import RecordError, TemplateError
from vlm_sft.inference.prompts import user_message

IMAGE = None
"""An image among the items of a turn; everything else is text."""

Items = list[str | None]


@functools.cache
def chat_tokenizer(pair: Pair, separator: str | None = None) -> ChatTokenizer:
    return ChatTokenizer.from_name(pair.template, load(pair.tokenizer), image_separator=separator)


@functools.cache
def exported(tokenizer: str) -> PreTrainedTokenizerBase:
    """An exported tokenizer, to be used with the chat template of a chat_tokenizer."""
    return exported_tokenizer(load(tokenizer), "template")


def exported_text(pair: Pair, messages: list[dict[str, Any]]) -> str:
    chat_template = chat_tokenizer(pair).to_jinja()
    made = exported(pair.tokenizer).apply_chat_template(
        messages, chat_template=chat_template, tokenize=False
    )
    return str(made)


def asked_of_export(
    pair: Pair, messages: list[dict[str, Any]], separator: str | None = None
) -> list[int]:
    """Ids of the exported template, whether or not the tokenizer may add special tokens."""
    tokenizer = exported(pair.tokenizer)
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=chat_tokenizer(pair, separator).to_jinja(),
        add_generation_prompt=messages[-1]["role"] != "assistant",
        tokenize=False,
    )
    ids = tokenizer(text)["input_ids"]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
    image = tokenizer.convert_tokens_to_ids("<image>")
    return [IMAGE_ID if i == image else i for i in ids]


# --- records as people write them


def as_string(items: Items) -> str:
    return "".join("<image>" if item is IMAGE else item for item in items)


def as_parts(items: Items, image: dict[str, Any]) -> list[dict[str, Any]]:
    return [image if item is IMAGE else {"type": "text", "text": item} for item in items]


IMAGE_PARTS: dict[str, dict[str, Any]] = {
    "image": {"type": "image", "image": "a.png"},
    "url": {"type": "image", "url": "a.png"},
    "path": {"type": "image", "path": "a.png"},
    "listed": {"type": "image"},
    "openai": {"type": "image_url", "image_url": {"url": "a.png"}},
}


@dataclass(frozen=True)
class Talk:
    """System text, then questions (items) with their answers."""

    system: str | None
    exchanges: tuple[tuple[Items, str], ...]

    @property
    def num_images(self) -> int:
        return sum(items.count(IMAGE) for items, _ in self.exchanges)

    def messages(self, form_name: str, *, last_answer: bool = True) -> list[dict[str, Any]]:
        """Messages for `apply_chat_template`, contents as strings or as lists of parts."""
        made: list[dict[str, Any]] = []
        if self.system is not None:
            made.append({"role": "system", "content": self.system})
        for items, answer in self.exchanges:
            content: Any = as_string(items)
            if form_name != "string":
                content = as_parts(items, IMAGE_PARTS[form_name])
            made += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return made if last_answer else made[:-1]

    def record(self, form_name: str) -> tuple[dict[str, Any], Form]:
        """A record of a form: LLaVA, `messages` in several forms, or Alpaca."""
        names = ["a.png"] * self.num_images
        if form_name == "llava":
            return {"conversations": self._llava(), "image": names}, "llava"
        if form_name == "alpaca":
            ((items, answer),) = self.exchanges
            record = {"instruction": as_string(items), "output": answer, "images": names}
            return {**record, "system": self.system}, "alpaca"
        record = {"messages": self.messages(form_name)}
        if form_name in ("string", "listed"):
            record["images"] = names
        return record, "messages"

    def _llava(self) -> list[dict[str, str]]:
        speakers = {"user": "human", "assistant": "gpt", "system": "system"}
        return [
            {"from": speakers[message["role"]], "value": message["content"]}
            for message in self.messages("string")
        ]


def read(talk: Talk, form_name: str) -> Conversation:
    record, form = talk.record(form_name)
    return parse_record(RawRecord(record, "memory", "r1"), form, Path("/images"))


def content_of(form_name: str) -> str:
    """Return the form of a call of the export that corresponds to a form of records."""
    return "string" if form_name in ("llava", "alpaca", "string") else form_name


def before_answers(conversation: Conversation) -> list[Conversation]:
    turns = conversation.turns
    cuts = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    return [Conversation("r1", turns[:cut], conversation.images) for cut in cuts]


# --- generated talks


WORDS = (
    "What is it?",
    "Größe 👩‍👩‍👧 café",
    "日本語で",
    "a",
    "12 + 30 = 42",
    "- x\n- y",
    "e\u0301",
    "שלום",
)
SPACES = ("", " ", "\n", "\n\n", "  ", "\t", " \n", "\u3000")


@st.composite
def texts(draw: st.DrawFn, *, leading: bool) -> str:
    before = draw(st.sampled_from(SPACES)) if leading else ""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=3))
    return (
        before + draw(st.sampled_from((" ", "\n", ""))).join(words) + draw(st.sampled_from(SPACES))
    )


def questions(leading: bool) -> st.SearchStrategy[Items]:
    with_images = st.lists(
        st.one_of(st.none(), st.sampled_from(SPACES[:3]), texts(leading=True)),
        min_size=1,
        max_size=5,
    ).filter(lambda items: leading or not as_string(items)[:1].isspace())
    return st.one_of(texts(leading=leading).map(lambda text: [text]), with_images)


@st.composite
def talks(draw: st.DrawFn, pair: Pair) -> Talk:
    leading = pair.tokenizer != "phi_3"  # its special tokens strip the white space after them
    system = draw(st.none() | texts(leading=leading)) if pair.takes_system else None
    count = draw(st.integers(1, min(3, pair.max_exchanges)))
    exchanges = []
    for _ in range(count):
        # An answer that begins with white space is a known difference (docs/templates.md).
        exchanges.append((draw(questions(leading)), draw(texts(leading=False))))
    return Talk(system, tuple(exchanges))


FORM_NAMES = ("llava", "string", *IMAGE_PARTS, "alpaca")
PAIRS = [
    pair
    for pair in (*MAIN_PAIRS, *OTHER_PAIRS)
    if missing(pair.tokenizer) is None
    and (pair in MAIN_PAIRS or pair.template == "auto" or pair.tokenizer in ("bytes", "bpe"))
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_every_form_of_a_record_has_the_prompt_that_it_was_trained_with(
    pair: Pair, data: st.DataObject
) -> None:
    talk = data.draw(talks(pair))
    small = pair.tokenizer in ("bytes", "bpe")
    separator = data.draw(st.sampled_from((None, "", " ", "\n\n"))) if small else None
    form_name = data.draw(st.sampled_from(FORM_NAMES[: None if len(talk.exchanges) == 1 else -1]))
    by = chat_tokenizer(pair, separator)
    trained_on = read(talk, form_name)
    try:
        tokenized = by.tokenize(trained_on)
    except RecordError as error:
        assert error.reason in ("unspellable", "template")
        return
    messages = talk.messages(content_of(form_name))
    assert asked_of_export(pair, messages, separator) == tokenized.input_ids
    cuts = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for cut, span, asked in zip(
        cuts, tokenized.answer_spans, before_answers(trained_on), strict=True
    ):
        prompt = by.prompt(asked)
        assert prompt == tokenized.input_ids[: span.start]
        assert asked_of_export(pair, messages[:cut], separator) == prompt


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_chat_asks_as_llavas_records_and_content_parts_do(pair: Pair, num_images: int) -> None:
    by = chat_tokenizer(pair)
    items: Items = [IMAGE] * num_images + ["What color is the car?"]
    written: Items = ["What color is the car?"]
    for number in range(num_images):
        written = [IMAGE, by.image_separator if number else by.text_separator, *written]
    chat = by.prompt(user_message("What color is the car?", [b""] * num_images))
    (trained,) = before_answers(read(Talk(None, ((written, "Red."),)), "llava"))
    assert by.prompt(trained) == chat
    for form_name, question in {
        "string": written,
        "image": items,
        "openai": items,
        "url": items,
    }.items():
        messages = Talk(None, ((question, "Red."),)).messages(form_name, last_answer=False)
        assert asked_of_export(pair, messages) == chat


def test_a_later_question_of_a_chat_is_the_multi_turn_record() -> None:
    pair = Pair("vicuna_v1", "sentencepiece", "vicuna_v1")
    talk = Talk(None, (([IMAGE, "What?"], "A car."), ([IMAGE, "And this?"], "A dog.")))
    first = user_message("What?", [b""])
    answered = (*first.turns, Turn("assistant", (TextPart("A car."),)))
    later = user_message("And this?", [b"", b""], history=answered)
    assert chat_tokenizer(pair).prompt(later) == chat_tokenizer(pair).prompt(
        before_answers(read(talk, "image"))[1]
    )


# --- the rule


A, B = ImagePart(0), ImagePart(1)


@pytest.mark.parametrize(
    ("items", "separator", "expected"),
    [
        ([A, "What?"], "\n", "<image>\nWhat?"),
        ([A, "\nWhat?"], "\n", "<image>\nWhat?"),
        (["What?", A], "\n", "What?\n<image>"),
        (["What?\n", A], "\n", "What?\n<image>"),
        (["See ", A, " and ", B, "."], "\n", "See \n<image>\n and \n<image>\n."),
        ([A, B, "Compare."], "\n", "<image>\n<image>\nCompare."),
        ([A, "", "What?"], "\n", "<image>\nWhat?"),
        (["", A, ""], "\n", "<image>"),
        (["Look:", "", "\n", A], "\n", "Look:\n<image>"),
        ([A, "What", " is it?"], "\n", "<image>\nWhat is it?"),
        ([A, "What?"], "", "<image>What?"),
        ([A, B, "What?"], " ", "<image> <image> What?"),
        ([A, " What?"], "\n", "<image>\n What?"),
    ],
)
def test_one_separator_is_between_an_image_and_its_neighbors(
    items: Sequence[str | ImagePart], separator: str, expected: str
) -> None:
    parts = tuple(TextPart(item) if isinstance(item, str) else item for item in items)
    made = separated_parts(parts, separator)
    assert "".join(p.text if isinstance(p, TextPart) else "<image>" for p in made) == expected


def test_a_template_file_names_its_separator_and_the_setting_goes_before_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ndescription: d\nimage_separator: ' '\nuser: {prefix: 'Q: '}\n",
        encoding="utf-8",
    )
    tokenizer = load("bytes")
    by = ChatTokenizer.from_name(str(path), tokenizer)
    assert (
        by.encoder.decode([i for i in by.prompt(user_message("Hi", [b""])) if i >= 0]) == "Q:  Hi"
    )
    again = ChatTokenizer.from_description(by.describe(), tokenizer)
    assert again.image_separator == " " and again.describe() == by.describe()
    other = ChatTokenizer.from_name(str(path), tokenizer, image_separator="\n")
    assert ChatTokenizer.from_description(other.describe(), tokenizer).image_separator == "\n"


AROUND = "name: mine\ndescription: d\nuser: {prefix: 'Q: '}\nimage_start: <img>\n"


def test_a_template_file_names_tokens_around_an_image(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(AROUND, encoding="utf-8")
    tokenizer = load("bytes-img")
    by = ChatTokenizer.from_name(str(path), tokenizer)
    assert by.image_tokens == ("<img>", "")
    ids = by.prompt(user_message("<img>", [b""]))
    start = tokenizer.convert_tokens_to_ids("<img>")
    assert ids.count(start) == 1  # the text of a user stays text
    assert ids[ids.index(start) + 1] == IMAGE_ID
    assert ChatTokenizer.from_description(by.describe(), tokenizer).describe() == by.describe()
    plain = ChatTokenizer.from_name("chatml", tokenizer).describe()["template"]["file"]
    assert not {"image_start", "image_end"} & set(plain)  # as in checkpoints before the setting
    bare = by.to_jinja(image_tokens=False)
    messages = [{"role": "user", "content": "<image>Hi"}]
    written = [
        tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False)
        for jinja in (by.to_jinja(), bare)
    ]
    assert written == ["Q: <img><image>Hi", "Q: <image>Hi"]


def test_tokens_around_an_image_must_be_plain_special_tokens(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(AROUND, encoding="utf-8")
    with pytest.raises(TemplateError, match="needs the special tokens <img>"):
        ChatTokenizer.from_name(str(path), load("bytes"))
    with pytest.raises(TemplateError, match="needs the special tokens <img>, </img>"):
        ChatTokenizer.from_name("internvl2_5", load("bytes"))
    greedy = byte_tokenizer()
    greedy.add_tokens([AddedToken("<img>", special=True, lstrip=True)])
    with pytest.raises(TemplateError, match="removes the white space around it"):
        ChatTokenizer.from_name(str(path), greedy)


@pytest.mark.parametrize("separator", ["<image>", "a<|im_end|>"])
def test_a_separator_that_is_no_ordinary_text_is_refused(separator: str) -> None:
    with pytest.raises(TemplateError, match=r"image separator .* is not ordinary text"):
        ChatTokenizer.from_name("chatml", load("bytes"), image_separator=separator)


def test_a_message_may_bring_its_own_separator() -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content, "image_separator": ""}]
    record = {"messages": [*turns, {"role": "assistant", "content": "Red."}]}
    found = parse_record(RawRecord(record, "memory", "r1"), None, Path("/images"))
    written = read(Talk(None, (([IMAGE, "What?"], "Red."),)), "llava")
    assert found.turns == written.turns
    record["messages"][0]["content"] = "What?"
    with pytest.raises(RecordError, match="`image_separator` must be text next to a list of parts"):
        parse_record(RawRecord(record, "memory", "r1"), None, Path("/images"))


# --- unusual messages


CHATML = Pair("chatml", "bytes", "chatml")


@pytest.mark.parametrize("content", [None, [], "", [{"type": "text", "text": ""}]])
def test_empty_content_is_empty_text(content: Any) -> None:
    text = exported_text(
        CHATML, [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]
    )
    assert text == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        ("chatml", [{"role": "tool", "content": "42"}], "no place for a message of role tool"),
        ("plain", [{"role": "system", "content": "Hi"}], "no place for a message of role system"),
        (
            "chatml",
            [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
            "trained without tools",
        ),
        (
            "chatml",
            [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}],
            "content part of type video: expected text or image",
        ),
    ],
)
def test_what_was_never_trained_is_refused_by_the_exported_template(
    template: str, messages: list[dict[str, Any]], expected: str
) -> None:
    with pytest.raises(Exception, match=expected):
        exported_text(Pair(template, "bytes", template), messages)


def test_a_templates_own_conditions_on_contents_do_not_return_in_the_export() -> None:
    import copy

    tokenizer = copy.deepcopy(load("bytes"))
    tokenizer.chat_template = (
        "\n {%- for message in messages %}<|im_start|>{{ message.role + '\n' }}"
        "{%- generation %}{{ message.content | trim }}{% endgeneration -%}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\n"
    )
    by = ChatTokenizer.from_name("auto", tokenizer)
    said = " vlmsftTurn1Content <a>\n"
    talk = Talk(None, (([said], "Yes."), (["Why?"], "So.")))
    ours = by.tokenize(read(talk, "llava")).input_ids
    made = exported_tokenizer(tokenizer, by.to_jinja())
    assert made.apply_chat_template(talk.messages("string"), return_dict=False) == ours


# --- what `check` reports


def checked(texts: Sequence[str], separator: str = "\n") -> list[str]:
    check = ImageLayoutCheck(separator)
    for text in texts:
        items: Items = []
        for number, piece in enumerate(text.split("<image>")):
            items += [IMAGE, piece] if number else [piece]
        check.add(read(Talk(None, (([i for i in items if i != ""], "Red."),)), "llava"))
    return check.warnings()


def test_records_laid_out_as_asked_give_no_warning() -> None:
    assert checked(["<image>\nWhat?", "<image>\n<image>\nWhat?", "No image here."]) == []
    assert checked(["<image> What?"], " ") == checked(["<image>What?"], "") == []


def test_another_separator_and_another_place_are_reported() -> None:
    (separator,) = checked(["<image> What?", "<image>\nWhat?", "<image>What?"])
    assert separator.startswith("2 of 3 questions about images (first: record 'r1') have other ")
    assert "than '\\n' between an image and its neighbors" in separator
    assert "set data.image_separator" in separator
    (place,) = checked(["What?\n<image>", "<image>\nWhat?"])
    assert place.startswith("1 of 2 questions about images (first: record 'r1') do not begin with")


def test_content_parts_are_always_laid_out_as_asked() -> None:
    check = ImageLayoutCheck("\n")
    check.add(read(Talk(None, (([IMAGE, "What?"], "Red."),)), "image"))
    assert check.num_questions == 1 and check.warnings() == []


@pytest.mark.parametrize("name", ["<|image|>", "<|image_1|>", "<ImageHere>", "[IMG]", "<image_0>"])
def test_a_placeholder_of_another_tool_is_named(name: str) -> None:
    record = {"messages": Talk(None, (([f"{name}What?"], "Red."),)).messages("string")}
    with pytest.raises(
        RecordError, match="is the placeholder of another tool, use <image>"
    ) as raised:
        parse_record(RawRecord({**record, "images": ["a.png"]}, "m", "r1"), None, Path("/images"))
    assert name in str(raised.value)
