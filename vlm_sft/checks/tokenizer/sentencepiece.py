"""Check SentencePiece vocabularies: the dummy space, and the backend against the original model."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from vlm_sft.checks.tokenizer.injection import UNUSUAL
from vlm_sft.checks.tokenizer.under_test import SAMPLES, Finding, TokenizerUnderTest, chat_text


def check_sentencepiece(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Check the dummy space after special tokens, and compare with the SentencePiece model file."""
    state = json.loads(tested.tokenizer.backend_tokenizer.to_str())
    scheme = _dummy_space(state)
    if scheme in ("always", "first"):
        yield from _check_legacy(tested, state, scheme)
    file = _sentencepiece_file(tested.tokenizer)
    if scheme is not None or file is not None:
        yield from _compare_with_model_file(tested, file)


def _check_legacy(
    tested: TokenizerUnderTest, state: dict[str, Any], scheme: str
) -> Iterator[Finding]:
    """Count the samples that have other ids under the other `legacy` setting.

    Legacy tokenizers put SentencePiece's dummy space before every piece of text, so also after
    each special token; others only before the first one.
    """
    other = "first" if scheme == "always" else "always"
    current, swapped = (
        Tokenizer.from_str(json.dumps(_with_dummy_space(state, s))) for s in (scheme, other)
    )
    name = {"always": "legacy (a space piece after every special token)", "first": "non-legacy"}
    differing = []
    for sample, _ in tested.text_samples:
        text = chat_text(tested.exported, sample.conversation)
        pair = [t.encode(text, add_special_tokens=False).ids for t in (current, swapped)]
        if pair[0] != pair[1]:
            differing.append(tested.describe_difference(*pair))
    number = f"{len(differing)} of {len(tested.text_samples)} samples"
    if differing:
        yield Finding(
            "legacy_differs",
            "note",
            "legacy",
            f"this tokenizer is {name[scheme]}; as {name[other]}, {number} would have other ids "
            f"({differing[0]})",
            "keep these tokenizer files with the model: libraries have different defaults",
        )
    else:
        yield Finding(
            "legacy", "good", "legacy", f"{name[scheme]}; as {name[other]}, {number} would differ"
        )


def _dummy_space(state: dict[str, Any]) -> str | None:
    """Return where a serialized tokenizer puts the dummy space: always, first, never; or None."""
    for section in ("normalizer", "pre_tokenizer"):
        for step in _steps(state[section]):
            if step["type"] == "Prepend":
                return "always"
            if step["type"] == "Metaspace":
                return str(step.get("prepend_scheme", "always"))
    return None


def _with_dummy_space(state: dict[str, Any], scheme: str) -> dict[str, Any]:
    """Return the serialized tokenizer with another `prepend_scheme` of its dummy space."""
    # A normalizer can write the space too; it is replaced by a pre-tokenizer, which has a scheme.
    normalizers = [s for s in _steps(state["normalizer"]) if not _writes_space(s)]
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    steps = [s for s in _steps(state["pre_tokenizer"]) if s["type"] != "Metaspace"]
    return {
        **state,
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [space, *steps]},
    }


def _writes_space(step: dict[str, Any]) -> bool:
    return step["type"] == "Prepend" or (step["type"] == "Replace" and step.get("content") == "▁")


def _steps(section: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, which may be a sequence of them."""
    if section is None:
        return []
    return section.get("normalizers") or section.get("pretokenizers") or [section]


def _compare_with_model_file(tested: TokenizerUnderTest, file: Path | None) -> Iterator[Finding]:
    """Compare the ids of the `tokenizers` backend with those of the SentencePiece model file."""
    what = "sentencepiece"
    if file is None or importlib.util.find_spec("sentencepiece") is None:
        missing = "there is no tokenizer.model" if file is None else "sentencepiece is missing"
        yield Finding("sentencepiece_absent", "note", what, f"not compared: {missing}")
        return
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(model_file=str(file))
    ordinary = [turn.text.strip() for sample in SAMPLES for turn in sample.conversation.turns]
    differing: list[tuple[str, str]] = []
    for text in (*ordinary, *UNUSUAL.values()):
        found = tested.tokenizer(text, add_special_tokens=False)["input_ids"]
        expected = reference.encode(text)
        if found != expected:
            differing.append((text, tested.describe_difference(found, expected)))
    total = len(ordinary) + len(UNUSUAL)
    if not differing:
        result = f"{total} texts have the ids of {file.name}"
        yield Finding("sentencepiece", "good", what, result)
        return
    text, difference = differing[0]
    result = (
        f"{len(differing)} of {total} texts have other ids than in {file.name}, first "
        f"{text[:30]!r} {difference}"
    )
    if text in ordinary:
        advice = "the model was not trained on these tokens; convert tokenizer.json from this file"
        yield Finding("sentencepiece_differs", "warning", what, result, advice)
    else:
        advice = "ordinary text has the same ids; the model was not trained on these rare tokens"
        yield Finding("sentencepiece_differs_rarely", "note", what, result, advice)


def _sentencepiece_file(tokenizer: PreTrainedTokenizerBase) -> Path | None:
    """Return the SentencePiece model file of a tokenizer; None if there is none."""
    vocab_file = getattr(tokenizer, "vocab_file", None)
    paths = [Path(str(tokenizer.name_or_path)) / "tokenizer.model"]
    if isinstance(vocab_file, str) and vocab_file.endswith(".model"):
        paths.insert(0, Path(vocab_file))
    return next((path for path in paths if path.is_file()), None)
