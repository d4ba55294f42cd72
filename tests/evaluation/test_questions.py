"""Cached scores equal those of whole sequences, and no image is shuffled to itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.model.tiny import batch_of
from tests.rounding import rounding, terms_of
from vlm_sft.data.image_layout import ImageLayout
from vlm_sft.data.images import ImageCrops
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.evaluation.conditions import derangement
from vlm_sft.evaluation.questions import (
    Prediction,
    Question,
    answer_text,
    blank_image,
    generate_predictions,
    last_choice,
    make_items,
    read_questions,
    require_questions_in_prompt,
    score_image,
    score_predictions,
    summarize,
)
from vlm_sft.inference.generate import generate_greedy
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.inference.prompts import user_message
from vlm_sft.utils.atomic_files import write_json


def ask_yes_no(text: str, image: str = "a.png", answer: str = "yes") -> Question:
    return Question(text, image, text, answer, "random", ("yes", "no"))


def noise(seed: int) -> ImageCrops:
    generator = torch.Generator().manual_seed(seed)
    return square(torch.randint(0, 256, (3, 28, 28), generator=generator, dtype=torch.uint8))


def square(pixels: torch.Tensor) -> ImageCrops:
    return ImageCrops(pixels[None], ImageLayout(crop_tokens=4))


def bound_of(run: LoadedModel) -> float:
    """Return how far apart two sums of log probabilities may be, relative to them."""
    return rounding(terms_of(run.model, length=80))


def plain_score(run: LoadedModel, asked: Question, choice: str, image: ImageCrops) -> float:
    prompt = run.prompt_ids(user_message(asked.question, [b""]))
    answer = run.chat_tokenizer.answer_ids(answer_text(choice))
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.inference_mode():
        output = run.model(batch_of(ids, torch.ones_like(ids), labels, image.pixels))
    return -float(output.loss_sum)


def test_cached_scores_equal_those_of_whole_sequences(run: LoadedModel) -> None:
    pixels = noise(1)
    questions = [
        ask_yes_no("Is there a dog?"),
        ask_yes_no("Can you see a very small cat?"),
        ask_yes_no("Hm"),
    ]
    for prediction in score_image(run, questions, pixels):
        expected = [plain_score(run, prediction.question, c, pixels) for c in ("yes", "no")]
        assert prediction.log_probabilities == pytest.approx(expected, rel=bound_of(run))


def test_one_question_is_scored_as_well_as_many(run: LoadedModel) -> None:
    pixels = square(torch.zeros(3, 28, 28, dtype=torch.uint8))
    alone = score_image(run, [ask_yes_no("Is there a dog?")], pixels)[0]
    together = score_image(run, [ask_yes_no("Is there a dog?"), ask_yes_no("Or a cow?")], pixels)[0]
    assert alone.log_probabilities == pytest.approx(together.log_probabilities, rel=bound_of(run))


def test_the_image_and_the_condition_matter(run: LoadedModel, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (250, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 40), (10, 10, 250)).save(tmp_path / "b.png")
    questions = [ask_yes_no("Is it red?", "a.png"), ask_yes_no("Is it red?", "b.png", "no")]

    scores = {
        (item.condition, item.question.image): prediction.log_probabilities
        for item, prediction in score_predictions(run, make_items(questions), tmp_path)
    }
    assert len(scores) == 6
    assert scores["right", "a.png"] == pytest.approx(scores["shuffled", "b.png"], rel=bound_of(run))
    assert scores["right", "b.png"] == pytest.approx(scores["shuffled", "a.png"], rel=bound_of(run))
    assert scores["right", "a.png"] != pytest.approx(scores["right", "b.png"], rel=bound_of(run))
    assert scores["blank", "a.png"] == pytest.approx(scores["blank", "b.png"], rel=bound_of(run))


def test_an_image_is_encoded_once_for_all_questions_about_it(
    run: LoadedModel, tmp_path: Path
) -> None:
    Image.new("RGB", (40, 30), (250, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 40), (10, 10, 250)).save(tmp_path / "b.png")
    existence = [ask_yes_no("Is it red?", name) for name in ("a.png", "b.png") for _ in range(20)]
    counting = [ask_yes_no("Are there two?", "a.png"), ask_yes_no("Are there two?", "b.png")]
    items = make_items(existence, measure="existence") + make_items(counting, measure="counting")
    images: list[int] = []
    with run.model.vision_tower.register_forward_pre_hook(
        lambda module, given: images.append(len(given[0]))
    ):
        predicted = list(score_predictions(run, items, tmp_path))
    assert images == [1, 1, 1]
    assert len(predicted) == 3 * 42
    assert sum(item.measure == "counting" for item, _ in predicted) == 6
    assert all(item.question is prediction.question for item, prediction in predicted)


def test_answers_of_any_number_and_length_score_as_whole_sequences_do(run: LoadedModel) -> None:
    pixels = noise(2)
    many = ("a", "b c", "a rather long answer", "two", "seven")
    questions = [
        Question("1", "a.png", "How many?", "two", "counting", many),
        ask_yes_no("Is there a dog in the image?"),
        Question("2", "a.png", "What?", "a", "open", ("a",)),
        *(Question(f"m{i}", "a.png", f"Count{'!' * i}", "two", "counting", many) for i in range(9)),
    ]
    predictions = score_image(run, questions, pixels)
    assert [prediction.question for prediction in predictions] == questions
    for prediction in predictions[:4]:
        asked = prediction.question
        expected = [plain_score(run, asked, choice, pixels) for choice in asked.choices]
        assert prediction.log_probabilities == pytest.approx(expected, rel=bound_of(run))


@settings(deadline=None)
@given(st.sets(st.text(min_size=1), min_size=2, max_size=30), st.integers(0, 2**31))
def test_an_image_is_never_shuffled_to_itself(names: set[str], seed: int) -> None:
    others = derangement(names, seed=seed)
    assert set(others) == set(others.values()) == names
    assert all(name != other for name, other in others.items())


def test_one_image_cannot_be_shuffled() -> None:
    with pytest.raises(UserError, match="at least two images"):
        derangement(["a"], seed=0)


def test_choices_come_from_the_closed_pair_or_from_the_file(tmp_path: Path) -> None:
    row = {"id": "1", "image": "a.png", "question": "?", "category": "dog"}
    write_json(
        tmp_path / "p.json",
        [
            row | {"answer": "no", "kind": "random"},
            row | {"answer": "two", "kind": "counting"},
            row | {"answer": "one", "kind": "counting"},
            row | {"answer": "left", "kind": "halves"},
        ],
    )
    choices = [p.choices for p in read_questions(tmp_path / "p.json")]
    assert choices == [("yes", "no"), ("one", "two"), ("one", "two"), ("left", "right")]


def test_a_question_without_answer_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "p.json", [{"id": "1", "image": "a", "question": "?", "kind": "x"}])
    with pytest.raises(UserError, match=r"p.json\[0\]: 'answer' is missing"):
        read_questions(tmp_path / "p.json")


def test_the_summary_counts_what_was_right(run: LoadedModel) -> None:
    predictions = score_image(run, [ask_yes_no("a"), ask_yes_no("b", answer="no")], noise(3))
    found = summarize(predictions)
    share = sum(v.correct for v in predictions) / 2
    assert found["accuracy"]["estimate"] == share
    assert (found["questions"], found["images"], found["chance"]) == (2, 1, 0.5)
    assert set(found["by_kind"]) == {"random"}


def test_a_template_without_the_question_is_refused(run: LoadedModel) -> None:
    require_questions_in_prompt(run)
    plain = replace(run, chat_tokenizer=ChatTokenizer.from_name("plain", run.tokenizer))
    with pytest.raises(UserError, match="leaves questions out"):
        require_questions_in_prompt(plain)


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("Yes.", "yes"),
        ("I see a cat and a boat, so no.", "no"),
        ("No boat, but a cat: YES", "yes"),
        ("I know nothing.", None),
        ("", None),
    ],
)
def test_the_last_choice_in_a_text_counts(answer: str, choice: str | None) -> None:
    assert last_choice(answer, ("yes", "no")) == choice
    assert Prediction(ask_yes_no("Is there a cat?"), free_form=answer).choice == (choice or "")


def test_a_text_without_a_choice_is_wrong() -> None:
    for truth in ("yes", "no"):
        assert not Prediction(
            ask_yes_no("Is there a cat?", answer=truth), free_form="Perhaps."
        ).correct


def test_free_answers_together_are_those_given_one_by_one(run: LoadedModel, tmp_path: Path) -> None:
    for index, name in enumerate(("a.png", "b.png", "c.png")):
        Image.new("RGB", (40, 28), (80 * index, 40, 200)).save(tmp_path / name)
    questions = [
        replace(ask_yes_no(text, image), id=f"{image} {text}")
        for image in ("a.png", "b.png", "c.png")
        for text in ("Is there a dog?", "And would you say that there is a cow?", "Dog?")
    ]
    items = make_items(questions, seed=1)
    found = list(generate_predictions(run, items, tmp_path, batch_size=4))
    assert sorted(map(repr, (item for item, _ in found))) == sorted(map(repr, items))
    for item, prediction in found:
        shown = blank_image(run) if item.shown is None else run.load_image(tmp_path / item.shown)
        [alone] = generate_greedy(
            run.model,
            run.chat_tokenizer,
            [run.prompt_ids(user_message(item.question.question, [b""]))],
            image_embeds=run.encode_images([shown]),
            max_new_tokens=64,
        )
        assert prediction.question is item.question
        assert prediction.free_form == alone
