"""Load typed YAML files with `key.path=value` overrides; errors are one sentence."""

import codecs
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from vlm_sft.config.validation_errors import in_words
from vlm_sft.config.yaml_text import YamlError, parse_yaml
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.utils.escape import shortened
from vlm_sft.utils.image_paths import current_directory_hint, nearest_existing
from vlm_sft.utils.reading import StrictJsonError, parse_json, read_bytes


class Section(BaseModel):
    """A section of a YAML file; unknown keys and wrong types are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True
    )


SectionT = TypeVar("SectionT", bound=Section)


def load(section: type[SectionT], path: str | Path, overrides: Sequence[str] = ()) -> SectionT:
    """Read a YAML file, apply `key.path=value` overrides, and check every key and value.

    Raises:
        ConfigError: One sentence with the file, the key, the value and what was expected. An
            unknown key is reported with the nearest known one.
    """
    return parse(section, read_tree(path, overrides), str(path))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML file and apply `key.path=value` overrides; keys and values are not checked yet.

    Raises:
        ConfigError: The file cannot be read or is not a mapping, or an override is malformed.
    """
    tree = _read_file(Path(path))
    for position, override in enumerate(overrides):
        _apply_override(tree, override, overrides[position + 1 :])
    return tree


def parse(section: type[SectionT], tree: Mapping[str, Any], where: str) -> SectionT:
    """Check a nested mapping of plain values; `where` names it in errors.

    Raises:
        ConfigError: As `load`.
    """
    _refuse_unusable(tree, where)
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {in_words(section, error)}") from None


def _refuse_unusable(tree: Mapping[str, Any], where: str) -> None:
    """Refuse text, keys and numbers, at any depth, that a file or file name cannot contain.

    YAML and JSON have escapes for NUL and for lone surrogates, and YAML has infinities.
    """
    waiting: list[tuple[str, Any]] = [("", tree)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(key or "a key", name) for name in value if isinstance(name, str)]
            waiting += [(f"{key}.{name}".lstrip("."), child) for name, child in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(f"{key}.{index}", child) for index, child in enumerate(value)]
        elif (expected := _expected_instead(value)) is not None:
            found = shortened(repr(value), 200)
            raise ConfigError(f"{where}: {key}: expected {expected} (found {found})")


def _expected_instead(value: Any) -> str | None:
    if isinstance(value, str):
        usable = "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
        return None if usable else "text without NUL or lone surrogates"
    if isinstance(value, float):
        return None if math.isfinite(value) else "a finite number"
    if isinstance(value, int):
        return None if abs(value) < 2**63 else "a whole number below 2**63"
    return None


def dump(values: Section) -> str:
    """Return the values as YAML, from which `load` restores them."""
    return yaml.safe_dump(values.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_file(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty; see configs/ for examples")
    try:
        tree = _parse(text)
    except YamlError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if tree is None:
        raise ConfigError(f"{path}: the file contains only comments; see configs/ for examples")
    if isinstance(tree, list):
        raise ConfigError(
            f"{path}: expected a mapping of keys, found list; a configuration has `key: value` "
            "lines (a file of records belongs into data.train)"
        )
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected a mapping of keys, found {type(tree).__name__}; a configuration has "
            "`key: value` lines"
        )
    return tree


def _read_text(path: Path) -> str:
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"; did you mean {inside}?" if inside.is_file() else "; give a YAML file"
        raise ConfigError(f"{path}: no such configuration file: this is a folder{hint}")
    try:
        data = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{path}: no such configuration file{current_directory_hint(path)}"
            f"{nearest_existing(path)}; see configs/"
        ) from None
    except UserError as error:
        raise ConfigError(str(error), code=error.reason) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise ConfigError(f"{path}: not UTF-8 but UTF-16 or UTF-32; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _parse(text: str) -> Any:
    """Parse as JSON if it is JSON, which may be indented with tabs, else as YAML."""
    if text.lstrip().startswith("{"):
        try:
            return parse_json(text)
        except StrictJsonError as error:
            if error.reason == "json_duplicate_key":
                raise YamlError(str(error)) from None
    return parse_yaml(text)


def _apply_override(tree: dict[str, Any], override: str, following: Sequence[str]) -> None:
    key, separator, raw = override.partition("=")
    _require_form(override, following)
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected key.path=value")
    try:
        value = parse_yaml(raw) if raw else None
    except YamlError as error:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML ({error}); quote it"
        ) from None
    node: Any = tree
    parts = key.split(".")
    if "" in parts:
        raise ConfigError(f"override {override!r}: the key has an empty part; remove a dot")
    for depth, part in enumerate(parts[:-1]):
        node = _descend(node, part, ".".join(parts[: depth + 1]), override)
    last = parts[-1]
    if isinstance(node, list):
        node[_list_index(node, last, key, override)] = value
    else:
        node[last] = value


def _require_form(override: str, following: Sequence[str]) -> None:
    """Refuse `key = value`, `key value` and `key: value`, naming the correct form."""
    key, separator, raw = override.partition("=")
    after = list(following[:2])
    if after[:1] == ["="]:
        value = after[1] if len(after) > 1 else "VALUE"
    elif after and after[0].startswith("=") and not separator:
        value = after[0][1:]
    elif after and "=" not in after[0] and (not separator or not raw):
        value = after[0]
    else:
        return
    key = key.rstrip(":")
    raise ConfigError(
        f"override {override!r}: expected key.path=value without spaces: {key}={value}"
    )


def _descend(node: Any, part: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, part, path, override)]
    if not isinstance(node, dict):
        parent = path.rpartition(".")[0]
        raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
    child = node.get(part)
    if child is None:
        child = node[part] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override {override!r}: {path} is a value, not a section")
    return child


def _list_index(node: list[Any], part: str, path: str, override: str) -> int:
    if not node:
        raise ConfigError(f"override {override!r}: the list is empty; give the whole list")
    if not (part.isascii() and part.isdigit()) or int(part) >= len(node):
        raise ConfigError(
            f"override {override!r}: {path}: expected an index from 0 to {len(node) - 1}"
        )
    return int(part)
