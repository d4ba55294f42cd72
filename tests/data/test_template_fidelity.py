"""Ids equal what the models' makers and transformers give; every difference is on a list.

Sources: `llama_models` (Meta's own chat format), `mistral_common` (Mistral's own), and the chat
templates in `tests/chat_templates_for_tests.py`, applied by transformers.
"""

import copy
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from tests import chat_templates_for_tests as published
from tests.data.mask_oracle import IMAGE_ID, MAIN_PAIRS, MASKED, OTHER_PAIRS, Pair, chat_tokenizer
from tests.tokenizers_for_tests import load, missing
from vlm_sft.data.chat_template import builtin_templates
from vlm_sft.data.conversation import Conversation, ImagePart, Part, TextPart, Turn
from vlm_sft.data.tokenize import ChatTokenizer

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "templates.md"

Message = dict[str, Any]


def user(*said: str | int) -> Message:
    return _message("user", said)


def answer(text: str) -> Message:
    return _message("assistant", [text])


def system(text: str) -> Message:
    return _message("system", [text])


def _message(role: str, said: Sequence[str | int]) -> Message:
    if all(isinstance(s, str) for s in said):
        return {"role": role, "content": "".join(map(str, said))}
    parts = [{"type": "text", "text": s} if isinstance(s, str) else {"type": "image"} for s in said]
    return {"role": role, "content": parts}


def conversation(messages: Sequence[Message]) -> Conversation:
    turns, images = [], 0
    for message in messages:
        content = message["content"]
        parts: list[Part] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "image":
                parts.append(ImagePart(images))
                images += 1
            else:
                parts.append(TextPart(part["text"]))
        separator = None if isinstance(content, list) else ""
        turns.append(Turn(message["role"], tuple(parts), image_separator=separator))
    return Conversation("r1", tuple(turns), (b"",) * images)


def ours(template: str, tokenizer: str, messages: Sequence[Message]) -> list[int]:
    """Training ids, or the prompt's where the last message is a question."""
    by = chat_tokenizer(Pair(template, tokenizer, ""))
    if messages[-1]["role"] == "assistant":
        return by.tokenize(conversation(messages)).input_ids
    return by.prompt(conversation(messages))


def transformers(tokenizer: str, chat_template: str, messages: Sequence[Message]) -> list[int]:
    return load(tokenizer).apply_chat_template(
        list(messages),
        chat_template=chat_template,
        add_generation_prompt=messages[-1]["role"] != "assistant",
        return_dict=False,
    )


QUESTIONS = [
    "What color is the car?",
    "Is there a dog (or a cat) in it? I don't know: 12 + 30 = 42.",
    "日本語で答えてください。",
    "Write code:\n\ndef f(x):\n    return x",
    "Größe, naïve café, 👩‍👩‍👧 🏳️‍🌈, שלום",
    "1. one\n2. two\n\n3. three",
]
ANSWERS = ["Red.", "No, there is not.", "はい。", "```python\nprint(1)\n```", "Ja – 3,5 m!", "4"]


def talk(
    count: int, *, system_text: str | None = None, question_last: bool = False
) -> list[Message]:
    messages = [] if system_text is None else [system(system_text)]
    for i in range(count):
        messages += [user(QUESTIONS[i % 6]), answer(ANSWERS[i % 6])]
    return messages[:-1] if question_last else messages


TALKS = [
    pytest.param(talk(n, question_last=last), id=f"{n}{'-prompt' if last else ''}")
    for n in (1, 2, 6)
    for last in (False, True)
]
TALKS_WITH_SYSTEM = [
    pytest.param(
        talk(n, system_text="Be brief.\nBe kind.", question_last=last),
        id=f"system-{n}{'-prompt' if last else ''}",
    )
    for n in (1, 3)
    for last in (False, True)
]


def need(tokenizer: str) -> None:
    if missing(tokenizer) is not None:
        pytest.skip(str(missing(tokenizer)))


# --- makers' own encoders


@pytest.mark.parametrize("messages", TALKS + TALKS_WITH_SYSTEM)
def test_llama_3_is_metas_own_chat_format(messages: list[Message]) -> None:
    need("llama_3")
    from llama_models.datatypes import RawMessage, StopReason
    from llama_models.llama3.chat_format import ChatFormat
    from llama_models.llama3.tokenizer import Tokenizer

    meta = ChatFormat(Tokenizer.get_instance())
    made = [
        RawMessage(role=m["role"], content=m["content"], stop_reason=StopReason.end_of_turn)
        if m["role"] == "assistant"
        else RawMessage(role=m["role"], content=m["content"])
        for m in messages
    ]
    theirs = meta.encode_dialog_prompt(made).tokens  # always opens the next answer
    opening = meta.encode_dialog_prompt([]).tokens[1:]
    found = ours("llama_3", "llama_3", messages)
    if messages[-1]["role"] == "assistant":
        found = found + opening
    assert found == theirs


@pytest.mark.parametrize("messages", TALKS + TALKS_WITH_SYSTEM)
def test_mistral_is_mistrals_own_encoder(messages: list[Message]) -> None:
    from mistral_common.protocol.instruct import messages as kinds
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.base import InstructRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    mistral = MistralTokenizer.v1()
    kind = {
        "user": kinds.UserMessage,
        "assistant": kinds.AssistantMessage,
        "system": kinds.SystemMessage,
    }
    made = [kind[m["role"]](content=m["content"]) for m in messages]
    if messages[-1]["role"] == "assistant":
        has_system = messages[0]["role"] == "system"
        request = InstructRequest(
            messages=made[1:] if has_system else made,
            system_prompt=messages[0]["content"] if has_system else None,
        )
        theirs = mistral.instruct_tokenizer.encode_instruct(request).tokens
    else:
        theirs = mistral.encode_chat_completion(ChatCompletionRequest(messages=made)).tokens
    if any(str(m["content"]) == QUESTIONS[3] for m in messages):
        return  # runs of spaces: on the list of differences
    assert ours("mistral", "llama_2_file", messages) == theirs


def test_llama_3s_converted_tokenizer_is_metas() -> None:
    need("llama_3")
    from llama_models.llama3.tokenizer import Tokenizer

    meta = Tokenizer.get_instance()
    for text in [*QUESTIONS, *ANSWERS, " \n\n  x", "e\u0301" * 40, "1234567 "]:
        assert load("llama_3").encode(text, add_special_tokens=False) == meta.encode(
            text, bos=False, eos=False
        )
    control = {str(t): i for i, t in load("llama_3").added_tokens_decoder.items()}
    assert control == meta.special_tokens


def test_qwens_converted_tokenizer_is_its_makers() -> None:
    need("qwen")
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    from tests.tokenizers_for_tests import QWEN_PATTERN, _package_file

    ranks = load_tiktoken_bpe(str(_package_file("dashscope", "resources/qwen.tiktoken")))
    qwen = tiktoken.Encoding("qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in [*QUESTIONS, *ANSWERS, " \n\n  x", "1234567 "]:
        assert load("qwen").encode(text, add_special_tokens=False) == qwen.encode(text)


# --- published chat templates


@pytest.mark.parametrize("messages", TALKS_WITH_SYSTEM)
@pytest.mark.parametrize("template", ["chatml", "auto"])
def test_chatml_is_qwens_own_template(template: str, messages: list[Message]) -> None:
    need("qwen")
    assert ours(template, "qwen", messages) == transformers("qwen", published.QWEN_2, messages)


@pytest.mark.parametrize("messages", TALKS + TALKS_WITH_SYSTEM)
@pytest.mark.parametrize("template", ["smollm2", "auto"])
def test_smollm2_is_the_template_in_its_gguf_file(template: str, messages: list[Message]) -> None:
    need("smollm2")
    own = load("smollm2").chat_template
    assert ours(template, "smollm2", messages) == transformers("smollm2", own, messages)


def test_smollm2s_published_template_is_the_one_in_its_gguf_file() -> None:
    need("smollm2")
    assert load("smollm2").chat_template == published.SMOLLM_2


@pytest.mark.parametrize("messages", TALKS + TALKS_WITH_SYSTEM)
def test_smollm2_is_its_published_template(messages: list[Message]) -> None:
    need("qwen")
    theirs = transformers("qwen", published.SMOLLM_2, messages)
    assert ours("smollm2", "qwen", messages) == theirs


@pytest.mark.parametrize("messages", TALKS + TALKS_WITH_SYSTEM)
@pytest.mark.parametrize("template", ["llama_3", "auto"])
def test_llama_3_is_its_published_template(template: str, messages: list[Message]) -> None:
    need("llama_3")
    theirs = transformers("llama_3", published.LLAMA_3, messages)
    assert ours(template, "llama_3", messages) == theirs


@pytest.mark.parametrize("messages", TALKS)
@pytest.mark.parametrize("template", ["gemma", "auto"])
def test_gemma_is_its_published_template(template: str, messages: list[Message]) -> None:
    assert ours(template, "gemma", messages) == transformers("gemma", published.GEMMA, messages)


@pytest.mark.parametrize("messages", TALKS + TALKS_WITH_SYSTEM)
@pytest.mark.parametrize("template", ["phi_3", "auto"])
def test_phi_3_is_its_published_template(template: str, messages: list[Message]) -> None:
    theirs = transformers("phi_3", published.PHI_3, messages)
    if template == "phi_3" and messages[-1]["role"] == "assistant":
        assert load("phi_3").convert_ids_to_tokens(theirs.pop()) == "<|endoftext|>"
    assert ours(template, "phi_3", messages) == theirs


@pytest.mark.parametrize("messages", TALKS_WITH_SYSTEM)
def test_llava_llama_2_is_llama_2s_published_template(messages: list[Message]) -> None:
    theirs = transformers("llama_2_file", published.LLAMA_2, messages)
    assert ours("llava_llama_2", "llama_2_file", messages) == theirs


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v1"])
def test_vicuna_supervises_the_ids_that_llava_supervises(name: str) -> None:
    """LLaVA's own preprocessing was run on this record: slow Llama tokenizer, not legacy."""
    messages = [user(0, "\nWhat color?"), answer("Red car."), user("Why?"), answer("Paint.")]
    tokenized = chat_tokenizer(Pair(name, "sentencepiece", name)).tokenize(conversation(messages))
    words = load("sentencepiece").convert_ids_to_tokens(
        [i for i in tokenized.labels if i != MASKED]
    )
    assert words == ["▁Red", "▁car", ".", "</s>", "▁P", "aint", ".", "</s>"]
    second = load("sentencepiece").convert_ids_to_tokens(tokenized.input_ids[-13:])
    assert " ".join(second) == "</s> USER : ▁Why ? ▁ASS IST ANT : ▁P aint . </s>"


# --- a template's four uses


@functools.cache
def with_image_token(name: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(load(name))
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    return tokenizer


@functools.cache
def from_checkpoint(pair: Pair) -> ChatTokenizer:
    stored = json.loads(json.dumps(chat_tokenizer(pair).describe()))
    return ChatTokenizer.from_description(stored, load(pair.tokenizer))


def exported(pair: Pair, messages: Sequence[Message]) -> list[int]:
    """The template as it is exported, applied by transformers; an image is one token."""
    tokenizer = with_image_token(pair.tokenizer)
    ids = tokenizer.apply_chat_template(
        list(messages),
        chat_template=chat_tokenizer(pair).to_jinja(),
        add_generation_prompt=messages[-1]["role"] != "assistant",
        return_dict=False,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    return [IMAGE_ID if i == image else i for i in ids]


FOUR_WAYS = {
    "one turn": [user("What color?"), answer("Red.")],
    "three turns": talk(3),
    "image": [user(0, "What color?"), answer("Red.")],
    "images": [user("Compare ", 0, " with ", 1, "."), answer("The same.")],
    "system": [system("Be brief."), user("What color?"), answer("Red.")],
    "system and image": [system("Be brief."), user(0, "What?"), answer("Red."), *talk(1)],
}


@pytest.mark.parametrize("case", FOUR_WAYS)
@pytest.mark.parametrize("pair", (*MAIN_PAIRS, *OTHER_PAIRS), ids=lambda pair: pair.name)
def test_training_prompt_export_and_checkpoint_agree(pair: Pair, case: str) -> None:
    need(pair.tokenizer)
    messages = FOUR_WAYS[case]
    if messages[0]["role"] == "system" and not pair.takes_system:
        pytest.skip("no place for system text")
    if sum(m["role"] == "user" for m in messages) > pair.max_exchanges:
        pytest.skip("one exchange a record")
    by = chat_tokenizer(pair)
    tokenized = by.tokenize(conversation(messages))
    for span in tokenized.answer_spans:
        before = messages[: span.turn]
        prompt = by.prompt(conversation(before))
        assert tokenized.input_ids[: span.start] == prompt
        assert exported(pair, before) == prompt
    assert exported(pair, messages) == tokenized.input_ids
    assert from_checkpoint(pair).tokenize(conversation(messages)) == tokenized
    assert from_checkpoint(pair).describe() == by.describe()


# --- the list of differences


@dataclass(frozen=True)
class Difference:
    """Where our ids differ from a maker's or from transformers', on purpose or unavoidably."""

    what: str
    """The sentence in docs/templates.md."""
    tokenizer: str
    ours: Callable[[], list[int]]
    theirs: Callable[[], list[int]]
    our_tokens: str
    """Tokens that only we have in a row, as the vocabulary names them."""
    their_tokens: str


def _talk(*texts: str) -> list[Message]:
    return [user(t) if i % 2 == 0 else answer(t) for i, t in enumerate(texts)]


def _pair(
    template: str, tokenizer: str, chat_template: str, messages: list[Message]
) -> tuple[Callable[[], list[int]], Callable[[], list[int]]]:
    return (
        lambda: ours(template, tokenizer, messages),
        lambda: transformers(tokenizer, chat_template, messages),
    )


def _spaces() -> list[int]:
    import sentencepiece

    model = resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return list(pieces.encode("a    return"))


KNOWN_DIFFERENCES = (
    Difference(
        "`chatml` writes no default system text; Qwen's template writes one.",
        "qwen",
        *_pair("chatml", "qwen", published.QWEN_2, _talk("Hi", "Yes.")),
        "<|im_start|> user Ċ Hi",
        "<|im_start|> system Ċ You",
    ),
    Difference(
        "Texts are never trimmed; Llama 3's, Llama 2's and Gemma's templates trim them.",
        "gemma",
        *_pair("gemma", "gemma", published.GEMMA, _talk(" Hi ", "Yes.")),
        "user <0x0A> ▁Hi ▁ <end_of_turn>",
        "user <0x0A> Hi <end_of_turn>",
    ),
    Difference(
        "`phi_3` writes no <|endoftext|> after the last answer; Phi 3's template does.",
        "phi_3",
        *_pair("phi_3", "phi_3", published.PHI_3, _talk("Hi", "Yes.")),
        "▁Yes . <|end|>",
        "<|end|> <|endoftext|>",
    ),
    Difference(
        "White space at the start of a text is kept; Phi 3's special tokens strip it.",
        "phi_3",
        *_pair("phi_3", "phi_3", published.PHI_3, _talk("\nHi", "Yes.")),
        "<|user|> ▁ <0x0A> Hi",
        "<|user|> ▁Hi",
    ),
    Difference(
        "`mistral` writes a space before an answer and none after </s>, as Mistral's own encoder "
        "does; the template published with v0.1 does the opposite.",
        "llama_2_file",
        *_pair("mistral", "llama_2_file", published.MISTRAL_1, _talk("Hi", "Yes.", "Why?", "So.")),
        "▁Yes . </s> ▁[",
        "] Yes . </s>",
    ),
    Difference(
        "Special-token strings in data stay ordinary text; transformers encodes them as special "
        "tokens.",
        "llama_3",
        *_pair("llama_3", "llama_3", published.LLAMA_3, _talk("Hi<|eot_id|>", "Yes.")),
        "Hi < | e ot _id",
        "Hi <|eot_id|> <|eot_id|>",
    ),
    Difference(
        "An answer begins at a token boundary, so that its prompt is a prefix; transformers "
        "merges the header's newline with an answer that begins with one.",
        "qwen",
        *_pair(
            "chatml",
            "qwen",
            published.QWEN_2,
            [system("Be brief."), user("Hi"), answer("\nYes.")],
        ),
        "assistant Ċ Ċ Yes",
        "assistant ĊĊ Yes",
    ),
    Difference(
        "Text after BOS begins with SentencePiece's dummy space in templates without special "
        "tokens, as in LLaVA; transformers omits it with a bare tokenizer.model.",
        "sentencepiece",
        *_pair("mistral", "sentencepiece", published.MISTRAL_1, _talk("Hi", "Yes.")),
        "<s> ▁[ INST",
        "<s> [ INST",
    ),
    Difference(
        "Runs of spaces are split as in transformers; SentencePiece itself splits them "
        "differently.",
        "llama_2_file",
        lambda: load("llama_2_file").encode("a    return", add_special_tokens=False),
        _spaces,
        "▁▁▁▁ return",
        "▁▁▁ ▁return",
    ),
)


@pytest.mark.parametrize("difference", KNOWN_DIFFERENCES, ids=lambda d: d.what.split(";")[0][:60])
def test_a_known_difference_is_still_there_and_is_documented(difference: Difference) -> None:
    need(difference.tokenizer)
    name = load(difference.tokenizer).convert_ids_to_tokens
    found, theirs = (f" {' '.join(name(ids))} " for ids in (difference.ours(), difference.theirs()))
    assert f" {difference.our_tokens} " in found
    assert f" {difference.their_tokens} " in theirs
    assert found != theirs
    assert difference.what in " ".join(DOCUMENT.read_text(encoding="utf-8").split())


def test_the_document_names_every_template() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert [name for name in builtin_templates() if f"`{name}`" not in text] == []
