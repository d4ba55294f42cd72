"""Kinds of wrong claims that captions and boxes decide, each next to a true one like it."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.coco import AnnotatedImage, Box, read_coco
from data_tools.instruct.config import VerifyConfig
from data_tools.instruct.schema import SampleType, Shown, Turn
from data_tools.instruct.verify import Policy, check_sample, reasons

CASES = Path(__file__).parent / "verify_cases"
CATEGORIES = tuple(
    category["name"]
    for category in json.loads((CASES / "instances.json").read_text(encoding="utf-8"))["categories"]
)
POLICY = Policy(VerifyConfig(), CATEGORIES)


def image(*captions: str, boxes: tuple[tuple[Any, ...], ...] = ()) -> AnnotatedImage:
    """An image of 640 x 480 with captions 1, 2, ... and boxes (category, left, top, w, h)."""
    made = tuple(
        Box(name, *(float(value) for value in place), crowd=False, id=100 + number)
        for number, (name, *place) in enumerate(boxes)
    )
    return AnnotatedImage(1, "1.jpg", 640, 480, captions, made, tuple(range(1, len(captions) + 1)))


MAN = image(
    "A man in a green shirt is riding a skateboard on a sunny day.",
    "A man on a skateboard in front of a white building.",
    "The man rides his skateboard past a parked red car.",
    boxes=(
        ("person", 200, 50, 150, 350), ("skateboard", 220, 380, 100, 40), ("car", 450, 100, 150, 90)
    ),
)  # fmt: skip
GIRLS = image(
    "Two girls are petting two goats in a pen.",
    "Two young girls pet goats at a zoo.",
    "A girl in a blue dress strokes a goat while her sister watches.",
    boxes=(
        ("person", 100, 50, 150, 350), ("person", 300, 50, 150, 350), ("person", 480, 60, 120, 330),
        ("sheep", 100, 300, 300, 150),
    ),
)  # fmt: skip
BEAR = image(
    "A black bear sits on the grass surrounded by five vultures.",
    "A black bear in a field with five vultures around it.",
    boxes=(
        ("bear", 200, 120, 230, 190), *(("bird", 20 + 110 * i, 330, 80, 100) for i in range(5)),
    ),
)  # fmt: skip
CLOCK = image("A clock on a building that reads 8:25.", boxes=(("clock", 250, 50, 200, 200),))
DESK = image(
    "A wooden desk with a laptop and two monitors in an office.",
    "Two monitors and a laptop on a desk.",
    boxes=(
        ("tv", 200, 100, 150, 120), ("tv", 380, 100, 150, 120), ("laptop", 10, 200, 150, 120),
    ),
)  # fmt: skip
PATIO = image(
    "Two buckets and closed umbrellas next to a mirror.",
    "A couple of buckets and a couple of benches by a mirror.",
    "A very messy counter space with a mirror and closed umbrellas.",
    "A counter with cups.",
    "A mirror, a dog bowl and buckets.",
)  # fmt: skip
ROOM = image(
    "A kitchen with white cabinets and a closed refrigerator.",
    "A cat is sleeping on the table in a kitchen.",
    boxes=(("cat", 200, 200, 150, 90), ("dining table", 100, 250, 400, 200)),
)


PLANE = image(
    "A statue of a woman next to a parked airplane.",
    "A white airplane is parked by a statue of a woman.",
    "A man looks at an airplane and a statue of a woman.",
    "An airplane stands on the tarmac near a woman's statue.",
    "A man in a hat looks at a statue of a woman near a plane.",
    boxes=(("airplane", 20, 100, 150, 100), ("person", 420, 150, 150, 300)),
)
CATS = image(
    "Two cats are sleeping on a pink blanket.",
    "A couple of cats asleep on a couch.",
    "A red rug in a vintage room with two sleeping cats.",
    "Two cats sleep in an old-fashioned room.",
)


def codes(
    answer: str,
    image: AnnotatedImage,
    question: str = "What do you see?",
    sample_type: SampleType = "conversation",
) -> tuple[str, ...]:
    turn = Turn(question=question, answer=answer, kind="object")
    return reasons(check_sample((turn,), sample_type, image, Shown(), POLICY))


@pytest.mark.parametrize(
    ("wrong", "true", "image", "code"),
    [
        # a noun before a verb that is a noun as well
        ("A zebra watches the man.", "A man watches the car.", MAN, "OBJECT_NOT_FOUND"),
        ("A dog monitors the door.", "The man monitors the car.", MAN, "OBJECT_NOT_FOUND"),
        ("A zebra drinks from a fountain.", "The man drinks water.", MAN, "OBJECT_NOT_FOUND"),
        ("The zebra's tail is long.", "The man's car is red.", MAN, "OBJECT_NOT_FOUND"),
        ("Several sheep stand there.", "A man stands there.", MAN, "OBJECT_NOT_FOUND"),
        # numbers of kinds of things
        ("There are four vultures.", "There are five vultures.", BEAR, "COUNT_WRONG"),
        ("Three vultures surround the bear.", "Five vultures surround it.", BEAR, "COUNT_WRONG"),
        ("The two vultures stay close.", "Two of the vultures stay close.", BEAR, "COUNT_WRONG"),
        ("Three girls pet the goats.", "The two girls pet goats.", GIRLS, "COUNT_TOO_HIGH"),
        ("There are four monitors.", "There are two monitors.", DESK, "COUNT_WRONG"),
        # hypothetical words reach no further than their clause
        ("The man is waiting, while two dogs sit there.", "He may meet a dog, or two dogs.", MAN,
         "OBJECT_NOT_FOUND"),
        ("He is enjoying the view while a dog runs along.", "He is ready to meet a dog.", MAN,
         "OBJECT_NOT_FOUND"),
        ("It might rain, and a bus waits there.", "It might rain, or a bus might come.", MAN,
         "OBJECT_NOT_FOUND"),
        # wider words
        ("There are no animals.", "There are no vehicles.", BEAR, "OBJECT_DENIED"),
        ("No vehicles are visible.", "No animals are visible.", MAN, "OBJECT_DENIED"),
        ("There is no car in sight.", "There is no other car in sight.", MAN, "OBJECT_DENIED"),
        # what has no category
        ("Three buckets stand there.", "Two buckets stand there.", PATIO, "COUNT_TOO_HIGH"),
        ("There is no mirror in the room.", "There is no rug in the room.", PATIO,
         "OBJECT_DENIED"),
        ("Nobody is visible.", "Nobody is wearing a hat.", MAN, "OBJECT_DENIED"),
        # captions alone, where nothing is boxed
        ("A cat lies next to it.", "A spoon lies next to it.", PATIO, "OBJECT_NOT_FOUND"),
        ("A young couple sits there.", "A couple of chairs are there.", PATIO, "OBJECT_NOT_FOUND"),
        # states and patterns
        ("All of the umbrellas are open.", "All of the umbrellas are closed.", PATIO,
         "ATTRIBUTE_WRONG"),
        ("The counter is tidy and spotless.", "The counter is dirty.", PATIO, "ATTRIBUTE_WRONG"),
        # attributes
        ("He wears a red shirt.", "He wears a dark green shirt.", MAN, "ATTRIBUTE_WRONG"),
        ("The bear is brown.", "The bear is black.", BEAR, "ATTRIBUTE_WRONG"),
        ("The desk is made of glass.", "The desk is made of wood.", DESK, "ATTRIBUTE_WRONG"),
        ("The refrigerator is open.", "The refrigerator is closed.", ROOM, "ATTRIBUTE_WRONG"),
        ("The cabinets are dark brown.", "The cabinets are off-white.", ROOM, "ATTRIBUTE_WRONG"),
        # actions
        ("The cat is eating.", "The cat is resting.", ROOM, "ACTION_WRONG"),
        ("A man lies on a skateboard.", "A man stands on a skateboard.", MAN, "ACTION_WRONG"),
        # kinds
        ("A woman rides a skateboard.", "A guy rides a skateboard.", MAN, "KIND_WRONG"),
        ("She is on a skateboard.", "He is on a skateboard.", MAN, "KIND_WRONG"),
        ("Two men pet the goats.", "Two children pet the goats.", GIRLS, "KIND_WRONG"),
        ("A polar bear sits there.", "A bear sits there.", BEAR, "KIND_WRONG"),
        ("Five pigeons surround the bear.", "Five birds surround it.", BEAR, "KIND_WRONG"),
        ("He is snowboarding.", "He is skateboarding.", MAN, "KIND_WRONG"),
        ("The cat is in a bathroom.", "The cat is in the kitchen.", ROOM, "KIND_WRONG"),
        # times
        ("It is ten past three.", "It is 8:23 by that clock.", CLOCK, "TIME_WRONG"),
        ("The man rides at night.", "The man rides during the day.", MAN, "TIME_WRONG"),
        # relations that captions give
        ("The man is behind the building.", "The man is in front of the building.", MAN,
         "RELATION_REFUTED"),
        # places
        ("The laptop is on the right-hand side of the image.",
         "The laptop is on the left-hand side of the image.", DESK, "PLACE_WRONG"),
        ("There is a laptop. It is in the top-right corner of the image.",
         "There is a laptop. It is in the left half of the image.", DESK, "PLACE_WRONG"),
        ("On the left, close to the airplane, stands a man.",
         "On the right, close to the airplane, stands a man.", PLANE, "PLACE_WRONG"),
        ("An airplane and a man are on the right.", "A man is on the right.", PLANE,
         "PLACE_WRONG"),
        ("The laptop is at the right end of the desk.",
         "The laptop is at the left end of the desk.", DESK, "PLACE_WRONG"),
        ("The airplane stands to the right of the tree.",
         "The airplane stands to the left of the tree.", PLANE, "PLACE_WRONG"),
        ("The man is behind the car.", "The man is in front of the car.", MAN,
         "RELATION_REFUTED"),
        # one and another
        ("A second man looks at it.", "A man looks at it.", PLANE, "COUNT_TOO_HIGH"),
        # verbs after `and`, and of the person who acts
        ("The bear has turned around and is running.", "The bear has turned and is sitting.", BEAR,
         "ACTION_WRONG"),
        ("The bear strolls across the grass.", "The bear rests on the grass.", BEAR,
         "ACTION_WRONG"),
        # what captions hardly leave out
        ("A helicopter stands there.", "A fence stands there.", PLANE, "OBJECT_NOT_FOUND"),
        ("It is a sleek modern room.", "It is a retro room.", CATS, "KIND_WRONG"),
        ("The man waits while she rides.", "The man waits while he rides.", MAN,
         "KIND_WRONG"),
    ],
)  # fmt: skip
def test_a_wrong_claim_is_rejected_and_a_true_one_like_it_is_not(
    wrong: str, true: str, image: AnnotatedImage, code: str
) -> None:
    assert code in codes(wrong, image)
    assert codes(true, image) == ()


@pytest.mark.parametrize(
    ("question", "wrong", "true", "image", "code"),
    [
        ("Can you see any cars?", "I do not see any.", "Yes, one.", MAN, "OBJECT_DENIED"),
        ("Is there a car?", "Unfortunately, no.", "Absolutely.", MAN, "OBJECT_DENIED"),
        ("Is there a zebra?", "Absolutely, it runs.", "No.", MAN, "OBJECT_NOT_FOUND"),
        ("What color is the shirt?", "Blue.", "Light green.", MAN, "ATTRIBUTE_WRONG"),
        ("What is the bear's fur like?", "Its fur is white.", "Its fur is black.", BEAR,
         "ATTRIBUTE_WRONG"),
        ("Is the shirt blue?", "Yes.", "No.", MAN, "ATTRIBUTE_WRONG"),
        ("Is the shirt green?", "No.", "Yes.", MAN, "ATTRIBUTE_WRONG"),
        ("Is the shirt green or red?", "Red.", "Green.", MAN, "ATTRIBUTE_WRONG"),
        ("Is the cat eating?", "Yes.", "No.", ROOM, "ACTION_WRONG"),
        ("Is this a bathroom?", "Yes.", "No.", ROOM, "KIND_WRONG"),
        ("What are the girls doing?", "They are washing the goats.", "They are stroking goats.",
         GIRLS, "ACTION_WRONG"),
        ("Who pets the goats?", "Two boys do.", "Two girls do.", GIRLS, "KIND_WRONG"),
        ("Which animal sits on the grass?", "A monkey sits there.", "A bear.", BEAR, "KIND_WRONG"),
        ("How many girls pet the goats?", "Just one.", "Two.", GIRLS, "COUNT_WRONG"),
        ("Where is the laptop?", "It is on the right of the image.",
         "It is on the left of the image.", DESK, "PLACE_WRONG"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_rejected_and_a_true_one_to_the_same_question_is_not(
    question: str, wrong: str, true: str, image: AnnotatedImage, code: str
) -> None:
    assert code in codes(wrong, image, question)
    assert codes(true, image, question) == ()


@pytest.mark.parametrize(
    "answer",
    [
        "A bus has stopped at the curb, so the man may take it home.",
        "The dog next to the man suggests that he lives close by.",
        "Several dogs are running along, which makes the scene lively.",
        "The man is riding bicycles for a living, it seems.",
    ],
)
def test_what_reasoning_states_as_a_fact_is_a_claim(answer: str) -> None:
    assert "OBJECT_NOT_FOUND" in codes(answer, MAN, "What may happen next?", "reasoning")


@pytest.mark.parametrize(
    "answer",
    [
        "A bus may stop at the curb, and he could take it home.",
        "Dogs need a lot of exercise, so a walk here would be good for one.",
        "A bicycle is often faster than a bus in such a street.",
        "Unlike a bicycle, a skateboard fits into a locker.",
        "The owner of the car probably lives nearby.",
    ],
)
def test_reasoning_may_speak_of_what_is_possible_or_general(answer: str) -> None:
    assert codes(answer, MAN, "What may happen next?", "reasoning") == ()


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is on the wall?", "A cloth with orange stripes hangs on a remote wall."),
        ("Who made it?", "It was made by Apple, and the players train with it for years."),
        ("What do the men do?", "Both riders wear white and bear a broad smile."),
        ("What does it say?", 'The text says "Learn Anywhere" in large letters.'),
        ("What does it say?", "They say the word STOP in capitals."),
        ("How does he feel?", "He can't help smiling."),
        ("What are the logs for?", "The logs act as a fence."),
        ("From where is it seen?", "It is a bird's eye view of the car."),
        ("Is he alone?", "Yes, no other person is in the image."),
        ("What part is hidden?", "The bed of the pickup is hidden by the building."),
        ("Suggest a title for this image.", "A quiet afternoon."),
        ("I would like to know what stands there.", "A red car."),
        ("Why is it fast?", "It is almost as fast as a bus."),
    ],
)
def test_idioms_and_adjectives_are_no_claims(question: str, answer: str) -> None:
    assert codes(answer, MAN, question) == ()


@pytest.mark.parametrize(
    ("question", "true", "wrong"),
    [
        ("Is there a car or a boat?", "A car.", "A boat."),
        ("Is there a boat or a car?", "There is a car.", "There is a boat."),
        ("Can you see a zebra, a boat or a car?", "A car, next to the man.", "A boat."),
        ("Is the man on a skateboard or a surfboard?", "He is on a skateboard.", "A surfboard."),
        ("Is there a car or a boat?", "Yes.", "No."),
        ("Is there a zebra or a boat?", "No.", "Yes."),
    ],
)
def test_of_the_things_offered_for_choice_only_the_chosen_one_is_claimed(
    question: str, true: str, wrong: str
) -> None:
    assert codes(true, MAN, question) == ()
    assert codes(wrong, MAN, question) != ()


def test_a_mirror_image_and_a_bunch_are_not_counted() -> None:
    mirror = image(
        "A cat looks at its reflection in a mirror.",
        boxes=(("cat", 40, 40, 200, 300), ("cat", 350, 40, 200, 300)),
    )
    assert codes("There is only one cat.", mirror) == ()
    apples = image("A bowl of apples.", boxes=(("apple", 100, 100, 300, 200),))
    assert codes("At least five apples are visible.", apples) == ()


def test_words_of_two_captions_do_not_make_one_thing() -> None:
    kitchen = image("A hot pan on a stove.", "A dog sleeps.", boxes=(("dog", 400, 300, 90, 90),))
    assert codes("A hot dog lies there.", kitchen) == ("OBJECT_NOT_FOUND",)


def test_what_is_outside_the_categories_is_in_captions_or_counted_as_unknown() -> None:
    turn = Turn(
        question="Describe it.", kind="object",
        answer="A man passes a white building, a guitar, and two large fountains.",
    )  # fmt: skip
    found = [
        check
        for check in check_sample((turn,), "detail", MAN, Shown(), POLICY)
        if check.rule == "other_object"
    ]
    assert [(check.verdict, check.code, check.claim) for check in found] == [
        ("unknown", None, "outside the categories and captions: guitar, fountain")
    ]


def test_one_guess_in_three_sentences_is_accepted_and_two_are_not() -> None:
    plain = "A man rides past a car. He looks happy."
    assert codes(f"{plain} It is probably his street.", MAN) == ()
    guesses = "A man rides past a car. It is probably his. He seems to be late."
    assert codes(guesses, MAN) == ("HEDGED",)


ROUNDS = [
    ("review", 0.9, 0.0),
    ("round_a", 0.95, 0.0),
    ("round_b", 0.95, 0.0),
    ("round_c", 0.9, 0.0),
    ("round_d", 0.9, 0.03),
    ("round_e", 0.85, 0.0),
    ("round_f", 0.85, 0.0),
    ("round_g", 0.9, 0.0),
    ("round_h", 0.8, 0.0),
    ("round_i", 0.78, 0.0),
    ("round_j", 0.8, 0.0),
    ("round_k", 0.85, 0.0),
    ("round_l", 0.8, 0.0),
    ("round_m", 0.8, 0.0),
    ("round_n", 0.75, 0.0),
    ("round_o", 0.8, 0.0),
    ("round_p", 0.7, 0.0),
    ("round_q", 0.8, 0.0),
    ("round_r", 0.75, 0.02),
    ("round_s", 0.58, 0.07),
    ("round_t", 0.0, 0.0),
    ("round_u", 0.0, 0.02),
    ("round_v", 0.0, 0.02),
]
"""Case files with the recall and the share of rejected true answers that must hold."""


@pytest.mark.parametrize(("name", "recall", "refused"), ROUNDS)
def test_the_case_files_are_judged_as_published(name: str, recall: float, refused: float) -> None:
    index = read_coco(CASES / "instances.json", CASES / "captions.json")
    images = {image.id: image for image in index.images}
    policy = Policy(VerifyConfig(), index.categories)
    verdicts: dict[bool, list[bool]] = {True: [], False: []}
    for line in (CASES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        turns = [Turn(question=q, answer=a, kind="object") for q, a in case["turns"]]
        found = check_sample(turns, case["type"], images[case["image_id"]], Shown(), policy)
        if case["decidable_from_annotations"] or case["truth"] == "ok":
            verdicts[case["truth"] == "ok"].append(bool(reasons(found)))
    assert sum(verdicts[False]) >= recall * len(verdicts[False])
    assert sum(verdicts[True]) <= refused * len(verdicts[True])


def test_a_pronoun_of_a_question_stands_for_what_the_turn_before_is_about() -> None:
    parked = image("A blue motorcycle is parked in a corner.", "A parked blue motorcycle.")
    first = Turn(question="Where is the motorcycle?", answer="It is in a corner.", kind="place")
    for answer, expected in (("It is bright red.", ("ATTRIBUTE_WRONG",)), ("It is blue.", ())):
        second = Turn(question="What color is it?", answer=answer, kind="attribute")
        checks = check_sample((first, second), "conversation", parked, Shown(), POLICY)
        assert reasons(checks) == expected


def test_answers_about_what_has_no_category_are_compared_with_captions() -> None:
    question, wrong, true = (
        "Is there a mirror in the room?", "No, there is not.", "Yes, there is a mirror.",
    )  # fmt: skip
    lunch = image("A man eating a burger at a mirror.", "A person eats a burger next to a mirror.")
    assert codes(wrong, lunch, question)
    assert codes(true, lunch, question) == ()


@pytest.mark.parametrize(
    ("captions", "question", "wrong", "true", "code"),
    [
        (
            ("A peeled banana on a plate.", "A banana lies there."),
            "Has the banana been peeled?",
            "No.",
            "Yes.",
            "ATTRIBUTE_WRONG",
        ),
        (
            ("A bearded man in a suit.", "A man in a suit."),
            "Does the man have a beard?",
            "No, he is clean-shaven.",
            "Yes, he has a beard.",
            "OBJECT_DENIED",
        ),
        (
            ("A lamp is on by a laptop.", "A lamp and a laptop."),
            "Is the lamp switched on?",
            "No, the lamp is off.",
            "Yes, the lamp is on.",
            "ATTRIBUTE_WRONG",
        ),
        (
            ("A cat sits on a toilet.", "A cat on the back of a toilet."),
            "Where is the cat sitting?",
            "It is sitting in the bathtub.",
            "It is sitting on the toilet.",
            "RELATION_REFUTED",
        ),
        (
            ("Planes in a cloudy sky.", "Two planes on a cloudy day."),
            "How is the weather?",
            "There is not a single cloud in the sky.",
            "There are many clouds in the sky.",
            "OBJECT_DENIED",
        ),
        (
            ("A truck behind a stop sign.", "A stop sign in front of a truck."),
            "Is the truck in front of the stop sign?",
            "Yes.",
            "No.",
            "RELATION_REFUTED",
        ),
        (
            ("A pitcher before a crowd.", "A pitcher throws the ball."),
            "What is in the background?",
            "The stadium is completely empty.",
            "The stadium is full.",
            "OBJECT_DENIED",
        ),
        (
            ("People fly kites over a lake.", "A park next to a lake."),
            "What do you see?",
            "Kites fly above the ocean.",
            "People stand at the shore of a lake.",
            "KIND_WRONG",
        ),
    ],
)
def test_denials_states_and_surfaces_are_compared_with_captions(
    captions: tuple[str, ...], question: str, wrong: str, true: str, code: str
) -> None:
    shown = image(*captions)
    assert code in codes(wrong, shown, question)
    assert codes(true, shown, question) == ()


def test_things_in_a_scene_of_toys_and_an_orange_one_are_not_taken_for_real() -> None:
    toys = image("A lego kitchen.", "A diorama made of toys.", boxes=(("chair", 0, 0, 50, 50),))
    assert codes("A table with small cupcakes stands there.", toys) == ()
    bags = image("Suitcases.", "Rows of suitcases.", boxes=(("suitcase", 0, 0, 50, 50),))
    assert codes("The suitcases differ: an orange one and a blue one stand there.", bags) == ()
