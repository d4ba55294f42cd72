"""What trackers are started with."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_runs import run
from vlm_sft.config.schema import RunConfig, load_config
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.train.trackers import tracker_arguments, tracking_folder

TINY = str(Path(__file__).parents[2] / "configs/tiny/stage1.yaml")


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    return load_config(TINY, [f"output_dir={tmp_path / 'mine'}", *overrides])


def test_a_resumed_run_has_the_same_id_and_writes_inside_its_folder(tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.trackers=[wandb, trackio]")
    first = tracker_arguments(config)
    assert tracker_arguments(config) == first
    wandb: dict[str, Any] = first["wandb"]
    assert wandb["dir"] == str(tmp_path / "mine/trackers") and wandb["resume"] == "allow"
    assert wandb["name"] == "mine" and wandb["entity"] is None and len(wandb["id"]) == 8
    unique = f"mine-{wandb['id']}"
    assert first["trackio"] == {"name": unique, "group": None, "resume": "allow"}


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    other = load_config(TINY, [f"output_dir={tmp_path / 'b/mine'}", "train.trackers=[wandb]"])
    config = config_of(tmp_path, "train.trackers=[wandb]")
    assert tracker_arguments(other)["wandb"]["id"] != tracker_arguments(config)["wandb"]["id"]


def test_names_and_places_are_the_configurations(tmp_path: Path) -> None:
    names = f"name: n, entity: team, dir: {tmp_path / 'logs'}, project: p, group: g, tags: [a, b]"
    config = config_of(
        tmp_path, "train.trackers=[wandb, mlflow, trackio]", f"train.tracking={{{names}}}"
    )
    arguments = tracker_arguments(config)
    found = arguments["wandb"]
    assert (found["name"], found["entity"], found["dir"]) == ("n", "team", str(tmp_path / "logs"))
    assert (found["group"], found["tags"]) == ("g", ["a", "b"])
    assert arguments["trackio"] == {"name": "n", "group": "g", "resume": "allow"}
    mlflow = arguments["mlflow"]
    assert mlflow["tags"] == {"a": "true", "b": "true", "group": "g"} and "run_id" not in mlflow
    assert mlflow["run_name"] == "n" and mlflow["logging_dir"].startswith("file://")
    assert tracking_folder(config) == tmp_path / "logs"


def test_tensorboard_alone_needs_no_id(tmp_path: Path) -> None:
    assert tracker_arguments(config_of(tmp_path)) == {} and not (tmp_path / "mine").exists()


def test_a_damaged_id_is_named(tmp_path: Path) -> None:
    config = config_of(tmp_path, "train.trackers=[wandb]")
    tracker_arguments(config)
    (tmp_path / "mine/trackers/run_id").write_text("../x\n")
    with pytest.raises(UserError, match="run_id: expected the id of the tracked run"):
        tracker_arguments(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.trackers=[wandbb]", "train.trackers.0: .*did you mean 'wandb'"),
        ("train.tracking.project=a/b", "train.tracking.project: expected a name without /"),
        ("train.tracking.projekt=a", "did you mean 'train.tracking.project'"),
        ("train.tracking.tag=[a]", "did you mean 'train.tracking.tags'"),
    ],
)
def test_a_wrong_name_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, override)


LONGER = ("train.max_steps=4", "--allow-change=train.max_steps")
ONCE = ("train.max_steps=2", "train.eval_samples=2", "train.eval_every_steps=2")


def test_tensorboard_has_every_step_once_and_the_answers_with_their_images(
    tmp_path: Path, in_the_repository: Path
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trackers = "train.trackers=[tensorboard]"
    assert run("stage1", tmp_path / "run", trackers, *ONCE) == 0
    assert run("stage1", tmp_path / "run", trackers, *ONCE[1:], *LONGER) == 0
    found = events.EventAccumulator(
        str(tmp_path / "run/trackers/vlm_sft"), size_guidance={events.TENSORS: 0}
    )
    found.Reload()
    losses = found.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    names = [tag for tag in found.Tags()["tensors"] if tag.startswith("answers/")]
    assert len(names) == 2
    texts = found.Tensors(names[0])
    assert [event.step for event in texts] == [2, 4]
    assert b"**label**" in texts[0].tensor_proto.string_val[0]
    images = [tag for tag in found.Tags()["images"] if tag.startswith("images/")]
    assert len(images) == 2 and found.Images(images[0])[0].width > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the trackers' own libraries
@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_resumed_run_continues_the_same_tracked_run(
    tmp_path: Path, in_the_repository: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "run/trackers"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    before = sorted(in_the_repository.iterdir())
    trackers = f"train.trackers=[{name}]"
    assert run("stage1", tmp_path / "run", trackers, *ONCE) == 0
    assert run("stage1", tmp_path / "run", trackers, *ONCE[1:], *LONGER) == 0
    steps, num_runs = {"wandb": of_wandb, "trackio": of_trackio, "mlflow": of_mlflow}[name](
        tmp_path / "run/trackers"
    )
    assert steps == [1, 2, 3, 4] and num_runs == 1
    assert sorted(in_the_repository.iterdir()) == before, "nothing in the current folder"


def of_wandb(folder: Path) -> tuple[list[int], int]:
    """Return the steps with a loss and the number of runs, from the files of offline runs."""
    ids, steps = set(), []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        ids.add(path.stem.removeprefix("run-"))
        steps += _steps_of_wandb(path)
    return steps, len(ids)


def _steps_of_wandb(path: Path) -> list[int]:
    from wandb.proto import wandb_internal_pb2

    steps = []
    for data in _log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        keys = {item.key or "/".join(item.nested_key) for item in record.history.item}
        if "train/loss" in keys:
            steps.append(record.history.step.num)
    return steps


def _log_records(data: bytes, block: int = 32_768) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, after wandb's header of 7 bytes."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        left = block - place % block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def of_trackio(folder: Path) -> tuple[list[int], int]:
    """Return the steps with a loss and the number of runs, from trackio's database."""
    import trackio

    (found,) = trackio.Api().runs("vlm_sft")
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("vlm_sft", found.name)
    return [row["step"] for row in rows if "train/loss" in row], 1


def of_mlflow(folder: Path) -> tuple[list[int], int]:
    """Return the steps with a loss and the number of runs, from MLflow's store."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("vlm_sft")
    runs = client.search_runs([experiment.experiment_id])
    files = client.list_artifacts(runs[0].info.run_id, "answers")
    assert [file.path for file in files] == [f"answers/step-0000000{n}.md" for n in (2, 4)]
    history = client.get_metric_history(runs[0].info.run_id, "train/loss")
    return [value.step for value in history], len(runs)
