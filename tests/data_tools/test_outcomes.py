"""The outcomes of the images and requests of a run."""

from collections import Counter

from data_tools.instruct.report.outcomes import Outcomes, Row
from data_tools.instruct.report.results import Outcome, Result
from tests.data_tools.asked import image, request_of

ENDS: tuple[tuple[int, Outcome, tuple[str, ...]], ...] = (
    (1, "kept", ()),
    (1, "dropped", ("NEAR_DUPLICATE",)),
    (1, "unanswered", ()),
    (2, "unanswered", ("timeout",)),
    (2, "rejected", ("LEAK", "REFUSAL")),
    (3, "unanswered", ("timeout",)),
    (3, "unanswered", ("nothing_to_say",)),
    (4, "rejected", ("LEAK",)),
    (4, "unverified", ()),
)


def counted(ends: tuple[tuple[int, Outcome, tuple[str, ...]], ...]) -> Outcomes:
    found, numbers = Outcomes(), Counter[int]()
    for about, outcome, reasons in ends:
        numbers[about] += 1
        request = request_of(image(about), "conversation", numbers[about])
        found.add(Result(request, outcome, reasons=reasons))
    return found


def test_an_image_counts_where_its_request_that_got_furthest_ended() -> None:
    missing = {"count": 1, "meaning": "images without a file", "examples": ["a"]}
    index = {"findings": {"image_missing": missing, "box_crowd": {"count": 7}}}
    lists = {"val2017": {"overlap": 1}, "pope": {"overlap": 0}}
    plan = {"left_out": {"of_evaluations": 1, "not_chosen": 0}, "guard": {"lists": lists}}
    expected = [
        Row("in the training files", 1, 1, ""),
        Row("all samples dropped by clean", 0, 1, "NEAR_DUPLICATE 1 (dropped.jsonl)"),
        Row("all answers rejected by verify", 2, 2, "LEAK 2, REFUSAL 1 (rejected.jsonl)"),
        Row("answered, not verified yet", 0, 1, ""),
        Row(
            "not answered",
            1,
            4,
            "failed: timeout 2, not asked yet 1, rules find nothing certain to say "
            "(a model as teacher may) 1 (failures.jsonl)",
        ),
        Row(
            "evaluation images",
            1,
            0,
            "val2017 1; refused, guard.allow_evaluation_images=true keeps them",
        ),
        Row("images without a file", 1, 0, ""),
    ]
    for ends in (ENDS, ENDS[::-1]):
        found = counted(ends)
        assert found.num_images == 4
        assert found.rows(index, plan) == expected
    assert Outcomes().rows({}, {}) == []
