"""LLaVA 1.5's quirks: repeated by name, corrected by default, told apart in the manifest."""

import functools

import pytest

from tests.tokenizers_for_tests import sentencepiece_tokenizer
from vlm_sft.data.conversation import Conversation, ImagePart, Part, TextPart, Turn
from vlm_sft.data.llava_quirks import FIXED, LLAVA_1_5, RECIPES, recipe_named
from vlm_sft.data.tokenize import Renderer
from vlm_sft.errors import RecordError, UserError
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_TOKEN_ID


def conversation(question: tuple[Part, ...], answer: str) -> Conversation:
    turns = (Turn("user", question), Turn("assistant", (TextPart(answer),)))
    images = sum(isinstance(part, ImagePart) for part in question)
    return Conversation("r1", turns, (b"",) * images, "file.json[0]")


CAPTIONED = conversation((ImagePart(0), TextPart("\nDescribe.")), "a red car")
ASKED_LATE = conversation((TextPart(" What is this?\n"), ImagePart(0)), "A car.")


@functools.cache
def renderer(template: str, recipe: str) -> Renderer:
    return Renderer.from_name(template, sentencepiece_tokenizer(), recipe=recipe)


def spelled(recipe: str, template: str, record: Conversation) -> str:
    """Tokens from the image's line on, the trained ones in brackets."""
    by = renderer(template, recipe)
    rendered = by.render(record)
    names = [
        "<image>" if i == IMAGE_TOKEN_ID else str(by.tokenizer.convert_ids_to_tokens(i))
        for i in rendered.input_ids
    ]
    pairs = zip(names, rendered.labels, strict=True)
    text = " ".join(f"[{name}]" if label != IGNORE_INDEX else name for name, label in pairs)
    return text[text.index("<image>") :]


def test_stage_1_trains_a_newline_instead_of_eos_in_llavas_recipe_only() -> None:
    assert spelled("fixed", "plain", CAPTIONED) == "<image> [a] [▁red] [▁car] [</s>]"
    assert spelled("llava-1.5", "plain", CAPTIONED) == "<image> [▁a] [▁red] [▁car] [<0x0A>]"
    assert renderer("plain", "llava-1.5").stop_id is None


def test_text_behind_an_image_begins_with_the_dummy_space_in_llavas_recipe_only() -> None:
    # The ids of LLaVA's own functions: "USER : ▁ <image> ▁ <0x0A> Describe . ▁ASS ..."
    assert spelled("llava-1.5", "vicuna_v1", CAPTIONED).startswith("<image> ▁ <0x0A> Des")
    assert spelled("fixed", "vicuna_v1", CAPTIONED).startswith("<image> <0x0A> Des")


def test_a_late_image_moves_first_in_llavas_recipe_only() -> None:
    by = renderer("vicuna_v1", "llava-1.5")
    moved = conversation((ImagePart(0), TextPart("\nWhat is this?")), "A car.")
    assert by.render(ASKED_LATE).input_ids == by.render(moved).input_ids
    assert "What ▁is ▁this ? " not in spelled("fixed", "vicuna_v1", ASKED_LATE)
    prompt = Conversation("r1", ASKED_LATE.turns[:1], (b"",))
    assert by.prompt(prompt) == by.render(ASKED_LATE).input_ids[: len(by.prompt(prompt))]


def test_a_turn_of_which_llava_would_lose_an_image_is_refused() -> None:
    two = conversation((ImagePart(0), TextPart("and"), ImagePart(1)), "Cars.")
    with pytest.raises(RecordError, match="keeps one image a turn and this one has 2"):
        renderer("vicuna_v1", "llava-1.5").render(two)
    assert renderer("vicuna_v1", "fixed").render(two).num_images == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_checkpoint_remembers_the_recipe(recipe: str) -> None:
    by = renderer("plain", recipe)
    again = Renderer.from_description(by.describe(), sentencepiece_tokenizer())
    assert again.recipe.name == recipe
    assert again.render(CAPTIONED) == by.render(CAPTIONED)


def test_the_manifest_lists_what_is_repeated_and_what_is_corrected() -> None:
    names = {"caption_newline", "image_first", "space_behind_image"}
    never = {"zeroed_samples", "control_from_data", "cut_answers"}
    assert set(LLAVA_1_5.describe()["repeated"]) == names
    assert set(LLAVA_1_5.describe()["corrected"]) == never
    assert FIXED.describe()["repeated"] == {}
    assert set(FIXED.describe()["corrected"]) == names | never


def test_an_unknown_recipe_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"no recipe 'llava'; expected fixed or llava-1\.5"):
        recipe_named("llava")


def test_the_exported_chat_template_moves_the_image_as_the_recipe_does() -> None:
    by = renderer("vicuna_v1", "llava-1.5")
    text = sentencepiece_tokenizer().apply_chat_template(
        [{"role": "user", "content": " What is this?\n<image>"}],
        chat_template=by.to_jinja(),
        tokenize=False,
        add_generation_prompt=True,
    )
    assert str(text).endswith("USER: <image>\nWhat is this? ASSISTANT:")
