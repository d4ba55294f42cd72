"""Settings that were renamed: an error for the user's files, a translation for stored ones.

A configuration file or an override with an old key is refused with the new one. A configuration
that an earlier version stored in a run directory or a checkpoint is translated when it is read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vlm_sft.errors import ConfigError


@dataclass(frozen=True)
class Renamed:
    """How a setting of an earlier version is written now.

    Attributes:
        key: The new key; None if the setting was removed.
        values: The values that were renamed, old to new.
        hint: What to do instead of a setting that was removed.
    """

    key: str | None
    values: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""


RENAMED: Final[Mapping[str, Renamed]] = {
    "data.recipe": Renamed("data.llava_quirks", {"fixed": "none"}),
    "train.share_prefixes": Renamed("train.share_image_prefix"),
    "train.on_non_finite": Renamed("train.on_nonfinite_loss"),
    "train.background_saving": Renamed("train.async_checkpointing"),
    "train.keep_checkpoints": Renamed("train.keep_last_checkpoints"),
    "train.sharding": Renamed("train.sharding", {"fsdp2": "zero3"}),
    "train.deepspeed": Renamed(
        None,
        hint="write 'train.sharding: zero2' for ZeRO stage 1 or 2, or 'train.sharding: zero3' for "
        "stage 3 (docs/multi-gpu.md maps the other settings)",
    ),
}
"""Settings of earlier versions, by their old keys. A key can stay while a value is renamed."""


def refuse_renamed(tree: Mapping[str, Any], where: str) -> None:
    """Refuse old keys and old values, naming the new ones.

    Raises:
        ConfigError: Names every old setting and its replacement in one sentence.
    """
    sentences = [_sentence(old, value) for old, value in _old_settings(tree)]
    if sentences:
        raise ConfigError(f"{where}: {'; '.join(sentences)}")


def translate_renamed(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored configuration with the new names; settings that were removed are dropped."""
    translated = {key: _copied(value) for key, value in tree.items()}
    for old, value in _old_settings(tree):
        renamed = RENAMED[old]
        section, name = old.split(".")
        if renamed.key != old:
            del translated[section][name]
        if renamed.key is not None:
            section, name = renamed.key.split(".")
            translated.setdefault(section, {})[name] = _new_value(renamed, value)
    return translated


def _old_settings(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the key and value of every setting that has an old key or an old value."""
    for old, renamed in RENAMED.items():
        section, name = old.split(".")
        values = tree.get(section)
        if isinstance(values, Mapping) and name in values:
            value = values[name]
            if renamed.key != old or (isinstance(value, str) and value in renamed.values):
                yield old, value


def _new_value(renamed: Renamed, value: Any) -> Any:
    return renamed.values.get(value, value) if isinstance(value, str) else value


def _sentence(old: str, value: Any) -> str:
    renamed = RENAMED[old]
    if renamed.key is None:
        return f"{old!r} was removed; {renamed.hint}"
    new = _new_value(renamed, value)
    setting = renamed.key if new == value else f"{renamed.key}: {new}"
    written = old if renamed.key != old else f"{old}: {value}"
    return f"'{written}' was renamed; write '{setting}'"


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else value
