"""What a stage refuses before it starts."""

from pathlib import Path

import pytest

from vlm_sft.config import load_config
from vlm_sft.errors import ConfigError
from vlm_sft.inputs import require_stage1, require_stage2

TINY = Path(__file__).parents[1] / "configs/tiny"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stage2", r"optim\.learning_rate\.language_model is 0\.003, but stage 1 trains"),
        ("stage2_lora", "lora: stage 1 trains the projector alone"),
    ],
)
def test_stage_1_refuses_settings_that_it_would_ignore(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_stage1(load_config(TINY / f"{name}.yaml"))


def test_each_stage_accepts_its_own_configuration() -> None:
    require_stage1(load_config(TINY / "stage1.yaml"))
    require_stage1(load_config(TINY / "stage1.yaml", ["optim.learning_rate.language_model=0"]))
    require_stage2(load_config(TINY / "stage2.yaml"))
