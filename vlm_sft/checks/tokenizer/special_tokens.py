"""The tokens around the words: begin, stop, padding, and marks that are tokens or only look so."""

import re
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from vlm_sft.checks.tokenizer.case import Case, Finding, counted
from vlm_sft.data.batch import collate
from vlm_sft.data.chat_template import TemplateText
from vlm_sft.data.dataset import Example
from vlm_sft.data.text_encoder import padding_id
from vlm_sft.utils.constants import IGNORE_INDEX


def fitting(case: Case) -> Iterator[Finding]:
    """Which kinds of conversation the template can hold."""
    what = "template"
    unproven = [(p, e) for p, e in case.refused if e.reason == "mask_proof"]
    left_out = [(p, e) for p, e in case.refused if e.reason != "mask_proof"]
    if unproven:
        names = ", ".join(probe.name for probe, _ in unproven)
        yield Finding(
            "mask_proof",
            "bad",
            what,
            f"labels cannot be proven for: {names}; first: {unproven[0][1].message}",
            "every such record would be refused; choose another template or tokenizer",
        )
    if not case.probes:
        if not unproven:
            words = f"takes none of the probe conversations: {left_out[0][1].message}"
            yield Finding("template_misfit", "bad", what, words, "choose another template")
        return
    held = ", ".join(probe.name for probe, _ in case.probes)
    if left_out:
        names = ", ".join(probe.name for probe, _ in left_out)
        yield Finding(
            "template_limits",
            "note",
            what,
            f"takes {held}; not {names}: {left_out[0][1].message}",
            "records of the other kinds are refused by name",
        )
    elif not unproven:
        yield Finding("template", "good", what, f"takes {held}")


def begin(case: Case) -> Iterator[Finding]:
    """The first token: who writes it, whether it is doubled, and that inference sends it too."""
    bos = case.tokenizer.bos_token_id
    heads = {tokenized.input_ids[0] for _, tokenized in case.probes}
    doubled = [
        probe.name
        for probe, tokenized in case.probes
        if bos is not None and tokenized.input_ids[:2] == [bos, bos]
    ]
    sent = {
        probe.name: case.chat_tokenizer.prompt(asked)[:1]
        for probe, _ in case.probes
        for _, asked in probe.prompts()
    }
    unled = [name for name, ids in sent.items() if not ids]
    sends = {ids[0] for ids in sent.values() if ids}
    if doubled:
        yield Finding(
            "bos_doubled",
            "bad",
            "begin",
            f"the template writes {case.tokens([bos])} twice at the start ({', '.join(doubled)})",
            "take it out of the chat template once",
        )
    elif not unled and sends != heads:
        yield Finding(
            "begin_differs",
            "bad",
            "begin",
            f"training begins with {case.tokens(sorted(heads))}, inference with "
            f"{case.tokens(sorted(sends))}",
            "choose a template that begins the same with and without an answer",
        )
    elif unled:
        yield Finding(
            "nothing_before_answer",
            "warning",
            "begin",
            f"nothing stands before an answer in: {', '.join(unled)}; its first token cannot be "
            "trained, and there is nothing to generate from",
            "give such records an image or a question, or choose a template with {bos}",
        )
    else:
        yield _bos(case, heads)


def _bos(case: Case, heads: set[int]) -> Finding:
    """Whether the template or the tokenizer, or both, write the first token."""
    bos, added = case.tokenizer.bos_token_id, _added_in_front(case.tokenizer)
    names = [case.tokens([token]) for token in sorted(heads)]
    shown = " or ".join(names) if len(names) < 3 else "the words themselves"
    if added and (bos is None or heads != {bos}):
        return Finding(
            "bos_not_trained",
            "warning",
            "begin",
            f"the tokenizer begins every text with {case.tokens(added)}, the template begins with "
            f"{shown}: processors and servers that tokenize the prompt themselves send a token "
            "that training never showed",
            "set add_bos_token to false in tokenizer_config.json, or write {bos} in the template",
        )
    if added:
        return Finding(
            "bos_added_by_both",
            "note",
            "begin",
            f"{shown}, once, in training and in what inference sends; the tokenizer would add its "
            "own to a prompt that the template wrote",
            "elsewhere, tokenize text that the template wrote with add_special_tokens=False",
        )
    return Finding("bos", "good", "begin", f"{shown}, the same in training and inference")


def _added_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer by itself puts before a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    return whole[: _find(whole, plain)] if len(whole) > len(plain) else []


def _find(ids: Sequence[int], part: Sequence[int]) -> int:
    """Where `part` begins in `ids`; 0 if it is not there."""
    places = range(len(ids) - len(part) + 1)
    return next((i for i in places if list(ids[i : i + len(part)]) == list(part)), 0)


def stop(case: Case) -> Iterator[Finding]:
    """The token that ends an answer: supervised, and the tokenizer's EOS or another."""
    if case.eot_token_id is None:
        yield Finding(
            "no_stop",
            "note" if case.chat_tokenizer.template.images_only_users else "warning",
            "stop",
            "answers end without a control token, so that the model does not learn to stop",
            "right for LLaVA's first stage alone; choose another template for answers",
        )
        return
    untrained = [
        probe.name
        for probe, tokenized in case.probes
        if any(
            tokenized.labels[span.end - 1] != case.eot_token_id for span in tokenized.answer_spans
        )
    ]
    if untrained:
        yield Finding(
            "stop_not_supervised",
            "bad",
            "stop",
            f"{case.eot_token} carries no label in: {', '.join(untrained)}",
            "choose another template",
        )
        return
    answers = sum(len(tokenized.answer_spans) for _, tokenized in case.probes)
    named = f"{case.eot_token} (id {case.eot_token_id}) ends and is trained in all {answers} "
    named += "probe answers"
    eos = case.tokenizer.eos_token
    if case.tokenizer.eos_token_id == case.eot_token_id:
        yield Finding("stop", "good", "stop", f"{named}; it is the tokenizer's EOS")
    else:
        yield Finding(
            "stop_is_not_eos",
            "note",
            "stop",
            f"{named}; the tokenizer's EOS is {eos}",
            "chat, evaluate and export stop at both; tools that know EOS alone would run on",
        )


def generation(case: Case) -> Iterator[Finding]:
    """Whether stock generation from the model's folder stops where answers end."""
    what, config = "generation config", case.generation_config
    if config is None:
        yield Finding(
            "generation_config_absent",
            "note",
            what,
            "there is no generation_config.json to read",
            "chat, evaluate and export pass the stop token themselves",
        )
        return
    listed = config.get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    shown = f"eos_token_id {', '.join(f'{i} ({case.tokens([i])})' for i in ids) or 'is not set'}"
    if case.eot_token_id is None:
        yield Finding("generation_config", "note", what, f"{shown}; answers have no stop token")
    elif case.eot_token_id in ids:
        yield Finding(
            "generation_config", "good", what, f"{shown}: generation stops on {case.eot_token}"
        )
    else:
        yield Finding(
            "generation_config_without_stop",
            "warning",
            what,
            f"{shown}, without {case.eot_token} (id {case.eot_token_id}): transformers and servers "
            "that read this file would generate on behind the answer",
            f"add {case.eot_token_id} to eos_token_id in generation_config.json; chat, evaluate "
            "and export here pass it themselves",
        )


def padding(case: Case) -> Iterator[Finding]:
    """Whether the padding id means something else too, and what masking by it would lose."""
    tokenizer, pad = case.tokenizer, padding_id(case.tokenizer)
    lost, total = _lost_by_masking(case, pad)
    if lost is None:
        yield Finding("padding_labels", "bad", "padding", "padding changed the labels of a batch")
        return
    same = [
        name
        for name, token in (
            ("the stop token", case.eot_token_id),
            ("EOS", tokenizer.eos_token_id),
            ("UNK", tokenizer.unk_token_id),
            ("BOS", tokenizer.bos_token_id),
        )
        if token == pad
    ]
    named = f"{case.tokens([pad])} (id {pad})"
    harmless = (
        f"harmless here: labels come from how the text was built and padding is masked by position "
        f"({total} of {total} labels stay in a padded batch)"
    )
    elsewhere = "a trainer that masks labels by the padding id "
    if tokenizer.pad_token_id is None:
        same_as = f", which is {' and '.join(same)}" if same else ""
        yield Finding(
            "pad_missing",
            "note",
            "padding",
            f"the tokenizer has none; {named} fills up{same_as}; {harmless}",
            f"{elsewhere}would lose {lost} of {total} labels" if lost else "",
        )
    elif same:
        yield Finding(
            "pad_is_" + ("eos" if pad == tokenizer.eos_token_id else "other"),
            "note",
            "padding",
            f"{named} is also {' and '.join(same)}; {harmless}",
            f"{elsewhere}would lose {lost} of {total} labels, every stop token among them"
            if pad == case.eot_token_id
            else f"{elsewhere}would lose such tokens within texts",
        )
    else:
        yield Finding("pad", "good", "padding", f"{named}, nothing else")


def _lost_by_masking(case: Case, pad: int) -> tuple[int | None, int]:
    """Labels that equal the padding id in a padded batch of the probes, and all labels.

    None: padding itself changed a label.
    """
    examples = [
        Example(
            probe.name,
            torch.tensor(tokenized.input_ids),
            torch.tensor(tokenized.labels),
            torch.zeros(0, 3, 1, 1),
        )
        for probe, tokenized in case.probes
    ]
    batch = collate(examples, pad)
    for example, labels, mask in zip(examples, batch.labels, batch.attention_mask, strict=True):
        length = len(example.labels)
        whole = torch.equal(labels[:length], example.labels) and bool(mask[:length].all())
        if not whole or bool(mask[length:].any()) or bool((labels[length:] != IGNORE_INDEX).any()):
            return None, 0
    return int((batch.labels == pad).sum()), int((batch.labels != IGNORE_INDEX).sum())


_MARK = re.compile(r"<\|[^<>|\s]+\|>|<</?[A-Z]+>>|</?[A-Za-z_]+>|\[/?[A-Z_]+\]")


_MEANT_AS_TOKEN = re.compile(r"<\|.*\|>|</?s>|<[a-z]+_of_[a-z]+>|<[be]os>")


def marks(case: Case) -> Iterator[Finding]:
    """Marks of the template that look like control tokens and are ordinary text."""
    texts = [
        piece.text
        for probe, _ in case.probes
        for piece in case.chat_tokenizer.template.pieces([t.role for t in probe.conversation.turns])
        if isinstance(piece, TemplateText)
    ]
    ordinary: dict[str, int] = {}
    for text in texts:
        for part in case.encoder.split_special_tokens(text):
            for mark in _MARK.findall(part) if isinstance(part, str) else ():
                ordinary[mark] = len(case.encoder.encode(mark, "continuation"))
    split = [mark for mark in ordinary if _MEANT_AS_TOKEN.fullmatch(mark)]
    words = [mark for mark in ordinary if mark not in split]
    if split:
        pieces = ", ".join(f"{mark} is {counted(ordinary[mark], 'piece')}" for mark in split)
        yield Finding(
            "header_is_text",
            "bad",
            "marks of the template",
            f"meant as control tokens but ordinary text to this tokenizer: {pieces}",
            "choose a template of this model's, or add the tokens and train their embeddings",
        )
    if words:
        yield Finding(
            "ordinary_marks",
            "note",
            "marks of the template",
            f"ordinary text to this tokenizer: {', '.join(words)}",
            "as with Llama 2; words of a record that look like them cannot be told apart",
        )
    if not ordinary:
        yield Finding("marks", "good", "marks of the template", "all are control tokens or words")
