import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from data_tools.instruct.config import InstructConfig
from data_tools.mix.config import MixConfig
from data_tools.select.config import SelectConfig
from vlm_sft.config import loading as settings
from vlm_sft.config.loading import Section
from vlm_sft.config.resume import flat
from vlm_sft.config.schema import RunConfig, dump_config, load_config, parse_config
from vlm_sft.config.validation_errors import _OTHER_NAMES
from vlm_sft.config.yaml_text import YamlError, parse_yaml
from vlm_sft.errors import ConfigError

LLAVA_LORA = Path(__file__).parents[2] / "configs/llava-1.5/stage2_lora.yaml"
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
            ["train.per_device_train_batch_size=4"],
            "unknown key 'train.per_device_train_batch_size'; did you mean "
            "'train.micro_batch_size'",
        ),
        (
            ["train.activation_checkpointing=true"],
            "train.activation_checkpointing: expected 'auto', 'none', 'selective' or 'full'",
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
            "train.packing.max_tokens is 2047, but data.max_length allows records of 2048",
        ),
        (["train.share_image_prefix=true"], "`share_image_prefix` needs `packing`"),
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
        (["seed.x=1"], "seed: expected a whole number .found a section with x"),
        (["optim.betas=[0.9]"], "key 'optim.betas.1' is missing|optim.betas: expected"),
        (["optim.betas=[0.9, 2]"], "optim.betas.1: expected a number of at most 1 .found 2"),
        (["data.train={path: a}"], "data.train: expected a list .found a section with path"),
        (["data.train=[]"], "data.train: expected at least 1 entr.* .found an empty list"),
        (["data.eval.0.path=x"], "data.eval: expected a list"),
        (["train=3"], "train: expected a section of keys and values .found 3"),
        (["lora.targets=7"], "lora.targets: expected a list or 'all-linear' .found 7"),
        (["lora.targets=[1]"], "lora.targets.0: expected text .found 1"),
        (["lora.targets=all_linear"], "did you mean 'all-linear'"),
        (["train.trackers=[wand]"], "train.trackers.0: expected .*did you mean 'wandb'"),
        (["train.trackers=wandb"], "train.trackers: expected a list .found 'wandb'"),
        (["output_dir=null"], "output_dir: expected text .found null"),
        (["train.max_steps", "3"], "expected key.path=value without spaces: train.max_steps=3"),
        (["train.max_steps", "=", "3"], "without spaces: train.max_steps=3"),
        (["train.max_steps=", "3"], "without spaces: train.max_steps=3"),
        (["train.max_steps", "=3"], "without spaces: train.max_steps=3"),
        (["train.max_steps:", "3"], "without spaces: train.max_steps=3"),
        (["train..max_steps=3"], "the key has an empty part"),
        (["train.max_stps=3"], "did you mean 'train.max_steps'"),
        (["max-steps=5"], "unknown key 'max-steps'; did you mean 'train.max_steps'"),
        (["training.max_steps=5"], "'training.max_steps'; did you mean 'train.max_steps'"),
        (["Data.Max-Length=5"], "'Data.Max-Length'; did you mean 'data.max_length'"),
        (["model.learning_rate=1"], "did you mean 'optim.learning_rate'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(file: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(file, overrides)
    assert "\n" not in str(error.value)


TOWER, LANGUAGE = "model.vision_tower", "model.language_model"
BUILT = [f"{LANGUAGE}.name=null", f"{LANGUAGE}.tokenizer=bytes"]
RESAMPLER = ["model.projector_type=resampler"]
PACKED = ["train.micro_batch_size=null", "train.packing.max_tokens=4096"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.epochs=.inf"], "train.epochs: expected a finite number .found inf"),
        (["train.epochs=1e300"], "train.epochs: expected a number of at most 1e[+]06"),
        (["optim.epsilon=.inf"], "optim.epsilon: expected a finite number"),
        (["optim.max_grad_norm=.inf"], "optim.max_grad_norm: expected a finite number"),
        (["optim.betas=[.nan, 0.9]"], "optim.betas.0: expected a finite number"),
        (["lora.alpha=.inf"], "lora.alpha: expected a finite number"),
        (["lora.alpha=1e38"], "lora.alpha: expected a number of at most"),
        (["train.save_every_minutes=1e300"], "train.save_every_minutes: .* of at most"),
        (["data.train.0.weight=1e22"], "data.train.0.weight: expected a number of at most 10000"),
        (["data.feature_cache_gb=1e300"], "data.feature_cache_gb: .* of at most"),
        ([f"{LANGUAGE}.config.rms_norm_eps=.inf"], "rms_norm_eps: expected a finite number"),
        ([f"{LANGUAGE}.tokenizer=''"], f"{LANGUAGE}.tokenizer: expected text that is not empty"),
        (["output_dir=''"], "output_dir: expected text that is not empty"),
        (["output_dir=' '"], "output_dir: expected text that is not empty"),
        (["data.train.0.path=''"], "data.train.0.path: expected text that is not empty"),
        (["data.train.0.image_root=''"], "data.train.0.image_root: expected text that is not"),
        (["data.cache_dir=''"], "data.cache_dir: expected text that is not empty"),
        (["data.template=''"], "data.template: expected text that is not empty"),
        (["projector=''"], "projector: expected text that is not empty"),
        (
            ["train.deepspeed=zero3.json"],
            "'train.deepspeed' was removed; write 'train.sharding: zero2'",
        ),
        (
            ["train.sharding=fsdp2"],
            "'train.sharding: fsdp2' was renamed; write 'train.sharding: zero3'",
        ),
        (["train.tracking.dir=''"], "train.tracking.dir: expected text that is not empty"),
        (["lora.targets=['']"], "lora.targets.0: expected text that is not empty"),
        ([f"{TOWER}.weights=''"], f"{TOWER}.weights: expected text that is not empty"),
        ([*PACKED, "train.packing.round_to=4097"], "round_to is 4097, .* max_tokens, 4096"),
        ([*PACKED, "train.packing.round_to=99999999999999999"], "round_to: .* at most"),
        (["train.global_batch_size=99999999999"], "global_batch_size: .* of at most"),
        (["data.num_workers=99999999"], "data.num_workers: expected a number of at most 1024"),
        (["lora.r=99999999999"], "lora.r: expected a number of at most"),
        ([f"{TOWER}.image_size=99999999999"], "image_size: expected a number of at most"),
        (["model.projector_type=mlp99999999x_gelu"], "model.projector_type: found 'mlp9"),
        (["model.projector_type=resample"], "found 'resample', expected one of .*'resampler'"),
        (["model.num_queries=64"], "model: num_queries is for projector_type: resampler"),
        ([*RESAMPLER, "model.num_queries=200"], r"such as 64, 144 or 256 \(found 200\)"),
        ([*RESAMPLER, "model.num_queries=0"], "model.num_queries: expected"),
        (
            [*BUILT, f"{LANGUAGE}.config.num_hidden_layers=99999999999999999"],
            "config: num_hidden_layers: expected at most 1,000 layers .found 9999",
        ),
        (
            [f"{TOWER}.config.vision_cfg.layers=[3, 99999]"],
            "config: vision_cfg.layers: expected at",
        ),
        ([*BUILT, f"{LANGUAGE}.config.attention_dropout=-1"], "attention_dropout: expected a num"),
        ([*BUILT, f"{LANGUAGE}.config.attention_dropout=1e308"], "a number from 0 to 1 .found 1e"),
        ([*BUILT, f"{LANGUAGE}.config.attn_pdrop=2"], "attn_pdrop: expected a number from 0 to 1"),
        ([f"{TOWER}.config.drop_path_rate=1.5"], "drop_path_rate: expected a number from 0 to 1"),
        ([f"{TOWER}.config.width={10**30}"], "config.width: expected a whole number below 2"),
    ],
)
def test_a_value_that_no_run_can_use_is_refused_when_it_is_read(
    file: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, overrides)


@pytest.mark.parametrize("text", ["a\0b", "\ud800", "a\udfff"])
@pytest.mark.parametrize(
    "key",
    [
        "output_dir",
        "projector",
        "data.train.0.image_root",
        "data.cache_dir",
        "data.image_separator",
        "data.system",
        "train.tracking.dir",
        "train.trackers.0",
        "model.language_model.config.model_type",
    ],
)
def test_text_that_no_file_can_hold_is_refused_when_it_is_read(
    file: Path, key: str, text: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^{file}: {re.escape(key)}: .* \(found '"):
        load_config(file, [f"{key}={json.dumps(text)}"])


def test_keys_without_unicode_text_are_refused_in_every_kind_of_file() -> None:
    for section in (RunConfig, MixConfig, InstructConfig):
        with pytest.raises(ConfigError, match=r"f\.yaml: .*expected text without NUL"):
            settings.parse(section, {"output_dir": "x", "a\ud800": 1}, "f.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- a\n- b\n", "expected a mapping of keys, found list"),
        (SMALLEST + "seed: 1\nseed: 2\n", r"key 'seed' appears twice \(lines 9 and 10\)"),
        (SMALLEST.replace("output_dir: runs/x\n", ""), "key 'output_dir' is missing"),
        (
            SMALLEST.replace("learning_rate", "learning_rte").replace("global_batch_size: 8, ", ""),
            "unknown key 'optim.learning_rte'; did you mean 'optim.learning_rate', which is "
            "missing.; key 'train.global_batch_size' is missing",
        ),
        ("output_dir: x\n", "keys 'model', 'data', 'optim', 'train' are missing"),
        ("", "the file is empty"),
        ("\ufeff", "the file is empty"),
        ("# nothing\n", "contains only comments"),
        ("just text\n", "expected a mapping of keys, found str"),
        ("data:\n\tx: 2\n", "line 2, column 1: a tab where YAML needs spaces"),
        ("seed: 1\n---\nseed: 2\n", "line 2, column 1: a second document"),
        ("seed: *base\n", "line 1, column 7: the alias .base has no anchor &base"),
        ("seed: !!python/name:os.system\n", "the tag .* is not supported"),
        ("seed: a: b\n", "line 1, column 8: a second `:` on one line"),
        ("[1, 2]: 3\n", "line 1: a key must be plain text"),
        ("a: &a [*a]\n", "line 1: an alias is inside the value that it names"),
        ('{"seed": 1, "seed": 2}', "the key 'seed' appears twice"),
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


def test_merge_keys_and_anchors_work_and_share_nothing(file: Path) -> None:
    merged = """\
data:
  train:
    - &common {path: a.json, image_root: images, weight: 2}
    - {<<: *common, path: b.json}
  eval: [*common]
"""
    file.write_text(SMALLEST.replace("data:\n  train: [{path: a.json}]\n", merged))
    config = load_config(file, ["data.train.0.path=c.json"])
    assert [f.path for f in config.data.train] == ["c.json", "b.json"]
    assert config.data.train[1].image_root == "images" and config.data.train[1].weight == 2
    assert config.data.eval[0].path == "a.json"


def test_several_merged_sections_and_an_override_of_a_merged_key_are_no_duplicates() -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: [*b, {z: 3}], x: 4}\n"
    assert parse_yaml(text)["c"] == {"x": 4, "y": 2, "z": 3}


def test_aliases_that_expand_without_bound_are_refused_at_once() -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(YamlError, match="values once its aliases are expanded"):
        parse_yaml("a0: &a0 [x]\n" + "\n".join(levels))
    merges = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    with pytest.raises(YamlError, match="values once its aliases are expanded"):
        parse_yaml("a0: &a0 {x: 1}\n" + "\n".join(merges))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_another_encoding_is_named(file: Path, encoding: str) -> None:
    file.write_bytes(SMALLEST.encode(encoding))
    with pytest.raises(ConfigError, match="not UTF-8 but UTF-16 or UTF-32; save it as UTF-8"):
        load_config(file)


def test_a_byte_order_mark_and_json_with_tabs_are_read(file: Path) -> None:
    file.write_text("\ufeff" + SMALLEST)
    config = load_config(file)
    file.write_text(json.dumps(config.model_dump(mode="json"), indent="\t"))
    assert load_config(file) == config


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for part in [field.annotation, *get_args(field.annotation)]:
            if isinstance(part, type) and issubclass(part, Section):
                yield from fields_of(part, f"{prefix}{name}.")


JARGON = re.compile(
    r"Input|valid |pydantic|Extra inputs|instance of|type=|unable to parse|literal\b"
)


@pytest.mark.parametrize("section", [RunConfig, InstructConfig, MixConfig, SelectConfig])
def test_every_wrong_value_is_refused_in_plain_words(section: type[Section]) -> None:
    wrong = ["[]", "[[1]]", "{}", "{a: 1}", "null", "text", "-1", "1.5", ".nan", "true", "1e400"]
    tried = 0
    for path in fields_of(section):
        for value in wrong:
            tree: dict[str, Any] = {}
            node = tree
            *parents, last = path.split(".")
            for part in parents:
                node = node.setdefault(part, {})
            node[last] = parse_yaml(value)
            try:
                settings.parse(section, tree, "f.yaml")
            except ConfigError as error:
                tried += 1
                assert not JARGON.search(str(error)), str(error)
    assert tried > 200


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_file_name_is_refused(name: str) -> None:
    paths = {
        "output_dir": RunConfig,
        "projector": RunConfig,
        "data.train.0.path": RunConfig,
        "data.train.0.image_root": RunConfig,
        "data.cache_dir": RunConfig,
        "data.feature_cache": RunConfig,
        "model.vision_tower.weights": RunConfig,
        "train.tracking.dir": RunConfig,
    }
    for path, section in paths.items():
        tree: Any = {}
        node = tree
        *parents, last = path.split(".")
        for part in parents:
            child = {} if part != "train" or parents[0] != "data" else [{}]
            node = node[0] if part == "0" else node.setdefault(part, child)
        node[last] = name
        with pytest.raises(ConfigError, match="expected text that is not empty") as caught:
            settings.parse(section, tree, "f.yaml")
        assert path in str(caught.value)


def test_an_empty_file_name_is_refused_in_instruction_data_and_mixtures() -> None:
    for section, tree in (
        (MixConfig, {"output_dir": ""}),
        (MixConfig, {"sources": [{"name": "a", "path": ""}]}),
        (MixConfig, {"sources": [{"name": "a", "path": "b", "receipts": ""}]}),
        (MixConfig, {"guard": {"lists": {"mine": [""]}}}),
        (InstructConfig, {"output_dir": ""}),
        (InstructConfig, {"coco": {"images": ""}}),
        (InstructConfig, {"teacher": {"answers_dir": ""}}),
    ):
        with pytest.raises(ConfigError, match="expected text that is not empty"):
            settings.parse(section, tree, "f.yaml")


def test_names_of_other_programs_are_known_for_existing_settings_only() -> None:
    ours = {key.rpartition(".")[2] for key in flat(load_config(LLAVA_LORA))}
    assert set(_OTHER_NAMES.values()) <= ours | {"learning_rate"}
    assert not ours & _OTHER_NAMES.keys()
