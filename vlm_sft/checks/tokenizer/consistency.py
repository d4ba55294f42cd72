"""Whether training, inference, the export and the model's own template say the same."""

import re
from collections.abc import Iterator

from vlm_sft.checks.tokenizer.case import (
    Case,
    Finding,
    conversation_of,
    first_difference,
    messages_of,
    text_of,
)
from vlm_sft.data.conversation import Conversation, TextPart, Turn
from vlm_sft.utils.constants import IGNORE_INDEX


def agreement(case: Case) -> Iterator[Finding]:
    """Training, inference and export: the same ids for the same turns."""
    prompts = 0
    for probe, tokenized in case.probes:
        for number, asked in probe.prompts():
            prompts += 1
            prompt, span = case.chat_tokenizer.prompt(asked), tokenized.answer_spans[number]
            if tokenized.input_ids[: span.start] != prompt:
                yield Finding(
                    "prompt_is_no_prefix",
                    "bad",
                    "training and inference",
                    f"{probe.name}: what inference sends before answer {number + 1} differs from "
                    f"training {case.difference(tokenized.input_ids[: span.start], prompt)}",
                    "choose another template",
                )
                return
    yield Finding(
        "prompt",
        "good",
        "training and inference",
        f"all {prompts} prompts are exact prefixes of the training ids, up to the first label",
    )
    yield from _export(case)


def _export(case: Case) -> Iterator[Finding]:
    what = "training and export"
    compared, differing = 0, []
    for name, ours, conversation, generate in _sequences(case):
        compared += 1
        try:
            theirs = case.exported_ids(conversation, generate=generate)
        except Exception as error:  # whatever a model's own Jinja raises
            reason = " ".join(str(error).split())[:200]
            yield Finding("export_fails", "bad", what, f"{name}: the chat template fails: {reason}")
            return
        if ours != theirs:
            differing.append((name, ours, theirs))
    if not differing:
        yield Finding(
            "export",
            "good",
            what,
            f"the exported chat template gives the same ids in all {compared} sequences",
        )
        return
    other_format = [d for d in differing if case.control_of(d[1]) != case.control_of(d[2])]
    name, ours, theirs = (other_format or differing)[0]
    yield Finding(
        "export_format_differs" if other_format else "export_ids_differ",
        "bad" if other_format else "warning",
        what,
        f"{len(differing)} of {compared} sequences differ under the exported chat template "
        f"({'control tokens differ' if other_format else 'control tokens agree'}), first {name} "
        f"{case.difference(ours, theirs)}",
        "use another template"
        if other_format
        else "chat and evaluate here send what was trained; tools on the export send the other ids",
    )


def _sequences(case: Case) -> Iterator[tuple[str, list[int], Conversation, bool]]:
    """Name, our ids and turns of each training text and each generation prompt."""
    for probe, tokenized in case.probes:
        yield f"{probe.name} (training)", tokenized.input_ids, probe.conversation, False
        for number, asked in probe.prompts():
            yield (
                f"{probe.name} (prompt {number + 1})",
                case.chat_tokenizer.prompt(asked),
                asked,
                True,
            )


def own_template(case: Case) -> Iterator[Finding]:
    """The model's own chat template against the one that was chosen."""
    what, own = "the model's own template", case.tokenizer.chat_template
    if not isinstance(own, str):
        return
    compared = 0
    differing: list[tuple[str, str, str]] = []
    for probe, tokenized in case.text_probes:
        try:
            theirs = _own_text(case, probe.conversation)
            ours = text_of(case.exported, probe.conversation)
        except Exception:  # the model's own template refuses these turns (system, often)
            continue
        compared += 1
        ids = case.tokenizer(theirs, add_special_tokens=False)["input_ids"]
        if ours != theirs and ids != tokenized.input_ids:
            differing.append((probe.name, ours, theirs))
    if differing:
        yield _other_format(case, differing)
    elif compared:
        yield Finding(
            "own_template", "good", what, f"the same in all {compared} probes without images"
        )
    else:
        yield Finding("own_template_refuses", "note", what, "takes none of the probes")
    if "strftime_now" in own and case.template_name == "auto":
        yield Finding(
            "dated",
            "warning",
            what,
            "writes today's date, so that prompts of other days differ from training",
            "give data.system, or a template file without the date",
        )


def _other_format(case: Case, differing: list[tuple[str, str, str]]) -> Finding:
    """How the model's own template differs, from (probe, our text, its text)."""
    what = "the model's own template"
    inner = [d for d in differing if not (d[1].startswith(d[2]) or d[2].startswith(d[1]))]
    name, ours, theirs = (inner or differing)[0]
    at = first_difference(ours, theirs)
    if not inner:
        return Finding(
            "own_template_ends_differently",
            "note",
            what,
            f"the same up to the end of the conversation, where {ours[at:]!r} stands here and "
            f"{theirs[at:]!r} there",
        )
    if case.chat_tokenizer.template.images_only_users:
        words = "not written: images and captions alone, which is for the first stage"
        return Finding("own_template_unused", "note", what, words)
    return Finding(
        "own_template_differs",
        "warning",
        what,
        f"the model was tuned with another format: {name} {_excerpt(ours, at)} here, "
        f"{_excerpt(theirs, at)} there",
        "take template auto, or the built-in one that is equal; keep this one only for a base "
        "model or to teach the new format",
    )


def _own_text(case: Case, conversation: Conversation) -> str:
    """Return what the model's own template writes, with the chat tokenizer's system text."""
    system = case.chat_tokenizer.describe()["default_system"]
    if system and conversation.turns[0].role != "system":
        added = Turn("system", (TextPart(system),))
        try:
            return text_of(case.tokenizer, conversation_of("system", added, *conversation.turns))
        except Exception:  # it takes no system text: what it writes without is still compared
            pass
    return text_of(case.tokenizer, conversation)


def generation_markers(case: Case) -> Iterator[Finding]:
    """The assistant mask of transformers against ours."""
    what, own = "generation markers", case.tokenizer.chat_template
    if not isinstance(own, str):
        return
    if not re.search(r"\{%-?\s*generation\s*-?%\}", own):
        yield Finding(
            "no_generation_markers",
            "note",
            what,
            "the model's template has none: trainers that take transformers' assistant mask would "
            "train nothing; labels here do not need them",
        )
        return
    compared, differing = 0, []
    for probe, tokenized in case.text_probes:
        try:
            found = case.tokenizer.apply_chat_template(
                messages_of(probe.conversation), return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception:  # the model's own template refuses these turns
            continue
        if found["input_ids"] != tokenized.input_ids:
            continue
        compared += 1
        ours = [label != IGNORE_INDEX for label in tokenized.labels]
        pairs = zip(tokenized.input_ids, ours, map(bool, found["assistant_masks"]), strict=True)
        only = [(token, mine) for token, mine, theirs in pairs if mine != theirs]
        if only:
            differing.append((probe.name, only))
    if not compared:
        yield Finding(
            "generation_markers_not_compared",
            "note",
            what,
            "the model's template has them, but writes other ids than the chosen template",
        )
    elif differing:
        name, only = differing[0]
        mine = case.tokens([token for token, ours in only if ours])
        theirs = case.tokens([token for token, ours in only if not ours])
        yield Finding(
            "generation_mask_differs",
            "note",
            what,
            f"transformers' mask differs in {len(differing)} of {compared} probes; {name}: trained "
            f"here alone: {mine or 'nothing'}; there alone: {theirs or 'nothing'}",
            "trained here: each answer with its stop token, and what the model must write itself",
        )
    else:
        yield Finding(
            "generation_mask", "good", what, f"transformers' mask is ours in {compared} probes"
        )


def _excerpt(text: str, at: int) -> str:
    return repr(text[max(0, at - 15) : at + 45])
