"""What each growing operator asks for, and when its result is rejected, without a server."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.config import VerifyConfig
from data_tools.instruct.grow import constraints
from data_tools.instruct.grow.answers import says_the_same
from data_tools.instruct.grow.checks import GrowthChecks
from data_tools.instruct.grow.novelty import NOVELTY, QuestionPool, rouge_l
from data_tools.instruct.grow.operators import OPERATORS
from data_tools.instruct.grow.refusals import Share, TaskMaker, check_answers
from data_tools.instruct.grow.seed_tasks import read_seed_tasks
from data_tools.instruct.grow.several_images import by_image
from data_tools.instruct.grow.translation import check_translation
from data_tools.instruct.plan.context import describe_several
from data_tools.instruct.schema import Check, Constraint, Sample, Shown, Task, Turn
from data_tools.instruct.verify import Policy, check_sample, check_several, reasons
from data_tools.rules.facts import Facts
from vlm_sft.errors import UserError

CATEGORIES = ("dog", "cat", "person", "bus", "book", "zebra", "cup")
POLICY = Policy(VerifyConfig(), CATEGORIES)


def image(number: int, *boxes: tuple[str, float, float, float, float], caption: str = "") -> Any:
    return AnnotatedImage(
        number, f"{number}.jpg", 400, 200, (caption or "A picture.",),
        tuple(
            Box(name, x, y, width, height, False, 100 * number + i)
            for i, (name, x, y, width, height) in enumerate(boxes)
        ),
        (1000 + number,),
    )  # fmt: skip


def turn(question: str, answer: str, kind: Any = "object") -> Turn:
    return Turn(question=question, answer=answer, kind=kind)


# --- new questions


def test_the_pool_finds_what_a_comparison_with_all_questions_finds() -> None:
    rng = np.random.default_rng(0)
    words = ["what", "where", "is", "a", "dog", "on", "left", "color", "of", "how", "many"]
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 9))) for _ in range(200)]
    pool: QuestionPool = QuestionPool()
    found = 0
    for number, text in enumerate(texts):
        plain = next((one for one in texts[:number] if rouge_l(one, text) >= NOVELTY), None)
        assert pool.like(text) == plain
        found += plain is not None
        pool.add(text)
    assert 25 < found < 175  # both happen


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ("Is there a cat on the sofa?", None),
        ("Please tell me, is there a cat in the picture?", "GROWN_NOT_NEW"),
        ("Answer the original question about the cat: is it asleep?", "GROWN_COPIES_PROMPT"),
    ],
)
def test_a_rewritten_question_has_to_ask_something_more(asked: str, code: str | None) -> None:
    parent = Sample.model_construct(
        turns=(turn("Is there a cat?", "No."),), image=type("I", (), {"id": 1})()
    )
    found = GrowthChecks().check(OPERATORS["constrain"], [turn(asked, "No.")], parent)
    assert [check.code for check in found] == ([code] if code else [])


def test_self_instruction_repeats_no_seed_task_no_other_image_and_not_itself() -> None:
    seeds = read_seed_tasks(None)
    assert len(seeds) > 50
    checks = GrowthChecks([seed.question for seed in seeds])
    first = [turn("Which pet is closer to the door?", "The dog.")]
    assert list(checks.check_new_tasks(first)) == []
    checks.keep(7, first)
    for asked in (seeds[0].question, "Which pet is closest to the door?", "Why not?"):
        assert [c.code for c in checks.check_new_tasks([turn(asked, "x")])] == ["GROWN_NOT_NEW"]
    twice = [turn("What hangs from the ceiling here?", "A lamp.")] * 2
    assert [check.turn for check in checks.check_new_tasks(twice)] == [1]


def test_seed_tasks_of_another_form_are_refused(tmp_path: Any) -> None:
    path = tmp_path / "seeds.json"
    task = {"id": "1", "question": "What is this?"}
    for content, message in (
        ("{", "expected a JSON list"),
        (json.dumps([task]), "at least 8 items"),
        (json.dumps([task] * 8), "the id '1' appears twice"),
        (json.dumps([{"id": 1}] * 8), "tasks.0.id"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_seed_tasks(path)


# --- answers


NONE = ("Is there a cat?", "No, there is none.", "existence")
TWO = ("How many dogs?", "There are two dogs.", "count")
LEFT = ("Is the dog left or right?", "The dog is on the left.", "place")
SIT = ("What do they do?", "They sit on a lawn.", "action")


@pytest.mark.parametrize(
    ("before", "said", "final", "same"),
    [
        (NONE, "I see dogs. Answer: No", True, True),
        (NONE, "I see a cat. Answer: Yes", True, False),
        (NONE, "No, only dogs.", True, False),  # no final answer
        (TWO, "One, two. Answer: 2", True, True),
        (TWO, "Two left. Answer: 3", True, False),
        (TWO, "One can see two dogs.", False, True),
        (TWO, "I see three dogs.", False, False),
        (LEFT, "Answer: left", True, True),
        (LEFT, "Answer: right", True, False),
        (SIT, "They rest. Answer: sit", True, True),
        (SIT, "Answer: they sleep", True, False),
        (SIT, "They rest. Answer: ", True, False),
    ],
)  # fmt: skip
def test_the_final_answer_is_that_of_the_parent(
    before: tuple[str, str, str], said: str, final: bool, same: bool
) -> None:
    question, answer, kind = before
    new = turn(question, said, kind)
    assert (says_the_same(turn(question, answer, kind), new, final=final) is None) == same


def test_a_translation_keeps_turns_yes_no_and_numbers_and_is_in_the_language() -> None:
    old = [turn("How many dogs are there in the picture?", "There are two dogs.", "count"),
           turn("Is there a cat in the picture?", "No, there is no cat.", "existence")]  # fmt: skip
    good = [
        turn("Wie viele Hunde sind auf dem Bild zu sehen?", "Es sind 2 Hunde zu sehen."),
        turn("Ist auf dem Bild eine Katze zu sehen?", "Nein, dort ist keine Katze."),
    ]

    def codes(new: list[Turn], language: str = "german") -> list[str | None]:
        return [check.code for check in check_translation(old, new, language)]

    assert codes(good) == []
    assert codes(good[:1]) == ["GROWN_OTHER_QUESTION"]
    three = [turn(good[0].question, "Es sind 3 Hunde zu sehen."), good[1]]
    assert codes(three) == ["GROWN_OTHER_ANSWER"]
    yes = [good[0], turn(good[1].question, "Ja, dort ist eine Katze.")]
    assert codes(yes) == ["GROWN_OTHER_ANSWER"]
    assert "TRANSLATION_LANGUAGE" in codes(old)
    assert "TRANSLATION_LANGUAGE" in codes(good, "french")
    long = [good[0].model_copy(update={"question": good[0].question * 5}), good[1]]
    assert codes(long) == ["TRANSLATION_LENGTH"]
    assert codes([good[0], turn(good[1].question, "?!")])[0] == "TURN_EMPTY"


# --- constraints


def test_drawn_constraints_can_be_kept_and_each_is_checked() -> None:
    answers = {
        "length_constraints:number_words": {"at most": "Two dogs.", "at least": "dog " * 50},
        "length_constraints:number_sentences": lambda a: "Dogs. " * a["num_sentences"],
        "detectable_format:number_bullet_lists": lambda a: "- a dog\n" * a["num_bullets"],
        "keywords:existence": lambda a: f"I see {a['keywords'][0]}.",
        "keywords:forbidden_words": lambda a: "Two dogs.",
        "punctuation:no_comma": lambda a: "Two dogs and a cat.",
        "change_case:english_lowercase": lambda a: "there are two dogs on the green lawn today.",
        "change_case:english_capital": lambda a: "THERE ARE TWO DOGS ON THE GREEN LAWN TODAY.",
        "startend:start_checker": lambda a: f"{a['start_phrase']} two dogs.",
        "startend:end_checker": lambda a: f"Two dogs. {a['end_phrase']}",
        "startend:quotation": lambda a: '"Two dogs."',
        "detectable_format:json_format": lambda a: '{"things": ["dog"]}',
        "detectable_content:postscript": lambda a: "Two dogs.\nP.S. They sit.",
    }
    wrong = {
        "length_constraints:number_words": {"at most": "dog " * 90, "at least": "Two dogs."},
        "keywords:forbidden_words": lambda a: f"There {a['forbidden_words'][0]} it is.",
        "punctuation:no_comma": lambda a: "A dog, a cat.",
        "keywords:existence": lambda a: "Nothing.",
    }
    seen: Counter[str] = Counter()
    for seed in range(60):
        drawn = constraints.draw(np.random.default_rng(seed), 3, ["dog", "cat"])
        kinds = [one.kind for one in drawn]
        assert len(set(kinds)) == len(kinds) >= 2
        for one in drawn:
            assert not set(constraints.KINDS[one.kind].excludes) & set(kinds)
            seen[one.kind] += 1
            assert "{" not in constraints.describe(one)
            for table, holds in ((answers, True), (wrong, False)):
                entry: Any = table.get(one.kind, lambda a: '[broken, "x')
                text = (
                    entry[one.arguments["relation"]]
                    if isinstance(entry, dict)
                    else entry(one.arguments)
                )
                assert (constraints.broken(text, [one]) == []) == holds, (one, text)
    assert set(seen) == set(constraints.KINDS)
    text = constraints.instruction("Describe it.", drawn)
    assert text.startswith("Describe it. The answer must ") and len(text.split()) <= 80


def test_an_image_without_objects_gets_no_word_to_contain() -> None:
    for seed in range(50):
        drawn = constraints.draw(np.random.default_rng(seed), 4, [])
        assert "keywords:existence" not in [one.kind for one in drawn]
    assert constraints.broken("Cats.", [Constraint(kind="punctuation:no_comma")]) == []


# --- several images


DOGS = image(1, ("dog", 10, 50, 60, 60), ("dog", 100, 50, 60, 60), caption="Two dogs.")
CAT = image(2, ("cat", 10, 50, 90, 90), caption="A cat sleeps.")


def several(*turns: Turn) -> tuple[str, ...]:
    parts, faults = by_image(turns, 2)
    return reasons((*faults, *check_several(turns, parts, [DOGS, CAT], Shown(), POLICY)))


FIRST = turn("How many dogs are there in the first picture?", "There are two dogs.", "count")
SECOND = turn("What does the second picture show?", "It shows a cat.")


@pytest.mark.parametrize(
    ("turns", "codes"),
    [
        ((FIRST, SECOND), ()),
        ((turn("Is there a cat in the first picture?", "Yes, a cat is there."), SECOND),
         ("OBJECT_NOT_FOUND",)),
        ((FIRST, turn("What does the second picture show?", "It shows two dogs.")),
         ("OBJECT_NOT_FOUND",)),
        ((turn("Compare the first and the second picture.",
               "The first picture shows two dogs, while the second picture shows a cat."),), ()),
        ((turn("Compare the first and the second picture.",
               "The first picture shows a cat, while the second picture shows two dogs."),),
         ("OBJECT_NOT_FOUND",)),
        ((turn("Which of the pictures has more animals?",
               "The first picture has more animals than the second picture."),),
         ("IMAGES_MIXED", "IMAGE_UNUSED")),
        ((turn("Do both pictures show a dog?", "No."),), ("IMAGES_MIXED", "IMAGE_UNUSED")),
        ((turn("How many dogs are there?", "Two."), SECOND), ("IMAGE_NOT_NAMED", "IMAGE_UNUSED")),
        ((FIRST, SECOND, turn("What is in the third picture?", "A dog.")), ("IMAGE_NOT_NAMED",)),
        ((FIRST,), ("IMAGE_UNUSED",)),
    ],
)  # fmt: skip
def test_each_sentence_is_checked_against_the_image_that_it_names(
    turns: tuple[Turn, ...], codes: tuple[str, ...]
) -> None:
    assert several(*turns) == codes


def test_claims_keep_their_places_and_labels_run_through_all_images() -> None:
    both = turn("Compare the first and the second picture.",
                "The first picture shows two dogs. The second picture shows a zebra.")  # fmt: skip
    parts, _ = by_image([both], 2)
    found = check_several([both], parts, [DOGS, CAT], Shown(), POLICY)
    (zebra,) = [check for check in found if check.code == "OBJECT_NOT_FOUND"]
    assert zebra.span is not None and both.answer[slice(*zebra.span)] == "zebra"
    context = describe_several([DOGS, CAT], 2, 30, 0.0)
    assert context.shown.captions == (1001, 1002) and context.shown.boxes == (100, 101, 200)
    assert "IMAGE 2: 400 x 200" in context.text and "c2: " in context.text
    assert "  b3: " in context.text.split("IMAGE 2")[1]


# --- refusals


def test_tasks_follow_from_the_annotations_and_keep_the_stated_proportion() -> None:
    pictures = [
        image(n, ("bus", 10, 20, 150, 120), ("person", 300, 20, 40, 120), ("book", 200, 5, 4, 4),
              caption="A man and a red bus.")
        for n in range(1, 41)
    ]  # fmt: skip
    maker = TaskMaker(CATEGORIES, Counter({"bus": 40, "person": 40, "book": 40, "dog": 3}))
    for wanted in (0.25, 0.5, 0.75):
        share, kinds = Share(wanted), Counter[str]()
        for number, picture in enumerate(pictures):
            facts, rng = Facts(picture), np.random.default_rng(number)
            for task in share.take(maker.unanswerable(facts, rng), maker.answerable(facts, rng)):
                kinds[task.why] += 1
                assert "{" not in task.question and task.answerable == bool(task.answer)
                absent = task.subject not in ("bus", "person", "book")
                assert absent == (task.why == "absent" or task.answer == "no"), task
        assert abs(share.unanswerable / share.total - wanted) < 0.01
    assert {"absent", "off_image", "identity", "tiny_text", "existence", "counting"} <= set(kinds)
    made = [maker.answerable(Facts(pictures[0]), np.random.default_rng(n)) for n in range(9)]
    assert {task.answer for tasks in made for task in tasks if task.why == "color"} == {"red"}
    named = image(50, ("person", 10, 10, 50, 90), caption="The singer John Smith on a stage.")
    big = image(51, ("book", 10, 10, 90, 90))
    for picture, why in ((named, "identity"), (big, "tiny_text")):
        tasks = maker.unanswerable(Facts(picture), np.random.default_rng(0))
        assert why not in {task.why for task in tasks}


def test_where_one_kind_runs_short_later_images_make_up_for_it() -> None:
    share = Share(0.5)
    task = Task(question="?", answerable=False, why="absent", kind="cannot_tell")
    for _ in range(10):
        share.take([], [task] * 4)
    assert share.total == 10  # only one each, so that the share is not lost
    for _ in range(10):
        share.take([task] * 4, [task] * 4)
    assert share.unanswerable / share.total == pytest.approx(0.5, abs=0.02)


ABSENT = Task(question="What color is the zebra?", answerable=False, why="absent",
              kind="cannot_tell", subject="zebra")  # fmt: skip
COST = Task(question="How much did the bus cost?", answerable=False, why="off_image",
            kind="cannot_tell", subject="bus")  # fmt: skip
NAME = Task(question="Who is the person in the image?", answerable=False, why="identity",
            kind="cannot_tell", subject="person")  # fmt: skip
TEXT = Task(question="What is written on the book?", answerable=False, why="tiny_text",
            kind="cannot_tell", subject="book")  # fmt: skip
COLOR = Task(question="What color is the bus?", answerable=True, why="color", kind="attribute",
             subject="bus", answer="red")  # fmt: skip
EXISTS = Task(question="Is there a zebra in the image?", answerable=True, why="existence",
              kind="existence", subject="zebra", answer="no")  # fmt: skip
STREET = image(3, ("bus", 10, 20, 150, 120), ("person", 300, 20, 40, 120), caption="A red bus.")


@pytest.mark.parametrize(
    ("task", "answer", "code"),
    [
        (ABSENT, "There is no zebra in the image, so its color cannot be told.", None),
        (ABSENT, "There is no zebra in the image.", None),
        (ABSENT, "The zebra is black.", "ANSWERED_UNANSWERABLE"),
        (ABSENT, "There is no zebra, but it would be white.", "ANSWERED_UNANSWERABLE"),
        (ABSENT, "That cannot be told.", "REFUSAL_WITHOUT_REASON"),
        (COST, "That cannot be told, because the image does not show any price.", None),
        (COST, "It cannot be known.", "REFUSAL_WITHOUT_REASON"),
        (COST, "The image does not tell, but a bus is about 300000 dollars.",
         "ANSWERED_UNANSWERABLE"),
        (COST, "It was very expensive.", "ANSWERED_UNANSWERABLE"),
        (NAME, "The image does not tell who the person is.", None),
        (NAME, "The person in the image is Peter.", "ANSWERED_UNANSWERABLE"),
        (TEXT, "The writing is too small, so it cannot be read.", None),
        (TEXT, 'It cannot be read well, but it says "Faust".', "ANSWERED_UNANSWERABLE"),
        (COLOR, "The bus is red.", None),
        (COLOR, "The color cannot be told.", "REFUSED_ANSWERABLE"),
        (COLOR, "The bus is blue.", "GROWN_OTHER_ANSWER"),
        (EXISTS, "No, there is no zebra.", None),
        (EXISTS, "The image does not show whether there is a zebra.", "REFUSED_ANSWERABLE"),
        (EXISTS, "Yes, there is a zebra.", "GROWN_OTHER_ANSWER"),
    ],
)  # fmt: skip
def test_refusals_and_answers_are_checked(task: Task, answer: str, code: str | None) -> None:
    said = Turn(question=task.question, answer=answer, kind=task.kind)
    claims = check_sample([said], "conversation", STREET, Shown(), POLICY)
    found = [check.code for check in check_answers([task], [said], claims)]
    assert found == ([code] if code else [])
    if code is None:  # nor do the other rules reject it
        assert reasons(claims) == ()


def test_other_questions_than_those_asked_are_rejected() -> None:
    said = [turn("What color is the bus?", "Red."), turn("Why?", "So.")]
    found: list[Check] = list(check_answers([COST], said, ()))
    assert [check.code for check in found][:2] == ["GROWN_OTHER_QUESTION"] * 2
