"""Run all checks of a tokenizer with a chat template."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from vlm_sft.checks.tokenizer.consistency import (
    check_consistency,
    check_generation_markers,
    check_own_template,
)
from vlm_sft.checks.tokenizer.injection import check_injection, check_unusual_text
from vlm_sft.checks.tokenizer.sentencepiece import check_sentencepiece
from vlm_sft.checks.tokenizer.special_tokens import (
    check_bos,
    check_eot,
    check_generation_config,
    check_markers,
    check_padding,
    check_samples,
)
from vlm_sft.checks.tokenizer.under_test import Finding, TokenizerUnderTest, counted
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.utils.reading import read_json

_CHECKS: Final[tuple[Callable[[TokenizerUnderTest], Iterator[Finding]], ...]] = (
    check_bos,
    check_eot,
    check_generation_config,
    check_padding,
    check_markers,
    check_consistency,
    check_own_template,
    check_generation_markers,
    check_injection,
    check_unusual_text,
    check_sentencepiece,
)


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    chat_tokenizer: ChatTokenizer,
    generation_config: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Test a tokenizer with a chat template on sample conversations.

    Args:
        tokenizer: Tokenizer of the model; it is not changed.
        template_name: Configured name of the template; `auto` is the model's own template.
        chat_tokenizer: Built from the tokenizer and the template.
        generation_config: The model's `generation_config.json`; None if there is none.
    """
    tested = TokenizerUnderTest(tokenizer, template_name, chat_tokenizer, generation_config)
    findings = list(check_samples(tested))
    if not tested.samples:
        return findings
    for check in _CHECKS:
        findings += check(tested)
    return findings


def build_chat_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template_name: str, *, system: str | None = None
) -> ChatTokenizer | Finding:
    """Return the chat tokenizer, or the finding that template and tokenizer do not fit."""
    try:
        return ChatTokenizer.from_name(template_name, tokenizer, default_system=system)
    except UserError as error:
        return Finding(
            "template_misfit",
            "bad",
            "template",
            str(error),
            "choose the template that the model was trained with, or add its special tokens to the "
            "tokenizer",
        )


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """Return the `generation_config.json` of a model folder; None if there is none.

    Raises:
        UserError: The file is not a JSON object.
    """
    file = folder / "generation_config.json"
    try:
        found = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(found).__name__}")
    return found


def summary(findings: Sequence[Finding]) -> str:
    """Return one sentence that sums up the findings."""
    bad = [finding for finding in findings if finding.level == "bad"]
    if bad:
        codes = ", ".join(dict.fromkeys(finding.code for finding in bad))
        return f"BAD: training with this tokenizer and template does not fit inference ({codes})"
    counts = {
        level: sum(finding.level == level for finding in findings)
        for level in ("warning", "note", "good")
    }
    totals = f"{counts['good']} good, {counted(counts['note'], 'note')}"
    if counts["warning"]:
        return (
            f"usable, with {counted(counts['warning'], 'warning')} ({totals}): training, inference "
            "and masks agree in vlm_sft; other tools or rare records can differ"
        )
    return f"good: training, inference and export use the same tokens ({totals})"
