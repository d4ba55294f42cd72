import pytest

from data_tools import words


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
    ],
)
def test_names_are_counted_in_english(name: str, one: str, two: str) -> None:
    assert (words.counted(name, 1), words.counted(name, 2)) == (one, two)


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
