"""What a stage refuses before it starts."""

from pathlib import Path

import pytest

from vlm_sft.commands.inputs import read_config
from vlm_sft.config.method import require_stage1, require_stage2
from vlm_sft.config.schema import dump_config, load_config
from vlm_sft.errors import ConfigError, TemplateError

TINY = Path(__file__).parents[2] / "configs/tiny"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stage2", r"optim\.learning_rate\.language_model is 0\.003, but stage 1 trains"),
        ("stage2_lora", "lora: stage 1 trains only the projector"),
    ],
)
def test_stage_1_refuses_settings_that_it_would_ignore(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_stage1(load_config(TINY / f"{name}.yaml"))


def test_each_stage_accepts_its_own_configuration() -> None:
    require_stage1(load_config(TINY / "stage1.yaml"))
    require_stage1(load_config(TINY / "stage1.yaml", ["optim.learning_rate.language_model=0"]))
    require_stage2(load_config(TINY / "stage2.yaml"))


def test_a_wrong_value_is_reported_before_its_difference_from_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TINY.parents[1])
    path, settings = str(TINY / "stage1.yaml"), [f"output_dir={tmp_path}"]
    (tmp_path / "config.yaml").write_text(dump_config(load_config(path, settings)))
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "manifest.json").write_text("{}")
    with pytest.raises(TemplateError, match="no template 'plane'; did you mean 'plain'"):
        read_config(path, [*settings, "data.template=plane"])
    monkeypatch.chdir(tmp_path)  # from here the run's files are not there any more
    assert read_config(path, settings).data.template == "plain"
    assert read_config(path, [*settings, "train.log_every_steps=7"]).train.log_every_steps == 7
