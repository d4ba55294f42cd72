"""Claims against captions with the opposite: states, denials, actions, kinds, places, numbers.

Each wrong answer stands next to a true one that has the same words.
"""

import pytest

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.config import VerifyConfig
from data_tools.instruct.schema import SampleType, Shown, Turn
from data_tools.instruct.verify import Policy, check_sample, reasons

POLICY = Policy(
    VerifyConfig(),
    ("person", "bus", "cat", "dog", "horse", "bird", "elephant", "banana", "carrot", "umbrella",
     "suitcase", "bed", "couch", "book", "tv", "laptop", "cell phone", "oven", "skateboard",
     "airplane", "dining table", "bear"),
)  # fmt: skip
PATIO = ("Tables and closed umbrellas next to a beach.", "A patio at the sea.", "A terrace.")
NET = ("A bed covered in a bug net.", "A bed in a hut with a net.", "A bedroom with windows.")
BANANA = ("A peeled banana and sauce on a plate.", "A banana and pudding.", "A banana on a plate.",
          "A banana next to sauce.")  # fmt: skip
LAMP = ("A lamp is on by a laptop on a desk.", "A desk with a lamp.", "A laptop and a lamp.")
BOARDING = ("A bus with its doors opened as passengers board.", "A bus.", "People and a bus.")
PURPLE = ("A room with purple walls and a bed.", "A bedroom.", "A bed in a room.")
LUGGAGE = ("Rows of various colored suitcases.", "Suitcases on a floor.", "Many suitcases.")
AIRPORT = ("A plane on a tarmac with a lot of buses.", "Buses at an airport.", "Buses and planes.")
RIVER = ("People are standing on a dock with their baggage.", "People with bags near a boat.",
         "A boat on a river.")  # fmt: skip
ISLAND = ("A kitchen with an island.", "A kitchen with a white island.", "An oven in a kitchen.")
PHONE = ("A woman taking a picture with her phone.", "A woman takes a photo.", "A girl by a river.")
SNEAKERS = ("A person in sneakers on a skateboard.", "Legs on a skateboard.", "A skateboarder.")
RIBBON = ("People cutting a ribbon on a street.", "People on a sidewalk.", "A man cuts a ribbon.")
SIGNS = ("A German street sign in town.", "Signs on a pole in the city.", "A pole with signs.")
BOYS = ("Little boys playing baseball.", "A boy swings a bat.", "Boys play a game.")
MEN = ("A man standing in a living room.", "Two men sit on a couch.", "A man and a seated friend.",
       "A man with friends seated near him.")  # fmt: skip
RIDERS = ("Two men riding horses on the beach.", "Two guys ride horses.", "Two men ride horses.")
GULL = ("A gull is flying over the sand.", "A bird flies over a beach.", "A bird flying.",
        "A seagull flying at a beach.")  # fmt: skip
DRINK = ("A man in a suit is holding a drink.", "A man holding a beverage.", "A man in a suit.")
TREE = ("A cat sitting in a tree.", "A cat in a palm tree.", "A cat resting in a tree.")
PLANES = ("Airplanes parked at an airport.", "Parked airplanes.", "Airplanes at their gates.")
BEARS = ("Two bears run over dry ground.", "Two bears running on soil.", "Two bears run.",
         "Bears running.")  # fmt: skip
GOATS = ("Two girls petting two goats.", "Girls pet goats in a pen.", "Two girls with goats.")
ROAD = ("A bus on a street.", "A bus driving down a road.", "A bus in a city.")
DUSK = ("Twilight at an intersection.", "A dusky evening.", "A night scene with lights.")
FAMILY = ("A family on a tennis court.", "A group of young children.", "Kids and their parents.")
BOWL = ("A skateboarder on a cement bowl.", "A boy in an empty concrete pool.", "A skater.")
CUPCAKE = ("A child looks at a cupcake.", "A baby holding a spoon.", "A boy eating a cupcake.")
MATCH = ("A man playing tennis.", "A man swinging a racket.", "A player in front of a crowd.")
TRAFFIC = ("A bike next to a road.", "A street sign.", "A bicycle and a sign.")
HELMET = ("A man wearing a helmet on a bike.", "A cyclist with a helmet.", "A man riding a bike.")

CASES = [
    # captions, question, answer, the code of the wrong answer or None
    (PATIO, "Is it ready?", "Yes. Every umbrella has been opened wide.", "ATTRIBUTE_WRONG"),
    (PATIO, "Is it ready?", "Not yet. Every umbrella is still closed.", None),
    (PATIO, "Describe it.", "Tall umbrellas are spread wide open there.", "ATTRIBUTE_WRONG"),
    (NET, "Is it safe?", "No. The bed is left completely uncovered.", "ATTRIBUTE_WRONG"),
    (NET, "Is it safe?", "No. The bed is without a net.", "OBJECT_DENIED"),
    (NET, "Is it safe?", "Yes. Without the net, it would not be.", None),
    (BANANA, "Can it keep?", "Yes, the banana is in its unopened skin.", "ATTRIBUTE_WRONG"),
    (BANANA, "Can it keep?", "No, the banana is out of its skin.", None),
    (BANANA, "What is it?", "A banana, and strawberries beside it.", "KIND_WRONG"),
    (LAMP, "Is it late?", "No. The lamp next to it is switched off.", "ATTRIBUTE_WRONG"),
    (LAMP, "Is it late?", "Yes. The lamp next to it is switched on.", None),
    (BOARDING, "Can they go in?", "The bus has closed all of its doors.", "ATTRIBUTE_WRONG"),
    (BOARDING, "Can they go in?", "The bus has opened all of its doors.", None),
    (PURPLE, "Describe it.", "A bed is in front of a wall painted dark green.", "ATTRIBUTE_WRONG"),
    (PURPLE, "Describe it.", "A bed is in front of a wall painted dark purple.", None),
    (LUGGAGE, "Describe it.", "All of the suitcases are white.", "ATTRIBUTE_WRONG"),
    (LUGGAGE, "Describe it.", "Some suitcases in a row are white.", None),
    (AIRPORT, "How do they go?", "There are no buses on the apron.", "OBJECT_DENIED"),
    (AIRPORT, "How do they go?", "There are no buses in the sky.", None),
    (RIVER, "Is it a trip?", "No, none of them has brought any luggage.", "OBJECT_DENIED"),
    (RIVER, "Is it a trip?", "Without any luggage they could not stay.", None),
    (ISLAND, "Is it big?", "No, the kitchen lacks an island.", "OBJECT_DENIED"),
    (ISLAND, "Is it big?", "Yes, the kitchen lacks a table only.", None),
    (PHONE, "Describe it.", "She is photographing it with a large camera.", "KIND_WRONG"),
    (PHONE, "Describe it.", "A woman looks into the camera of her phone.", None),
    (SNEAKERS, "Describe it.", "The rider balances in open sandals.", "KIND_WRONG"),
    (SNEAKERS, "Describe it.", "The rider balances in old shoes.", None),
    (RIBBON, "Describe it.", "A ribbon is cut inside a large hall.", "KIND_WRONG"),
    (RIBBON, "Describe it.", "A ribbon is cut in front of the town hall.", None),
    (SIGNS, "Where is it?", "The signs on the pole are written in Dutch.", "KIND_WRONG"),
    (SIGNS, "Where is it?", "It stands at a lonely farm road.", "KIND_WRONG"),
    (SIGNS, "Where is it?", "The signs on the pole are written in German.", None),
    (BOYS, "Who plays?", "They look like grown men.", "KIND_WRONG"),
    (MEN, "Are they all active?", "All three of them are on their feet.", "ACTION_WRONG"),
    (MEN, "Who is active?", "One of them is on his feet.", None),
    (RIDERS, "What are the men doing?", "They lead their horses on foot.", "ACTION_WRONG"),
    (RIDERS, "What are the men doing?", "They are out on horseback.", None),
    (GULL, "What is the gull up to?", "It has settled on a dome.", "ACTION_WRONG"),
    (GULL, "What is the gull up to?", "It took off from a dome.", None),
    (DRINK, "Describe him.", "The man holds a microphone in his hand.", "ACTION_WRONG"),
    (DRINK, "Describe him.", "The man holds a drink in his hand.", None),
    (TREE, "How can the cat get down?", "The cat sits on the roof of a house.",
     "RELATION_REFUTED"),
    (TREE, "How can the cat get down?", "The cat sits on a branch.", None),
    (PLANES, "What are the airplanes doing?", "They are taking off.", "ACTION_WRONG"),
    (BEARS, "What do they seek?", "The two bears are wading in a stream.", "ACTION_WRONG"),
    (GOATS, "How many animals are there?", "Two goats can be seen.", None),
    (ROAD, "Where is the bus?", "It is driving across a bridge.", "KIND_WRONG"),
    (DUSK, "What time of day is it?", "It looks like morning.", "TIME_WRONG"),
    (DUSK, "Is it day or night?", "It is dusk.", None),
    (BOWL, "Describe it.", "The bowl is built of plywood sheets.", "ATTRIBUTE_WRONG"),
    (BOWL, "Describe it.", "The bowl is built of concrete.", None),
    (CUPCAKE, "What is the day?", "The child is opening a wrapped present.", "ACTION_WRONG"),
    (CUPCAKE, "What is the day?", "The child is admiring a cupcake.", None),
    (MATCH, "Describe it.", "A female player is ready for the ball.", "KIND_WRONG"),
    (MATCH, "Describe it.", "A male player is ready for the ball.", None),
    (TRAFFIC, "Describe it.", "A bicycle hangs from the ceiling of a garage.", "KIND_WRONG"),
    (HELMET, "Is it safe?", "No, the man is not wearing a helmet.", "OBJECT_DENIED"),
    (HELMET, "Is it safe?", "No, the man is not wearing a vest.", None),
    (RIDERS, "Is it busy?", "No, nobody is riding there.", "OBJECT_DENIED"),
    (PLANES, "Describe it.", "Some of them are gray, and a couple are white.", None),
    (FAMILY, "Are they mostly adults?", "No, most of them are children.", None),
]  # fmt: skip


def codes(
    captions: tuple[str, ...], turns: list[tuple[str, str]], kind: SampleType, *boxes: Box
) -> tuple[str, ...]:
    image = AnnotatedImage(
        id=1, file_name="1.jpg", width=640, height=480, captions=captions,
        caption_ids=tuple(range(101, 101 + len(captions))), boxes=boxes,
    )  # fmt: skip
    asked = [Turn(question=q, answer=a, kind="object") for q, a in turns]
    found = reasons(check_sample(asked, kind, image, Shown(), POLICY))
    return tuple(code for code in found if code not in ("TOO_SHORT", "HEDGED"))


@pytest.mark.parametrize(("captions", "question", "answer", "code"), CASES)
def test_the_opposite_of_captions_is_rejected_and_their_words_are_not(
    captions: tuple[str, ...], question: str, answer: str, code: str | None
) -> None:
    found = codes(captions, [(question, answer)], "reasoning")
    assert found[:1] == (() if code is None else (code,))


def test_a_second_question_does_not_hide_what_is_counted() -> None:
    horses = [Box("horse", 10 + 120 * i, 200, 100, 100, False, 11 + i) for i in range(5)]
    question = "How many horses are there, and what are they doing?"
    for number, expected in (("three", ("COUNT_WRONG",)), ("five", ())):
        answer = f"There are {number} horses; some are standing."
        assert codes(("Horses on a hill.",), [(question, answer)], "conversation", *horses) == (
            expected
        )


def test_he_stands_for_the_person_named_before_not_for_the_elephant() -> None:
    boxes = (
        Box("elephant", 20, 40, 300, 400, False, 11),
        Box("person", 450, 60, 150, 380, False, 12),
    )
    captions = ("A man next to an elephant.",)
    for side, expected in (("left", ("PLACE_WRONG",)), ("right", ())):
        turns = [
            ("Who is next to the elephant?", "A man stands close to it."),
            ("On which side is he?", f"He is standing at the {side} edge of the frame."),
        ]
        assert codes(captions, turns, "conversation", *boxes) == expected
