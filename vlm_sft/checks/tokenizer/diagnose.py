"""What a tokenizer and a chat template do together: tried on probe conversations, told in words."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlm_sft.checks.tokenizer.case import Case, Finding, counted
from vlm_sft.checks.tokenizer.consistency import agreement, generation_markers, own_template
from vlm_sft.checks.tokenizer.injection import control_strings, unusual_writing
from vlm_sft.checks.tokenizer.sentencepiece import spelling
from vlm_sft.checks.tokenizer.special_tokens import begin, fitting, generation, marks, padding, stop
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import UserError
from vlm_sft.utils.reading import read_json

_EXAMINATIONS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    begin,
    stop,
    generation,
    padding,
    marks,
    agreement,
    own_template,
    generation_markers,
    control_strings,
    unusual_writing,
    spelling,
)


def diagnose(
    tokenizer: PreTrainedTokenizerBase,
    template_name: str,
    chat_tokenizer: ChatTokenizer,
    generation_config: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Everything that can go wrong between a tokenizer and a chat template, by trying it.

    Args:
        tokenizer: The model's; left as it is.
        template_name: What the template was asked for by; `auto` is the model's own.
        chat_tokenizer: Made of the two.
        generation_config: The model's `generation_config.json`; None: it has none.
    """
    case = Case(tokenizer, template_name, chat_tokenizer, generation_config)
    found = list(fitting(case))
    if not case.probes:
        return found
    for examination in _EXAMINATIONS:
        found += examination(case)
    return found


def fitted(
    tokenizer: PreTrainedTokenizerBase, template_name: str, *, system: str | None = None
) -> ChatTokenizer | Finding:
    """The chat tokenizer of a template and a tokenizer, or the finding that they do not fit."""
    try:
        return ChatTokenizer.from_name(template_name, tokenizer, default_system=system)
    except UserError as error:
        return Finding(
            "template_misfit",
            "bad",
            "template",
            str(error),
            "the template must be one that the model was tuned with, or its tokens must be added",
        )


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """A model folder's `generation_config.json`; None where it has none.

    Raises:
        UserError: The file is no JSON object.
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
    """One sentence that sums findings up."""
    bad = [finding for finding in findings if finding.level == "bad"]
    if bad:
        names = ", ".join(dict.fromkeys(finding.code for finding in bad))
        return f"BAD: this tokenizer and template do not train what inference needs ({names})"
    counts = {
        level: sum(finding.level == level for finding in findings)
        for level in ("warning", "note", "good")
    }
    told = f"{counts['good']} good, {counted(counts['note'], 'note')}"
    if counts["warning"]:
        return (
            f"usable, with {counted(counts['warning'], 'warning')} to read ({told}): training, "
            "inference and masks agree here, other tools or rare records may differ"
        )
    return f"good: training, inference and export say the same ({told})"
