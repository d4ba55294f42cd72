"""Old keys are refused with their new names; stored configurations are translated."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from vlm_sft.config.renamed import RENAMED, refuse_renamed, translate_renamed
from vlm_sft.config.resume import flat
from vlm_sft.config.schema import dump_config, load_config, load_stored_config
from vlm_sft.errors import ConfigError

TINY = Path(__file__).parents[2] / "configs" / "tiny" / "stage1.yaml"
OLD = {
    "data": {"recipe": "fixed"},
    "train": {
        "share_prefixes": False,
        "on_non_finite": "skip",
        "background_saving": False,
        "keep_checkpoints": 7,
        "deepspeed": None,
        "sharding": "fsdp2",
    },
}


def test_every_new_name_is_a_setting() -> None:
    known = flat(load_config(TINY))
    for renamed in RENAMED.values():
        assert renamed.key in known if renamed.key else renamed.hint


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.recipe=fixed", "'data.recipe' was renamed; write 'data.llava_quirks: none'"),
        ("data.recipe=llava-1.5", "'data.recipe' was renamed; write 'data.llava_quirks'"),
        (
            "train.keep_checkpoints=3",
            "'train.keep_checkpoints' was renamed; write 'train.keep_last_checkpoints'",
        ),
    ],
)
def test_an_old_key_is_refused_with_the_new_one(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TINY, [override])
    assert str(caught.value) == f"{TINY}: {message}"


def test_all_old_keys_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"data\.llava_quirks.*train\.async_checkpointing"):
        refuse_renamed(OLD, "run.yaml")


def test_a_stored_configuration_with_old_keys_is_read(tmp_path: Path) -> None:
    tree: dict[str, Any] = yaml.safe_load(dump_config(load_config(TINY)))
    for section, values in OLD.items():
        for name, value in values.items():
            new_key = RENAMED[f"{section}.{name}"].key
            if new_key is not None:
                del tree[section][new_key.split(".")[1]]
            tree[section][name] = value
    stored = tmp_path / "config.yaml"
    stored.write_text(yaml.safe_dump(tree))
    expected = load_config(
        TINY,
        [
            "train.keep_last_checkpoints=7",
            "train.on_nonfinite_loss=skip",
            "train.async_checkpointing=false",
            "train.sharding=zero3",
        ],
    )
    assert load_stored_config(stored) == expected
    with pytest.raises(ConfigError, match=r"'data\.recipe' was renamed"):
        load_config(stored)


def test_translation_leaves_the_stored_values_alone() -> None:
    tree = {"data": {"recipe": "llava-1.5", "max_length": 3}, "seed": 1}
    translated = translate_renamed(tree)
    assert translated == {"data": {"llava_quirks": "llava-1.5", "max_length": 3}, "seed": 1}
    assert tree == {"data": {"recipe": "llava-1.5", "max_length": 3}, "seed": 1}
    assert translate_renamed({"seed": 1, "data": None}) == {"seed": 1, "data": None}
