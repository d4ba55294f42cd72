"""Every setting has a class on resume, and a difference is shown as a diff."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from vlm_sft.config.resume import (
    RULES,
    changes_between,
    flat,
    require_allowed,
    require_changeable,
    rule_of,
)
from vlm_sft.config.schema import RunConfig, load_config
from vlm_sft.errors import ConfigError

ROOT = Path(__file__).parent.parent
TINY = ROOT / "configs" / "tiny" / "stage2_lora.yaml"


def keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key that a configuration can have, without places in lists."""
    from vlm_sft.config.validation_errors import section_of

    found = []
    for name, field in section.model_fields.items():
        child = section_of(field.annotation)
        if child is not None:
            found += keys_of(child, f"{prefix}{name}.")
        found.append(prefix + name)
    return found


def test_every_setting_there_is_has_a_class_and_every_class_a_setting() -> None:
    keys = keys_of(RunConfig)
    sections = {key.rpartition(".")[0] for key in keys} - {""}
    leaves = [key for key in keys if key not in sections or key in RULES]
    assert [key for key in leaves if not _has_rule(key)] == []
    assert [key for key in RULES if key not in keys] == []


def _has_rule(key: str) -> bool:
    try:
        rule_of(key)
    except KeyError:
        return False
    return True


def test_a_list_of_sections_is_compared_setting_by_setting() -> None:
    config = load_config(TINY)
    assert "data.train.0.path" in flat(config)
    assert rule_of("data.train.0.weight") == "forbidden"
    assert rule_of("data.train.0.image_root") == "explicit"
    assert rule_of("model.language_model.config.hidden_size") == "forbidden"


def changed(*overrides: str) -> list[Any]:
    return changes_between(load_config(TINY), load_config(TINY, overrides))


def test_free_settings_need_no_word() -> None:
    assert (
        require_allowed(changed("train.log_every_steps=7", "data.num_workers=1"), [], "RUN") == []
    )


def test_an_explicit_one_is_shown_as_a_diff_with_the_flag_that_allows_it() -> None:
    changes = changed("optim.learning_rate.projector=0.5")
    before = load_config(TINY).optim.learning_rate.projector
    with pytest.raises(ConfigError) as caught:
        require_allowed(changes, [], "RUN")
    lines = str(caught.value).splitlines()
    assert lines[0] == "RUN holds a run with another configuration:"
    assert lines[1:3] == [
        f"  - optim.learning_rate.projector: {before!r}",
        "  + optim.learning_rate.projector: 0.5",
    ]
    assert "--allow-change optim.learning_rate.projector" in lines[3]
    for allowed in (["optim.learning_rate.projector"], ["optim"]):
        assert require_allowed(changes, allowed, "RUN") == changes
    with pytest.raises(ConfigError):
        require_allowed(changes, ["optim.learning_rate.pro"], "RUN")


def test_a_forbidden_one_stays_forbidden() -> None:
    changes = changed("seed=1", "optim.weight_decay=0.5")
    with pytest.raises(ConfigError, match="seed cannot change within a run"):
        require_allowed(changes, ["seed", "optim"], "RUN")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("seed", "it is forbidden to change"),
        ("train.log_every_steps", "it is free to change"),
        ("optim.learning_rat", "no such setting"),
    ],
)
def test_allowing_what_cannot_be_allowed_is_refused(name: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        require_changeable(load_config(TINY), [name])
