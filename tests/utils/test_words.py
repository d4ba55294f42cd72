import pytest

from vlm_sft.utils import words


@pytest.mark.parametrize(
    ("name", "one", "two"),
    [
        ("dog", "a dog", "two dogs"),
        ("umbrella", "an umbrella", "two umbrellas"),
        ("bus", "a bus", "two buses"),
        ("person", "a person", "two people"),
        ("butterfly", "a butterfly", "two butterflies"),
        ("toy", "a toy", "two toys"),
        ("fish", "a fish", "two fish"),
        ("wine glass", "a wine glass", "two wine glasses"),
        ("couch", "a couch", "two couches"),
        ("scissors", "a pair of scissors", "two pairs of scissors"),
        ("butter knife", "a butter knife", "two butter knives"),
        ("cup of coffee", "a cup of coffee", "two cups of coffee"),
        ("fireman", "a fireman", "two firemen"),
        ("human", "a human", "two humans"),
        ("luggage", "some luggage", "two pieces of luggage"),
        ("SUV", "an SUV", "two SUVs"),
        ("UFO", "a UFO", "two UFOs"),
    ],
)
def test_names_are_counted_in_english(name: str, one: str, two: str) -> None:
    assert (words.counted(name, 1), words.counted(name, 2)) == (one, two)


@pytest.mark.parametrize(
    ("name", "spoken"),
    [
        ("my_ski", "my ski"),
        ("traffic-cone", "traffic cone"),
        ("Traffic_Light", "traffic light"),
        ("t-shirt", "t-shirt"),
        ("18-wheeler", "18-wheeler"),
        ("SUV", "SUV"),
        ("__dog__", "dog"),
        ("cell phone", "cell phone"),
    ],
)
def test_a_category_is_spoken_in_words(name: str, spoken: str) -> None:
    assert words.spoken(name) == spoken


def test_what_comes_in_pairs_or_pieces_is_one_of_those() -> None:
    names = ("dog", "scissors", "skis", "broccoli")
    assert [words.single(name) for name in names] == [
        "dog",
        "pair of scissors",
        "pair of skis",
        "piece of broccoli",
    ]


@pytest.mark.parametrize(
    ("caption", "name", "spoken_of"),
    [
        ("Two CARS in a street.", "car", True),
        ("A carpet.", "car", False),
        ("A taxi waits.", "car", True),
        ("Some women talk.", "person", True),
        ("A hot dog.", "dog", True),  # too careful rather than wrong
        ("A cat.", "dog", False),
        ("Two traffic-cones.", "traffic cone", True),
    ],
)
def test_captions_speak_of_a_category_by_name_plural_or_synonym(
    caption: str, name: str, spoken_of: bool
) -> None:
    assert words.mentions(caption, name) is spoken_of


def test_lists_and_numbers_are_written_out() -> None:
    assert words.listed(["a", "b", "c"]) == "a, b and c"
    assert words.listed(["a"]) == "a"
    assert [words.number(n) for n in (1, 12, 13)] == ["one", "twelve", "13"]


@pytest.mark.parametrize(
    ("name", "the", "exists", "one"),
    [
        ("skis", "the skis are", "is a pair of skis", "pair of skis"),
        ("sunglasses", "the sunglasses are", "is a pair of sunglasses", "pair of sunglasses"),
        ("shoes", "the shoes are", "are some shoes", "shoe"),
        ("wine glasses", "the wine glasses are", "are some wine glasses", "wine glass"),
        ("people", "the people are", "are some people", "person"),
        ("batteries", "the batteries are", "are some batteries", "battery"),
        ("boxes", "the boxes are", "are some boxes", "box"),
        ("broccoli", "the broccoli is", "is some broccoli", "piece of broccoli"),
        ("bus", "the bus is", "is a bus", "bus"),
        ("wine glass", "the wine glass is", "is a wine glass", "wine glass"),
        ("sheep", "the sheep is", "is a sheep", "sheep"),
        ("cactus", "the cactus is", "is a cactus", "cactus"),
        ("lens", "the lens is", "is a lens", "lens"),
        ("unicorn", "the unicorn is", "is a unicorn", "unicorn"),
        ("hourglass", "the hourglass is", "is an hourglass", "hourglass"),
        ("uninflated ball", "the uninflated ball is", "is an uninflated ball", "uninflated ball"),
    ],
)
def test_verbs_and_articles_agree_with_the_name(name: str, the: str, exists: str, one: str) -> None:
    assert f"the {name} {words.be(name)}" == the
    assert f"{words.be_one(name)} {words.article(name)} {name}" == exists
    assert words.single(name) == one


def test_plural_names_are_counted_without_a_second_plural() -> None:
    assert [words.counted(name, 2) for name in ("shoes", "skis", "people", "sunglasses")] == [
        "two shoes", "two pairs of skis", "two people", "two pairs of sunglasses",
    ]  # fmt: skip
