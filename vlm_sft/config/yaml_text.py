"""Parse YAML strictly: no duplicate keys, bounded aliases, one-sentence errors with the line."""

import re
from typing import Any, Final

import yaml

MAX_NODES: Final = 100_000
"""Maximum number of values after all aliases are expanded."""


class YamlError(yaml.YAMLError):
    """A text is not valid YAML, or not accepted; the message is one sentence."""


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, with `2e-5` read as a number as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text; None for an empty one.

    Anchors, aliases and merge keys (`<<: *name`) are supported. Aliases become copies, so that one
    of them can be changed by an override.

    Raises:
        YamlError: Wrong syntax, a duplicate key, an alias inside its own anchor, or aliases that
            expand to too many values.
    """
    try:
        loader = _Loader(text)  # refuses characters that YAML does not allow
    except yaml.YAMLError as error:
        raise YamlError(_in_words(error)) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _require_sound(node)
        return _unshared(loader.construct_document(node))
    except YamlError:
        raise
    except yaml.YAMLError as error:
        raise YamlError(_in_words(error)) from None
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise YamlError(f"a value cannot be read ({error}); quote it to have text") from None
    finally:
        loader.dispose()


def _require_sound(root: yaml.Node) -> None:
    """Refuse duplicate keys and aliases that refer to themselves or expand beyond `MAX_NODES`.

    Works on nodes, before merge keys are resolved: afterwards an overridden key of a merged mapping
    would look like a duplicate.
    """
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        known = sizes.get(id(node), 0)
        if known is None:
            raise YamlError(f"line {_line(node)}: an alias is inside the value that it names")
        if known:
            return known
        sizes[id(node)] = None
        if isinstance(node, yaml.MappingNode):
            _refuse_duplicates(node)
            total = 1 + sum(size(key) + size(value) for key, value in node.value)
        else:
            children = node.value if isinstance(node, yaml.SequenceNode) else []
            total = 1 + sum(map(size, children))
        if total > MAX_NODES:
            raise YamlError(
                f"line {_line(node)}: more than {MAX_NODES:,} values once its aliases are expanded"
            )
        sizes[id(node)] = total
        return total

    size(root)


def _refuse_duplicates(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise YamlError(f"line {_line(key)}: a key must be plain text")
        if key.value in lines:
            raise YamlError(
                f"key {key.value!r} appears twice (lines {lines[key.value]} and {_line(key)}); "
                "remove one"
            )
        lines[key.value] = _line(key)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(child) for key, child in value.items()}
    return [_unshared(child) for child in value] if isinstance(value, list) else value


def _in_words(error: yaml.YAMLError) -> str:
    """Return an error of PyYAML as one sentence with the line."""
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    if "'\\t'" in problem:
        return f"{place}a tab where YAML needs spaces; indent with spaces"
    if "expected a single document" in str(error):
        return f"{place}a second document (`---`) begins here; keep one"
    if match := re.search(r"found undefined alias '?([^']*)'?", problem):
        return f"{place}the alias *{match[1]} has no anchor &{match[1]} before it"
    if "could not determine a constructor" in problem:
        tag = problem.rsplit("tag ", 1)[-1].strip("'")
        return f"{place}the tag {tag!r} is not supported; remove it"
    if "mapping values are not allowed" in problem:
        return (
            f"{place}a second `:` on one line, or wrong indentation; quote text that contains `: `"
        )
    if "special characters are not allowed" in str(error):
        return "it contains control characters; save it as plain text"
    if "did not find expected" in problem or "expected <block end>" in problem:
        return f"{place}wrong indentation, or a bracket or quote that is not closed"
    return place + " ".join(problem.split())
