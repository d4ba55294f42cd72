"""No command replaces a file of others or one of its own inputs, and each finds out at once."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.tiny_runs import TINY
from vlm_sft import check, evaluate, show
from vlm_sft.errors import UserError
from vlm_sft.export import __main__ as export

pytestmark = pytest.mark.usefixtures("in_the_repository")

Main = Callable[[Sequence[str]], int]
DATA = TINY / "data"
CONFIG = str(TINY / "stage1.yaml")


@pytest.fixture
def records(tmp_path: Path) -> Path:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"id": "a", "conversations": turns}]))
    return path


@pytest.fixture
def probes(tmp_path: Path) -> Path:
    row = {"image": "images/red-circle-2.png", "question": "Is it red?", "answer": "yes"}
    path = tmp_path / "probes.json"
    path.write_text(json.dumps([{"id": "a", "kind": "random", **row}]))
    return path


def commands(records: Path, probes: Path, out: str) -> dict[str, tuple[Main, list[str]]]:
    """Every command that writes a file of the user's choice, with `out` as that file."""
    data = [CONFIG, f"data.train.0.path={records}", "data.eval=[]"]
    alone = ["--records", str(records), "--tokenizer", "bytes", "--template", "chatml"]
    measured = [str(DATA), "--images", str(DATA), "--probes", str(probes)]
    return {
        "check": (check.main, [*data, "--no-model", "--bad", out]),
        "show": (show.main, [*data, "--image-tokens", "4", "--html", out]),
        "show --records": (show.main, [*alone, "--html", out]),
        "evaluate": (evaluate.main, [*measured, "--out", out]),
    }


NAMES = ["check", "show", "show --records", "evaluate"]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_others_stays(tmp_path: Path, records: Path, probes: Path, name: str) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text("mine")
    main, argv = commands(records, probes, str(mine))[name]
    with pytest.raises(UserError, match="replace it with --overwrite") as caught:
        main(argv)
    assert caught.value.reason == "not_ours" and mine.read_text() == "mine"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("link", ["same", "symlink", "hard link"])
def test_an_input_is_never_the_output(
    tmp_path: Path, records: Path, probes: Path, name: str, link: str
) -> None:
    source = probes if name == "evaluate" else records
    before, out = source.read_bytes(), source
    if link != "same":
        out = tmp_path / "other.json"
        out.symlink_to(source) if link == "symlink" else out.hardlink_to(source)
    main, argv = commands(records, probes, str(out))[name]
    with pytest.raises(UserError, match="is read by this command"):
        main([*argv, "--overwrite"])
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["check", "show"])
def test_the_configuration_is_never_the_output(
    tmp_path: Path, records: Path, probes: Path, name: str
) -> None:
    mine = tmp_path / "my.yaml"
    mine.write_text((TINY / "stage1.yaml").read_text())
    main, argv = commands(records, probes, str(mine))[name]
    with pytest.raises(UserError, match="is read by this command"):
        main([str(mine), *argv[1:], "--overwrite"])


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_never_the_output(
    tmp_path: Path, records: Path, probes: Path, name: str
) -> None:
    image = (DATA if name == "evaluate" else tmp_path) / "images" / "red-circle-2.png"
    if name != "evaluate":
        image.parent.mkdir()
        image.write_bytes(b"image")
    before = image.read_bytes()
    main, argv = commands(records, probes, str(image))[name]
    with pytest.raises(UserError, match="which this command reads"):
        main([*argv, "--overwrite"])
    assert image.read_bytes() == before


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_a_checkpoint_is_never_the_output(
    lora_run: Path, records: Path, probes: Path, name: str
) -> None:
    for place in ("final/manifest.json", "final/new.json"):
        main, argv = commands(records, probes, str(lora_run / place))[name]
        with pytest.raises(UserError, match="where a training run keeps checkpoints"):
            main([*argv, "--overwrite"])
    assert not (lora_run / "final" / "new.json").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_place_that_takes_no_file_is_named_before_the_work(
    tmp_path: Path, records: Path, probes: Path, name: str
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    main, argv = commands(records, probes, str(blocked / "out.json"))[name]
    with pytest.raises(OSError) as caught:
        main(argv)
    assert caught.value.filename == str(blocked)


@pytest.mark.parametrize("name", ["show", "show --records"])
def test_a_page_is_written_again_over_itself(
    tmp_path: Path, records: Path, probes: Path, name: str
) -> None:
    main, argv = commands(records, probes, str(tmp_path / "page.html"))[name]
    assert main(argv) == 0 and main(argv) == 0


def test_a_list_of_bad_records_is_replaced_when_the_user_says_so(
    tmp_path: Path, records: Path, probes: Path
) -> None:
    listed = tmp_path / "bad.jsonl"
    main, argv = commands(records, probes, str(listed))["check"]
    assert main(argv) == 0 and listed.read_text() == ""
    listed.write_text("mine")
    assert main([*argv, "--overwrite"]) == 0 and listed.read_text() == ""


def test_results_are_written_again_over_themselves_and_printed_first(
    lora_run: Path,
    tmp_path: Path,
    probes: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = [str(lora_run / "final"), "--images", str(DATA), "--probes", str(probes)]
    quick = ["--conditions", "right", "--device", "cpu"]
    for _ in range(2):
        assert evaluate.main([*argv, *quick]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["made_by"] == "vlm_sft evaluate"

    def disk_is_full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    capsys.readouterr()
    monkeypatch.setattr("vlm_sft.commands.evaluate.write_json", disk_is_full)
    with pytest.raises(OSError, match="No space"):
        evaluate.main([*argv, *quick])
    assert "probes" in capsys.readouterr().out


def test_results_of_others_in_the_current_folder_stay(
    tmp_path: Path, probes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.json").write_text('{"mine": 1}')
    argv = [str(DATA), "--images", str(DATA), "--probes", str(probes)]
    with pytest.raises(UserError, match=r"results\.json: the file exists"):
        evaluate.main(argv)
    assert (tmp_path / "results.json").read_text() == '{"mine": 1}'


# --- export


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("final/x", "where a training run keeps checkpoints"),
        ("final", "is read by this command"),
        ("checkpoints/x", "where a training run keeps checkpoints"),
        (".", "not an empty directory"),
        ("config.yaml", "not an empty directory"),
    ],
)
def test_an_export_never_goes_into_the_run_that_it_reads(
    lora_run: Path, place: str, said: str
) -> None:

    with pytest.raises(UserError, match=said):
        export.main([str(lora_run / "final"), str(lora_run / place)])


@pytest.mark.parametrize("what", ["link", "dangling link", "file", "full", "under a file"])
def test_a_destination_that_cannot_be_used_is_refused_before_the_work(
    lora_run: Path, tmp_path: Path, what: str
) -> None:

    out, file = tmp_path / "out", tmp_path / "file"
    file.write_text("mine")
    if what.endswith("link"):
        out.symlink_to(tmp_path / ("empty" if what == "link" else "nowhere"))
        (tmp_path / "empty").mkdir()
    elif what == "file":
        out = file
    elif what == "full":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    else:
        out = file / "out"
    with pytest.raises((UserError, OSError), match=r"symbolic link|not an empty|Not a directory"):
        export.main([str(lora_run / "final"), str(out)])
    assert file.read_text() == "mine"


def test_an_export_keeps_what_a_file_manager_left(lora_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".DS_Store").write_text("icons")
    assert export.main([str(lora_run / "final"), str(out)]) == 0
    assert (out / ".DS_Store").read_text() == "icons"
    assert json.loads((out / "export.json").read_text())["made_by"] == "vlm_sft export"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
