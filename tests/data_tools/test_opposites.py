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
     "airplane", "dining table", "bear", "truck"),
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
    (PURPLE, "Describe it.", "A bed is there, and the walls are painted dark green.",
     "ATTRIBUTE_WRONG"),
    (PURPLE, "Describe it.", "A bed is in front of a wall painted dark green.", None),
    (LUGGAGE, "Describe it.", "All of the suitcases are white.", "ATTRIBUTE_WRONG"),
    (LUGGAGE, "Describe it.", "Some suitcases in a row are white.", None),
    (AIRPORT, "How do they go?", "There are no buses on the apron.", "OBJECT_DENIED"),
    (AIRPORT, "How do they go?", "There are no buses in the sky.", None),
    (RIVER, "Is it a trip?", "No, none of them has brought any luggage.", "OBJECT_DENIED"),
    (RIVER, "Is it a trip?", "Without any luggage they could not stay.", None),
    (ISLAND, "Is it big?", "No, the kitchen lacks an island.", "OBJECT_DENIED"),
    (ISLAND, "Is it big?", "Yes, the kitchen lacks a table only.", None),
    (PHONE, "Describe it.", "A woman looks into the camera of her phone.", None),
    (SNEAKERS, "Describe it.", "The rider balances in open sandals.", "KIND_WRONG"),
    (SNEAKERS, "Describe it.", "The rider balances in old shoes.", None),
    (RIBBON, "Describe it.", "A ribbon is cut inside a large hall.", "KIND_WRONG"),
    (RIBBON, "Describe it.", "A ribbon is cut in front of the town hall.", None),
    (SIGNS, "Where is it?", "The signs on the pole are written in German.", None),
    (BOYS, "Who plays?", "They look like grown men.", "KIND_WRONG"),
    (MEN, "Who is active?", "One of them is on his feet.", None),
    (RIDERS, "What are the men doing?", "They lead their horses on foot.", "ACTION_WRONG"),
    (RIDERS, "What are the men doing?", "They are out on horseback.", None),
    (GULL, "What is the gull up to?", "It has settled on a dome.", "ACTION_WRONG"),
    (GULL, "What is the gull up to?", "It took off from a dome.", None),
    (DRINK, "Describe him.", "The man holds a drink in his hand.", None),
    (TREE, "How can the cat get down?", "The cat sits on the roof of a house.",
     "RELATION_REFUTED"),
    (TREE, "How can the cat get down?", "The cat sits on a branch.", None),
    (PLANES, "What are the airplanes doing?", "They are taking off.", "ACTION_WRONG"),
    (BEARS, "What do they seek?", "The two bears are wading in a stream.", "ACTION_WRONG"),
    (GOATS, "How many animals are there?", "Two goats can be seen.", None),
    (DUSK, "What time of day is it?", "It looks like morning.", "TIME_WRONG"),
    (DUSK, "Is it day or night?", "It is dusk.", None),
    (BOWL, "Describe it.", "The bowl is built of plywood sheets.", "ATTRIBUTE_WRONG"),
    (BOWL, "Describe it.", "The bowl is built of concrete.", None),
    (CUPCAKE, "What is the day?", "The child is opening a wrapped present.", "ACTION_WRONG"),
    (CUPCAKE, "What is the day?", "The child is admiring a cupcake.", None),
    (MATCH, "Describe it.", "A female player is ready for the ball.", "KIND_WRONG"),
    (MATCH, "Describe it.", "A male player is ready for the ball.", None),
    (TRAFFIC, "Describe it.", "A bicycle hangs from the ceiling of a garage.", "KIND_WRONG"),
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


SKIING = ("A woman skiing down the slope.", "A woman in a red jacket skiing.", "A skier poses.")
SUIT = ("A man in a suit holds a drink.", "A man in a suit and tie.", "A man holding a beverage.")
RIBBONS = ("A group of people cutting a ribbon.", "A man cuts a ribbon.", "A man with scissors.",
           "People watch two young children.")  # fmt: skip
CABINETS = ("A kitchen with a white island.", "White cabinets and a silver oven.", "A kitchen.")
TRICK = ("A skateboarder doing a trick.", "A man jumps with his skateboard.", "A man skating.")
VINTAGE = ("A kitchen with vintage appliances.", "An old fashioned kitchen.", "Old appliances.")
CARROTS = ("A plate of carrots and beans.", "Carrots and beans on a plate.", "Carrots on a plate.",
           "Carrots and small beans.")  # fmt: skip
KIDS = ("Kids pose on a tennis court.", "Children at a tennis net.", "A group of kids.")
BEDROOM = ("A bed in a hut with a net.", "A bedroom with windows.", "A bed under a net.")
STATUE = ("A metal statue of two women.", "A metal statue on a bench.", "Two women of metal.")
STREET = ("A woman walks next to a man riding a bike.", "A man riding a bike.", "A man on a bike.",
          "A man and a woman on a street.")  # fmt: skip
CAT = ("A woman sitting on a laptop next to a cat.", "A person using a laptop.", "A cat.")

NATURAL = [
    # true answers that were rejected; what captions are silent about is no contradiction
    (SKIING, "Describe it.", "A skier pauses on a groomed run with her skis pointing right."),
    (SUIT, "Is he by himself?", "No, two women are sitting at the tables behind him."),
    (SUIT, "Describe the man.", "He has a goatee. In the background, women are at tables."),
    (RIBBONS, "What's that in the girl's hands?", "A huge pair of scissors."),
    (CABINETS, "Describe it.", "A tall reddish cabinet in the corner adds a darker accent."),
    (TRICK, "Is he alone?", "Not entirely, there's somebody sitting by the building."),
    (
        TRICK,
        "Describe it.",
        "A skater is on a ramp. Behind it, more planks are lying in the grass.",
    ),
    (VINTAGE, "Is it old?", "Yes. A modern household would also have plugs."),
    (VINTAGE, "Where is it?", "It looks like an old kitchen, shown in a museum."),
    (CARROTS, "What is there?", "Carrots which have grown into funny shapes, and beans or peas."),
    (KIDS, "Describe it.", "A tall boy in a red polo shirt stands in the center."),
    (BEDROOM, "Why a net?", "The lush greenery outside the windows points to a warm region."),
    (STREET, "Are they a couple?", "They go down the street, he on a pink bike and she on foot."),
    (CAT, "Describe it.", "The laptop seems to rest on the person's knees."),
    (SIGNS, "Which streets meet here?", "Potsdamer Straße and Bülowstraße."),
]


@pytest.mark.parametrize(("captions", "question", "answer"), NATURAL)
def test_what_captions_leave_out_is_not_rejected(
    captions: tuple[str, ...], question: str, answer: str
) -> None:
    assert codes(captions, [(question, answer)], "conversation") == ()


def test_the_material_of_a_bench_is_read_after_made_of() -> None:
    bench = ("A stone bench under a tree.", "A bench with a view.", "A tree and a stone bench.")
    asked = "Is there a seat?"
    for answer, expected in (
        ("Yes, on the right there's a bench made of wooden slats.", ("ATTRIBUTE_WRONG",)),
        ("Yes, on the right there's a bench made of stone slabs.", ()),
    ):
        assert codes(bench, [(asked, answer)], "conversation") == expected


def test_the_subject_of_a_color_may_be_followed_by_a_participle() -> None:
    for color, expected in (("wooden", ("ATTRIBUTE_WRONG",)), ("metal", ())):
        answer = f"The two figures are carved out of {color.removesuffix('en')}."
        assert codes(STATUE, [("What is it made of?", answer)], "conversation") == expected
    lamps = ("A green lamp over a desk.", "A desk with a green lamp.", "A lamp.")
    for color, expected in (("red", ("ATTRIBUTE_WRONG",)), ("green", ())):
        answer = f"The lamp hanging from the ceiling is {color}."
        assert codes(lamps, [("Describe it.", answer)], "conversation") == expected


def test_a_part_of_a_board_and_people_in_general_are_not_missing_things() -> None:
    board = Box("skateboard", 10, 10, 300, 200, False, 11)
    legs = ("Legs on a skateboard.", "A skateboard.", "Sneakers on a board.")
    for answer, expected in (
        ("The truck of the board has a checkered pattern.", ()),
        ("The truck of the driver has a checkered pattern.", ("OBJECT_NOT_FOUND",)),
        ("It rolls well. People probably ride it every day.", ()),
        ("It rolls well. People ride it next to a wall.", ("OBJECT_NOT_FOUND",)),
    ):
        assert codes(legs, [("Describe it.", answer)], "conversation", board) == expected


def test_one_of_two_actions_is_not_claimed() -> None:
    cook = ("A woman standing by a stove.", "A woman stands in a kitchen.", "A standing woman.")
    for answer, expected in (("She sits there.", ("ACTION_WRONG",)), ("She sits or stands.", ())):
        turns = [("What is the woman doing?", answer)]
        assert codes(cook, turns, "conversation") == expected


def test_a_pronoun_for_what_an_earlier_sentence_names_is_read() -> None:
    """The sentence with the pronoun is shorter than the one that names the people."""
    question = "How can you tell that it is a birthday?"
    answer = (
        "A cake has been placed on the table, and four people have gathered around it. They seem "
        "to wait for it to be served."
    )
    party = ("A family is eating cake.", "People sit at a table.", "Four people sit at a table.")
    assert codes(party, [(question, answer)], "reasoning") == ()
