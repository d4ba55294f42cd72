"""Which settings may differ when a run goes on, and how a difference is told."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import ConfigError

Rule = Literal["free", "explicit", "forbidden"]

RULES: Mapping[str, Rule] = {
    "output_dir": "free",
    "seed": "forbidden",
    # Names and paths say where a thing lies; what it is, the manifest knows by its digest.
    "projector": "explicit",
    "model.vision_tower": "forbidden",
    "model.vision_tower.name": "explicit",
    "model.vision_tower.weights": "explicit",
    "model.projector_type": "forbidden",
    "model.language_model": "forbidden",
    "model.language_model.name": "explicit",
    "model.language_model.tokenizer": "explicit",
    "model.language_model.attn_implementation": "explicit",
    "lora": "forbidden",
    "data.train": "forbidden",
    "data.train.path": "explicit",
    "data.train.image_root": "explicit",
    "data.train.follow_symlinks": "free",
    "data.eval": "explicit",
    "data.template": "forbidden",
    "data.system": "forbidden",
    "data.image_separator": "explicit",
    "data.recipe": "forbidden",
    "data.max_length": "forbidden",
    "data.length_policy": "forbidden",
    "data.on_error": "explicit",
    "data.max_quarantined": "free",
    "data.image_aspect": "forbidden",
    "data.image_processing": "explicit",
    "data.feature_cache": "explicit",
    "data.feature_cache_gb": "free",
    "data.num_workers": "free",
    "data.cache_dir": "free",
    "optim": "explicit",
    "optim.optimizer": "forbidden",
    "train.epochs": "explicit",
    "train.max_steps": "explicit",
    "train.global_batch_size": "forbidden",
    "train.micro_batch_size": "explicit",
    "train.packing": "explicit",
    "train.share_prefixes": "forbidden",
    "train.precision": "explicit",
    "train.master_weights": "forbidden",
    "train.sharding": "explicit",
    "train.on_non_finite": "explicit",
    "train.max_skipped_steps": "free",
    "train.neftune_alpha": "explicit",
    "train.activation_checkpointing": "free",
    "train.compile": "explicit",
    "train.fp8": "explicit",
    "train.deterministic": "explicit",
    "train.group_by_length": "forbidden",
    "train.save_every_steps": "free",
    "train.save_every_minutes": "free",
    "train.background_saving": "free",
    "train.keep_checkpoints": "free",
    "train.eval_every_steps": "free",
    "train.eval_samples": "free",
    "train.log_every_steps": "free",
    "train.trackers": "free",
    "train.tracking": "free",
}
"""By key or by what it begins with, the longest counting; places in a list are left out.

`free` changes nothing of what is learned; `explicit` does, and must be asked for by name with
`--allow-change`; `forbidden` would make it another run.
"""


@dataclass(frozen=True)
class Change:
    """One setting that differs from what the run's checkpoints were made with."""

    key: str
    before: Any
    now: Any

    @property
    def rule(self) -> Rule:
        """What `RULES` says of its key."""
        return rule_of(self.key)


def rule_of(key: str) -> Rule:
    """The class of a setting, e.g. of `data.train.0.path`.

    Raises:
        KeyError: No rule covers it, which is a fault of this program.
    """
    parts = [part for part in key.split(".") if not part.isdigit()]
    while parts:
        if (rule := RULES.get(".".join(parts))) is not None:
            return rule
        parts.pop()
    raise KeyError(key)


def changes_between(before: RunConfig, now: RunConfig) -> list[Change]:
    """Every setting that differs, by key."""
    old, new = flat(before), flat(now)
    return [
        Change(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def require_allowed(changes: Sequence[Change], allowed: Sequence[str], where: str) -> list[Change]:
    """Refuse what may not change; the changes that were allowed by name.

    Args:
        changes: What differs.
        allowed: Keys, or what keys begin with (`optim`), that the user allows to change.
        where: The run folder, for the message.

    Raises:
        ConfigError: With the differences as a diff, and what to do about each.
    """
    differing = [change for change in changes if change.rule != "free"]
    granted = [c for c in differing if c.rule == "explicit" and _is_allowed(c.key, allowed)]
    if refused := [change for change in differing if change not in granted]:
        raise ConfigError(_diff(refused, where), code="settings_changed")
    return granted


def require_changeable(config: RunConfig, allowed: Sequence[str]) -> None:
    """Refuse a name under which no setting may be changed on request.

    Raises:
        ConfigError: It is no setting's, or one that is free or can never change.
    """
    for name in allowed:
        keys = [key for key in flat(config) if _is_allowed(key, [name])]
        if not any(rule_of(key) == "explicit" for key in keys):
            rules = {rule_of(key) for key in keys}
            why = (
                "no such setting" if not keys else f"it is {' and '.join(sorted(rules))} to change"
            )
            raise ConfigError(
                f"--allow-change {name}: {why}; give a key like optim.learning_rate.projector"
            )


def diff_lines(changes: Sequence[Change]) -> list[str]:
    """Two lines for every change, old and new."""
    return [
        line
        for change in changes
        for line in (f"  - {change.key}: {change.before!r}", f"  + {change.key}: {change.now!r}")
    ]


def _diff(refused: Sequence[Change], where: str) -> str:
    explicit = [change.key for change in refused if change.rule == "explicit"]
    forbidden = [change.key for change in refused if change.rule == "forbidden"]
    lines = [f"{where} holds a run with another configuration:", *diff_lines(refused)]
    if forbidden:
        lines.append(
            f"{', '.join(forbidden)} cannot change within a run; go back to what it was, or choose "
            "another output_dir"
        )
    if explicit:
        flags = " ".join(f"--allow-change {key}" for key in explicit)
        lines.append(f"to go on with the new {', '.join(explicit)}, add {flags}")
    return "\n".join(lines)


def _is_allowed(key: str, allowed: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by its full key; what stands in a list of sections has its place as a part."""
    return dict(_leaves(config.model_dump(mode="json"), ""))


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
