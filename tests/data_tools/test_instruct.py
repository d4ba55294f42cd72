"""The stages in turn, as a user runs them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools import make_scenes
from data_tools.instruct.__main__ import main
from data_tools.instruct.generate.answers import read_answers
from data_tools.instruct.plan.command import read_requests
from data_tools.instruct.run_folder import RunFolder
from data_tools.instruct.stages import COMMANDS, parsers
from tests.data_tools.teacher_server import Act, Received, drop, fail, fenced, say, served
from tests.tiny_runs import run as run_stage
from vlm_sft.config.schema import DataFile
from vlm_sft.data.records import read_records
from vlm_sft.errors import UserError


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    make_scenes.main(["--out", str(folder), "--artist", "twemoji", "--count", "12", "--seed", "3"])
    return folder


def config_file(folder: Path, scenes: Path, **sections: Any) -> Path:
    annotations = scenes / "annotations"
    values = {
        "output_dir": str(folder / "run"),
        "seed": 1,
        "coco": {
            "instances": str(annotations / "instances_twemoji.json"),
            "captions": str(annotations / "captions_twemoji.json"),
            "images": str(scenes / "images"),
        },
        "teacher": {"kind": "rules"},
        **sections,
    }
    path = folder / "instruct.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> Path:
    """The configuration of a finished run in the folder `run` next to it."""
    config = config_file(tmp_path_factory.mktemp("finished"), scenes)
    assert main(["run", str(config)]) == 0
    return config


def files_of(folder: Path) -> dict[str, bytes]:
    names = ("samples.jsonl", "rejected.jsonl", "kept.jsonl", "export/llava.json")
    names += ("export/messages.jsonl", "export/train.parquet", "report/report.html")
    return {name: (folder / name).read_bytes() for name in names}


def test_run_makes_training_files_and_a_second_run_changes_no_byte(
    finished: Path, scenes: Path
) -> None:
    run = finished.with_name("run")
    before = files_of(run)
    assert main(["run", str(finished)]) == 0
    assert files_of(run) == before
    samples = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(samples) > 12 and before["rejected.jsonl"] == b""
    found = list(
        read_records(
            DataFile(path=str(run / "export/llava.json"), image_root=str(scenes / "images"))
        )
    )
    kept = (run / "kept.jsonl").read_text(encoding="utf-8").splitlines()
    assert [getattr(record, "id", None) for record in found] == [json.loads(k)["id"] for k in kept]


def test_refused_images_are_reported_with_the_switch_that_keeps_them(
    tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = json.loads((scenes / "annotations/captions_twemoji.json").read_text())
    ids = tmp_path / "ids.txt"
    ids.write_text(f"{annotations['images'][0]['id']}\n", encoding="utf-8")
    config = config_file(tmp_path, scenes, guard={"lists": {"mine": str(ids)}})
    assert main(["plan", str(config)]) == main(["report", str(config)]) == 0
    table = outcome_table(capsys.readouterr().out)
    assert table["evaluation images"] == (
        1, 0, "mine 1; refused, guard.allow_evaluation_images=true keeps them"
    )  # fmt: skip
    assert main(["plan", str(config), "guard.allow_evaluation_images=true"]) == 0
    assert "1  images of evaluations found, kept" in capsys.readouterr().out


def outcome_table(printed: str) -> dict[str, tuple[int, int, str]]:
    """Images, requests and reasons by outcome, from the table at the end of `run`."""
    lines = printed.splitlines()
    found = {}
    for line in lines[lines.index("  images  requests  outcome") + 1 :]:
        images, requests, rest = line.split(maxsplit=2)
        outcome, _, reasons = rest.partition(": ")
        found[outcome] = int(images), int(requests.replace("-", "0")), reasons
    return found


def test_a_run_ends_with_why_images_and_requests_have_no_sample(
    tmp_path: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((scenes / "images").iterdir())
    own = tmp_path / "images"
    own.mkdir()
    for image in images[1:]:
        (own / image.name).symlink_to(image)
    (own / images[1].name).unlink()
    (own / images[1].name).write_bytes(b"no image")
    coco = {
        "instances": str(scenes / "annotations/instances_twemoji.json"),
        "captions": str(scenes / "annotations/captions_twemoji.json"),
        "images": str(own),
        "follow_symlinks": True,
        "max_faulty": 1,
    }
    config = config_file(tmp_path, scenes, coco=coco, images={"count": 9})
    strict = ["verify.forms.detail={turns: [1, 1], answer_words: [300, 400]}"]
    assert main(["run", str(config), "clean.max_per_category=1", *strict]) == 0
    table = outcome_table(capsys.readouterr().out)
    run = RunFolder(tmp_path / "run")
    num_requests = len(list(read_requests(run)))
    assert sum(images for images, _, _ in table.values()) == 12
    assert sum(requests for _, requests, _ in table.values()) == num_requests
    assert table["images without a file"][:2] == table["images that cannot be opened"][:2] == (1, 0)
    assert table["not chosen"] == (1, 0, "images.count is smaller")
    assert "nothing certain to say" in table["not answered"][2]
    num_rejected = len(run.rejected.read_bytes().splitlines())
    assert num_rejected > 0
    assert table["all answers rejected by verify"][1:] == (
        num_rejected, f"TOO_SHORT {num_rejected} (rejected.jsonl)"
    )  # fmt: skip
    assert "CATEGORY" in table["all samples dropped by clean"][2]
    kept = run.kept.read_text().splitlines()
    ids = {json.loads(line)["image"]["id"] for line in kept}
    assert table["in the training files"] == (len(ids), len(kept), "")


def test_the_order_of_answers_and_the_number_of_workers_change_no_byte(finished: Path) -> None:
    run = finished.with_name("run")
    before = files_of(run)
    run.rename(run.with_name("first"))
    main(["plan", str(finished)])
    for shard in (3, 1, 2):
        main(["generate", str(finished), "--shard", f"{shard}/3", "teacher.concurrency=1"])
    for command in ("verify", "clean", "export", "report"):
        main([command, str(finished)])
    assert files_of(run) == before


def test_stage_2_trains_on_the_exported_file(tmp_path: Path, scenes: Path, finished: Path) -> None:
    run_stage(
        "stage2",
        tmp_path / "trained",
        f"data.train=[{{path: {finished.with_name('run') / 'export/llava.json'}, "
        f"image_root: {scenes / 'images'}}}]",
        "data.eval=[]",
        "data.max_length=1024",
        "projector=null",
        "train.max_steps=2",
    )
    assert (tmp_path / "trained/final/manifest.json").is_file()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("words", [["--help"], ["nowhere.yaml", "--help"], ["-h"]])
def test_every_command_has_its_own_help_with_examples(
    command: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, *words])
    assert end.value.code == 0
    help_text = capsys.readouterr().out
    prog = f"vlm-sft data {command}"
    assert help_text.startswith(f"usage: {prog} [-h]")
    for word in ("--overwrite", "CONFIG.yaml", "key.path=value", f"\n  {prog} "):
        assert word in help_text


def test_the_examples_of_the_help_are_accepted() -> None:
    for name, stage in COMMANDS.items():
        for example in stage.examples:
            assert parsers()[name].read(example.split()).config.endswith(".yaml")


@pytest.mark.parametrize(
    "words",
    [
        "my.yaml --shard 2/3 limits.usd=1 seed=2",
        "--shard 2/3 my.yaml limits.usd=1 seed=2",
        "my.yaml limits.usd=1 seed=2 --shard=2/3",
        "my.yaml limits.usd=1 --shard 2/3 seed=2",
    ],
)
def test_options_may_be_before_and_after_the_configuration(words: str) -> None:
    found = parsers()["generate"].read(words.split())
    assert (found.config, found.overrides) == ("my.yaml", ["limits.usd=1", "seed=2"])
    assert (found.shard.number, found.shard.count) == (2, 3)


def test_the_value_of_an_option_is_not_an_override() -> None:
    found = parsers()["verify"].read(["my.yaml", "--file", "a=b.json"])
    assert (found.file, found.overrides) == (Path("a=b.json"), [])


@pytest.mark.parametrize("option", ["--shard", "--show=3", "--file"])
def test_run_has_no_options_of_a_stage(option: str, tmp_path: Path, scenes: Path) -> None:
    with pytest.raises(UserError, match=r"an option of `\w+`, not of `run`; run the stages one by"):
        main(["run", str(config_file(tmp_path, scenes)), option, "1/2"])


def test_a_misspelt_stage_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"^COMMAND verfy: did you mean verify\?$"):
        main(["verfy", "my.yaml"])


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom data_tools.instruct.__main__ import main\n"
        "try: main(['plan', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'pydantic', 'numpy', 'rich', 'yaml', 'PIL'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", ["plan", "run", "generate", "export"])
@pytest.mark.parametrize("name", ["pictures.jsonl", "requests.jsonl", "samples.jsonl"])
def test_a_folder_of_an_older_version_is_refused_in_one_sentence(
    command: str, name: str, tmp_path: Path, scenes: Path
) -> None:
    config = config_file(tmp_path, scenes)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text('{"id": "a", "picture": {"id": 7}}\n')
    with pytest.raises(UserError, match=r"was made by an older version.*choose a new output_dir"):
        main([command, str(config)])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_ctrl_c_in_a_stage_says_that_repeating_the_command_continues(
    tmp_path: Path,
    scenes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_tools.instruct.plan.command.command", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["run", str(config_file(tmp_path, scenes))])
    assert "stopped in `plan`; repeat the command to continue" in capsys.readouterr().err


def test_a_misspelt_setting_is_one_sentence_and_code_2(tmp_path: Path, scenes: Path) -> None:
    config = config_file(tmp_path, scenes, teachr={})
    done = subprocess.run(
        [sys.executable, "-m", "data_tools.instruct", "plan", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert "did you mean 'teacher'?" in done.stderr and done.stderr.count("\n") == 1


SLIPS: dict[str, tuple[Callable[[str, str], Act], str | None]] = {
    "well": (lambda text, absent: say(text), None),
    "fences": (lambda text, absent: say(fenced(text)), None),
    "two objects": (lambda text, absent: say(text + text), "SEVERAL_OBJECTS"),
    "wrong schema": (lambda text, absent: say('{"reply": 1}'), "WRONG_SCHEMA"),
    "cut": (lambda text, absent: say(text[:40], finish="length"), "ANSWER_CUT"),
    "refusal": (lambda text, absent: say("I'm sorry, but I cannot help with that."), "REFUSAL"),
    "leak": (lambda text, absent: say(_said_more(text, "The caption says so.")), "LEAK"),
    "hallucinated": (
        lambda text, absent: say(_said_more(text, f"There is a {absent}.")),
        "OBJECT_NOT_FOUND",
    ),
}  # what the server makes of a true answer, and the code that rejects it


def _said_more(text: str, more: str) -> str:
    """The JSON answer with a sentence at the end of its last answer."""
    answer = json.loads(text)
    last = answer["turns"][-1] if "turns" in answer else answer
    last["answer"] += " " + more
    return json.dumps(answer)


def test_a_server_that_misbehaves_costs_no_record_and_nothing_wrong_is_kept(
    tmp_path: Path, scenes: Path
) -> None:
    truth = tmp_path / "truth"
    truth.mkdir()
    by_rules = config_file(truth, scenes)
    for command in ("index", "plan", "generate"):
        main([command, str(by_rules)])
    run = RunFolder(truth / "run")
    absent = _absent(scenes)
    answers = read_answers(run.answers)
    true = {r.sample_id: answers[r.id].text for r in read_requests(run) if r.id in answers}
    slip_of = {name: list(SLIPS)[n % len(SLIPS)] for n, name in enumerate(true)}
    sample_of: dict[str, str] = {}

    def script(received: Received) -> Act:
        if received.is_probe:
            return say("{}")
        if received.times == 1 and int(received.id[:2], 16) % 3 == 0:
            return (drop, fail(500), fail(429, retry_after=0))[int(received.id[2], 16) % 3]
        sample = sample_of[received.id]
        if sample not in true:
            return say("I cannot tell.")
        return SLIPS[slip_of[sample]][0](true[sample], absent[int(sample[:12])])

    with served(script) as server:
        teacher = {"kind": "openai", "base_url": server.url, "model": "scripted"}
        config = config_file(tmp_path, scenes, teacher={**teacher, "structured": "none"})
        run = RunFolder(tmp_path / "run")
        for command in ("index", "plan"):
            main([command, str(config)])
        sample_of.update({r.id: r.sample_id for r in read_requests(run)})
        for command in ("generate", "verify", "clean", "export", "report"):
            main([command, str(config)])
        asked = sum(server.counts.values())
        main(["generate", str(config)])
        assert sum(server.counts.values()) == asked
    accepted = _by_id(run.samples)
    rejected = _by_id(run.rejected)
    assert accepted.keys().isdisjoint(rejected) and accepted.keys() | rejected.keys() == set(
        sample_of.values()
    )
    for sample, slip in slip_of.items():
        code = SLIPS[slip][1]
        if code is None:
            assert sample in accepted, rejected[sample]["reasons"]
        else:
            assert code in rejected[sample]["reasons"]
    fenced_one = accepted[_first(slip_of, "fences")]
    assert [c["claim"] for c in fenced_one["checks"] if c["rule"] == "reading"] == [
        "text around the object"
    ]
    page = (run.report / "report.html").read_text(encoding="utf-8")
    assert "OBJECT_NOT_FOUND" in page


def _absent(scenes: Path) -> dict[int, str]:
    """Of every image a kind of thing that is annotated elsewhere and not there."""
    text = (scenes / "annotations/instances_twemoji.json").read_text(encoding="utf-8")
    document = json.loads(text)
    names = {entry["id"]: entry["name"] for entry in document["categories"]}
    there: dict[int, set[str]] = {entry["id"]: set() for entry in document["images"]}
    for entry in document["annotations"]:
        there[entry["image_id"]].add(names[entry["category_id"]])
    everything = set().union(*there.values())
    return {image: min(everything - present) for image, present in there.items()}


def _by_id(path: Path) -> dict[str, Any]:
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["id"]: row for row in rows}


def _first(slip_of: dict[str, str], slip: str) -> str:
    return next(sample for sample, its in slip_of.items() if its == slip)
