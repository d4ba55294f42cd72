"""Every setting has a resume policy, and a difference is shown as a diff."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vlm_sft.config.fields import RESUME_POLICIES
from vlm_sft.config.resume import (
    changes_between,
    flat,
    require_allowed,
    require_changeable,
    resume_policy,
)
from vlm_sft.config.schema import RunConfig, load_config
from vlm_sft.config.validation_errors import section_of
from vlm_sft.errors import ConfigError

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny" / "stage2_lora.yaml"


def fields_of(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every field of a section and of the sections in it, with its key."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        child = section_of(field.annotation)
        if child is not None:
            yield from fields_of(child, f"{prefix}{name}.")


def own_policy(field: FieldInfo) -> Any:
    return (field.json_schema_extra or {}).get("on_resume")  # type: ignore[union-attr]


def test_every_setting_has_a_resume_policy() -> None:
    for key, field in fields_of(RunConfig):
        always_there = field.annotation is section_of(field.annotation)
        expected = [None] if always_there else RESUME_POLICIES
        assert own_policy(field) in expected, key


def test_a_list_of_sections_is_compared_setting_by_setting() -> None:
    config = load_config(TINY)
    assert "data.train.0.path" in flat(config)
    assert resume_policy("data.train.0.weight") == "forbidden"
    assert resume_policy("data.eval.0.weight") == "explicit"
    assert resume_policy("train.tracking.name") == "free"
    assert resume_policy("data.train.0.image_root") == "explicit"
    assert resume_policy("model.language_model.config.hidden_size") == "forbidden"


def changed(*overrides: str) -> list[Any]:
    return changes_between(load_config(TINY), load_config(TINY, overrides))


def test_free_settings_need_no_permission() -> None:
    assert (
        require_allowed(changed("train.log_every_steps=7", "data.num_workers=1"), [], "RUN") == []
    )


def test_an_explicit_one_is_shown_as_a_diff_with_the_flag_that_allows_it() -> None:
    changes = changed("optim.learning_rate.projector=0.5")
    before = load_config(TINY).optim.learning_rate.projector
    with pytest.raises(ConfigError) as caught:
        require_allowed(changes, [], "RUN")
    lines = str(caught.value).splitlines()
    assert lines[0] == "RUN contains a run with another configuration:"
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


def test_an_unknown_setting_has_no_policy() -> None:
    for key in ("trian.epochs", "train", "model.vision_tower"):
        with pytest.raises(KeyError):
            resume_policy(key)


def test_an_adapter_cannot_be_added_to_a_run() -> None:
    with pytest.raises(ConfigError, match=r"lora\.r, .*cannot change within a run"):
        require_allowed(
            changes_between(load_config(TINY, ["lora=null"]), load_config(TINY)), ["lora"], "RUN"
        )
