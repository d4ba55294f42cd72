"""Turn pydantic's validation errors into one plain sentence."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

from vlm_sft.utils.escape import shortened

_MAX_SENTENCES: Final = 4
"""Errors that are described; further ones are only counted."""

_EXPECTED: Final[Mapping[str, str]] = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section of keys and values",
    "model_type": "a section of keys and values",
    "model_attributes_type": "a section of keys and values",
    "literal_error": "{expected}",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "at least {min_length} entries",
    "too_long": "at most {max_length} entries",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "none_required": "null",
}
"""The expected value by pydantic's error type, a format string for the error's context."""

_OTHER_NAMES: Final[Mapping[str, str]] = {
    "bf16": "precision",
    "fp16": "precision",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_accumulation_steps": "global_batch_size",
    "image_aspect_ratio": "image_aspect",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "mm_projector_lr": "learning_rate",
    "model_max_length": "max_length",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch_size",
    "save_steps": "save_every_steps",
    "save_total_limit": "keep_last_checkpoints",
    "target_modules": "targets",
}
"""Names that transformers, peft and LLaVA have for settings, with ours."""

Problem = Mapping[str, Any]
Path = tuple[str | int, ...]


def in_words(section: type[BaseModel], error: ValidationError) -> str:
    """Return the errors as one sentence.

    Unknown keys come first, each with the key that was probably intended, then all missing keys,
    then wrong values.
    """
    problems = [(_path(problem), problem) for problem in error.errors()]
    missing = [path for path, problem in problems if problem["type"] == "missing"]
    sentences: list[str] = []
    for path, problem in problems:
        if problem["type"] == "extra_forbidden":
            sentence, meant = _unknown(section, path, problem["input"], missing)
            sentences.append(sentence)
            missing = [other for other in missing if other != meant]
    if missing:
        names = ", ".join(repr(_dotted(path)) for path in missing)
        one = len(missing) == 1
        sentences.append(
            f"key{'' if one else 's'} {names} {'is' if one else 'are'} missing; add "
            + ("it" if one else "them")
        )
    sentences += _wrong_values(problems)
    more = len(sentences) - _MAX_SENTENCES
    return "; ".join(sentences[:_MAX_SENTENCES]) + (f" (and {more} more)" if more > 0 else "")


def _path(problem: Problem) -> Path:
    """Return the path of the value, without pydantic's names for the members of a union."""
    return tuple(part for part in problem["loc"] if not _is_union_member(part))


def _is_union_member(part: str | int) -> bool:
    text = str(part)
    names = ("str", "int", "float", "bool", "none", "constrained-str", "constrained-int")
    return "[" in text or ("-" in text and text.startswith("function")) or text in names


def _dotted(path: Path) -> str:
    return ".".join(map(str, path))


def _wrong_values(problems: Sequence[tuple[Path, Problem]]) -> Iterator[str]:
    """Yield a sentence for every wrong value; the errors of a union's members are joined."""
    places: dict[Path, list[Problem]] = {}
    for path, problem in problems:
        if problem["type"] not in ("extra_forbidden", "missing"):
            places.setdefault(path, []).append(problem)
    for path, found in places.items():
        # Of a union's members, report the one whose validation got furthest.
        if any(len(other) > len(path) and other[: len(path)] == path for other in places):
            continue
        yield _wrong_value(path, found)


def _wrong_value(path: Path, found: Sequence[Problem]) -> str:
    problem = found[0]
    if problem["type"] in ("value_error", "assertion_error"):
        message = (
            str(problem["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
        )
        return f"{_dotted(path)}: {message}" if path else message
    expected = " or ".join(dict.fromkeys(_expected(each) for each in found))
    value = problem["input"]
    hint = _nearest_choice(value, found)
    return f"{_dotted(path) or 'the file'}: expected {expected} (found {_shown(value)}){hint}"


def _expected(problem: Problem) -> str:
    context = {
        key: f"{value:g}" if isinstance(value, float) else value
        for key, value in problem.get("ctx", {}).items()
    }
    if problem["type"] == "string_pattern_mismatch":
        return f"text of the form {context['pattern']}"
    words = _EXPECTED.get(problem["type"])
    return "another value" if words is None else words.format(**context)


def _nearest_choice(value: Any, found: Sequence[Problem]) -> str:
    choices = [
        word.strip(" '")
        for problem in found
        if problem["type"] == "literal_error"
        for word in str(problem["ctx"]["expected"]).replace(" or ", ",").split(",")
    ]
    near = difflib.get_close_matches(str(value), choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        keys = ", ".join(map(str, list(value)[:3]))
        return f"a section with {keys}" if value else "an empty section"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shortened(repr(value), 200)


def _unknown(
    section: type[BaseModel], path: Path, value: Any, missing: Sequence[Path]
) -> tuple[str, Path]:
    """Return the sentence about an unknown key, and the missing key that was probably intended."""
    key, parents = str(path[-1]), path[:-1]
    absent = {str(other[-1]): other for other in missing if other[:-1] == parents}
    start = f"unknown key {_dotted(path)!r}"
    if near := difflib.get_close_matches(key, absent, n=1, cutoff=0.4):
        meant = absent[near[0]]
        return f"{start}; did you mean {_dotted(meant)!r}, which is missing?", meant
    full = path
    while isinstance(value, Mapping) and len(value) == 1:  # an override in an unknown section
        inner, value = next(iter(value.items()))
        full = (*full, str(inner))
    if (meant_path := _same_ignoring_form(section, _dotted(full))) is not None:
        start = f"unknown key {_dotted(full)!r}"
        return f"{start}; did you mean {meant_path!r}?", ()
    everywhere = dict(_all_paths(section, ""))
    if (meant_name := _OTHER_NAMES.get(key, key)) in everywhere:
        return f"{start}; did you mean {everywhere[meant_name]!r}?", ()
    known = _known_keys(section, parents)
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f"{start}; did you mean {_dotted((*parents, near[0]))!r}?", ()
    if near := difflib.get_close_matches(key, everywhere, n=1, cutoff=0.8):
        return f"{start}; did you mean {everywhere[near[0]]!r}?", ()
    return f"{start}; known here: {', '.join(known)}", ()


def nearest_setting(section: type[BaseModel], key: str) -> str | None:
    """Return the full key of the setting that was probably meant; None if none is near.

    Case, dashes for underscores and a wrong or missing section do not matter: `max-steps` and
    `training.max_steps` are `train.max_steps`. Otherwise the last part is compared by spelling.
    """
    if (same := _same_ignoring_form(section, key)) is not None:
        return same
    everywhere = dict(_all_paths(section, ""))
    last = _plain(key).rpartition(".")[2]
    if (known := _OTHER_NAMES.get(last)) is not None:
        return everywhere[known]
    near = difflib.get_close_matches(last, everywhere, n=1, cutoff=0.8)
    return everywhere[near[0]] if near else None


def _same_ignoring_form(section: type[BaseModel], key: str) -> str | None:
    """Return the setting whose last part is that of `key`, of several the one most like `key`."""
    plain = _plain(key)
    last = plain.rpartition(".")[2]
    same = [path for name, path in _all_paths(section, "") if name == last and path != key]

    def likeness(path: str) -> float:
        return difflib.SequenceMatcher(None, plain, path).ratio()

    return max(same, key=likeness, default=None)


def _plain(key: str) -> str:
    return key.replace("-", "_").lower()


def _known_keys(section: type[BaseModel], path: Path) -> list[str]:
    for part in path:
        if isinstance(part, int):
            continue
        child = section_of(section.model_fields[part].annotation)
        if child is None:
            return []
        section = child
    return list(section.model_fields)


def _all_paths(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in section.model_fields.items():
        yield name, prefix + name
        child = section_of(field.annotation)
        if child is not None:
            yield from _all_paths(child, f"{prefix}{name}.")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section in a field's annotation, alone, in a union or in a list; or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in get_args(annotation):
        found = section_of(argument)
        if found is not None:
            return found
    return None
