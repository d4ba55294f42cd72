"""Duplicates are dropped, frequent answers are leveled, and no turn is lost on the way."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_tools.instruct.clean import balance, texts
from data_tools.instruct.clean import command as cleaning
from data_tools.instruct.clean.choices import Categories, choice_of, group_of
from data_tools.instruct.clean.near_duplicates import MAX_MISSED, choose_bands
from data_tools.instruct.clean.same_images import find_same_images, hash_image, near_pairs
from data_tools.instruct.config import InstructConfig, SameImageConfig
from data_tools.instruct.schema import Sample
from tests.data_tools.instruct_samples import draw, dropped, kept, run_folder, sample, turn
from vlm_sft.errors import UserError

KEEP: dict[str, Any] = {
    "near_duplicates": None,
    "same_questions": False,
    "same_images": {"action": "keep"},
    "answers": {"families": []},
    "openings": None,
}
"""Nothing is dropped."""

LONG = (
    "A brown dog lies on a green sofa beside a small wooden table with a cup of coffee and two old "
    "books while a lamp shines above it in the quiet room"
)


def clean(folder: Path, samples: list[Sample], **settings: Any) -> InstructConfig:
    categories = settings.pop("categories", None)
    config = run_folder(folder, samples, categories, **{**KEEP, **settings})
    cleaning.command(config)
    return config


def figures(config: InstructConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(config.output_dir) / "cleaning.json").read_text())
    return found


def claims(one: Sample) -> list[str]:
    return [check.claim for check in one.checks if check.rule == "clean"]


# --- repeats


def test_the_first_of_equal_and_nearly_equal_texts_stays(tmp_path: Path) -> None:
    samples = [
        sample("a", 1, [("Describe it.", LONG)], sample_type="detail"),
        sample("b", 2, [("What is shown?", LONG.upper() + "!")], sample_type="detail"),
        sample("c", 3, [("Describe it.", LONG + " today")], sample_type="detail"),
        sample("d", 4, [("Describe it.", LONG[::-1])], sample_type="detail"),
    ]
    config = clean(tmp_path, samples, near_duplicates={})
    assert [one.id for one in kept(config)] == ["a", "d"]
    exact, near = dropped(config)
    assert (exact.reasons, claims(exact)) == (("EXACT_DUPLICATE",), ["duplicate of a"])
    assert near.reasons == ("NEAR_DUPLICATE",)
    assert claims(near) == ["duplicate of a (Jaccard 0.968)"]  # 30 of 31 shingles


def test_short_texts_and_a_programs_texts_repeat_on_one_image_only(tmp_path: Path) -> None:
    short = [("Is there a dog?", "Yes.")]
    samples = [
        sample("a", 1, short),
        sample("b", 2, short),
        sample("c", 1, short),
        sample("d", 1, [("Say.", LONG)], sample_type="reasoning", origin="rules"),
        sample("e", 2, [("Say.", LONG)], sample_type="reasoning", origin="rules"),
        sample("f", 2, [("Say.", LONG)], sample_type="reasoning", origin="rules"),
    ]
    config = clean(tmp_path, samples, near_duplicates={})
    assert [one.id for one in kept(config)] == ["a", "b", "d", "e"]
    assert [claims(one) for one in dropped(config)] == [["duplicate of a"], ["duplicate of e"]]


WORDS = st.sampled_from(["dog", "cat", "sofa", "table", "lamp", "red", "lies", "near", "under"])


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.lists(WORDS, min_size=1, max_size=6)),
        min_size=1,
        max_size=14,
    ),
    st.sampled_from([0.5, 0.8, 1.0]),
)
def test_no_two_kept_texts_are_alike_and_the_first_of_alike_ones_is_kept(
    tmp_path_factory: pytest.TempPathFactory,
    texts_of: list[tuple[int, list[str]]],
    threshold: float,
) -> None:
    samples = [
        sample(f"s{i}", image, [("What?", " ".join(words))], sample_type="detail")
        for i, (image, words) in enumerate(texts_of)
    ]
    settings_of = {"threshold": threshold, "shingle_words": 2, "across_words": 3}
    folder = tmp_path_factory.mktemp("near")
    config = clean(folder, samples, near_duplicates=settings_of)

    def compared(first: Sample, second: Sample) -> bool:
        long = all(len(texts.words(one.turns[0].answer)) >= 3 for one in (first, second))
        return long or first.image.id == second.image.id

    def likeness(first: Sample, second: Sample) -> float:
        sets = [texts.shingles(texts.words(s.turns[0].answer), 2) for s in (first, second)]
        return texts.jaccard(*sets)

    expected: list[Sample] = []
    for one in samples:  # the definition, in the plainest form
        if not any(compared(e, one) and likeness(e, one) >= threshold for e in expected):
            expected.append(one)
    assert [one.id for one in kept(config)] == [one.id for one in expected]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_are_chosen_so_that_pairs_at_the_threshold_are_hardly_ever_missed(
    threshold: float,
) -> None:
    bands, rows = choose_bands(threshold)
    assert (1 - threshold**rows) ** bands <= MAX_MISSED
    assert bands * rows <= 128
    assert choose_bands(0.8) == (25, 5)


def test_a_question_asked_before_of_the_image_goes_with_what_leans_on_it(tmp_path: Path) -> None:
    samples = [
        sample("a", 1, [("Is there a dog?", "Yes.")]),
        sample(
            "b",
            1,
            [
                ("What stands there?", "A bus."),
                ("is there a DOG", "Yes."),
                ("What colour is it?", "Brown."),
                ("How many cars are there?", "Two."),
            ],
        ),
        sample("c", 2, [("Is there a dog?", "Yes.")]),
    ]
    config = clean(tmp_path, samples, same_questions=True)
    whole, rest, other = kept(config)
    assert whole == samples[0] and other == samples[2]
    assert [t.question for t in rest.turns] == ["What stands there?", "How many cars are there?"]
    assert [c.claim for c in rest.checks if c.turn is not None] == ["claim 0", "claim 3"]
    assert [c.turn for c in rest.checks if c.turn is not None] == [0, 1]
    assert claims(rest) == [
        "turn 1 was dropped: SAME_QUESTION",
        "turn 2 was dropped: SAME_QUESTION",
    ]
    lost = dropped(config)
    assert [one.id for one in lost] == ["b-turn-1", "b-turn-2"]
    assert [one.turns for one in lost] == [(samples[1].turns[1],), (samples[1].turns[2],)]
    assert claims(lost[0]) == ["asked before in a"]
    assert all(one.status == "rejected" and one.cost.tokens_in == 0 for one in lost)


# --- images


def test_an_image_saved_again_smaller_is_the_same_and_another_colour_is_not(
    tmp_path: Path,
) -> None:
    draw(tmp_path / "1.png", 1, (256, 192))
    draw(tmp_path / "2.png", 2, (256, 192))
    first = Image.open(tmp_path / "1.png")
    first.resize((200, 150)).save(tmp_path / "3.jpg", quality=80)
    red, green, blue = first.split()
    Image.merge("RGB", (blue, red, green)).save(tmp_path / "4.png")
    (tmp_path / "5.png").write_bytes(b"no picture")
    names = ["1.png", "2.png", "3.jpg", "4.png", "5.png", "6.png"]
    paths = {number: tmp_path / name for number, name in enumerate(names, 1)}
    same = find_same_images(paths, tmp_path / "cache.jsonl", SameImageConfig())
    assert same.repeats == {3: 1}
    assert sorted(same.unreadable) == [5, 6]
    again = find_same_images(paths, tmp_path / "cache.jsonl", SameImageConfig())
    assert again.repeats == {3: 1} and again.num_opened == 2  # the unreadable ones


def test_samples_on_a_repeated_or_unreadable_image_are_dropped(tmp_path: Path) -> None:
    samples = [sample(f"s{i}", i, [("What?", f"Thing {i}.")]) for i in (1, 2, 3)]
    images = tmp_path / "images"
    images.mkdir()
    draw(images / f"{1:012d}.png", 1)
    draw(images / f"{2:012d}.png", 1)
    (images / f"{3:012d}.png").write_bytes(b"")
    config = clean(tmp_path, samples, same_images={})
    assert [one.id for one in kept(config)] == ["s1"]
    twin, broken = dropped(config)
    assert (twin.reasons, claims(twin)) == (("IMAGE_DUPLICATE",), ["duplicate of s1"])
    assert broken.reasons == ("IMAGE_UNREADABLE",)
    assert figures(config)["images"]["first_alike"] == [[2, 1]]


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 2**64 - 1), min_size=1, max_size=12), st.integers(0, 8))
def test_near_hashes_are_all_found(base: set[int], distance: int) -> None:
    near = {value ^ (1 << (value % 64)) for value in base} | {value ^ 0b1011 for value in base}
    values = np.array(sorted(base | near), np.uint64)
    found = near_pairs(values, distance)
    for place, value in enumerate(values.tolist()):
        expected = [
            other
            for other, theirs in enumerate(values.tolist())
            if other != place and (value ^ theirs).bit_count() <= distance
        ]
        assert found.get(place, []) == expected


def test_the_hash_is_that_of_imagehash(tmp_path: Path) -> None:
    import imagehash

    draw(tmp_path / "1.png", 1)
    expected = str(imagehash.phash(Image.open(tmp_path / "1.png").convert("RGB")))
    assert hash_image(tmp_path / "1.png") == int(expected, 16)


# --- answers


@pytest.mark.parametrize(
    ("question", "answer", "kind", "expected"),
    [
        ("Is there a dog?", "Yes, there is.", "existence", ("yes_no", 0)),
        ("Is there a dog?", "No.", "existence", ("yes_no", 1)),
        ("Is there a dog?", "I see a cat and a bus, so no.", "existence", ("yes_no", 1)),
        ("What is on the table?", "No objects are on it.", "object", None),
        ("Is the dog on the left or right?", "It is on the left side.", "place", ("side", 0)),
        ("Where is the dog?", "It lies to the right of the cat.", "place", ("side", 1)),
        ("Where is the dog?", "It lies right next to the cat.", "place", None),
        ("Where is the dog?", "To the left of the cat, on the right.", "place", None),
        ("Is the cup above or below the shelf?", "It is above it.", "place", ("height", 0)),
        ("Where is the cup?", "On top of the shelf.", "place", None),
        ("Which? A. dog B. cat C. bus", "B", "object", ("option", 1)),
        ("Which? (A) dog (B) cat", "(A) dog", "object", ("option", 0)),
        ("Which? A. dog B. cat", "A dog lies there.", "object", None),
        ("What colour is the dog?", "Brown.", "attribute", None),
    ],
)
def test_a_choice_is_told_by_question_and_answer(
    question: str, answer: str, kind: Any, expected: tuple[str, int] | None
) -> None:
    found = choice_of(turn(question, answer, kind))
    assert (found and (found.family, found.value)) == expected


def test_categories_are_found_by_plural_and_synonym() -> None:
    categories = Categories(["dog", "dining table", "person"])

    def group(question: str) -> tuple[str, str, str]:
        found = turn(question, "Yes.", "existence")
        choice = choice_of(found)
        assert choice is not None
        return group_of(found, choice, categories)

    asked = group("Are men at the table with their puppies?")
    assert asked == ("yes_no", "existence", "dining table+dog+person")
    assert group("Is there a giraffe?") == ("yes_no", "existence", "")


def existence(name: str, category: str, answer: str, *, image: int) -> Sample:
    return sample(name, image, [(f"Is there a {category}?", f"{answer}.", "existence")])


def many_answers() -> list[Sample]:
    """Dogs mostly yes, cats mostly no; in all 60 yes and 40 no."""
    counts = [("dog", "Yes", 40), ("dog", "No", 10), ("cat", "Yes", 20), ("cat", "No", 30)]
    found = []
    for category, answer, count in counts:
        for _ in range(count):
            number = len(found) + 1
            found.append(existence(f"s{number:03d}", category, answer, image=number))
    return found


def test_neither_the_category_nor_the_whole_gives_the_answer_away(tmp_path: Path) -> None:
    names = {number: ["dog", "cat"] for number in range(1, 101)}
    config = clean(tmp_path, many_answers(), answers={"slack": 0}, categories=names)
    count = Counter((one.turns[0].question, one.turns[0].answer) for one in kept(config))
    assert count == {
        ("Is there a dog?", "Yes."): 10,
        ("Is there a dog?", "No."): 10,
        ("Is there a cat?", "Yes."): 20,
        ("Is there a cat?", "No."): 20,
    }
    told = figures(config)["answers"]["yes_no"]
    assert told["before"] == {"yes": 60, "no": 40, "guessed_by_category_alone": 0.7}
    assert told["kept"] == {"yes": 30, "no": 30, "guessed_by_category_alone": 0.5}
    assert figures(config)["not_reached"] == []


def test_what_is_levelled_does_not_depend_on_the_order_of_samples(tmp_path: Path) -> None:
    samples = many_answers()
    first = clean(tmp_path / "1", samples, answers={})
    second = clean(tmp_path / "2", samples[::-1], answers={})
    assert {one.id for one in kept(first)} == {one.id for one in kept(second)}
    assert len(kept(first)) < 100


def test_a_turn_that_the_next_one_refers_to_stays_and_that_is_told(tmp_path: Path) -> None:
    talk: list[Any] = [
        ("Is there a dog?", "Yes.", "existence"),
        ("What is it doing?", "It sleeps."),
    ]
    samples = [sample(f"s{i}", i, talk) for i in range(1, 5)]
    config = clean(tmp_path, samples, answers={})
    assert kept(config) == samples
    assert figures(config)["not_reached"] == [
        "yes_no: 1 of 1 groups (kind and categories) are unbalanced, because turns after the "
        "surplus ones refer back to them",
        "yes_no: 4 yes, 0 no in total",
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1), st.integers(0, 2))
def test_leveling_leaves_no_answer_above_the_rarest_and_drops_no_more_than_it_must(
    members: list[tuple[int, int]], slack: int
) -> None:
    turns = pd.DataFrame(members, columns=["group", "value"]).assign(free=True)
    turns["order"] = np.arange(len(members), dtype=np.uint64)[::-1]
    dropped = balance.level(turns, "group", 3, ratio=1.0, slack=slack)
    for group, of_group in turns.groupby("group"):
        before = np.bincount(of_group["value"], minlength=3)
        after = np.bincount(of_group.drop(dropped, errors="ignore")["value"], minlength=3)
        assert after.tolist() == np.minimum(before, before.min() + slack).tolist(), group


# --- openings, caps, shares


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
    st.sampled_from([0.1, 0.25, 0.34, 0.5, 1.0]),
)
def test_the_limit_of_a_share_is_the_highest_that_keeps_it(counts: list[int], share: float) -> None:
    limit = balance.share_limit(np.array(counts), share, least=1, max_loss=1.0)
    reachable = [
        cut
        for cut in range(1, max(counts) + 1)
        if min(cut, max(counts)) <= share * sum(min(c, cut) for c in counts) + 1e-9
    ]
    if len(counts) * share < 1:
        assert limit == max(counts)  # cannot be reached by cutting: nothing is cut
    else:
        assert limit == max(reachable, default=1)


def test_answers_that_begin_alike_are_capped(tmp_path: Path) -> None:
    openings = ["The image shows"] * 60 + ["There is also"] * 20 + ["On the left"] * 20
    samples = [
        sample(
            f"s{i}", i, [("Describe.", f"{opening} {i} things of that kind now.")],
            sample_type="detail",
        )
        for i, opening in enumerate(openings, 1)
    ]  # fmt: skip
    config = clean(tmp_path, samples, openings={"max_share": 0.5, "least": 1})
    count = Counter(" ".join(one.turns[0].answer.split()[:3]) for one in kept(config))
    assert count == {"The image shows": 40, "There is also": 20, "On the left": 20}
    assert {one.reasons for one in dropped(config)} == {("OPENING_CAP",)}
    for tight in ({"max_share": 0.3}, {"max_share": 0.5, "max_loss": 0.15}):
        told = clean(tmp_path / str(len(tight)), samples, openings={"least": 1, **tight})
        assert len(kept(told)) == 100
        (sentence,) = figures(told)["not_reached"]
        assert sentence.startswith(
            "openings of detail: 'the image shows' begins 60% of the answers, above "
        )


def test_types_images_and_categories_are_held_to_their_shares_and_caps(tmp_path: Path) -> None:
    types = ["conversation"] * 12 + ["detail"] * 4 + ["reasoning"] * 12
    samples = [
        sample(f"s{i}", i // 2, [("What?", f"Thing {i}.")], sample_type=kind)
        for i, kind in enumerate(types, 2)
    ]
    shares = {"conversation": 0.4, "detail": 0.2, "reasoning": 0.4}
    config = clean(tmp_path / "types", samples, type_shares=shares)
    count = Counter(one.type for one in kept(config))
    assert count == {"conversation": 8, "detail": 4, "reasoning": 8}
    one_each = clean(tmp_path / "images", samples, max_per_image=1)
    assert len({one.image.id for one in kept(one_each)}) == len(kept(one_each)) == 14
    names = {number: ["person"] if number < 12 else ["person", "bear"] for number in range(20)}
    capped = clean(tmp_path / "categories", samples, max_per_category=7, categories=names)
    bears = sum(one.image.id >= 12 for one in kept(capped))
    assert bears == 6 and 7 <= len(kept(capped)) <= 13  # all that are rare, 7 of the others
    assert figures(capped)["dropped"]["samples_by_reason"] == {
        "CATEGORY_CAP": 28 - len(kept(capped))
    }


# --- the whole


QUESTIONS = st.sampled_from(
    [
        ("Is there a dog?", "existence"),
        ("Is there a cat?", "existence"),
        ("Is it on the left or on the right?", "place"),
        ("What is it doing?", "action"),
    ]
)
ANSWERS = st.sampled_from(["Yes.", "No.", "On the left.", "On the right.", "The dog sleeps here."])


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            st.integers(1, 4), st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=4)
        ),
        max_size=12,
    )
)
def test_every_turn_is_kept_or_dropped_once_and_again_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, talks: list[tuple[int, list[Any]]]
) -> None:
    samples = [
        sample(f"s{i}", image, [(q, a, kind) for (q, kind), a in talk])
        for i, (image, talk) in enumerate(talks)
    ]
    folder = tmp_path_factory.mktemp("whole")
    settings_of = {**KEEP, "near_duplicates": {}, "same_questions": True, "answers": {}}
    config = clean(folder, samples, **settings_of)
    before = Counter((s.id, t.question, t.answer) for s in samples for t in s.turns)
    after = Counter(
        (s.id.split("-")[0], t.question, t.answer)
        for s in [*kept(config), *dropped(config)]
        for t in s.turns
    )
    assert before == after
    for one in kept(config):
        assert {check.turn for check in one.checks if check.rule == "object"} == set(
            range(len(one.turns))
        )
    told = figures(config)
    assert told["kept"]["turns"] == sum(len(one.turns) for one in kept(config))
    assert told["dropped"]["lines"] == len(dropped(config))
    names = ("kept.jsonl", "dropped.jsonl", "cleaning.json")
    first = [(Path(config.output_dir) / name).read_bytes() for name in names]
    cleaning.command(config)
    assert first == [(Path(config.output_dir) / name).read_bytes() for name in names]


def test_samples_of_unknown_images_are_refused(tmp_path: Path) -> None:
    config = run_folder(tmp_path, [sample("a", 1, [("What?", "A dog.")])], **KEEP)
    run = Path(config.output_dir)
    (run / "images.jsonl").write_text("")
    with pytest.raises(UserError, match=r"sample 'a' is about image 1, which images\.jsonl"):
        cleaning.command(config)
