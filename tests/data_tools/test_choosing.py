from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from data_tools.coco import AnnotatedImage, Box
from data_tools.instruct.plan.selection import choose, types_of


def image(number: int, *names: str) -> AnnotatedImage:
    boxes = tuple(Box(name, 0, 0, 5, 5, False, i) for i, name in enumerate(names, 1))
    return AnnotatedImage(number, f"{number}.jpg", 10, 10, ("A.",), boxes)


def many() -> list[AnnotatedImage]:
    """1,000 images: people everywhere, a dog in 100, a toaster in 5, nothing boxed in 10."""
    found = []
    for number in range(1, 1001):
        names = ["person"] * (number > 10)
        names += ["dog"] * (number % 10 == 0) + ["toaster"] * (number % 200 == 0)
        found.append(image(number, *names))
    return found


def test_balanced_takes_rare_categories_first_and_then_in_turns() -> None:
    chosen = choose(many(), 60, "balanced", 0)
    counts = Counter(name for image in chosen for name in image.categories or ("none",))
    assert counts["toaster"] == 5, "all there are"
    assert counts["none"] >= 9 and counts["dog"] >= 20
    assert [image.id for image in chosen] == sorted(image.id for image in chosen)
    by_chance = Counter(
        name for image in choose(many(), 60, "random", 0) for name in image.categories
    )
    assert by_chance["toaster"] <= 2 and by_chance["dog"] < 15


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=3), min_size=1, max_size=30),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 5),
    st.sampled_from(["random", "balanced"]),
)
def test_a_larger_count_keeps_a_smaller_ones_images(
    scenes: list[list[str]], few: int, more: int, seed: int, how: str
) -> None:
    images = [image(i, *names) for i, names in enumerate(scenes, 1)]
    smaller = choose(images, min(few, more), how, seed)  # type: ignore[arg-type]
    larger = choose(images, max(few, more), how, seed)  # type: ignore[arg-type]
    assert len(smaller) == min(few, more, len(images))
    assert {p.id for p in smaller} <= {p.id for p in larger}
    assert len({p.id for p in larger}) == len(larger) == min(max(few, more), len(images))
    assert smaller == choose(images[::-1], min(few, more), how, seed)  # type: ignore[arg-type]


def test_types_are_drawn_in_their_shares_for_each_image_by_itself() -> None:
    shares = {"conversation": 0.7, "detail": 0.29, "reasoning": 1.94}
    drawn = Counter(kind for i in range(10_000) for kind, _ in types_of(i, shares, 0))  # type: ignore[arg-type]
    assert abs(drawn["conversation"] - 7_000) < 150
    assert abs(drawn["detail"] - 2_900) < 150
    assert abs(drawn["reasoning"] - 19_400) < 100
    more = {"conversation": 1.7, "detail": 0.4, "reasoning": 2}
    for i in range(300):
        assert set(types_of(i, shares, 0)) <= set(types_of(i, more, 0))  # type: ignore[arg-type]
