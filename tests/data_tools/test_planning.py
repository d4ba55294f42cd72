import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.instruct.config import InstructConfig
from data_tools.instruct.generate import command as generating
from data_tools.instruct.plan import command as planning
from data_tools.instruct.plan.estimate import estimate_tokens
from data_tools.instruct.plan.prompts import make_templates, messages
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Request
from data_tools.instruct.verify import command as verifying
from tests.data_tools.coco_files import write_coco
from vlm_sft.config import loading as settings
from vlm_sft.errors import UserError

DOG = ("dog", [10, 10, 40, 30], 0)
EVERYTHING = {"conversation": 1, "detail": 1, "reasoning": 2}


def config_of(files: dict[str, Path], **sections: Any) -> InstructConfig:
    tree: dict[str, Any] = {
        "output_dir": str(files["out"]),
        "coco": {name: str(files[name]) for name in ("instances", "captions", "images")},
        "requests": {"shares": EVERYTHING},
        "teacher": {
            "kind": "openai",
            "model": "gpt-x",
            "prices": {"input": 1, "cached": 0.1, "output": 10},
        },
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return InstructConfig.model_validate(tree)


def plan(config: InstructConfig, show: int = 0) -> list[Request]:
    planning.command(config, show)
    return list(planning.read_requests(RunFolder(Path(config.output_dir))))


def written(files: dict[str, Path]) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in files["out"].iterdir()}


def test_requests_come_by_image_type_and_number_with_ids_of_their_content(
    tmp_path: Path,
) -> None:
    files = write_coco(tmp_path, {5: [DOG], 3: []})
    requests = plan(config_of(files))
    assert [request.sample_id for request in requests] == [
        f"{image:012d}-{kind}"
        for image in (3, 5)
        for kind in ("conversation-0", "detail-0", "reasoning-0", "reasoning-1")
    ]
    for request in requests:
        content = request.model_dump(mode="json", exclude={"id", "sample_id", "grown"})
        text = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        assert request.id == hashlib.sha256(text.encode()).hexdigest()
        assert set(request.parameters) == {"model", "temperature", "top_p", "max_tokens", "seed"}
    assert len({request.id for request in requests}) == len(requests)
    assert len({request.parameters["seed"] for request in requests}) == len(requests)
    templates = planning.read_templates(RunFolder(files["out"]))
    detail = requests[1]
    assert detail.question in templates["detail"]["questions"]
    assert f"QUESTION: {detail.question}\n" in messages(detail, templates)[-1]["content"]
    assert requests[0].question is None and detail.shown.captions == (2,)


def test_changing_one_image_changes_only_its_own_requests(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {i: [DOG] for i in range(1, 30)})
    before = {request.sample_id: request.id for request in plan(config_of(files))}
    document = json.loads(files["captions"].read_text())
    document["annotations"][3]["caption"] = "Something else."
    files["captions"].write_text(json.dumps(document))
    after = {request.sample_id: request.id for request in plan(config_of(files))}
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("000000000004-")}


def test_more_images_keep_the_requests_of_the_ones_before(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {i: [DOG] for i in range(1, 30)})
    few = {r.id for r in plan(config_of(files, images={"count": 5}))}
    more = {r.id for r in plan(config_of(files, images={"count": 12}))}
    assert len(few) == 20 and few < more and len(more) == 48


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": {"model": "gpt-y"}},
        {"teacher": {"temperature": 0.1}},
        {"teacher": {"max_tokens": 5}},
        {"requests": {"decimals": 3}},
        {"seed": 1},
    ],
)
def test_whatever_determines_the_answer_is_in_the_id(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    files = write_coco(tmp_path, {1: [DOG]})
    before = {request.id for request in plan(config_of(files))}
    config = config_of(files, **{k: v for k, v in change.items() if k != "seed"})
    if "seed" in change:
        config = config.model_copy(update=change)
    assert not before & {request.id for request in plan(config)}


@pytest.mark.parametrize(
    "change", [{"teacher": {"concurrency": 3}}, {"limits": {"usd": 3}}, {"clean": {}}]
)
def test_what_does_not_determine_it_is_not(tmp_path: Path, change: dict[str, Any]) -> None:
    files = write_coco(tmp_path, {1: [DOG]})
    before = [request.id for request in plan(config_of(files))]
    assert before == [request.id for request in plan(config_of(files, **change))]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {i: [DOG] for i in range(1, 9)})
    plan(config_of(files))
    first = written(files)
    assert set(first) == {
        "images.jsonl", "index.json", "requests.jsonl", "templates.json", "plan.json",
        "config.yaml",
    }  # fmt: skip
    plan(config_of(files))
    assert written(files) == first
    folder = RunFolder(files["out"])
    assert settings.load(InstructConfig, folder.config) == config_of(files)
    for name, template in planning.read_templates(folder).items():
        assert template == make_templates(("dog", "cat", "car", "bus", "apple", "cup"))[name]


def test_the_table_says_what_it_takes_and_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_coco(tmp_path, {i: [DOG] for i in range(1, 5)})
    for name in ("instances", "captions"):
        document = json.loads(files[name].read_text())
        document["images"][0]["coco_url"] = "http://x/val2017/000000000001.jpg"
        document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 2]
        files[name].write_text(json.dumps(document))
    requests = plan(config_of(files, limits={"usd": 0.0001}), show=1)
    assert {request.image for request in requests} == {3, 4}
    told = json.loads((files["out"] / "plan.json").read_text())
    assert told["left_out"] == {
        "of_evaluations": 1,
        "without_annotations": 1,
        "not_chosen": 0,
        "chosen_without_a_type": 0,
    }
    total = told["requests"]["all"]
    assert total["requests"] == 8
    usd = told["usd"]
    assert usd["nothing_cached"] == pytest.approx(
        (total["tokens_in"] + 10 * total["tokens_out"]) / 1e6, abs=1e-4
    )
    assert usd["prefixes_cached"] == pytest.approx(
        usd["nothing_cached"] - 0.9 * total["repeated_prefix"] / 1e6, abs=1e-4
    )
    said = capsys.readouterr().out
    assert "2 of 4 images are asked about; left out: 1 evaluation images" in said
    assert "limits.usd 0.0001 is lower than that" in said
    assert "val2017: 1 of our images name it as their split" in said
    assert said.count("----- system") == 1 and "----- assistant" in said


def test_a_plan_without_the_requests_of_finished_samples_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_coco(tmp_path, {1: [DOG], 2: [DOG], 3: [DOG]}, {n: ["A dog."] for n in (1, 2, 3)})
    rules = {"teacher": {"kind": "rules", "model": "", "prices": None}}
    every = config_of(files, **rules)
    plan(every)
    generating.command(every)
    verifying.command(every)
    folder = RunFolder(files["out"])
    samples = [
        json.loads(row)
        for path in (folder.samples, folder.rejected)
        for row in path.read_text().splitlines()
    ]
    assert samples
    capsys.readouterr()
    plan(every)
    assert "warning" not in capsys.readouterr().out
    few = config_of(files, images={"count": 1}, **rules)
    [image] = {request.image for request in plan(few)}
    lost = sum(sample["image"]["id"] != image for sample in samples)
    said = capsys.readouterr().out
    assert lost > 0 and f"warning: {lost} verified samples are about requests" in said
    assert "samples.jsonl" in said and "`plan` with the former settings" in said
    plan(every)
    assert "warning" not in capsys.readouterr().out


def test_nothing_left_to_ask_is_an_error(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [DOG]})
    (tmp_path / "mine.txt").write_text("1")
    config = config_of(files, guard={"lists": {"mine": str(tmp_path / "mine.txt")}})
    with pytest.raises(UserError, match=r"no requests can be made; left out: 1 evaluation images"):
        plan(config)
    assert not (files["out"] / "requests.jsonl").exists()


def test_rules_have_no_sampling_parameters(tmp_path: Path) -> None:
    files = write_coco(tmp_path, {1: [DOG]})
    config = config_of(files, teacher={"kind": "rules", "model": "", "prices": None})
    assert {frozenset(r.parameters) for r in plan(config)} == {frozenset({"model", "seed"})}
    assert json.loads((files["out"] / "plan.json").read_text())["usd"] is None


def test_without_a_plan_reading_one_says_what_to_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(UserError, match="run"):
        list(planning.read_requests(folder))
    with pytest.raises(UserError, match="run `plan` first"):
        planning.read_templates(folder)


def test_tokens_are_estimated_by_words_numbers_and_signs() -> None:
    assert estimate_tokens("") == 0
    assert estimate_tokens("A dog sits.") == 4
    assert estimate_tokens("[0.25, 1.00]") == 10
