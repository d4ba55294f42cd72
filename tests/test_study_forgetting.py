"""The study of forgetting: its runs differ in text alone, and its advice follows from its rows."""

from pathlib import Path
from typing import Any

import pytest
from study_forgetting import HELD_OUT, REPLAYED, Study, questions, recommended

from data_tools.mix.config import MixConfig
from vlm_sft.config.schema import load_config


def row(percent: int, change: float, estimate: float = 0.9) -> dict[str, Any]:
    return {
        "method": "lora",
        "percent": percent,
        "change": change,
        "estimate": estimate,
        "low": estimate - 0.05,
    }


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        ([row(0, 0.4), row(5, 0.3), row(10, 0.2), row(20, 0.1)], "10 %"),
        ([row(0, 0.4), row(5, 0.1, estimate=0.8), row(10, 0.1)], "10 %"),
        ([row(0, 0.4), row(5, 0.3)], "none of those tried"),
        ([row(0, -0.1), row(5, -0.2)], "0 %: the loss does not rise without text"),
        ([row(0, 0.4)], "unknown: too few runs"),
        ([row(0, 0.4), row(0, 0.2), row(5, 0.3), row(5, 0.0)], "5 %"),
    ],
)
def test_the_smallest_share_that_halves_the_rise_is_recommended(
    rows: list[dict[str, Any]], advice: str
) -> None:
    assert recommended(rows, "lora") == advice


def test_held_out_questions_are_about_other_modules() -> None:
    assert not set(REPLAYED) & set(HELD_OUT)
    replayed, held_out = questions(REPLAYED, 400), questions(HELD_OUT, 48)
    assert len(set(replayed)) == 400 and len(set(held_out)) == 48
    assert replayed == questions(REPLAYED, 400)


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_runs_differ_in_their_mixture_alone(method: str, tmp_path: Path) -> None:
    study, settings = Study(tmp_path, 3, 50), {}
    for share in (0, 10):
        config = load_config("configs/demo/stage2_lora.yaml", study.settings(method, share, 1))
        settings[share] = config.model_dump()
        assert settings[share].pop("output_dir") and settings[share]["data"].pop("train")
        mixture = MixConfig.model_validate(study.mixture(share, 1, tmp_path / "mix"))
        assert (mixture.total, mixture.replay_share) == (400, share / 100 or None)
    assert settings[0] == settings[10] and settings[0]["train"]["max_steps"] == 50
    assert (settings[0]["lora"] is None) == (method == "full")
