"""`vlm-sft data select` from records to files, its cache, and its control."""

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from data_tools.select.__main__ import main
from tests.evaluation.test_clip_scores import clip_folder
from tests.evaluation.test_record_scores import plain_loss
from vlm_sft.best_of.questions import images_digest, questions_digest, read_questions
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation
from vlm_sft.data.records import read_records
from vlm_sft.errors import UserError
from vlm_sft.evaluation.clip_scores import ClipScore, ClipScorer
from vlm_sft.inference.loaded_model import load_checkpoint

ROOT = Path(__file__).parents[3]
TINY = ROOT / "configs" / "tiny" / "data"


@pytest.fixture
def select(tmp_path: Path) -> Path:
    """A configuration for nine records: one repeats another, one is broken, one has no image."""
    records: list[Any] = json.loads((TINY / "instructions.json").read_text())[:6]
    for number, record in enumerate(records):
        record["type"] = "color" if number < 4 else "shape"
    lost = {**records[0], "id": "lost", "image": "images/missing.png"}
    records += [records[0], {"id": "broken"}, lost]
    (tmp_path / "data.json").write_text(json.dumps(records))
    settings = {"output_dir": str(tmp_path / "out"), "path": str(tmp_path / "data.json"),
                "image_root": str(TINY)}  # fmt: skip
    (tmp_path / "select.yaml").write_text(json.dumps(settings))
    return tmp_path / "select.yaml"


def test_both_parts_are_records_to_train_on_and_scores_are_computed_once(
    select: Path, full_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [str(select), f"model={full_run / 'final'}", "rank_by=necessity", "size=3",
                 "diversity=k_center"]  # fmt: skip
    assert main(arguments) == 0
    out = select.parent / "out"
    rows = parquet.read_table(out / "scores.parquet").to_pylist()
    assert len(rows) == 9
    why = [row["why_not"] for row in rows]
    assert why[6:] == ["same as an earlier one", "format", "image_missing"]
    assert sum(row["selected"] for row in rows) == sum(row["random"] for row in rows) == 3
    assert all((row["why_not"] == "") == row["selected"] for row in rows)
    assert all(row["ifd"] > 0 and row["answer_tokens"] > 0 for row in rows[:7])
    report = json.loads((out / "selection.json").read_text())
    assert report["usable"] == 6 and report["categories"]["shape"]["usable"] == 2
    for part in ("selected", "random"):
        file = DataFile(path=str(out / f"{part}.jsonl"), image_root=report["image_root"])
        records = list(read_records(file))
        assert [r.id for r in records if isinstance(r, Conversation)] == [
            row["id"] for row in rows if row[part]
        ]

    from vlm_sft.evaluation.record_scores import RecordScorer

    def refuse(*_: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(RecordScorer, "score", refuse)
    before = (out / "scores.parquet").read_bytes()
    assert main(arguments) == 0
    assert (out / "scores.parquet").read_bytes() == before


@pytest.mark.parametrize("batching", ["padded", "packed"])
def test_the_columns_are_those_of_a_plain_loop(select: Path, full_run: Path, batching: str) -> None:
    arguments = [str(select), f"model={full_run / 'final'}", f"batching={batching}", "size=3"]
    assert main(arguments) == 0
    rows = parquet.read_table(select.parent / "out" / "scores.parquet").to_pylist()
    loaded = load_checkpoint(full_run / "final", device="cpu")
    file = DataFile(path=str(select.parent / "data.json"), image_root=str(TINY))
    records = [one for one in read_records(file) if isinstance(one, Conversation)]
    for row, record in zip(rows[:3], records, strict=False):
        own = plain_loss(loaded, record, blank=False, alone=False)
        alone = plain_loss(loaded, record, blank=False, alone=True)
        blank = plain_loss(loaded, record, blank=True, alone=False)
        assert row["id"] == record.id
        assert row["loss"] == pytest.approx(own, abs=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(own), abs=1e-5)
        assert row["ifd"] == pytest.approx(own / alone, abs=1e-5)
        assert row["necessity"] == pytest.approx(blank - own, abs=1e-5)


def test_agreement_of_images_and_texts_ranks_and_is_computed_once(
    select: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = select.parent / "data.json"
    records = json.loads(data.read_text())
    records[1]["conversations"][1]["value"] += " and round" * 3  # over the context
    records.append({"id": "text", "conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]})  # fmt: skip
    broken = TINY.parent / "data" / "instructions.json"
    records.append({**records[2], "id": "broken-image", "image": broken.name})
    data.write_text(json.dumps(records))
    model = clip_folder(tmp_path / "clip")
    arguments = [str(select), f"clip_model={model}", "rank_by=clip", "size=2", "quotas=none"]
    assert main(arguments) == 0
    assert "the answers of 1 records are longer than the context" in capsys.readouterr().out
    out = select.parent / "out"
    rows = parquet.read_table(out / "scores.parquet").to_pylist()
    found = [
        one
        for one in read_records(DataFile(path=str(data), image_root=str(TINY)))
        if isinstance(one, Conversation)
    ]
    for row, record in zip(rows[:3], found, strict=False):
        (score,) = ClipScorer(str(model), device="cpu").score([record])
        assert isinstance(score, ClipScore) and row["clip"] == pytest.approx(score.clip, abs=1e-5)
    assert rows[-2]["why_not"] == "clip unknown" and rows[-1]["why_not"] == "image_format"
    best = sorted(rows[:6], key=lambda row: -row["clip"])[:2]
    assert all(row["selected"] for row in best)
    assert json.loads((out / "selection.json").read_text())["clip_truncated"] == 1

    def refuse(*_: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(ClipScorer, "score", refuse)
    assert main(arguments) == 0
    with pytest.raises(ValueError, match="clip needs `clip_model`"):
        main([str(select), "rank_by=clip"])


def test_a_kill_loses_no_score_that_was_written(
    select: Path, full_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_tools.select import model_scores
    from vlm_sft.evaluation.record_scores import RecordScorer

    monkeypatch.setattr(model_scores, "_AT_ONCE", 2)
    monkeypatch.setattr(model_scores, "_FLUSH_SECONDS", 0.0)
    score, calls = RecordScorer.score, []

    def counted(self: RecordScorer, records: Any) -> Any:
        calls.append([record.id for record in records])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, records)

    monkeypatch.setattr(RecordScorer, "score", counted)
    arguments = [str(select), f"model={full_run / 'final'}", "size=2", "batching=packed"]
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    assert main(arguments) == 0
    assert calls[3:] == calls[2:3] + calls[4:] and [len(c) for c in calls] == [2, 2, 2, 2, 1]


def drawn_for(data: Path, folder: Path) -> Path:
    """A folder as `vlm-sft sample` writes it: samples of the first two records of a data file."""
    questions = read_questions(DataFile(path=str(data), image_root=str(TINY)))[0]
    samples = [
        {"id": f"{name}/{turn}", "sample": n, "text": text, "tokens": 2, "ended": True}
        for name in ("red-circle-0", "red-circle-1")
        for turn, right in ((1, "red"), (2, "circle"))
        for n, text in enumerate([right, right if name.endswith("0") else "none"])
    ]
    folder.mkdir()
    settings = {"data": {"path": str(data), "questions": questions_digest(questions)}}
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return folder / "samples.jsonl"


def test_samples_tell_what_is_solved(select: Path) -> None:
    path = drawn_for(select.parent / "data.json", select.parent / "drawn")
    assert main([str(select), f"samples={path}", 'keep={"solved": [0, 0.9]}', "size=1"]) == 0
    rows = parquet.read_table(select.parent / "out" / "scores.parquet").to_pylist()
    assert [row["solved"] for row in rows[:3]] == [1.0, 0.5, None]
    assert [row["why_not"] for row in rows[:3]] == ["solved too high", "", "solved unknown"]
    assert [row["random"] for row in rows].index(True) in (0, 1)


def test_samples_of_other_questions_and_damaged_ones_are_refused(select: Path) -> None:
    data = select.parent / "data.json"
    path = drawn_for(data, select.parent / "drawn")
    lines, records = path.read_text(), data.read_text()
    foreign = json.dumps({"id": "x", "sample": 0, "text": "", "tokens": 0, "ended": False}) + "\n"
    for text, message in (
        (lines + lines.splitlines(keepends=True)[0], "jsonl:9: .*twice"),
        (lines + foreign, "unknown question 'x'"),
        (lines.replace('"red"', "null", 1), "jsonl:1: .*'text'"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            main([str(select), f"samples={path}"])
    path.write_text(lines)
    data.write_text(records.replace('"red"', '"crimson"'))
    with pytest.raises(UserError, match="differ from"):
        main([str(select), f"teacher_samples={path}"])
    data.write_text(records)
    (path.parent / "settings.json").unlink()
    with pytest.raises(UserError, match=r"no settings\.json"):
        main([str(select), f"samples={path}"])


def test_a_selection_that_fails_leaves_no_report_of_another_one(
    select: Path, full_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = select.parent / "out"
    assert main([str(select), "size=3"]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    suite, train = select.parent / "suite.yaml", select.parent / "train.yaml"
    suite.write_text("tasks: {}")
    config = (ROOT / "configs" / "tiny" / "stage2.yaml").read_text()
    train.write_text(config.replace("runs/tiny/stage1/final", str(full_run / "final")))
    control = ["--train-control", str(train), "--held-out", str(suite)]
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="tasks"):
        main([str(select), "size=4", *control])
    with pytest.raises(UserError, match=r"no record is selected .*too low 6, .*image_missing 1"):
        main([str(select), 'keep={"answer_words": [1000, null]}'])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    probe = {"id": 1, "image": "red-circle-2.png", "question": "Color?", "answer": "red"}
    (select.parent / "probes.json").write_text(json.dumps([probe]))
    task = {"name": "color", "kind": "gqa", "files": [str(select.parent / "probes.json")],
            "images": str(TINY / "images")}  # fmt: skip
    suite.write_text(json.dumps({"tasks": [task]}))

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_tools.select.control.train_control", stopped)
    with pytest.raises(KeyboardInterrupt):
        main([str(select), "size=4", *control])
    assert json.loads((out / "selection.json").read_text())["selected"] == 4


def test_images_in_tar_files_count_as_files(select: Path) -> None:
    with tarfile.open(select.parent / "images.tar", "w") as tar:
        tar.add(TINY / "images" / "red-circle-0.png", "red.png")
    records = [
        {"id": name, "image": f"images.tar/{name}.png", "question": "Color?", "answer": "red"}
        for name in ("red", "lost")
    ]
    (select.parent / "data.json").write_text(json.dumps(records))
    arguments = [str(select), f"image_root={select.parent}", "size=1"]
    assert main(arguments) == 0
    out = select.parent / "out"
    why = parquet.read_table(out / "scores.parquet")["why_not"].to_pylist()
    assert why == ["", "image_missing"]
    file = DataFile(path=str(select.parent / "data.json"), image_root=str(select.parent))
    questions, _ = read_questions(file)
    before = images_digest(questions)
    with tarfile.open(select.parent / "images.tar", "a") as tar:
        tar.add(TINY / "images" / "blue-circle-0.png", "lost.png")
    assert images_digest(questions) != before


def test_two_records_with_one_id_are_refused(select: Path) -> None:
    data = select.parent / "data.json"
    records = json.loads(data.read_text())
    for record, name in zip(records, ("x", "x#2", "x"), strict=False):
        record["id"] = name
    data.write_text(json.dumps(records))
    with pytest.raises(UserError, match="two records would get the id 'x#2'"):
        main([str(select), "size=3"])


@pytest.mark.slow
def test_the_control_trains_both_parts_alike(
    select: Path, full_run: Path, in_the_repository: Path
) -> None:
    folder = select.parent
    probes = [
        {"id": color, "image": f"{color}-circle-2.png", "question": "Color?", "answer": color}
        for color in ("red", "blue")
    ]
    (folder / "probes.json").write_text(json.dumps(probes))
    suite = {"tasks": [{"name": "color", "kind": "gqa", "files": [str(folder / "probes.json")],
                        "images": str(TINY / "images"), "max_tokens": 4}]}  # fmt: skip
    (folder / "suite.yaml").write_text(json.dumps(suite))
    train = (ROOT / "configs" / "tiny" / "stage2.yaml").read_text()
    train = train.replace("runs/tiny/stage1/final", str(full_run / "final"))
    train = train.replace("epochs: 40", "epochs: 2").replace("[tensorboard]", "[]")
    (folder / "train.yaml").write_text(train)
    control = ["--train-control", str(folder / "train.yaml"), "--held-out",
               str(folder / "suite.yaml")]  # fmt: skip
    assert main([str(select), "size=2", *control]) == 0
    found = json.loads((folder / "out" / "selection.json").read_text())["control"]
    assert found["steps"] == 2 and found["comparisons"][0]["questions"] == 2


def test_selections_in_one_folder_share_the_run_of_the_random_part(
    select: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another ranking was refused, because its records differ from those of the finished run."""
    runs: list[list[str]] = []

    def ids(path: Path) -> list[str]:
        return [json.loads(line)["id"] for line in path.read_text().splitlines()]

    def pretend(module: str, arguments: list[str]) -> None:
        if module == "vlm_sft.stage2":
            settings = dict(one.split("=", 1) for one in arguments[1:])
            (data,) = json.loads(settings["data.train"])
            final = Path(settings["output_dir"]) / "final"
            if final.is_dir():
                return
            runs.append(ids(Path(data["path"])))
            final.mkdir(parents=True)
            (final / "manifest.json").write_text('{"step": 2}')
            return
        out = Path(arguments[arguments.index("--out") + 1])
        out.mkdir(exist_ok=True)
        question = {"id": "1", "image": "x", "scores": {"right": 1.0}}
        task = {"kind": "gqa", "main": "accuracy", "questions": [question]}
        results = {"model": arguments[0], "tasks": {"color": task}}
        (out / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr("data_tools.select.control.run_module", pretend)
    monkeypatch.setattr("data_tools.select.control.require_control", lambda *_: None)
    for name in ("train.yaml", "suite.yaml"):
        (select.parent / name).write_text(name)
    data = select.parent / "data.json"
    data.write_text(data.read_text().replace('"square"', '"a large square"'))
    control = ["--train-control", str(select.parent / "train.yaml"), "--held-out",
               str(select.parent / "suite.yaml")]  # fmt: skip
    out = select.parent / "out"
    for order in ("highest", "lowest", "highest"):
        assert main([str(select), "size=2", f"order={order}", *control]) == 0
        assert ids(out / "random.jsonl") in runs and ids(out / "selected.jsonl") in runs
    assert len(runs) == 3  # the random part, the highest, the lowest


def test_one_sentence_about_what_is_missing(select: Path) -> None:
    for arguments, message in (
        ([str(select), "--train-control", "stage2.yaml"], "--held-out"),
        ([str(select), "path=nothing.json"], "nothing.json"),
        ([str(select), "preset=ifd"], "model"),
        ([str(select), "category_key=answer_type"], "no record has .*'answer_type'"),
        ([str(select), "samples=none.jsonl", "rank_by=solved"], "none.jsonl"),
        ([str(select), "image_root=null"], "image_missing 8.*images start in .*set image_root"),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)


def test_absolute_image_names_are_below_a_relative_image_root(
    select: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = str(TINY / "images" / "red-circle-0.png")
    records = [{"id": "one", "image": image, "question": "Color?", "answer": "red"}]
    (select.parent / "data.json").write_text(json.dumps(records))
    monkeypatch.chdir(TINY.parent)
    assert main([str(select), "image_root=data", "size=1"]) == 0
    (line,) = (select.parent / "out" / "selected.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"][0]["content"][0]["image"] == "images/red-circle-0.png"


def test_questions_with_separate_annotations_are_selected_by_their_category(select: Path) -> None:
    folder = select.parent
    questions = [{"question_id": n, "image": f"images/{name}.png", "question": "What color?"}
                 for n, name in enumerate(("red-circle-0", "blue-circle-0"))]  # fmt: skip
    answers = [{"question_id": n, "multiple_choice_answer": f"Color {n}.", "answer_type": kind}
               for n, kind in enumerate(("other", "number"))]  # fmt: skip
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "answers.json").write_text(json.dumps({"annotations": answers}))
    arguments = [str(select), f"path={folder / 'questions.json'}", "category_key=answer_type",
                 f"annotations={folder / 'answers.json'}", "share=0.5"]  # fmt: skip
    assert main(arguments) == 0
    report = json.loads((folder / "out" / "selection.json").read_text())
    assert report["usable"] == 2 and set(report["categories"]) == {"other", "number"}
