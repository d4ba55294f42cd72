"""What a stage refuses before it starts."""

from pathlib import Path

import pytest

from vlm_sft.commands.inputs import ALL_PARTS, read_config
from vlm_sft.config.method import require_stage1, require_stage2
from vlm_sft.config.schema import dump_config, load_config
from vlm_sft.errors import ConfigError, TemplateError, UserError
from vlm_sft.utils import libraries

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


def test_a_missing_package_is_named_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(TINY.parents[1])
    monkeypatch.setattr(libraries, "find_spec", lambda name: None)
    path = str(TINY / "stage1.yaml")
    for setting, message in (
        ("train.trackers=[tensorboard]", r"train\.trackers: tensorboard is not .*\[tensorboard\]"),
        ("train.trackers=[mlflow]", r"train\.trackers: mlflow is not .*vlm-sft\[track\]"),
        ("optim.optimizer=adamw_8bit", r"optim\.optimizer: .*'bitsandbytes' is not .*\[qlora\]"),
        ("model.language_model.quantization=nf4", "quantization: the package 'bitsandbytes' is"),
    ):
        with pytest.raises(UserError, match=message):
            read_config(path, ["train.trackers=[]", setting])
        read_config(path, ["train.trackers=[]", setting], ALL_PARTS - {"packages"})


def test_the_header_of_a_table_is_checked_before_anything_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TINY.parents[1])
    path, table = str(TINY / "stage1.yaml"), tmp_path / "table.csv"
    (tmp_path / "metadata.csv").write_text("photo,text\na.jpg,A dog.\n")
    table.write_text("photo,qestion,answer\na.jpg,What?,A dog.\n")
    for key, name in (("train", table), ("eval", table), ("eval", tmp_path)):
        with pytest.raises(UserError, match=r"no column for") as error:
            read_config(path, [f"data.{key}=[{{path: {name}}}]"])
        assert error.value.reason == "missing_column"


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
