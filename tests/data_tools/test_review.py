"""Decisions of reviewers: kept, undone, applied by `clean` and `select`, and compared."""

import http.client
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from pyarrow import parquet

from data_tools.instruct import export
from data_tools.instruct.clean import command as cleaning
from data_tools.instruct.explain import explain
from data_tools.instruct.lines import read_lines
from data_tools.instruct.report.counts import Result
from data_tools.instruct.report.results import read_results
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Sample
from data_tools.review.__main__ import main, order_of
from data_tools.review.agreement import agreements, kappa
from data_tools.review.decisions import (
    EditedTurn,
    ReviewerLog,
    read_decisions,
)
from data_tools.review.sources import Item, RecordFile, RunSamples, edited_record, sample_content
from data_tools.select.__main__ import main as select
from tests.data_tools.coco_files import write_coco
from tests.data_tools.instruct_runs import config_of
from tests.data_tools.review_runs import served, write_run
from vlm_sft.config.schema import DataFile
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.records import read_records
from vlm_sft.errors import UserError

KEEP: dict[str, Any] = {
    "near_duplicates": None, "same_questions": False, "same_images": {"action": "keep"},
    "answers": {"families": []}, "openings": None,
}  # fmt: skip


@contextmanager
def log_of(folder: Path, reviewer: str = "ann") -> Iterator[ReviewerLog]:
    folder.mkdir(exist_ok=True)
    log = ReviewerLog(folder, reviewer)
    try:
        yield log
    finally:
        log.close()


def turns(*texts: str) -> list[EditedTurn]:
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return [EditedTurn(question=question, answer=answer) for question, answer in pairs]


# --- the file


def test_decisions_are_read_again_and_the_last_ones_are_undone(tmp_path: Path) -> None:
    with log_of(tmp_path) as log:
        log.append("x", "1", "accept")
        log.append("y", "1", "reject", reason="trivial")
        log.append("x", "1", "edit", turns=turns("Q", "A"))
        undone = log.undo()
        assert undone is not None and undone.decision == "edit"
        assert log.latest()["x", "1"].decision == "accept", "the one before it holds again"
    with log_of(tmp_path) as log:
        assert [one.decision for one in log.done] == ["accept", "reject"]
        assert [log.undo() is not None for _ in range(3)] == [True, True, False]
    assert read_decisions(tmp_path) == {"ann": {}}


def test_a_line_that_a_kill_has_cut_is_removed_and_a_damaged_one_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with log_of(tmp_path) as log:
        log.append("x", "1", "accept")
        whole = log.path.read_bytes()
    log.path.write_bytes(whole + whole[:40])
    with log_of(tmp_path) as log:
        assert len(log.done) == 1
        assert "40 bytes were removed" in capsys.readouterr().err
        log.append("y", "1", "accept")
        assert len(log.path.read_bytes().splitlines()) == 2
        with pytest.raises(UserError, match="ann reviews in another process"):
            ReviewerLog(tmp_path, "ann")
    log.path.write_bytes(whole.replace(b"accept", b"maybe"))
    with pytest.raises(UserError, match=r"ann\.jsonl:1: decision"):
        ReviewerLog(tmp_path, "ann")


def test_every_decision_is_on_the_disk_before_it_is_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    with log_of(tmp_path) as log:
        monkeypatch.setattr("os.fsync", lambda _: synced.append(len(log.path.read_bytes())))
        log.append("x", "1", "accept")
        log.append("y", "1", "accept")
        assert synced == [len(log.path.read_bytes()) // 2, len(log.path.read_bytes())]


# --- what is reviewed


def test_parts_share_some_samples_and_have_the_others_to_themselves() -> None:
    items = [Item(f"s{n}", "", "", False, False) for n in range(2000)]
    one, two = (order_of(items, n, 2, 0.2, seed=3, shuffled=True) for n in (1, 2))
    assert set(one) | set(two) == set(range(2000))
    assert 330 < len(set(one) & set(two)) < 470
    assert one == order_of(items, 1, 2, 0.2, seed=3, shuffled=True) != sorted(one)
    assert one != order_of(items, 1, 2, 0.2, seed=4, shuffled=True)
    fewer = order_of(items[:1000], 1, 2, 0.2, seed=3, shuffled=True)
    assert fewer == [number for number in one if number < 1000], "more samples move no other"


def test_an_exported_record_is_the_sample_that_was_decided_about(tmp_path: Path) -> None:
    root = write_run(tmp_path)
    config = config_of(root, tmp_path / "images")
    export.command(config.model_copy(update={"export": config.export.model_copy(
        update={"image_prefix": "some/folder/"})}))  # fmt: skip
    samples = {one.id: one for one in read_lines(RunFolder(root).kept, Sample)}
    for name in ("llava.json", "messages.jsonl"):
        file = DataFile(path=str(root / "export" / name), image_root=str(tmp_path))
        items = RecordFile(file, None, None).items
        assert len(items) == len(samples) > 3
        assert all(item.digest == sample_content(samples[item.id]) for item in items)
    changed = next(iter(samples.values()))
    other = changed.model_copy(update={"turns": changed.turns[:-1]})
    assert sample_content(changed) != sample_content(other)


def test_an_edit_keeps_images_and_the_white_space_that_training_sees() -> None:
    user = Turn("user", (ImagePart(0), TextPart("\nWhat?")))
    answer = Turn("assistant", (TextPart("A dog. "),))
    record = Conversation("r", (Turn("system", (TextPart("S"),)), user, answer), (b"image",))
    new = edited_record(record, turns("What is it?", "A cat."))
    assert new.turns[0].text == "S" and new.turns[2].text == "A cat. "
    assert new.turns[1].parts == (ImagePart(0), TextPart("\nWhat is it?"))
    assert edited_record(record, turns("What?", "A dog.")) == record
    between = Turn("user", (TextPart("Is"), ImagePart(0), TextPart("this it?")))
    pieces = Conversation("r", (between, answer), (b"image",))
    assert edited_record(pieces, turns("Isthis it?", "No.")).turns[0] == between
    for text, message in (("Is it?", "between its parts"), ("", "2 turns|the edited text 2")):
        given = turns(text, "No.") if text else turns("a", "b", "c", "d")
        with pytest.raises(UserError, match=message):
            edited_record(pieces, given)


def test_an_image_outside_of_the_image_folder_is_not_shown(tmp_path: Path) -> None:
    root = write_run(tmp_path)
    secret = tmp_path / "000000000001.jpg"
    secret.write_bytes((tmp_path / "images" / "000000000001.jpg").read_bytes())
    for path in (RunFolder(root).images, RunFolder(root).samples):
        path.write_text(path.read_text().replace('"000000000001.jpg', '"../000000000001.jpg'))
    source = RunSamples(root, None)
    places = [n for n, item in enumerate(source.items) if item.id.startswith("000000000001")]
    (view,) = source.images(places[0], source.sample(places[0]))
    assert view.uri == "" and "outside of the image root" in view.error
    (other,) = source.images(places[-1] + 1, source.sample(places[-1] + 1))
    assert other.uri.startswith("data:image/jpeg")


# --- the server


def asked(
    address: str, method: str = "GET", path: str = "", body: Any = None, **headers: str
) -> Any:
    url = urlsplit(address)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
    data = None if body is None else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path if path[:1] == "/" else url.path + path, data, named)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text, response.headers


def test_only_the_page_itself_can_read_and_decide(tmp_path: Path) -> None:
    root = write_run(tmp_path, 2)
    with served(root) as address:
        url = urlsplit(address)
        own, token = f"http://{url.netloc}", url.path.strip("/")
        assert url.hostname == "127.0.0.1"
        status, html, headers = asked(address)
        assert status == 200 and "default-src 'none'" in html and token in html
        assert headers["X-Frame-Options"] == "DENY" and headers["Cache-Control"] == "no-store"
        first = json.loads(asked(address, path="sample?at=0&move=0&show=all&type=")[1])
        choice = {"at": 0, "id": first["id"], "digest": first["digest"], "decision": "accept"}
        good = {"Content_Type": "application/json", "X_Review_Token": token, "Origin": own}
        for wrong in (
            {"Host": "evil.example"},
            {"Host": f"evil.example:{url.port}"},
            {"Origin": "http://evil.example"},
            {"Sec_Fetch_Site": "cross-site"},
        ):
            assert asked(address, **wrong)[0] == 403, wrong
            assert asked(address, "POST", "decide", choice, **{**good, **wrong})[0] == 403, wrong
        for name, value in (
            ("Content_Type", "text/plain"), ("X_Review_Token", "x"), ("Origin", "null"),
        ):  # fmt: skip
            assert asked(address, "POST", "decide", choice, **{**good, name: value})[0] == 403
        without = {name: value for name, value in good.items() if name != "Origin"}
        assert asked(address, "POST", "decide", choice, **without)[0] == 403
        for path in ("/", "/wrong/", f"/{token}", f"/{token}/sample/x", f"/{token}/../etc/passwd",
                     f"/{token}/..%2f..%2fetc%2fpasswd"):  # fmt: skip
            status, text, _ = asked(address, path=path)
            assert status == 404 and "root:" not in text, path
        assert asked(address, "POST", "undo", None, Content_Length=str(2**30), **good)[0] == 413
        for body in (
            {**choice, "digest": "other"}, {**choice, "decision": "reject"}, {**choice, "at": 99},
            {**choice, "reason": "trivial"}, {**choice, "decision": "edit"}, {"at": 0}, [],
            {**choice, "decision": "edit", "turns": [{"question": "a", "answer": "b"}] * 9},
        ):  # fmt: skip
            status, text, _ = asked(address, "POST", "decide", body, **good)
            assert status == 400 and json.loads(text)["error"], body
        assert not (root / "review" / "ann.jsonl").read_bytes(), "nothing was decided"
        assert asked(address, "POST", "decide", choice, **good)[0] == 200
    assert len((root / "review" / "ann.jsonl").read_bytes().splitlines()) == 1


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    root = write_run(tmp_path, 2)
    hostile = "<script>alert(1)</script>\u202e\x1b"
    path = RunFolder(root).samples
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["id"] += hostile
        row["turns"][0]["answer"] = hostile
        row["checks"] = [{**check, "claim": hostile} for check in row["checks"]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with served(root) as address:
        found = json.loads(asked(address, path="sample?at=0&move=0&show=all&type=")[1])
        assert "<script" not in found["html"] and "&lt;script&gt;" in found["html"]
        assert "\u202e" not in found["html"] and "\x1b" not in found["html"]
        assert found["turns"][0]["answer"] == hostile, "the text to edit is the sample's"


# --- clean


def decided(root: Path, *choices: tuple[str, str, Any], reviewer: str = "ann") -> None:
    """Write decisions about samples of a run: id, decision, reason or turns."""
    source = RunSamples(root, None)
    digests = {item.id: item.digest for item in source.items}
    with log_of(root / "review", reviewer) as log:
        for name, kind, more in choices:
            log.append(
                name, digests[name], kind,  # type: ignore[arg-type]
                reason=more if kind == "reject" else None,
                turns=more if kind == "edit" else None,
            )  # fmt: skip


def edited_last(sample: Sample, said: str) -> list[EditedTurn]:
    """The turns of a sample, the last one about a dog."""
    texts = [text for turn in sample.turns[:-1] for text in (turn.question, turn.answer)]
    return turns(*texts, "Is there a dog?", said)


def results_of(root: Path) -> dict[str, Result]:
    folder = RunFolder(root)
    return {one.request.sample_id: one for one in read_results(folder, folder.answers)}


def test_clean_applies_the_decisions_and_every_sample_is_accounted_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_run(tmp_path)
    folder = RunFolder(root)
    plain = config_of(root, tmp_path / "images", clean=KEEP)
    samples = [one for one in read_lines(folder.samples, Sample) if one.type == "conversation"]
    rejected = [one for one in read_lines(folder.rejected, Sample) if one.turns]
    no, good, bad, stale = (one.id for one in samples[:4])
    right, wrong = (
        edited_last(one, said) for one, said in ((samples[1], "Yes."), (samples[2], "No."))
    )
    decided(
        root, (no, "reject", "bad_question"), (good, "edit", right), (bad, "edit", wrong),
        (stale, "reject", "trivial"), (rejected[0].id, "accept", None),
        (rejected[1].id, "reject", "other"),
    )  # fmt: skip
    decided(root, (no, "accept", None), reviewer="bob")
    lines = folder.samples.read_text().splitlines(keepends=True)
    place = next(n for n, line in enumerate(lines) if json.loads(line)["id"] == stale)
    lines[place] = lines[place].replace("Is there a", "Can you see a")
    folder.samples.write_text("".join(lines))

    cleaning.command(plain)
    assert "clean.decisions=" in capsys.readouterr().err
    config = config_of(root, tmp_path / "images", clean={**KEEP, "decisions": str(root / "review")})
    cleaning.command(config)
    out = capsys.readouterr().out
    assert "review: 1 accepted, 2 edited, 2 rejected; reviewers disagree about 1" in out
    assert "decisions about 1 samples that have changed" in out
    kept = {one.id: one for one in read_lines(folder.kept, Sample)}
    dropped = {one.id: one for one in read_lines(folder.dropped, Sample)}
    assert dropped[no].reasons == ("REVIEW_REJECTED",)
    assert dropped[bad].reasons[-1] == "REVIEW_EDIT" and len(dropped[bad].reasons) > 1
    assert kept[good].turns[-1].answer == "Yes."
    assert any(check.rule == "object" for check in kept[good].checks), "verified again"
    assert stale in kept and rejected[1].id not in {*kept, *dropped}
    taken = kept[rejected[0].id]
    assert taken.status == "accepted" and not any(check.code for check in taken.checks)
    assert "accepted by ann, against" in taken.checks[-1].claim

    summary = json.loads(folder.cleaning.read_text())
    total = len(lines) + 1
    assert summary["input"]["samples"] == total == len(kept) + len(dropped)
    assert summary["dropped"]["samples_by_reason"] == {"REVIEW_EDIT": 1, "REVIEW_REJECTED": 1}
    assert summary["review"] == {
        "accepted": 1, "rejected": 2, "edited": 2, "disagreements": 1, "changed": 1,
        "unknown_ids": 0,
    }  # fmt: skip
    results = results_of(root)
    assert results[no].outcome == "dropped" and results[no].reasons == ("REVIEW_REJECTED",)
    assert results[rejected[0].id].outcome == "kept"
    assert results[rejected[1].id].outcome == "rejected"
    export.command(config)
    lines = (root / "export" / "receipts.jsonl").read_text().splitlines()
    receipts = {row["id"]: row for row in map(json.loads, lines)}
    assert receipts[good]["review"] == ["edited by ann"] and "review" not in receipts[stale]
    stages = [stage.name for stage in explain(config, rejected[0].id).stages]
    assert stages == ["planned", "answered", "verified", "reviewed", "cleaned", "exported"]
    cleaning.command(plain)
    assert rejected[0].id not in {one.id for one in read_lines(folder.kept, Sample)}


# --- select


def test_select_leaves_out_rejected_records_and_verifies_edited_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write_coco(tmp_path, {n: [("dog", [10, 10, 50, 50], 0)] for n in range(1, 7)})
    records = [
        {"id": f"r{n}", "image": f"{n:012d}.jpg", "conversations": [
            {"from": "human", "value": f"<image>\nWhat is in image {n}?"},
            {"from": "gpt", "value": "A dog."}]}
        for n in range(1, 7)
    ]  # fmt: skip
    data = tmp_path / "data.json"
    data.write_text(json.dumps(records))
    file = DataFile(path=str(data), image_root=str(files["images"]))
    items = {item.id: item for item in RecordFile(file, None, None).items}
    with log_of(tmp_path / "review") as log:
        for name, kind, more in (
            ("r1", "reject", "trivial"), ("r2", "edit", "A dog in the image."),
            ("r3", "edit", "A giraffe next to a cat."), ("r4", "accept", None),
            ("gone", "accept", None),
        ):  # fmt: skip
            edited = turns(f"What is in image {name[1]}?", more) if kind == "edit" else None
            digest = items[name].digest if name in items else ""
            log.append(name, digest, kind, reason=more if kind == "reject" else None, turns=edited)  # type: ignore[arg-type]
        log.append("r5", "of an older text", "reject", reason="other")
    config = {"output_dir": str(tmp_path / "out"), "path": str(data), "share": 1.0,
              "image_root": str(files["images"]),
              "decisions": str(tmp_path / "review")}  # fmt: skip
    (tmp_path / "select.yaml").write_text(json.dumps(config))
    boxes = [f"instances={files['instances']}", f"captions={files['captions']}"]
    assert select([str(tmp_path / "select.yaml"), *boxes]) == 0
    out = capsys.readouterr().out
    assert "1 accepted, 2 edited, 1 rejected" in out and "1 samples that have changed" in out
    rows = parquet.read_table(tmp_path / "out" / "scores.parquet").to_pylist()
    assert [row["why_not"] for row in rows] == [
        "review: trivial", "", "review edit: OBJECT_NOT_FOUND", "", "", "",
    ]  # fmt: skip
    assert rows[1]["answer_words"] == 5 and rows[0]["random"] is False
    written = list(read_records(DataFile(path=str(tmp_path / "out" / "selected.jsonl"),
                                         image_root=str(files["images"]))))  # fmt: skip
    assert isinstance(written[0], Conversation)
    assert written[0].turns[1].text == "A dog in the image."
    report = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert report["review"]["unknown_ids"] == 1 and report["review"]["unverified"] == 0
    assert report["not_selected"] == {"review: trivial": 1, "review edit: OBJECT_NOT_FOUND": 1}
    assert select([str(tmp_path / "select.yaml")]) == 0
    assert "not verified: 2 edited records without annotations" in capsys.readouterr().out


# --- agreement


def made(folder: Path, reviewer: str, choices: Sequence[str], digest: str = "d") -> None:
    with log_of(folder, reviewer) as log:
        for number, kind in enumerate(choices):
            edited = turns("Q", "A") if kind == "edit" else None
            why = "trivial" if kind == "reject" else None
            log.append(f"s{number}", digest, kind, reason=why, turns=edited)  # type: ignore[arg-type]


def test_agreement_is_counted_with_cohens_kappa_and_its_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    names = np.array(["accept", "edit", "reject"])
    one = names[rng.integers(0, 3, 60)]
    two = np.where(rng.random(60) < 0.7, one, names[rng.integers(0, 3, 60)])
    made(tmp_path, "ann", one)
    made(tmp_path, "bob", two)
    made(tmp_path, "eve", ["accept"] * 60, digest="another text")
    (found,) = agreements(read_decisions(tmp_path))
    assert found.names == ("ann", "bob") and found.counts.sum() == 60
    np.testing.assert_array_equal(
        found.counts, sklearn.confusion_matrix(one, two, labels=list(names))
    )
    assert found.kappa == pytest.approx(sklearn.cohen_kappa_score(one, two), abs=1e-12)
    assert found.low < found.kappa < found.high and found.share == np.mean(one == two)
    # The same interval from the samples themselves, drawn one by one.
    draws = [rng.integers(0, 60, 60) for _ in range(300)]
    plain = np.quantile([sklearn.cohen_kappa_score(one[d], two[d]) for d in draws], [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx(tuple(plain), abs=0.06)
    assert [name for name, _, _ in found.differing] == sorted(
        f"s{n}" for n in np.flatnonzero(one != two)
    )
    assert main(["--agreement", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"kappa {found.kappa:.3f}" in out and "ann and bob: 60 samples in common" in out
    assert f"{len(found.differing)} samples with different decisions" in out
    assert np.isnan(kappa(np.diag([5, 0, 0])))


def test_one_sentence_about_what_is_missing(tmp_path: Path) -> None:
    root = write_run(tmp_path, 2)
    for arguments, message in (
        ([], "give DIR"),
        ([str(root), "--records", "x.json"], "give DIR"),
        (["--records", "x.json"], "needs --out"),
        ([str(tmp_path / "none")], "no such folder"),
        ([str(root), "--reviewer", "../me"], "letters, digits"),
        ([str(root), "--agreement"], "has no decisions"),
        ([str(root), "--part", "3/2"], "expected i/n"),
        ([str(root), "--instances", str(root / "config.yaml")], "belong to --records"),
        (
            ["--records", str(tmp_path / "x.json"), "--out", str(tmp_path / "o")],
            "no such data file",
        ),
    ):
        with pytest.raises(UserError, match=message):
            main(arguments)
