import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from data_tools.instruct import explain as explaining
from data_tools.instruct.explain import explain, show
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.schema import Failure
from tests.data_tools.instruct_runs import FATES, Run, add, config_of
from tests.data_tools.test_instruct_report import HOSTILE, hostile_run, images
from vlm_sft.errors import UserError

FATES_ONCE = tuple(dict.fromkeys(FATES))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """One conversation of each fate: image 1 is kept, 2 loses a turn, ..."""
    run = Run(images(tmp_path / "images", len(FATES_ONCE)))
    for image, fate in zip(run.images, FATES_ONCE, strict=True):
        add(run, image, "conversation", fate)
    return run


def shown(tmp_path: Path, sample_id: str, *, whole_prompt: bool = False) -> str:
    """Return what a terminal without colors shows of the sample."""
    found = explain(config_of(tmp_path / "run", tmp_path / "images"), sample_id)
    file = io.StringIO()
    show(Console(file=file, width=200), found, whole_prompt=whole_prompt)
    return file.getvalue()


@pytest.mark.parametrize(
    ("fate", "words"),
    [
        ("kept", ["✓ cleaned  kept", "· exported not exported yet", "✓1  supported", "b1 dog"]),
        ("lost_turn", ["kept; 1 turns dropped (000000000002-conversation-0-turn-1: ANSWER"]),
        ("duplicate", ["✗ cleaned  dropped: 000000000003-conversation-0: NEAR_DUPLICATE"]),
        ("count", ["✗ verified rejected: COUNT_WRONG", "✗1  contradicted", "[3 of dog]✗1"]),
        ("object", ["✗ verified rejected: OBJECT_NOT_FOUND", "A [giraffe]✗"]),
        ("unread", ["rejected: could not be parsed: REFUSAL", "I am sorry, I cannot see"]),
        ("unanswered", ["· answered not asked yet"]),
    ],
)
def test_a_sample_of_every_fate_is_explained(
    tmp_path: Path, run: Run, fate: str, words: list[str]
) -> None:
    run.write(tmp_path / "run")
    text = shown(tmp_path, f"{FATES_ONCE.index(fate) + 1:012d}-conversation-0")
    for word in [*words, "c1  A dog.", "✓ planned"]:
        assert word in text


def test_a_run_that_is_not_verified_is_explained(tmp_path: Path, run: Run) -> None:
    run.write(tmp_path / "run", "plan", "generate")
    assert "· verified not verified yet" in shown(tmp_path, "000000000001-conversation-0")


def test_a_failed_request_tells_its_last_failure(tmp_path: Path, run: Run) -> None:
    folder = run.write(tmp_path / "run")
    number = FATES_ONCE.index("unanswered")
    request = run.requests[number]
    lines = [
        Failure(request=request.id, sample_id=request.sample_id, reason="timeout", message="slow"),
        Failure(request=request.id, sample_id=request.sample_id, reason="refused", message="401"),
    ]
    folder.failures.write_text("".join(line.model_dump_json() + "\n" for line in lines))
    assert "✗ answered refused: 401" in shown(tmp_path, request.sample_id)


def test_an_exported_sample_names_its_files(tmp_path: Path, run: Run) -> None:
    folder = run.write(tmp_path / "run")
    folder.exports.mkdir()
    (folder.exports / "llava.json").write_text("[]")
    (folder.exports / "receipts.jsonl").write_text(json.dumps({"id": run.kept[0].id}) + "\n")
    assert "✓ exported in llava.json" in shown(tmp_path, run.kept[0].id)
    assert "✗ exported not in the exported files" in shown(tmp_path, run.kept[1].id)


def test_the_prompt_is_collapsed_unless_asked_for(tmp_path: Path, run: Run) -> None:
    run.write(tmp_path / "run")
    brief = shown(tmp_path, "000000000001-conversation-0")
    whole = shown(tmp_path, "000000000001-conversation-0", whole_prompt=True)
    assert "You write conversation data." not in brief and "3 messages before it" in brief
    assert "You write conversation data." in whole and "A seed example." in whole
    assert "b1: dog" in brief and "b1: dog" in whole


def test_a_request_is_found_by_its_hash_and_a_turn_by_its_sample(tmp_path: Path, run: Run) -> None:
    run.write(tmp_path / "run")
    config = config_of(tmp_path / "run", tmp_path / "images")
    assert explain(config, run.requests[3].id).request == run.requests[3]
    assert explain(config, run.dropped[0].id).request == run.requests[1]


def test_an_image_is_answered_with_its_samples_or_why_it_has_none(tmp_path: Path, run: Run) -> None:
    folder = run.write(tmp_path / "run")
    with pytest.raises(UserError, match=r"samples: 000000000002-conversation-0$"):
        shown(tmp_path, "000000000002.jpg")
    folder.requests.write_text("")
    with pytest.raises(UserError, match=r"000000000002\.jpg: was not chosen, or no type was drawn"):
        shown(tmp_path, "2")
    ids = tmp_path / "ids.txt"
    ids.write_text("2")
    config = config_of(folder.root, tmp_path / "images", guard={"lists": {"mine": str(ids)}})
    with pytest.raises(UserError, match=r"of mine, so .*guard\.allow_evaluation_images=true keeps"):
        explain(config, "2")


def test_an_unknown_id_is_answered_with_the_nearest(tmp_path: Path, run: Run) -> None:
    run.write(tmp_path / "run")
    config = config_of(tmp_path / "run", tmp_path / "images")
    with pytest.raises(UserError, match="nearest are 000000000004-conversation-0, "):
        explain(config, "00000000004-conversaton-0")


def test_a_terminal_is_not_commanded_by_foreign_text(tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    run.write(tmp_path / "run")
    for request in (run.requests[0], run.requests[6], run.requests[8]):  # kept and rejected
        text = shown(tmp_path, request.sample_id, whole_prompt=True)
        assert not {c for c in text if (ord(c) < 32 and c != "\n") or ord(c) in range(0x7F, 0xA0)}
        assert "\u202e" not in text and ("\u241b" in text)
    assert "\x1b" in HOSTILE


def test_the_page_and_the_image_are_written_where_they_are_asked_for(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.write(tmp_path / "run")
    config = config_of(tmp_path / "run", tmp_path / "images")
    page, image = tmp_path / "out.html", tmp_path / "out.png"
    sample_id = f"{FATES_ONCE.index('count') + 1:012d}-conversation-0"
    explaining.command(config, sample_id, html=page, png=image)
    first = page.read_bytes(), image.read_bytes()
    explaining.command(config, sample_id, html=page, png=image)
    assert (page.read_bytes(), image.read_bytes()) == first
    assert Image.open(io.BytesIO(image.read_bytes())).size == (80, 60)
    html = page.read_text(encoding="utf-8")
    for words in ("COUNT_WRONG", 'data-rests="b1 b2"', "✗ b1 dog", "You write conversation data."):
        assert words in html
    assert str(page) in capsys.readouterr().out


def test_a_hostile_sample_has_a_harmless_page(tmp_path: Path) -> None:
    run = hostile_run(tmp_path)
    run.write(tmp_path / "run")
    page = tmp_path / "out.html"
    config = config_of(tmp_path / "run", tmp_path / "images")
    explaining.command(config, run.requests[0].sample_id, html=page)
    html = page.read_text(encoding="utf-8")
    assert html.count("<script") == 1 and "<img src=x" not in html and "\u202e" not in html


def test_a_missing_image_has_no_png(tmp_path: Path, run: Run) -> None:
    run.write(tmp_path / "run")
    (tmp_path / "images" / "000000000001.jpg").unlink()
    config = config_of(tmp_path / "run", tmp_path / "images")
    with pytest.raises(UserError, match="000000000001"):
        explaining.command(config, "000000000001-conversation-0", png=tmp_path / "a.png")
    assert not RunFolder(tmp_path / "run").report.exists()
