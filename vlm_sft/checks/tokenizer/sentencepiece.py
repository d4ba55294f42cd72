"""SentencePiece vocabularies: the dummy space, and the backend against the original."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from vlm_sft.checks.tokenizer.case import PROBES, Case, Finding, text_of
from vlm_sft.checks.tokenizer.injection import UNUSUAL


def spelling(case: Case) -> Iterator[Finding]:
    """SentencePiece: the dummy space behind control tokens, and the model file itself."""
    state = json.loads(case.tokenizer.backend_tokenizer.to_str())
    scheme = _dummy_space(state)
    if scheme in ("always", "first"):
        yield from _legacy(case, state, scheme)
    file = _sentencepiece_file(case.tokenizer)
    if scheme is not None or file is not None:
        yield from _against_sentencepiece(case, file)


def _legacy(case: Case, state: dict[str, Any], scheme: str) -> Iterator[Finding]:
    """How many probes the other `legacy` setting would spell with other ids."""
    other = "first" if scheme == "always" else "always"
    mine, swapped = (Tokenizer.from_str(json.dumps(_respaced(state, s))) for s in (scheme, other))
    name = {"always": "legacy (a space piece behind every control token)", "first": "non-legacy"}
    differing = []
    for probe, _ in case.text_probes:
        text = text_of(case.exported, probe.conversation)
        pair = [t.encode(text, add_special_tokens=False).ids for t in (mine, swapped)]
        if pair[0] != pair[1]:
            differing.append(case.difference(*pair))
    number = f"{len(differing)} of {len(case.text_probes)} probes"
    if differing:
        yield Finding(
            "legacy_differs",
            "note",
            "legacy",
            f"this tokenizer is {name[scheme]}; as {name[other]} {number} would have other ids "
            f"({differing[0]})",
            "keep these tokenizer files with the model: libraries differ in their default",
        )
    else:
        yield Finding(
            "legacy", "good", "legacy", f"{name[scheme]}; as {name[other]} {number} would differ"
        )


def _dummy_space(state: dict[str, Any]) -> str | None:
    """Where a serialized tokenizer puts SentencePiece's space: always, first, never; or None."""
    for section in ("normalizer", "pre_tokenizer"):
        for step in _steps(state[section]):
            if step["type"] == "Prepend":
                return "always"
            if step["type"] == "Metaspace":
                return str(step.get("prepend_scheme", "always"))
    return None


def _respaced(state: dict[str, Any], scheme: str) -> dict[str, Any]:
    """The serialized tokenizer with its dummy space as `scheme` says."""
    kept = [s for s in _steps(state["normalizer"]) if not _writes_space(s)]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    steps = [s for s in _steps(state["pre_tokenizer"]) if s["type"] != "Metaspace"]
    return {
        **state,
        "normalizer": {"type": "Sequence", "normalizers": kept} if kept else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [space, *steps]},
    }


def _writes_space(step: dict[str, Any]) -> bool:
    return step["type"] == "Prepend" or (step["type"] == "Replace" and step.get("content") == "▁")


def _steps(section: dict[str, Any] | None) -> list[dict[str, Any]]:
    if section is None:
        return []
    return section.get("normalizers") or section.get("pretokenizers") or [section]


def _against_sentencepiece(case: Case, file: Path | None) -> Iterator[Finding]:
    """The `tokenizers` backend against SentencePiece itself, where its model file is there."""
    what = "sentencepiece"
    if file is None or importlib.util.find_spec("sentencepiece") is None:
        reason = "no tokenizer.model beside it" if file is None else "sentencepiece not installed"
        yield Finding("sentencepiece_absent", "note", what, f"not compared: {reason}")
        return
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(file))
    ordinary = [turn.text.strip() for probe in PROBES for turn in probe.conversation.turns]
    differing: list[tuple[str, str]] = []
    for text in (*ordinary, *UNUSUAL.values()):
        ours = case.tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = reference.encode(text)
        if ours != theirs:
            differing.append((text, case.difference(ours, theirs)))
    total = len(ordinary) + len(UNUSUAL)
    if not differing:
        words = f"{total} texts have the ids that {file.name} gives"
        yield Finding("sentencepiece", "good", what, words)
        return
    text, difference = differing[0]
    words = (
        f"{len(differing)} of {total} texts have other ids than {file.name} gives, first "
        f"{text[:30]!r} {difference}"
    )
    if text in ordinary:
        advice = "the model has not seen these spellings; make tokenizer.json from this file again"
        yield Finding("sentencepiece_differs", "warning", what, words, advice)
    else:
        advice = "ordinary text has the same ids; these rare spellings the model has not seen"
        yield Finding("sentencepiece_differs_rarely", "note", what, words, advice)


def _sentencepiece_file(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    named = getattr(tokenizer, "vocab_file", None)
    places = [Path(str(tokenizer.name_or_path)) / "tokenizer.model"]
    if isinstance(named, str) and named.endswith(".model"):
        places.insert(0, Path(named))
    return next((place for place in places if place.is_file()), None)
