"""Compare the configuration of a resumed run with the one that the run was started with.

Every field of the schema carries its own resume policy: `Free`, `Explicit` or `Forbidden`.
"""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from vlm_sft.config.fields import RESUME_POLICIES, ResumePolicy
from vlm_sft.config.schema import RunConfig
from vlm_sft.config.validation_errors import section_of
from vlm_sft.errors import ConfigError


@dataclass(frozen=True)
class Change:
    """A setting whose value differs from the one that the run's checkpoints were trained with."""

    key: str
    before: Any
    now: Any

    @property
    def policy(self) -> ResumePolicy:
        """The resume policy of the setting."""
        return resume_policy(self.key)


def resume_policy(key: str) -> ResumePolicy:
    """Return the resume policy of a setting, e.g. of `data.train.0.path`.

    A section that can be absent and a list of sections have a policy of their own, for adding and
    removing them. It also limits the fields inside: the most permissive policy on the way to a
    setting applies. (`weight` is forbidden to change in `data.train`, but not in `data.eval`.)

    Raises:
        KeyError: If there is no such setting.
    """
    section: type[BaseModel] = RunConfig
    policies: list[ResumePolicy] = []
    for part in key.split("."):
        if part.isdigit():
            continue
        field = section.model_fields.get(part)
        if field is None:
            raise KeyError(key)
        if isinstance(field.json_schema_extra, dict):
            policies.append(field.json_schema_extra["on_resume"])  # type: ignore[arg-type]
        child = section_of(field.annotation)
        if child is None:  # a setting; further parts of the key are inside its value
            break
        section = child
    if not policies:
        raise KeyError(key)
    return min(policies, key=RESUME_POLICIES.index)


def changes_between(before: RunConfig, now: RunConfig) -> list[Change]:
    """Return every setting whose value differs, sorted by key."""
    old, new = flat(before), flat(now)
    return [
        Change(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def require_allowed(changes: Sequence[Change], allowed: Sequence[str], where: str) -> list[Change]:
    """Refuse the changes that the resume policy and the user do not allow.

    Args:
        changes: The differences between the two configurations.
        allowed: Values of `--allow-change`: keys, or prefixes of keys such as `optim`.
        where: The run directory, for the message.

    Returns:
        The changes of `explicit` settings that the user allowed.

    Raises:
        ConfigError: Shows the refused differences as a diff and says what to do about each.
    """
    differing = [change for change in changes if change.policy != "free"]
    granted = [c for c in differing if c.policy == "explicit" and _is_allowed(c.key, allowed)]
    if refused := [change for change in differing if change not in granted]:
        raise ConfigError(_refusal(refused, where), code="settings_changed")
    return granted


def require_changeable(config: RunConfig, allowed: Sequence[str]) -> None:
    """Refuse a value of `--allow-change` that does not name a setting with the policy `explicit`.

    Raises:
        ConfigError: If there is no such setting, or it is free or forbidden to change.
    """
    for name in allowed:
        policies = {resume_policy(key) for key in flat(config) if _is_allowed(key, [name])}
        if "explicit" not in policies:
            why = f"it is {' and '.join(sorted(policies))} to change"
            raise ConfigError(
                f"--allow-change {name}: {why if policies else 'no such setting'}; give a key "
                "like optim.learning_rate.projector"
            )


def diff_lines(changes: Sequence[Change]) -> list[str]:
    """Return two lines per change, with the old and the new value."""
    return [
        line
        for change in changes
        for line in (f"  - {change.key}: {change.before!r}", f"  + {change.key}: {change.now!r}")
    ]


def _refusal(refused: Sequence[Change], where: str) -> str:
    explicit = [change.key for change in refused if change.policy == "explicit"]
    forbidden = [change.key for change in refused if change.policy == "forbidden"]
    lines = [f"{where} contains a run with another configuration:", *diff_lines(refused)]
    if forbidden:
        lines.append(
            f"{', '.join(forbidden)} cannot change within a run; restore the old value, or choose "
            f"another output_dir, e.g. output_dir={unused_name(where)}"
        )
    if explicit:
        flags = " ".join(f"--allow-change {key}" for key in explicit)
        lines.append(
            f"to resume with the new {', '.join(explicit)}, add {flags}; to start another run, "
            f"choose another output_dir, e.g. output_dir={unused_name(where)}"
        )
    return "\n".join(lines)


def unused_name(folder: str) -> str:
    """Return a name like that of a folder under which there is nothing yet: `runs/a-2`."""
    names = (f"{folder.rstrip('/')}-{number}" for number in itertools.count(2))
    return next(name for name in names if not os.path.lexists(name))


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def flat(config: RunConfig) -> dict[str, Any]:
    """Return every setting by its full key; a list of sections contributes its indices."""
    return flat_tree(config.model_dump(mode="json"))


def flat_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a nested mapping by their full keys, as `flat` does."""
    return dict(_leaves(tree, ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
