from pathlib import Path
from typing import Any

import pytest

from vlm_sft.config import dump_config, load_config, parse_config
from vlm_sft.errors import ConfigError

SMALLEST = """\
output_dir: runs/x
model:
  vision_tower: {library: timm, name: resnet18}
  language_model: {name: some/model}
data:
  train: [{path: a.json}]
optim: {learning_rate: {projector: 2e-5}}
train: {global_batch_size: 8, micro_batch_size: 2}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(SMALLEST)
    return path


def test_scientific_notation_is_a_number(file: Path) -> None:
    assert load_config(file).optim.learning_rate.projector == 2e-5


def test_overrides_reach_into_sections_and_lists(file: Path) -> None:
    config = load_config(
        file, ["train.max_steps=7", "data.train.0.weight=2", "projector=runs/s1/final", "lora.r=8"]
    )
    assert config.train.max_steps == 7
    assert config.data.train[0].weight == 2.0
    assert config.projector == "runs/s1/final"
    assert config.lora is not None and config.lora.r == 8


def test_a_dumped_configuration_reads_back_equal(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["lora.r=8"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.max_lenght=5"], "unknown key 'data.max_lenght'; did you mean 'data.max_length'"),
        (
            ["train.gradient_checkpointing=true"],
            "unknown key 'train.gradient_checkpointing'; did you mean "
            "'train.activation_checkpointing'",
        ),
        (
            ["train.activation_checkpointing=true"],
            "train.activation_checkpointing: Input should be 'auto', 'none', 'selective' or 'full'",
        ),
        (["train.learning_rate=1"], "did you mean 'optim.learning_rate'"),
        (["data.train.0.wieght=2"], "did you mean 'data.train.0.weight'"),
        (
            ["train.packing.max_tokens=4096"],
            "train: give exactly one of `micro_batch_size` .padded. and `packing`",
        ),
        (["train.micro_batch_size=null"], "train: give exactly one of `micro_batch_size`"),
        (
            ["train.micro_batch_size=null", "train.packing.max_tokens=2047"],
            "train.packing.max_tokens is 2047, but data.max_length lets a record have 2048",
        ),
        (["train.share_prefixes=true"], "`share_prefixes` needs `packing`"),
        (
            [
                "train.micro_batch_size=null",
                "train.packing.max_tokens=4096",
                "train.group_by_length=true",
            ],
            "`packing` needs no `group_by_length`",
        ),
        (["train.micro_batch_size=0"], "train.micro_batch_size: .*greater than 0 .*found 0"),
        (["data.image_aspect=stretch"], "data.image_aspect: .*'pad' or 'crop'.*'stretch'"),
        (["model.projector_type=mlp"], "model.projector_type"),
        (["model.language_model.config={a: 1}"], "exactly one of `name` and `config`"),
        (["seed"], "expected key.path=value"),
        (["data.train.3.path=x"], "expected an index from 0 to 0"),
        (["seed.x=1"], "seed: .*valid integer"),
    ],
)
def test_a_wrong_setting_is_one_sentence(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(file, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping of keys, found list"),
        (SMALLEST + "seed: 1\nseed: 2\n", "key 'seed' appears twice"),
        (SMALLEST.replace("output_dir: runs/x\n", ""), "key 'output_dir' is missing"),
    ],
)
def test_a_wrong_file_is_one_sentence(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such configuration file"):
        load_config(tmp_path / "nowhere.yaml")


def test_plain_values_are_checked_the_same_way() -> None:
    tree: dict[str, Any] = {"output_dir": "x", "extra": 1}
    with pytest.raises(ConfigError, match="here: "):
        parse_config(tree, "here")
