"""Find out once, by a small request, which parameters a server accepts, and record it."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from data_tools.instruct.config import TeacherConfig
from data_tools.instruct.generate.teachers.completions import LENGTHS, Reply, RequestFormat, strict
from data_tools.instruct.generate.teachers.faults import Fault
from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.reading import read_json

Attempts = Callable[[str, dict[str, Any]], Awaitable[tuple[Reply | Fault, int]]]

MODES: Final = ("json_schema", "json_object", "none")
"""Ways to ask for JSON, the strictest first."""
_TOKENS: Final = 64
"""Longest answer to a probe."""
_QUESTION: Final = "Say hello to the reader in one short sentence. (If asked for JSON: as JSON.)"
_SCHEMA: Final = {"type": "object", "properties": {"greeting": {"type": "string"}}}


async def find_request_format(
    config: TeacherConfig,
    urls: list[str],
    parameters: dict[str, Any],
    found: Path,
    attempts: Attempts,
) -> RequestFormat:
    """Return what `found` has recorded for this server and model, or probe the server.

    The probes carry the run's own sampling parameters. A server that accepts a JSON schema and then
    ignores it counts as not supporting schemas.

    Raises:
        UserError: The server accepts no request at all.
    """
    if config.structured != "auto":
        return RequestFormat(config.structured)
    identity = {"base_url": urls, "model": parameters.get("model")}
    known = _known(found, identity)
    if known is not None:
        return known
    request_format, tried = await _probe(config.section, parameters, attempts)
    settled = {"structured": request_format.structured, "length": request_format.length}
    write_json(found, {**identity, **settled, "tried": tried})
    return request_format


def _known(found: Path, identity: dict[str, Any]) -> RequestFormat | None:
    try:
        values = read_json(found)
        known = values["structured"] in MODES and values["length"] in LENGTHS
        if known and {name: values[name] for name in identity} == identity:
            return RequestFormat(values["structured"], values["length"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return None


async def _probe(
    section: str, parameters: dict[str, Any], attempts: Attempts
) -> tuple[RequestFormat, list[dict[str, str]]]:
    tried: list[dict[str, str]] = []
    length = LENGTHS[0]
    message = ""
    for mode in MODES:
        outcome = await _try(parameters, mode, length, attempts)
        if isinstance(outcome, Fault) and outcome.parameter == LENGTHS[0]:
            length = LENGTHS[1]
            tried.append({"structured": mode, "outcome": f"{LENGTHS[0]} refused, {length} tried"})
            outcome = await _try(parameters, mode, length, attempts)
        if isinstance(outcome, Fault):
            message = outcome.message
            tried.append({"structured": mode, "outcome": message})
            if outcome.reason != "refused":
                break
            continue
        kept = mode != "json_schema" or _keeps_to_the_schema(outcome)
        tried.append({"structured": mode, "outcome": "taken" if kept else "taken and ignored"})
        if kept:
            return RequestFormat(mode, length), tried
    raise UserError(
        f"{section}: the small request that finds out which parameters the server accepts failed: "
        f"{message}; fix that, or set {section}.structured",
        code="teacher_refused",
    )


async def _try(
    parameters: dict[str, Any], mode: str, length: str, attempts: Attempts
) -> Reply | Fault:
    others = {name: value for name, value in parameters.items() if name not in LENGTHS}
    messages = [{"role": "user", "content": _QUESTION}]
    body: dict[str, Any] = {"messages": messages, **others, length: _TOKENS}
    if mode == "json_schema":
        form = {"name": "greeting", "strict": True, "schema": strict(_SCHEMA)}
        body["response_format"] = {"type": mode, "json_schema": form}
    elif mode == "json_object":
        body["response_format"] = {"type": mode}
    outcome, _ = await attempts(f"probe-{mode}", body)
    return outcome


def _keeps_to_the_schema(reply: Reply) -> bool:
    if reply.finish == "length":  # truncated, but in the requested form
        return reply.text.lstrip().startswith("{")
    try:
        value = json.loads(reply.text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(value) == {"greeting"}
