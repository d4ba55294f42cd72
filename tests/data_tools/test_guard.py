import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.coco import AnnotatedImage
from data_tools.instruct import contamination as guard
from data_tools.instruct.config import GuardConfig
from vlm_sft.errors import UserError


def images(*ids: int, split: str | None = None) -> list[AnnotatedImage]:
    return [AnnotatedImage(i, f"{i:012d}.jpg", 10, 10, ("A.",), (), (1,), None, split) for i in ids]


def statuses(found: guard.Guard) -> dict[str, str]:
    return {name: figures.status for name, figures in found.figures.items()}


FORMS: dict[str, str] = {
    "ids.txt": "33471\n\n000000000042\nCOCO_val2014_000000000007.jpg\n",
    "pope.json": "\n".join(
        json.dumps({"question_id": n, "image": f"COCO_val2014_{i:012d}.jpg", "label": "yes"})
        for n, i in enumerate((33471, 42, 7, 7))
    ),
    "questions.jsonl": "\n".join(
        json.dumps({"question_id": 1, "image": f"{i:012d}.jpg"}) for i in (33471, 42, 7)
    ),
    "ours.json": json.dumps(
        [{"id": f"{i}-existence-0", "image": f"images/{i:012d}.jpg"} for i in (33471, 42, 7)]
    ),
    "list.json": '[33471, 42, "COCO_val2014_000000000007.jpg"]',
    "results.json": json.dumps([{"image_id": i, "caption": "x"} for i in (33471, 42, 7)]),
    "instances_val2017.json": json.dumps(
        {
            "info": {},
            "images": [{"id": i, "file_name": "whatever.jpg"} for i in (33471, 42, 7)],
            "annotations": [{"id": 1, "image_id": 99}],
        },
        indent=1,
    ),
    "dataset_coco.json": json.dumps(
        {
            "images": [
                {"cocoid": i, "imgid": n, "split": split, "filename": f"COCO_val2014_{i:012d}.jpg"}
                for n, (i, split) in enumerate(
                    [(33471, "test"), (5, "train"), (42, "test"), (6, "val"), (7, "test")]
                )
            ]
        }
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_lists_are_read_in_the_forms_that_evaluations_are_published_in(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_text(FORMS[name])
    assert guard.read_ids(path, "karpathy_test") == {33471, 42, 7}


def test_a_split_named_elsewhere_is_that_part_of_karpathys_file(tmp_path: Path) -> None:
    path = tmp_path / "dataset_coco.json"
    path.write_text(FORMS["dataset_coco.json"])
    assert guard.read_ids(path, "karpathy_val") == {6}
    assert guard.read_ids(path, "my_own") == {33471, 5, 42, 6, 7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no image"),
        ("[]", "lists no image"),
        ("kitchen.jpg", r":1: found 'kitchen.jpg', expected COCO's numeric id"),
        ('{"question": "x"}', "expected COCO's numeric id"),
        ('[{"image": null}]', r"\[0\]: found"),
        ("[true]", r"\[0\]: found 'True'"),
        ("[-3]", r"\[0\]: found '-3'"),
        ("[1", "is not valid JSON"),
        ('{"annotations": [\n]}', "a list 'images'"),
    ],
)
def test_a_list_without_ids_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        guard.read_ids(path)
    with pytest.raises(UserError, match="no such file"):
        guard.read_ids(tmp_path / "none")


def checked(tmp_path: Path, ours: list[AnnotatedImage], **lists: Any) -> guard.Guard:
    named = {}
    for name, ids in lists.items():
        named[name] = str(tmp_path / f"{name}.txt")
        Path(named[name]).write_text("\n".join(map(str, ids)))
    return guard.check(ours, GuardConfig(lists=named))


def test_images_of_evaluations_are_refused_and_counted_by_list(tmp_path: Path) -> None:
    ours = images(1, 2, 3, 4, split="train2017")
    found = checked(tmp_path, ours, pope=[2, 9], mine=[2, 3])
    assert found.evaluations == {2: ("pope", "mine"), 3: ("mine",)}
    assert [p.id for p in ours if not found.refuses(p.id)] == [1, 4]
    told = found.as_dict()["lists"]
    assert told["pope"] == {"status": "checked", "listed": 2, "overlap": 1}
    assert told["mine"] == {"status": "checked", "listed": 2, "overlap": 2}


def test_what_nobody_looked_at_is_said_plainly(tmp_path: Path) -> None:
    found = checked(tmp_path, images(1, split="train2017"), pope=[2])
    assert statuses(found) == {
        "pope": "checked",
        "val2014": "not checked",
        "val2017": "by split",
        "llava_bench_coco": "not checked",
        "karpathy_test": "not checked",
    }
    said = "\n".join(found.lines())
    assert "llava_bench_coco, karpathy_test: NOT CHECKED" in said and "guard.lists.NAME" in said


def test_val2014s_own_list_covers_the_evaluations_made_of_it(tmp_path: Path) -> None:
    found = checked(tmp_path, images(1, 2, split="train2017"), val2014=[2])
    assert statuses(found)["pope"] == statuses(found)["karpathy_test"] == "covered"
    assert found.refuses(2) and not found.refuses(1)


def test_names_of_the_2014_files_settle_everything_without_a_list(tmp_path: Path) -> None:
    ours = images(1, split="train2014") + images(2, split="val2014")
    found = checked(tmp_path, ours)
    assert found.evaluations == {2: ("val2014",)}
    assert statuses(checked(tmp_path, ours[:1])) == dict.fromkeys(guard.KNOWN, "by split")
    assert statuses(found)["val2014"] == "by split" and statuses(found)["pope"] == "covered"


def test_images_that_do_not_say_where_they_are_from_leave_it_open(tmp_path: Path) -> None:
    ours = images(1) + images(2, split="val2017")
    found = checked(tmp_path, ours)
    assert statuses(found)["val2017"] == "split only"
    assert found.evaluations == {2: ("val2017",)}
    assert "NOT CHECKED" in "\n".join(found.lines())


def test_said_otherwise_they_are_kept_and_still_counted() -> None:
    config = GuardConfig(allow_evaluation_images=True)
    found = guard.check(images(2, split="val2017"), config)
    assert not found.refuses(2)
    assert found.as_dict()["evaluation_images"] == 1
    assert "1  images of evaluations found, kept (guard.allow_evaluation_images)" in "\n".join(
        found.lines()
    )


def test_refused_images_come_with_the_switch_that_keeps_them() -> None:
    refused = guard.check(images(2, split="val2017"), GuardConfig())
    assert "guard.allow_evaluation_images=true keeps them" in next(refused.lines())
    nothing = guard.check(images(2, split="train2017"), GuardConfig())
    assert "allow_evaluation_images" not in next(nothing.lines())
