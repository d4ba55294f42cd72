"""Check that training, inference, the export and the model's own template give the same tokens."""

import re
from collections.abc import Iterator

from vlm_sft.checks.tokenizer.under_test import (
    Finding,
    TokenizerUnderTest,
    chat_text,
    conversation_of,
    first_difference,
    template_messages,
)
from vlm_sft.data.conversation import Conversation, TextPart, Turn
from vlm_sft.utils.constants import IGNORE_INDEX


def check_consistency(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Compare the ids of training, of prompts for inference, and of the exported template."""
    num_prompts = 0
    for sample, tokenized in tested.samples:
        for number, conversation in sample.prompts():
            num_prompts += 1
            prompt, span = (
                tested.chat_tokenizer.prompt(conversation),
                tokenized.answer_spans[number],
            )
            before = tokenized.input_ids[: span.start]
            if before != prompt:
                yield Finding(
                    "prompt_is_no_prefix",
                    "bad",
                    "training and inference",
                    f"{sample.name}: the prompt of answer {number + 1} differs from the training "
                    f"tokens {tested.describe_difference(before, prompt)}",
                    "choose another template",
                )
                return
    yield Finding(
        "prompt",
        "good",
        "training and inference",
        f"all {num_prompts} prompts are exact prefixes of the training ids, up to the first label",
    )
    yield from _check_export(tested)


def _check_export(tested: TokenizerUnderTest) -> Iterator[Finding]:
    what = "training and export"
    compared, differing = 0, []
    for name, ours, conversation, generate in _sequences(tested):
        compared += 1
        try:
            exported = tested.exported_ids(conversation, generate=generate)
        except Exception as error:  # the Jinja of a model's own template can raise anything
            reason = " ".join(str(error).split())[:200]
            yield Finding("export_fails", "bad", what, f"{name}: the chat template fails: {reason}")
            return
        if ours != exported:
            differing.append((name, ours, exported))
    if not differing:
        yield Finding(
            "export",
            "good",
            what,
            f"the exported chat template gives the same ids in all {compared} sequences",
        )
        return
    # Different special tokens mean another format, which is bad. With the same special tokens only
    # the encoding of the text between them differs.
    other_format = [
        (name, ours, exported)
        for name, ours, exported in differing
        if tested.special_ids_in(ours) != tested.special_ids_in(exported)
    ]
    name, ours, exported = (other_format or differing)[0]
    yield Finding(
        "export_format_differs" if other_format else "export_ids_differ",
        "bad" if other_format else "warning",
        what,
        f"{len(differing)} of {compared} sequences differ under the exported chat template "
        f"(special tokens {'differ' if other_format else 'agree'}), first {name} "
        f"{tested.describe_difference(ours, exported)}",
        "choose another template"
        if other_format
        else "chat and evaluate send the tokens of training; tools that use the export send others",
    )


def _sequences(
    tested: TokenizerUnderTest,
) -> Iterator[tuple[str, list[int], Conversation, bool]]:
    """Yield name, ids, turns and `add_generation_prompt` of each training text and prompt."""
    for sample, tokenized in tested.samples:
        yield f"{sample.name} (training)", tokenized.input_ids, sample.conversation, False
        for number, conversation in sample.prompts():
            ids = tested.chat_tokenizer.prompt(conversation)
            yield f"{sample.name} (prompt {number + 1})", ids, conversation, True


def check_own_template(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Compare the model's own chat template with the chosen one."""
    what, own = "the model's own template", tested.tokenizer.chat_template
    if not isinstance(own, str):
        return
    compared = 0
    differing: list[tuple[str, str, str]] = []
    for sample, tokenized in tested.text_samples:
        try:
            ours = chat_text(tested.exported, sample.conversation)
            own_text = _with_bos(tested, _own_text(tested, sample.conversation), ours)
        except Exception:  # the model's own template does not accept these turns (system, often)
            continue
        compared += 1
        ids = tested.tokenizer(own_text, add_special_tokens=False)["input_ids"]
        if ours != own_text and ids != tokenized.input_ids:
            differing.append((sample.name, ours, own_text))
    if differing:
        yield _other_format(tested, differing)
    elif compared:
        yield Finding(
            "own_template", "good", what, f"the same in all {compared} samples without images"
        )
    else:
        yield Finding("own_template_refuses", "note", what, "accepts none of the samples")
    if "strftime_now" in own and tested.template_name == "auto":
        yield Finding(
            "dated",
            "warning",
            what,
            "writes the current date, so prompts of later days differ from training",
            "set data.system, or use a template file without the date",
        )


def _other_format(tested: TokenizerUnderTest, differing: list[tuple[str, str, str]]) -> Finding:
    """Describe how the model's own template differs.

    Args:
        tested: The tokenizer with the chosen template.
        differing: Sample, text of the chosen template, text of the model's own template.
    """
    what = "the model's own template"
    inner = [d for d in differing if not (d[1].startswith(d[2]) or d[2].startswith(d[1]))]
    name, ours, own_text = (inner or differing)[0]
    at = first_difference(ours, own_text)
    if not inner:
        return Finding(
            "own_template_ends_differently",
            "note",
            what,
            f"the same except for the end of the conversation: {ours[at:]!r} in the chosen "
            f"template, {own_text[at:]!r} in the model's own",
        )
    if tested.chat_tokenizer.template.images_only_users:
        text = "not used: the chosen template writes only images and captions, for stage 1"
        return Finding("own_template_unused", "note", what, text)
    if tested.template_name == "auto":  # recognized by what the model's own template writes
        return Finding(
            "own_template_is_shorter",
            "note",
            what,
            f"the chosen template was recognized by it; in {name}, the chosen one writes "
            f"{_excerpt(ours, at)}, the model's own {_excerpt(own_text, at)}",
        )
    return Finding(
        "own_template_differs",
        "warning",
        what,
        f"the model was trained with another format: {name} {_excerpt(ours, at)} in the chosen "
        f"template, {_excerpt(own_text, at)} in the model's own",
        "use template auto, or the equal built-in one; keep this template only for a base model, "
        "or to train the new format",
    )


def _own_text(tested: TokenizerUnderTest, conversation: Conversation) -> str:
    """Return the text of the model's own template, with the default system text."""
    system = tested.chat_tokenizer.describe()["default_system"]
    if system and conversation.turns[0].role != "system":
        added = Turn("system", (TextPart(system),))
        try:
            return chat_text(
                tested.tokenizer, conversation_of("system", added, *conversation.turns)
            )
        except Exception:  # it accepts no system text: compare the text without one
            pass
    return chat_text(tested.tokenizer, conversation)


def _with_bos(tested: TokenizerUnderTest, own_text: str, ours: str) -> str:
    """Return the model's own text with the BOS that its tokenizer adds when it encodes text."""
    bos = tested.tokenizer.bos_token
    if not bos or own_text.startswith(bos) or not ours.startswith(bos):
        return own_text
    adds_bos = tested.tokenizer("a")["input_ids"][:1] == [tested.tokenizer.bos_token_id]
    return bos + own_text if adds_bos else own_text


def check_generation_markers(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Compare the assistant mask of transformers with the labels."""
    what, own = "generation markers", tested.tokenizer.chat_template
    if not isinstance(own, str):
        return
    if not re.search(r"\{%-?\s*generation\s*-?%\}", own):
        yield Finding(
            "no_generation_markers",
            "note",
            what,
            "the model's template has none: trainers that use the assistant mask of transformers "
            "would train nothing; vlm_sft does not need them",
        )
        return
    compared, differing = 0, []
    for sample, tokenized in tested.text_samples:
        try:
            found = tested.tokenizer.apply_chat_template(
                template_messages(tested.tokenizer, sample.conversation),
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
        except Exception:  # the model's own template does not accept these turns
            continue
        if found["input_ids"] != tokenized.input_ids:
            continue
        compared += 1
        trained = [label != IGNORE_INDEX for label in tokenized.labels]
        masks = zip(tokenized.input_ids, trained, map(bool, found["assistant_masks"]), strict=True)
        only = [(token, ours) for token, ours, theirs in masks if ours != theirs]
        if only:
            differing.append((sample.name, only))
    if not compared:
        yield Finding(
            "generation_markers_not_compared",
            "note",
            what,
            "the model's template has them, but writes other ids than the chosen template",
        )
    elif differing:
        name, only = differing[0]
        only_ours = tested.token_names([token for token, ours in only if ours])
        only_theirs = tested.token_names([token for token, ours in only if not ours])
        yield Finding(
            "generation_mask_differs",
            "note",
            what,
            f"the mask of transformers differs in {len(differing)} of {compared} samples; {name}: "
            f"trained only by vlm_sft: {only_ours or 'nothing'}; only by transformers: "
            f"{only_theirs or 'nothing'}",
            "vlm_sft trains each answer with its end-of-turn token, and all that the model must "
            "write itself",
        )
    else:
        text = f"the mask of transformers equals the labels in {compared} samples"
        yield Finding("generation_mask", "good", what, text)


def _excerpt(text: str, at: int) -> str:
    return repr(text[max(0, at - 15) : at + 45])
