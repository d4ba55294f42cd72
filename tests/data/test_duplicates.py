"""Duplicates are reported with their places; similar records are not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.duplicates import DuplicateFinder


def record(name: str, *images: bytes | Path, text: str = "A cat.") -> Conversation:
    asked = tuple(ImagePart(i) for i in range(len(images))) or (TextPart("What?"),)
    turns = (Turn("user", asked), Turn("assistant", (TextPart(text),)))
    return Conversation(name, turns, tuple(images))


def found_in(
    *files: tuple[str, list[Conversation | None]], held_out: list[Conversation] | None = None
) -> list[str]:
    duplicates = DuplicateFinder()
    for name, records in files:
        duplicates.begin(name, held_out=False)
        for each in records:
            duplicates.add(each)
    if held_out is not None:
        duplicates.begin("val.json", held_out=True)
        for each in held_out:
            duplicates.add(each)
    return [str(repeat) for repeat in duplicates.found()]


def test_several_questions_about_one_image_are_no_repeat() -> None:
    records = [record("a", b"cat"), record("b", b"cat", text="Yes."), record("c", text="Yes.")]
    assert found_in(("a.json", [*records, record("d", b"dog")])) == []


def test_ids_are_compared_over_all_files_and_records_counted_from_one() -> None:
    first = [record("x", b"1"), None, record("y", b"2")]
    second: list[Conversation | None] = [record("z", b"3"), record("y", b"4"), record("x", b"5")]
    (reported,) = found_in(("a.json", list(first)), ("b.json", second))
    assert reported.startswith("2 training records have an id that an earlier one has")
    assert reported.endswith("first: record 3 of a.json and record 2 of b.json")


def test_a_record_is_known_again_under_another_id_and_another_image_file(tmp_path: Path) -> None:
    here, copy = tmp_path / "here.jpg", tmp_path / "copy.jpg"
    here.write_bytes(b"the same bytes")
    copy.write_bytes(b"the same bytes")
    (reported,) = found_in(("a.json", [record("1", here), record("2", b"x"), record("3", copy)]))
    assert reported == (
        "1 training records repeat an earlier one, images and words; "
        "first: record 1 of a.json and record 3 of a.json"
    )


def test_held_out_images_that_are_trained_on_are_reported_whatever_the_question() -> None:
    train: list[Conversation | None] = [record("1", b"cat"), record("2", b"dog", b"cow")]
    held_out = [record("3", b"owl"), record("4", b"cow", text="Moo."), record("5", b"cat", b"cow")]
    (reported,) = found_in(("a.json", train), held_out=held_out)
    assert reported.startswith("2 held-out records show an image that is trained on too")
    assert reported.endswith("first: record 2 of val.json and record 2 of a.json")


def test_held_out_texts_count_only_without_an_image() -> None:
    train: list[Conversation | None] = [record("1", b"cat"), record("2", text="Four.")]
    assert found_in(("a.json", train), held_out=[record("3", b"dog")]) == []
    (reported,) = found_in(("a.json", train), held_out=[record("3", text="Four.")])
    assert reported.startswith("1 held-out records without an image are trained on too")


@pytest.mark.parametrize("held_out", [None, []])
def test_nothing_repeats_in_nothing(held_out: list[Conversation] | None) -> None:
    assert found_in(("a.json", []), held_out=held_out) == []


@given(st.lists(st.integers(0, 5), max_size=12))
def test_as_many_repeats_as_records_beyond_the_first_of_their_kind(kinds: list[int]) -> None:
    records: list[Conversation | None] = [
        record(str(n), bytes([kind])) for n, kind in enumerate(kinds)
    ]
    reported = found_in(("a.json", records))
    expected = len(kinds) - len(set(kinds))
    assert [line.split()[0] for line in reported] == ([str(expected)] if expected else [])
