"""The stage: answers become samples and rejected samples."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_tools.instruct.config import CocoConfig, InstructConfig, TeacherConfig
from data_tools.instruct.generate.answers import AnswerWriter
from data_tools.instruct.index import command as index
from data_tools.instruct.lines import read_lines, write_lines
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Answer, Request, Sample, Shown
from data_tools.instruct.verify import command as verifying
from tests.data_tools.coco_files import write_coco
from vlm_sft.errors import UserError

OBJECTS: dict[int, list[tuple[str, list[float], int]]] = {
    1: [("dog", [10, 10, 40, 40], 0), ("dog", [60, 10, 40, 40], 0), ("cup", [150, 60, 20, 20], 0)],
    2: [("cat", [10, 10, 40, 40], 0)],
}


@pytest.fixture
def config(tmp_path: Path) -> InstructConfig:
    files = write_coco(tmp_path, OBJECTS, {1: ["Two dogs and a cup."], 2: ["A cat."]})
    coco = CocoConfig(
        instances=str(files["instances"]), captions=str(files["captions"]),
        images=str(files["images"]),
    )  # fmt: skip
    config = InstructConfig(
        output_dir=str(tmp_path / "run"), coco=coco, teacher=TeacherConfig(kind="rules")
    )
    index(config)
    return config


def write_run(config: InstructConfig, said: list[tuple[int, str | None]]) -> None:
    """A conversation request for each image id, answered with the answer to one question."""
    folder = RunFolder(Path(config.output_dir))
    requests = [
        Request(
            id=f"{number:064x}", sample_id=f"sample-{number}", image=image, type="conversation",
            number=number, template="conversation", template_sha256="t", question=None,
            context="", parameters={}, shown=Shown(captions=(image,), boxes=()),
        )
        for number, (image, _) in enumerate(said)
    ]  # fmt: skip
    write_lines(folder.requests, requests)
    writer = AnswerWriter(folder.answers)
    for request, (_, answer) in reversed(list(zip(requests, said, strict=True))):
        if answer is not None:
            turn = {"question": "What is there?", "answer": answer, "kind": "object"}
            text = json.dumps({"turns": [turn]})
            writer.write(Answer(request=request.id, teacher="openai", text=text, finish="stop"))
    writer.close()


def test_samples_and_rejected_come_in_the_order_of_the_requests_with_counts(
    config: InstructConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [(1, "Two dogs."), (1, "Three dogs."), (2, None), (2, "A cat and a bus."), (2, "A cat.")]
    write_run(config, said)
    verifying.command(config)
    folder = RunFolder(Path(config.output_dir))
    accepted, rejected = (list(read_lines(p, Sample)) for p in (folder.samples, folder.rejected))
    assert [sample.id for sample in accepted] == ["sample-0", "sample-4"]
    assert [(sample.id, sample.reasons) for sample in rejected] == [
        ("sample-1", ("COUNT_TOO_HIGH",)),
        ("sample-3", ("OBJECT_NOT_FOUND",)),
    ]
    told = json.loads(folder.verification.read_text())
    assert told["funnel"] == {
        "requests": 5, "unanswered": 1, "answered": 4, "read": 4, "accepted": 2, "rejected": 2,
    }  # fmt: skip
    assert told["codes"] == {"COUNT_TOO_HIGH": 1, "OBJECT_NOT_FOUND": 1}
    printed = capsys.readouterr().out
    assert "unanswered 1, accepted 2, rejected 2" in printed
    assert "sample-1: 3 dogs" in printed


def test_answers_to_no_request_are_counted_and_never_empty_the_samples(
    config: InstructConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(Path(config.output_dir))
    write_run(config, [(1, "There are two dogs."), (2, "A cat."), (2, None)])
    verifying.command(config)
    assert "to no request" not in capsys.readouterr().out
    assert json.loads(folder.verification.read_text())["left_out"] == {}
    first, *_ = lines = folder.requests.read_bytes().splitlines(keepends=True)
    folder.requests.write_bytes(first)
    verifying.command(config)
    assert "left out: 1 answers to no request in requests.jsonl" in capsys.readouterr().out
    [left_out] = json.loads(folder.verification.read_text())["left_out"].items()
    assert left_out[0].startswith("answers to no request") and left_out[1] == 1
    before = folder.samples.read_bytes()
    folder.requests.write_bytes(b"")
    with pytest.raises(UserError, match=r"requests\.jsonl: is empty, although there are 2 answers"):
        verifying.command(config)
    assert folder.samples.read_bytes() == before
    folder.requests.write_bytes(b"".join(lines))
    verifying.command(config)
    assert len(folder.samples.read_bytes().splitlines()) == 2


def test_the_same_answers_give_the_same_bytes(config: InstructConfig) -> None:
    write_run(config, [(1, "Two dogs."), (1, "A bus."), (2, "A cat.")])
    folder = RunFolder(Path(config.output_dir))
    contents = []
    for _ in range(2):
        verifying.command(config)
        files = (folder.samples, folder.rejected, folder.verification)
        contents.append([path.read_bytes() for path in files])
    assert contents[0] == contents[1]


def test_an_unreadable_answer_is_kept_as_it_came(config: InstructConfig) -> None:
    write_run(config, [(1, None)])
    folder = RunFolder(Path(config.output_dir))
    writer = AnswerWriter(folder.answers)
    writer.write(Answer(request=f"{0:064x}", teacher="openai", text="No JSON", finish="stop"))
    writer.close()
    verifying.command(config)
    [sample] = read_lines(folder.rejected, Sample)
    assert (sample.raw, sample.turns, sample.reasons) == ("No JSON", (), ("NOT_JSON",))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_files_of_llava_form_are_checked_against_the_annotations(
    config: InstructConfig, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records: list[dict[str, Any]] = [
        record("a", "coco/train2017/000000000001.jpg", "How many dogs are there?", "Two."),
        record("a", "COCO_train2014_000000000001.jpg", "How many dogs are there?", "Four."),
        record("b", "000000000099.jpg", "Is there a dog?", "Yes."),
        {"id": "c", "conversations": []},
    ]
    path = tmp_path / f"mine.{suffix}"
    lines = "\n".join(json.dumps(record) for record in records)
    path.write_text(json.dumps(records) if suffix == "json" else lines)
    verifying.command(config, path)
    folder = RunFolder(Path(config.output_dir) / "checked" / "mine")
    [good], [bad] = (list(read_lines(p, Sample)) for p in (folder.samples, folder.rejected))
    assert (good.id, good.origin, good.turns[0].kind) == ("a-0", "imported", "count")
    assert (bad.id, bad.reasons) == ("a-1", ("COUNT_WRONG",))
    left_out = json.loads(folder.verification.read_text())["left_out"]
    assert sum(left_out.values()) == 2
    assert "left out: 1 records whose image is not indexed" in capsys.readouterr().out


def record(number: str, image: str, question: str, answer: str) -> dict[str, Any]:
    conversations = [
        {"from": "human", "value": f"<image>\n{question}"},
        {"from": "gpt", "value": answer},
    ]
    return {"id": number, "image": image, "conversations": conversations}


@pytest.mark.skipif("VLM_SFT_COCO_DIR" not in os.environ, reason="needs real COCO pictures")
def test_held_out_answers_and_human_captions_are_told_apart_as_documented(tmp_path: Path) -> None:
    import measure_held_out
    import measure_verification

    from data_tools.instruct.index import read_categories, read_images
    from data_tools.instruct.verify import Policy

    root = Path(os.environ["VLM_SFT_COCO_DIR"])
    coco = CocoConfig(
        instances=str(next(root.glob("annotations/instances_*.json"))),
        captions=str(next(root.glob("annotations/captions_*.json"))),
        images=str(root / "images"),
    )
    teacher = TeacherConfig(kind="rules")
    config = InstructConfig(output_dir=str(tmp_path / "run"), coco=coco, teacher=teacher)
    index(config)
    folder = RunFolder(Path(config.output_dir))
    images = read_images(folder)
    policy = Policy(config.verify, read_categories(folder))
    outcomes = measure_held_out.outcomes(images, policy)
    assert outcomes["true, rejected"] <= 2
    assert outcomes["false, accepted"] == 0
    captions = [(p, i) for p in images.values() for i in range(len(p.captions))]
    refused = sum(
        any(
            measure_verification.is_false(check)
            for check in measure_verification.check_caption(p, i, policy, leave_out=True)
        )
        for p, i in captions
    )
    assert refused <= 0.02 * len(captions)


def test_mutations_of_true_samples_are_rejected_with_the_right_code() -> None:
    import mutate_samples

    from data_tools.coco import AnnotatedImage, Box
    from data_tools.instruct.config import VerifyConfig
    from data_tools.instruct.schema import Turn
    from data_tools.instruct.verify import Policy, check_sample, reasons
    from tests.data_tools.test_verification import CATEGORIES

    boxes = (
        Box("dog", 10, 200, 100, 100, False, 1),
        Box("dog", 150, 200, 100, 100, False, 2),
        Box("cat", 400, 250, 80, 60, False, 3),
    )
    image = AnnotatedImage(1, "1.jpg", 640, 480, ("Two dogs lie near a cat.",), boxes, (9,))
    policy = Policy(VerifyConfig(), CATEGORIES)
    turns = (
        Turn(question="Is there a cat in the picture?", answer="Yes.", kind="existence"),
        Turn(question="Is there a zebra?", answer="No, there is no zebra.", kind="existence"),
        Turn(question="How many dogs can you see?", answer="Two.", kind="count"),
        Turn(
            question="Is the cat in the left or the right half of the picture?",
            answer="The cat is in the right half of the picture.",
            kind="place",
        ),
    )
    assert not reasons(check_sample(turns, "conversation", image, Shown(), policy))
    seen = set()
    for number in range(12):  # another key, another variant
        for name, (mutate, expected) in mutate_samples.MUTATIONS.items():
            mutant = mutate(turns, "conversation", image, sorted(CATEGORIES), str(number))
            if mutant is None or mutant == turns:
                continue
            seen.add(name)
            found = reasons(check_sample(mutant, "conversation", image, Shown(), policy))
            assert set(expected.split()) & set(found), (name, mutant, found)
    assert seen == set(mutate_samples.MUTATIONS)
