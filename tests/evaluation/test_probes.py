"""Probes: cached branches score as the plain path, no image is shuffled to itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.model.tiny import batch_of
from tests.rounding import rounding, terms_of
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.evaluation.probes import (
    Probe,
    Verdict,
    ask,
    blank_pixels,
    derangement,
    judge,
    judge_image,
    read_probes,
    require_questions,
    spell,
    spoken_choice,
    summarize,
    tasks_of,
)
from vlm_sft.inference.loaded_model import VlmRun, question
from vlm_sft.utils.atomic_files import write_json


def probe(text: str, image: str = "a.png", answer: str = "yes") -> Probe:
    return Probe(text, image, text, answer, "random", ("yes", "no"))


def noise(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 28, 28), generator=generator, dtype=torch.uint8)


def bound_of(run: VlmRun) -> float:
    """Return how far apart two sums of log probabilities may be, relative to them."""
    return rounding(terms_of(run.model, length=80))


def plain_score(run: VlmRun, asked: Probe, choice: str, pixels: torch.Tensor) -> float:
    prompt = run.prompt_ids(question(asked.question, [b""]))
    answer = run.chat_tokenizer.answer_ids(spell(choice))
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.inference_mode():
        output = run.model(batch_of(ids, torch.ones_like(ids), labels, pixels[None]))
    return -float(output.loss_sum)


def test_cached_branches_score_as_whole_sequences_do(run: VlmRun) -> None:
    pixels = noise(1)
    probes = [probe("Is there a dog?"), probe("Can you see a very small cat?"), probe("Hm")]
    for verdict in judge_image(run, probes, pixels):
        expected = [plain_score(run, verdict.probe, c, pixels) for c in ("yes", "no")]
        assert verdict.log_probabilities == pytest.approx(expected, rel=bound_of(run))


def test_one_question_is_scored_as_well_as_many(run: VlmRun) -> None:
    pixels = torch.zeros(3, 28, 28, dtype=torch.uint8)
    alone = judge_image(run, [probe("Is there a dog?")], pixels)[0]
    together = judge_image(run, [probe("Is there a dog?"), probe("Or a cow?")], pixels)[0]
    assert alone.log_probabilities == pytest.approx(together.log_probabilities, rel=bound_of(run))


def test_the_image_and_the_condition_matter(run: VlmRun, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (250, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 40), (10, 10, 250)).save(tmp_path / "b.png")
    probes = [probe("Is it red?", "a.png"), probe("Is it red?", "b.png", "no")]

    scores = {
        (task.condition, task.probe.image): verdict.log_probabilities
        for task, verdict in judge(run, tasks_of(probes), tmp_path)
    }
    assert len(scores) == 6
    assert scores["right", "a.png"] == pytest.approx(scores["shuffled", "b.png"], rel=bound_of(run))
    assert scores["right", "b.png"] == pytest.approx(scores["shuffled", "a.png"], rel=bound_of(run))
    assert scores["right", "a.png"] != pytest.approx(scores["right", "b.png"], rel=bound_of(run))
    assert scores["blank", "a.png"] == pytest.approx(scores["blank", "b.png"], rel=bound_of(run))


def test_an_image_is_run_once_whatever_is_asked_about_it(run: VlmRun, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (250, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (30, 40), (10, 10, 250)).save(tmp_path / "b.png")
    existence = [probe("Is it red?", name) for name in ("a.png", "b.png") for _ in range(20)]
    counting = [probe("Are there two?", "a.png"), probe("Are there two?", "b.png")]
    tasks = tasks_of(existence, measure="existence") + tasks_of(counting, measure="counting")
    images: list[int] = []
    with run.model.vision_tower.register_forward_pre_hook(
        lambda module, given: images.append(len(given[0]))
    ):
        judged = list(judge(run, tasks, tmp_path))
    assert images == [1, 1, 1]
    assert len(judged) == 3 * 42
    assert sum(task.measure == "counting" for task, _ in judged) == 6
    assert all(task.probe is verdict.probe for task, verdict in judged)


def test_answers_of_any_number_and_length_score_as_whole_sequences_do(run: VlmRun) -> None:
    pixels = noise(2)
    many = ("a", "b c", "a rather long answer", "two", "seven")
    probes = [
        Probe("1", "a.png", "How many?", "two", "counting", many),
        probe("Is there a dog in the image?"),
        Probe("2", "a.png", "What?", "a", "open", ("a",)),
        *(Probe(f"m{i}", "a.png", f"Count{'!' * i}", "two", "counting", many) for i in range(9)),
    ]
    verdicts = judge_image(run, probes, pixels)
    assert [verdict.probe for verdict in verdicts] == probes
    for verdict in verdicts[:4]:
        asked = verdict.probe
        expected = [plain_score(run, asked, choice, pixels) for choice in asked.choices]
        assert verdict.log_probabilities == pytest.approx(expected, rel=bound_of(run))


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
    choices = [p.choices for p in read_probes(tmp_path / "p.json")]
    assert choices == [("yes", "no"), ("one", "two"), ("one", "two"), ("left", "right")]


def test_a_probe_without_answer_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "p.json", [{"id": "1", "image": "a", "question": "?", "kind": "x"}])
    with pytest.raises(UserError, match=r"p.json\[0\]: 'answer' is missing"):
        read_probes(tmp_path / "p.json")


def test_the_summary_counts_what_was_right(run: VlmRun) -> None:
    verdicts = judge_image(run, [probe("a"), probe("b", answer="no")], noise(3))
    found = summarize(verdicts)
    share = sum(v.correct for v in verdicts) / 2
    assert found["accuracy"]["estimate"] == share
    assert (found["questions"], found["images"], found["chance"]) == (2, 1, 0.5)
    assert set(found["by_kind"]) == {"random"}


def test_a_template_without_the_question_cannot_be_probed(run: VlmRun) -> None:
    require_questions(run)
    plain = replace(run, chat_tokenizer=ChatTokenizer.from_name("plain", run.tokenizer))
    with pytest.raises(UserError, match="leaves questions out"):
        require_questions(plain)


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
def test_the_last_verdict_that_is_said_counts(answer: str, choice: str | None) -> None:
    assert spoken_choice(answer, ("yes", "no")) == choice
    assert Verdict(probe("Is there a cat?"), spoken=answer).choice == (choice or "")


def test_saying_neither_is_wrong_whatever_the_truth() -> None:
    for truth in ("yes", "no"):
        assert not Verdict(probe("Is there a cat?", answer=truth), spoken="Perhaps.").correct


def test_free_answers_together_are_those_given_one_by_one(run: VlmRun, tmp_path: Path) -> None:
    for index, name in enumerate(("a.png", "b.png", "c.png")):
        Image.new("RGB", (40, 28), (80 * index, 40, 200)).save(tmp_path / name)
    probes = [
        replace(probe(text, image), id=f"{image} {text}")
        for image in ("a.png", "b.png", "c.png")
        for text in ("Is there a dog?", "And would you say that there is a cow?", "Dog?")
    ]
    tasks = tasks_of(probes, seed=1)
    found = list(ask(run, tasks, tmp_path, batch_size=4))
    assert sorted(map(repr, (task for task, _ in found))) == sorted(map(repr, tasks))
    for task, verdict in found:
        shown = blank_pixels(run) if task.shown is None else run.pixels(tmp_path / task.shown)
        [alone] = run.answers(
            [run.prompt_ids(question(task.probe.question, [b""]))], run.image_embeds([shown])
        )
        assert verdict.probe is task.probe
        assert verdict.spoken == alone
