"""What trackers are started with."""

from pathlib import Path
from typing import Any

import pytest

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
    assert first["trackio"] == {"name": f"mine-{wandb['id']}", "resume": "allow"}


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    other = load_config(TINY, [f"output_dir={tmp_path / 'b/mine'}", "train.trackers=[wandb]"])
    config = config_of(tmp_path, "train.trackers=[wandb]")
    assert tracker_arguments(other)["wandb"]["id"] != tracker_arguments(config)["wandb"]["id"]


def test_names_and_places_are_the_configurations(tmp_path: Path) -> None:
    tracking = f"train.tracking={{name: n, entity: team, dir: {tmp_path / 'logs'}, project: p}}"
    config = config_of(tmp_path, "train.trackers=[wandb]", tracking)
    found = tracker_arguments(config)["wandb"]
    assert (found["name"], found["entity"], found["dir"]) == ("n", "team", str(tmp_path / "logs"))
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
    ],
)
def test_a_wrong_name_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, override)
