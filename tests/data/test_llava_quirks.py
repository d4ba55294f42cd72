"""LLaVA-1.5's quirks: reproduced on request, corrected by default, listed in the manifest."""

import functools

import pytest

from tests.tokenizers_for_tests import sentencepiece_tokenizer
from vlm_sft.data.conversation import Conversation, ImagePart, Part, TextPart, Turn
from vlm_sft.data.llava_quirks import LLAVA_1_5, NO_QUIRKS, LlavaQuirks
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID


def conversation(question: tuple[Part, ...], answer: str) -> Conversation:
    turns = (Turn("user", question), Turn("assistant", (TextPart(answer),)))
    images = sum(isinstance(part, ImagePart) for part in question)
    return Conversation("r1", turns, (b"",) * images, "file.json[0]")


CAPTIONED = conversation((ImagePart(0), TextPart("\nDescribe.")), "a red car")
ASKED_LATE = conversation((TextPart(" What is this?\n"), ImagePart(0)), "A car.")


@functools.cache
def chat_tokenizer(template: str, llava_quirks: str) -> ChatTokenizer:
    return ChatTokenizer.from_name(template, sentencepiece_tokenizer(), llava_quirks=llava_quirks)


def tokens(llava_quirks: str, template: str, record: Conversation) -> str:
    """Tokens from the image's line on, supervised ones in brackets."""
    by = chat_tokenizer(template, llava_quirks)
    tokenized = by.tokenize(record)
    names = [
        "<image>" if i == IMAGE_TOKEN_ID else str(by.tokenizer.convert_ids_to_tokens(i))
        for i in tokenized.input_ids
    ]
    pairs = zip(names, tokenized.labels, strict=True)
    text = " ".join(f"[{name}]" if label != IGNORE_INDEX else name for name, label in pairs)
    return text[text.index("<image>") :]


def test_stage_1_trains_a_newline_instead_of_eos_with_llavas_quirks_only() -> None:
    assert tokens("none", "plain", CAPTIONED) == "<image> [a] [▁red] [▁car] [</s>]"
    assert tokens("llava-1.5", "plain", CAPTIONED) == "<image> [▁a] [▁red] [▁car] [<0x0A>]"
    assert chat_tokenizer("plain", "llava-1.5").eot_token_id is None


def test_text_after_an_image_begins_with_the_dummy_space_with_llavas_quirks_only() -> None:
    # The ids of LLaVA's own functions: "USER : ▁ <image> ▁ <0x0A> Describe . ▁ASS ..."
    assert tokens("llava-1.5", "vicuna_v1", CAPTIONED).startswith("<image> ▁ <0x0A> Des")
    assert tokens("none", "vicuna_v1", CAPTIONED).startswith("<image> <0x0A> Des")


def test_a_late_image_moves_first_with_llavas_quirks_only() -> None:
    by = chat_tokenizer("vicuna_v1", "llava-1.5")
    moved = conversation((ImagePart(0), TextPart("\nWhat is this?")), "A car.")
    assert by.tokenize(ASKED_LATE).input_ids == by.tokenize(moved).input_ids
    assert "What ▁is ▁this ? " not in tokens("none", "vicuna_v1", ASKED_LATE)
    prompt = Conversation("r1", ASKED_LATE.turns[:1], (b"",))
    assert by.prompt(prompt) == by.tokenize(ASKED_LATE).input_ids[: len(by.prompt(prompt))]


def test_a_turn_with_several_images_is_refused() -> None:
    two = conversation((ImagePart(0), TextPart("and"), ImagePart(1)), "Cars.")
    with pytest.raises(RecordError, match="keeps one image per turn and this one has 2"):
        chat_tokenizer("vicuna_v1", "llava-1.5").tokenize(two)
    assert chat_tokenizer("vicuna_v1", "none").tokenize(two).num_images == 2


@pytest.mark.parametrize("llava_quirks", ["none", "llava-1.5"])
def test_a_checkpoint_stores_the_quirks(llava_quirks: str) -> None:
    by = chat_tokenizer("plain", llava_quirks)
    again = ChatTokenizer.from_description(by.describe(), sentencepiece_tokenizer())
    assert again.llava_quirks.name == llava_quirks
    assert again.tokenize(CAPTIONED) == by.tokenize(CAPTIONED)


def test_the_manifest_lists_reproduced_and_corrected_quirks() -> None:
    names = {"caption_newline", "image_first", "space_behind_image"}
    never = {"zeroed_samples", "control_from_data", "cut_answers"}
    assert set(LLAVA_1_5.describe()["repeated"]) == names
    assert set(LLAVA_1_5.describe()["corrected"]) == never
    assert NO_QUIRKS.describe()["repeated"] == {}
    assert set(NO_QUIRKS.describe()["corrected"]) == names | never


def test_an_unknown_set_of_quirks_is_refused() -> None:
    with pytest.raises(UserError, match=r"unknown value 'llava'; expected none or llava-1\.5"):
        LlavaQuirks.from_name("llava")


def test_the_name_that_older_checkpoints_store_is_accepted() -> None:
    assert LlavaQuirks.from_name("fixed") is NO_QUIRKS


def test_the_exported_chat_template_moves_the_image_as_training_does() -> None:
    by = chat_tokenizer("vicuna_v1", "llava-1.5")
    text = sentencepiece_tokenizer().apply_chat_template(
        [{"role": "user", "content": " What is this?\n<image>"}],
        chat_template=by.to_jinja(),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert str(text).endswith("USER: <image>\nWhat is this? ASSISTANT:")
