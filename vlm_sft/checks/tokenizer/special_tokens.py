"""Check the special tokens around texts: BOS, end of turn, padding, markers of the template."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from transformers import PreTrainedTokenizerBase

from vlm_sft.checks.tokenizer.under_test import Finding, TokenizerUnderTest, counted
from vlm_sft.data.batch import pad_examples
from vlm_sft.data.chat_template import TemplateText
from vlm_sft.data.dataset import Example
from vlm_sft.data.hf_tokenizer import padding_id
from vlm_sft.utils.constants import IGNORE_INDEX


def check_samples(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Report which kinds of conversations the template accepts."""
    what = "template"
    unproven = [(s, e) for s, e in tested.refused if e.reason == "mask_proof"]
    refused = [(s, e) for s, e in tested.refused if e.reason != "mask_proof"]
    if unproven:
        names = ", ".join(sample.name for sample, _ in unproven)
        yield Finding(
            "mask_proof",
            "bad",
            what,
            f"labels cannot be verified for: {names}; first: {unproven[0][1].message}",
            "every such record would be refused; choose another template or tokenizer",
        )
    if not tested.samples:
        if not unproven:
            text = f"accepts none of the sample conversations: {refused[0][1].message}"
            yield Finding("template_misfit", "bad", what, text, "choose another template")
        return
    accepted = ", ".join(sample.name for sample, _ in tested.samples)
    if refused:
        names = ", ".join(sample.name for sample, _ in refused)
        yield Finding(
            "template_limits",
            "note",
            what,
            f"accepts {accepted}; would refuse {names}: {refused[0][1].message}",
            "these are built-in samples; `check CONFIG.yaml` tests your own records",
        )
    elif not unproven:
        yield Finding("template", "good", what, f"accepts {accepted}")


def check_bos(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Check who writes the first token, and that it is the same in training and inference."""
    bos = tested.tokenizer.bos_token_id
    first_in_training = {tokenized.input_ids[0] for _, tokenized in tested.samples}
    doubled = [
        sample.name
        for sample, tokenized in tested.samples
        if bos is not None and tokenized.input_ids[:2] == [bos, bos]
    ]
    prompt_starts = {
        sample.name: tested.chat_tokenizer.prompt(conversation)[:1]
        for sample, _ in tested.samples
        for _, conversation in sample.prompts()
    }
    empty_prompts = [name for name, ids in prompt_starts.items() if not ids]
    first_in_inference = {ids[0] for ids in prompt_starts.values() if ids}
    if doubled:
        yield Finding(
            "bos_doubled",
            "bad",
            "begin",
            f"the template writes {tested.token_names([bos])} twice at the start "
            f"({', '.join(doubled)})",
            "remove one of them from the chat template",
        )
    elif not empty_prompts and first_in_inference != first_in_training:
        yield Finding(
            "begin_differs",
            "bad",
            "begin",
            f"training begins with {tested.token_names(sorted(first_in_training))}, inference with "
            f"{tested.token_names(sorted(first_in_inference))}",
            "choose a template that begins the same with and without an answer",
        )
    elif empty_prompts:
        yield Finding(
            "nothing_before_answer",
            "warning",
            "begin",
            f"there is no token before an answer in: {', '.join(empty_prompts)}; its first token "
            "cannot be trained, and generation has no prompt",
            "give such records an image or a question, or choose a template with {bos}",
        )
    else:
        yield _bos_finding(tested, first_in_training)


def _bos_finding(tested: TokenizerUnderTest, first_ids: set[int]) -> Finding:
    """Report whether the template, the tokenizer, or both write the first token."""
    bos, added = tested.tokenizer.bos_token_id, _added_prefix(tested.tokenizer)
    names = [tested.token_names([token]) for token in sorted(first_ids)]
    shown = " or ".join(names) if len(names) < 3 else "the text itself"
    if added and (bos is None or first_ids != {bos}):
        return Finding(
            "bos_not_trained",
            "warning",
            "begin",
            f"the tokenizer begins every text with {tested.token_names(added)}, the template "
            f"begins with {shown}: processors and servers that tokenize the prompt themselves send "
            "a token that was not trained",
            "set add_bos_token to false in tokenizer_config.json, or write {bos} in the template",
        )
    if added:
        return Finding(
            "bos_added_by_both",
            "note",
            "begin",
            f"{shown}, once, in training and inference; the tokenizer would add its own to a "
            "prompt text",
            "in other programs, tokenize prompt texts with add_special_tokens=False",
        )
    return Finding("bos", "good", "begin", f"{shown}, the same in training and inference")


def _added_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that the tokenizer adds before a text by default."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    default = tokenizer("a")["input_ids"]
    return default[: _find(default, plain)] if len(default) > len(plain) else []


def _find(ids: Sequence[int], part: Sequence[int]) -> int:
    """Return the index at which `part` begins in `ids`; 0 if it does not occur."""
    starts = range(len(ids) - len(part) + 1)
    return next((i for i in starts if list(ids[i : i + len(part)]) == list(part)), 0)


def check_eot(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Check that the token that ends an answer is trained, and whether it is the EOS token."""
    if tested.eot_token_id is None:
        yield Finding(
            "no_stop",
            "note" if tested.chat_tokenizer.template.images_only_users else "warning",
            "stop",
            "answers end without a special token, so the model is not trained to stop",
            "right only for stage 1 of LLaVA; choose another template for answers",
        )
        return
    untrained = [
        sample.name
        for sample, tokenized in tested.samples
        if any(
            tokenized.labels[span.end - 1] != tested.eot_token_id for span in tokenized.answer_spans
        )
    ]
    if untrained:
        yield Finding(
            "stop_not_supervised",
            "bad",
            "stop",
            f"{tested.eot_token} has no label in: {', '.join(untrained)}",
            "choose another template",
        )
        return
    answers = sum(len(tokenized.answer_spans) for _, tokenized in tested.samples)
    text = (
        f"{tested.eot_token} (id {tested.eot_token_id}) ends all {answers} sample answers and is "
        "trained"
    )
    if tested.tokenizer.eos_token_id == tested.eot_token_id:
        yield Finding("stop", "good", "stop", f"{text}; it is the tokenizer's EOS")
    else:
        yield Finding(
            "stop_is_not_eos",
            "note",
            "stop",
            f"{text}; the tokenizer's EOS is {tested.tokenizer.eos_token}",
            "chat, evaluate and export stop at both; tools that stop only at EOS would continue",
        )


def check_generation_config(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Check that generation with the model's own settings stops at the end of an answer."""
    what, config = "generation config", tested.generation_config
    if config is None:
        yield Finding(
            "generation_config_absent",
            "note",
            what,
            "there is no generation_config.json",
            "chat, evaluate and export pass the stop token themselves",
        )
        return
    listed = config.get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    named = ", ".join(f"{i} ({tested.token_names([i])})" for i in ids)
    shown = f"eos_token_id {named or 'is not set'}"
    eot, eot_id = tested.eot_token, tested.eot_token_id
    if eot_id is None:
        yield Finding("generation_config", "note", what, f"{shown}; answers have no stop token")
    elif eot_id in ids:
        yield Finding("generation_config", "good", what, f"{shown}: generation stops at {eot}")
    else:
        yield Finding(
            "generation_config_without_stop",
            "warning",
            what,
            f"{shown}, without {eot} (id {eot_id}): transformers and servers that read this file "
            "would generate beyond the answer",
            f"add {eot_id} to eos_token_id in generation_config.json; chat, evaluate and export "
            "pass it themselves",
        )


def check_padding(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Check if the padding token has another meaning, and what masking by its id would lose."""
    tokenizer, pad = tested.tokenizer, padding_id(tested.tokenizer)
    lost, total = _labels_equal_to_padding(tested, pad)
    if lost is None:
        yield Finding("padding_labels", "bad", "padding", "padding changed the labels of a batch")
        return
    meanings = [
        name
        for name, token in (
            ("the stop token", tested.eot_token_id),
            ("EOS", tokenizer.eos_token_id),
            ("UNK", tokenizer.unk_token_id),
            ("BOS", tokenizer.bos_token_id),
        )
        if token == pad
    ]
    named = f"{tested.token_names([pad])} (id {pad})"
    harmless = (
        "harmless here: labels do not depend on token ids, and padding is masked by position "
        f"({total} of {total} labels stay in a padded batch)"
    )
    elsewhere = "a trainer that masks labels by the padding id "
    if tokenizer.pad_token_id is None:
        same_as = f", which is {' and '.join(meanings)}" if meanings else ""
        yield Finding(
            "pad_missing",
            "note",
            "padding",
            f"the tokenizer has no padding token; {named} is used{same_as}; {harmless}",
            f"{elsewhere}would lose {lost} of {total} labels" if lost else "",
        )
    elif meanings:
        yield Finding(
            "pad_is_" + ("eos" if pad == tokenizer.eos_token_id else "other"),
            "note",
            "padding",
            f"{named} is also {' and '.join(meanings)}; {harmless}",
            f"{elsewhere}would lose {lost} of {total} labels, every stop token among them"
            if pad == tested.eot_token_id
            else f"{elsewhere}would lose such tokens within texts",
        )
    else:
        yield Finding("pad", "good", "padding", f"{named} has no other meaning")


def _labels_equal_to_padding(tested: TokenizerUnderTest, pad: int) -> tuple[int | None, int]:
    """Count the labels that equal the padding id in a padded batch of the samples.

    Returns:
        This count and the number of all labels. The count is None if padding changed a label.
    """
    examples = [
        Example(
            sample.name,
            torch.tensor(tokenized.input_ids),
            torch.tensor(tokenized.labels),
            torch.zeros(0, 3, 1, 1),
        )
        for sample, tokenized in tested.samples
    ]
    batch = pad_examples(examples, pad)
    all_labels, masks = batch.labels(), batch.attention_mask
    assert masks is not None
    for example, labels, mask in zip(examples, all_labels, masks, strict=True):
        length = len(example.labels)
        kept = torch.equal(labels[:length], example.labels) and bool(mask[:length].all())
        if not kept or bool(mask[length:].any()) or bool((labels[length:] != IGNORE_INDEX).any()):
            return None, 0
    return int((all_labels == pad).sum()), int((all_labels != IGNORE_INDEX).sum())


_MARKER: Final = re.compile(r"<\|[^<>|\s]+\|>|<</?[A-Z]+>>|</?[A-Za-z_]+>|\[/?[A-Z_]+\]")
"""Text of a template that looks like a special token, e.g. `<|user|>`, `<<SYS>>`, `[INST]`."""

_MEANT_AS_TOKEN: Final = re.compile(r"<\|.*\|>|</?s>|<[a-z]+_of_[a-z]+>|<[be]os>")
"""Markers that models have as single tokens; `[INST]` was ordinary text in Llama 2 already."""


def check_markers(tested: TokenizerUnderTest) -> Iterator[Finding]:
    """Check for markers of the template that look like special tokens but are ordinary text."""
    what = "markers of the template"
    texts = [
        piece.text
        for sample, _ in tested.samples
        for piece in tested.chat_tokenizer.template.pieces(
            [turn.role for turn in sample.conversation.turns]
        )
        if isinstance(piece, TemplateText)
    ]
    num_tokens: dict[str, int] = {}
    for text in texts:
        for part in tested.encoder.split_special_tokens(text):
            for marker in _MARKER.findall(part) if isinstance(part, str) else ():
                num_tokens[marker] = len(tested.encoder.encode(marker, "continuation"))
    meant_as_tokens = [marker for marker in num_tokens if _MEANT_AS_TOKEN.fullmatch(marker)]
    plain_text = [marker for marker in num_tokens if marker not in meant_as_tokens]
    if meant_as_tokens:
        shown = ", ".join(f"{m} is {counted(num_tokens[m], 'token')}" for m in meant_as_tokens)
        yield Finding(
            "header_is_text",
            "bad",
            what,
            f"meant as special tokens, but ordinary text for this tokenizer: {shown}",
            "choose a template of this model, or add the tokens and train their embeddings",
        )
    if plain_text:
        yield Finding(
            "ordinary_marks",
            "note",
            what,
            f"ordinary text for this tokenizer: {', '.join(plain_text)}",
            "as in Llama 2; the same text in a record cannot be distinguished from them",
        )
    if not num_tokens:
        yield Finding("marks", "good", what, "all are special tokens")
