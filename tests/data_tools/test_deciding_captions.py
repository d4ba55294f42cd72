"""Claims that several captions together decide, and true answers that look like such claims."""

import pytest

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.config import VerifyConfig
from data_tools.instruct.schema import SampleType, Shown, Turn
from data_tools.instruct.verify import Policy, check_sample, reasons

POLICY = Policy(
    VerifyConfig(),
    ("person", "skis", "carrot", "broccoli", "bowl", "chair", "laptop", "umbrella", "sink",
     "toilet", "baseball bat", "traffic light", "bus", "cat", "dog", "horse"),
)  # fmt: skip
BOXES = {
    "person": Box("person", 280, 44, 218, 346, False, 11),
    "broccoli": Box("broccoli", 125, 67, 138, 155, False, 12),
    "bowl": Box("bowl", 12, 8, 591, 400, False, 13),
    "laptop": Box("laptop", 50, 200, 136, 92, False, 14),
    "sink": Box("sink", 258, 355, 232, 124, False, 15),
    "toilet": Box("toilet", 605, 371, 34, 75, False, 16),
    "baseball bat": Box("baseball bat", 372, 184, 87, 52, False, 17),
}
SKIER = (
    "A woman standing on skis.",
    "A woman is skiing down a slope.",
    "A young woman skiing.",
    "A person on skis in the snow.",
)
STEW = (
    "A bowl with rice, broccoli and beans.",
    "Broccoli, rice and other vegetables.",
    "A bean and corn mixture with broccoli.",
    "Rice, broccoli and a vegetable dish.",
)
TENNIS = (
    "A player serving in front of a crowd.",
    "A man serving a ball in a stadium.",
    "A crowd watches a tennis player.",
)
BATTER = ("A batter.", "A man swings a bat.", "A man at the plate.", "A baseball game.")
DESK = ("A lamp is by a laptop on a desk.", "A desk has a lamp on it.", "A desk with a lamp.")
BATH = ("A bathroom with a sink.", "A sink and a mirror.", "A bathroom.")
DUSK = ("Twilight at an intersection.", "A dusky evening.", "A night scene with lights.")


def codes(
    captions: tuple[str, ...],
    boxes: tuple[str, ...],
    question: str,
    answer: str,
    sample_type: SampleType,
) -> tuple[str, ...]:
    image = AnnotatedImage(
        id=1, file_name="1.jpg", width=640, height=480, captions=captions,
        caption_ids=tuple(range(101, 101 + len(captions))),
        boxes=tuple(BOXES[name] for name in boxes),
    )  # fmt: skip
    turn = Turn(question=question, answer=answer, kind="object")
    return reasons(check_sample((turn,), sample_type, image, Shown(), POLICY))


@pytest.mark.parametrize(
    ("captions", "boxes", "question", "answer"),
    [
        (TENNIS, ("person",), "Describe it.",
         "A tennis player serves. Many seats on the left are empty."),
        (STEW, ("bowl", "broccoli"), "What is in the bowl?",
         "Rice, broccoli and a stew that has bits of carrot in it."),
        (SKIER, ("person",), "Describe it.", "A woman is on skis. She is standing in the snow."),
        (DESK, ("laptop",), "Where is the lamp?", "It is standing on the desk."),
        (BATH, ("sink", "toilet"), "Describe it.",
         "A sink is near the middle, and the toilet is just to the right of it."),
        (DUSK, ("person",), "Describe it.", "An intersection around sunset."),
    ],
)  # fmt: skip
def test_true_answers_that_captions_do_not_word_are_accepted(
    captions: tuple[str, ...], boxes: tuple[str, ...], question: str, answer: str
) -> None:
    assert codes(captions, boxes, question, answer, "conversation") == ()


@pytest.mark.parametrize(
    ("captions", "boxes", "question", "answer", "code"),
    [
        (TENNIS, ("person",), "Is it popular?", "No, the stadium is empty.", "OBJECT_DENIED"),
        (STEW, ("bowl", "broccoli"), "What is in the bowl?", "Rice, broccoli and a carrot.",
         "OBJECT_NOT_FOUND"),
        (SKIER, ("person",), "Describe it.", "A woman is on a slope. She is sitting in the snow.",
         "ACTION_WRONG"),
        (DESK, ("laptop",), "Where is the lamp?", "It is standing on the floor.",
         "RELATION_REFUTED"),
        (BATH, ("sink", "toilet"), "Describe it.",
         "A sink is near the middle, and the toilet is just to the left of it.", "PLACE_WRONG"),
        (DUSK, ("person",), "Describe it.", "An intersection around noon.", "TIME_WRONG"),
        (SKIER, ("person",), "What is she doing?", "The woman is kneeling.", "ACTION_WRONG"),
        (SKIER, ("person",), "What is the woman up to?", "She is sitting down.", "ACTION_WRONG"),
    ],
)  # fmt: skip
def test_what_captions_decide_together_is_rejected(
    captions: tuple[str, ...], boxes: tuple[str, ...], question: str, answer: str, code: str
) -> None:
    assert codes(captions, boxes, question, answer, "conversation")[:1] == (code,)
