"""The study of connectors: its arms are valid configurations that differ only as they say."""

from pathlib import Path
from typing import Any

import pytest
import study_connectors
from study_connectors import ARMS, CONFIGS, Study

from vlm_sft import evaluate
from vlm_sft.config.schema import load_config


def settings(name: str, stage: str, path: Path) -> dict[str, Any]:
    study = Study(path, seed=1, counts={"train": 10}, steps=(3, 5))
    return load_config(CONFIGS[stage], study.overrides(name, stage)).model_dump()


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize("stage", CONFIGS)
@pytest.mark.parametrize("pair", [("mlp", "resampler"), ("square", "tiles")])
def test_compared_arms_differ_in_the_image_tokens_alone(
    pair: tuple[str, str], stage: str, tmp_path: Path
) -> None:
    first, second = (settings(name, stage, tmp_path) for name in pair)
    differing = {key for key in first if first[key] != second[key]}
    assert differing <= {"model", "output_dir", "projector"}
    model, other = first["model"], second["model"]
    assert {key for key in model if model[key] != other[key]} == {
        "mlp": {"projector_type", "num_queries", "vision_tower"},
        "square": {"image_tiling"},
    }[pair[0]]
    assert first["train"]["max_steps"] == (3 if stage == "stage1" else 5)
    assert ARMS[pair[0]].scenes == ARMS[pair[1]].scenes


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_asked_with_its_own_and_with_blank_images(name: str, tmp_path: Path) -> None:
    study = Study(tmp_path, seed=1, counts={"test": 10}, steps=(3, 5))
    arguments = evaluate.parser().read(study.evaluation(name))
    assert arguments.conditions == ["right", "blank"]
    assert ARMS[name].scenes in str(arguments.images)


def test_an_interval_is_shown_with_its_ends() -> None:
    found = {"estimate": 0.75, "low": 0.7, "high": 0.8}
    assert study_connectors._with_interval(found) == "0.750 (0.700 to 0.800)"
