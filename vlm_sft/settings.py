"""Typed YAML with `key.path=value` overrides; unknown keys are errors, told in one sentence."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from vlm_sft.errors import ConfigError, UserError
from vlm_sft.image_paths import current_directory_hint, nearest_existing
from vlm_sft.reading import parse_yaml, read_text


class Section(BaseModel):
    """A mapping of a YAML file; unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


SectionT = TypeVar("SectionT", bound=Section)


def load(section: type[SectionT], path: str | Path, overrides: Sequence[str] = ()) -> SectionT:
    """Read a YAML file, apply `key.path=value` overrides, and check every key and value.

    Raises:
        ConfigError: In one sentence, with the file, the key's path, what was found and expected;
            an unknown key names the nearest known one.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply_override(tree, override)
    return parse(section, tree, str(path))


def parse(section: type[SectionT], tree: Mapping[str, Any], where: str) -> SectionT:
    """Check a tree of plain values; `where` names it in errors.

    Raises:
        ConfigError: As `load`.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_one_sentence(section, error)}") from None


def dump(values: Section) -> str:
    """The values as YAML; `load` reads it back equal."""
    return yaml.safe_dump(values.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise ConfigError(
            f"{path}: no such configuration file{current_directory_hint(path)}"
            f"{nearest_existing(path)}; see configs/"
        ) from None
    except UserError as error:
        raise ConfigError(str(error), code=error.reason) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        tree = parse_yaml(text, _Loader)
    except yaml.YAMLError as error:
        detail = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid YAML: {detail}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(tree).__name__}")
    return tree


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys and reads `2e-5` as the number that it is."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, (list, dict)):
                raise yaml.YAMLError(f"line {line}: a key must be plain text")
            if key in seen:
                raise yaml.YAMLError(f"line {line}: key {key!r} appears twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _install_float_resolver() -> None:
    import re

    pattern = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    _Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+.0123456789"))


_install_float_resolver()


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, raw = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: expected key.path=value")
    try:
        value = parse_yaml(raw, _Loader) if raw else None
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not valid YAML; quote it") from None
    node: Any = tree
    parts = key.split(".")
    for depth, part in enumerate(parts[:-1]):
        node = _descend(node, part, ".".join(parts[: depth + 1]), override)
    last = parts[-1]
    if isinstance(node, list):
        node[_list_index(node, last, key, override)] = value
    else:
        node[last] = value


def _descend(node: Any, part: str, path: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, part, path, override)]
    child = node.get(part)
    if child is None:
        child = node[part] = {}
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override {override!r}: {path} is a value, not a section")
    return child


def _list_index(node: list[Any], part: str, path: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"override {override!r}: {path}: expected an index from 0 to {len(node) - 1}"
        )
    return int(part)


def _one_sentence(section: type[Section], error: ValidationError) -> str:
    first = error.errors()[0]
    location = [part for part in first["loc"] if not str(part).startswith(("list[", "literal["))]
    path = ".".join(str(part) for part in location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"unknown key {path!r}{_nearest_hint(section, location)}{more}"
    if first["type"] == "missing":
        return f"key {path!r} is missing; add it{more}"
    message = first["msg"].removeprefix("Value error, ")
    found = first["input"]
    shown = f" (found {found!r})" if isinstance(found, (str, int, float, type(None))) else ""
    return f"{path or 'the file'}: {message}{shown}{more}"


def _nearest_hint(section: type[Section], location: Sequence[Any]) -> str:
    known = _known_keys(section, location[:-1])
    everywhere = dict(_all_paths(section, ""))
    if str(location[-1]) in everywhere:
        return f"; did you mean {everywhere[str(location[-1])]!r}?"
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {'.'.join([*map(str, location[:-1]), near[0]])!r}?"
    return f"; known here: {', '.join(known)}"


def _known_keys(section: type[BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        child = _section_of(section.model_fields[part].annotation)
        if child is None:
            return []
        section = child
    return list(section.model_fields)


def _all_paths(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        yield name, prefix + name
        child = _section_of(field.annotation)
        if child is not None:
            yield from _all_paths(child, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = _section_of(argument)
        if found is not None:
            return found
    return None
