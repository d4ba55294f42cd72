"""Seed the bugs that masks have had elsewhere, one at a time: do the tests see each?

    scripts/mutate_masks                # every mutant, with and without the built-in proof
    scripts/mutate_masks --only stop    # mutants whose name has "stop" in it

Each mutant is an exact replacement in a copy of the sources. It is tried twice: as it is, and with
the built-in proof switched off, so that the tests alone must see it. The exit code is 1 when one
survives.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tests.tools.mutation import Mutant, copied_sources, killer
from vlm_sft.utils.progress import track

DATA = "vlm_sft/data/"
TESTS = (
    "tests/data/test_tokenize.py",
    "tests/data/test_batch.py",
    "tests/data/test_dataset.py",
    "tests/data/test_golden_masks.py",
    "tests/data/test_mask_properties.py",
)
LIGHT = "not qwen and not llama_3 and not smollm2 and not extreme and not left_over"
"""Tests that load small vocabularies: enough to see every mutant."""
KEPT = ("tests", "tests.tokenizers_for_tests", "tests.chat_templates_for_tests")
"""Built once, in `warm_up`."""


LABELS = (
    "            labels += ids[start:] if supervised else [IGNORE_INDEX] * (len(ids) - start)\n"
)
MASKED = "[IGNORE_INDEX] * (len(ids) - start)"
TRAINED = "            supervised = False\n"
FLAG = "                supervised = layout.conversation.turns[turn].supervised\n"

NO_PROOF = Mutant(
    "the proof is switched off",
    DATA + "tokenize.py",
    "self._prove(layout, tokenized, answers)",
    "pass",
)

MUTANTS = (
    Mutant(
        "the first token of an answer is masked",
        DATA + "tokenize.py",
        LABELS,
        f"            labels += [IGNORE_INDEX, *ids[start + 1 :]] if supervised else {MASKED}\n",
    ),
    Mutant(
        "the stop token is masked",
        DATA + "tokenize.py",
        LABELS,
        f"            labels += [*ids[start:-1], IGNORE_INDEX] if supervised else {MASKED}\n",
    ),
    Mutant(
        "the last token of the header is trained",
        DATA + "tokenize.py",
        LABELS,
        LABELS + "            if supervised and start:\n"
        "                labels[start - 1] = ids[start - 1]\n",
    ),
    Mutant(
        "the separator after the stop is trained",
        DATA + "tokenize.py",
        LABELS,
        LABELS + "            if run.turn is None and answer_spans and len(ids) > start:\n"
        "                labels[start] = ids[start]\n",
    ),
    Mutant(
        "questions are trained", DATA + "tokenize.py", TRAINED, "            supervised = True\n"
    ),
    Mutant(
        "a turn's flag is ignored",
        DATA + "tokenize.py",
        FLAG,
        "                supervised = True\n",
    ),
    Mutant(
        "every second answer is skipped",
        DATA + "tokenize.py",
        FLAG,
        FLAG.rstrip("\n") + " and len(answer_spans) % 2 == 1\n",
    ),
    Mutant(
        "only the last answer is trained",
        DATA + "tokenize.py",
        FLAG,
        FLAG.rstrip("\n") + " and run is layout.runs[-1]\n",
    ),
    Mutant(
        "after an empty answer the wrong turn is taken",
        DATA + "tokenize.py",
        FLAG,
        "                before = turn - 2 if len(ids) - start == 1 and turn > 2 else turn\n"
        "                supervised = layout.conversation.turns[before].supervised\n",
    ),
    Mutant(
        "an empty answer is not trained",
        DATA + "tokenize.py",
        FLAG,
        FLAG.rstrip("\n") + " and len(ids) - start > 1\n",
    ),
    Mutant(
        "answers are trimmed",
        DATA + "tokenize.py",
        "            part.text if isinstance(part, TextPart) else",
        "            part.text.strip() if isinstance(part, TextPart) else",
    ),
    Mutant(
        "the words of stage 1's question are kept",
        DATA + "tokenize.py",
        'if turn.role == "user" and self.template.images_only_users:',
        "if False:",
    ),
    Mutant(
        "the prompt ends in a space",
        DATA + "tokenize.py",
        "        return tokenized.input_ids\n\n    def answer_ids",
        '        return [*tokenized.input_ids, *self.encoder.encode(" ", "continuation")]\n\n'
        "    def answer_ids",
    ),
    Mutant(
        "the header of an answer is trained",
        DATA + "chat_template.py",
        "            TemplateText(self._fill(answer.prefix)),\n",
        "            TemplateText(self._fill(answer.prefix), supervised=True),\n",
    ),
    Mutant(
        "the space before an answer is masked",
        DATA + "chat_template.py",
        "            TemplateText(self._fill(answer.answer_prefix), supervised=True),\n",
        "            TemplateText(self._fill(answer.answer_prefix)),\n",
    ),
    Mutant(
        "BOS is doubled",
        DATA + "templates/vicuna_v1.yaml",
        'begin: "{bos}"',
        'begin: "{bos}{bos}"',
    ),
    Mutant(
        "the newline after <|im_end|> is missing",
        DATA + "templates/chatml.yaml",
        'stop: "<|im_end|>", suffix: "\\n"',
        'stop: "<|im_end|>"',
    ),
    Mutant(
        "control strings in data become control tokens",
        DATA + "text_encoder.py",
        'state["added_tokens"] = _whitespace_tokens(state)',
        "_whitespace_tokens(state)",
    ),
    Mutant(
        "the dummy space is put before every stretch of text",
        DATA + "text_encoder.py",
        'wanted = context == "start" or (context == "after_special_token" and scope == "always")',
        "wanted = True",
    ),
    Mutant(
        "padding is masked by its id, and the stop with it",
        DATA + "batch.py",
        "    positions, targets, rows = targets_of(labels)\n",
        "    labels = labels.masked_fill(input_ids == pad_token_id, IGNORE_INDEX)\n"
        "    positions, targets, rows = targets_of(labels)\n",
    ),
    Mutant(
        "padding is trained",
        DATA + "batch.py",
        "batch_first=True, padding_value=IGNORE_INDEX",
        "batch_first=True, padding_value=pad_token_id",
    ),
    Mutant(
        "attention leaves out every token that is padding's",
        DATA + "batch.py",
        "attention_mask=torch.arange(input_ids.shape[1]) < lengths[:, None]",
        "attention_mask=input_ids != pad_token_id",
    ),
    Mutant(
        "images are trained",
        DATA + "dataset.py",
        "supervised & ~is_image",
        "supervised | is_image",
    ),
    Mutant(
        "labels do not move when images are expanded",
        DATA + "dataset.py",
        "np.repeat(labels, times)",
        "np.append(labels, np.full(times.sum() - len(labels), IGNORE_INDEX))",
    ),
    Mutant(
        "the first position keeps its label",
        DATA + "filtering.py",
        "            labels[0] = IGNORE_INDEX",
        "            pass",
    ),
    Mutant(
        "records are cut at the limit, inside answers",
        DATA + "filtering.py",
        "        if length <= limit:\n            return record, tokenized\n",
        "        if True:\n            return record, TokenizedRecord("
        "tokenized.input_ids[:limit], tokenized.labels[:limit])\n",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What the tests said: the first test that failed, or None."""

    mutant: Mutant
    with_proof: str | None
    without_proof: str | None


def warm_up() -> None:
    """Import what takes seconds and build the tokenizers once; every trial is a fork of this."""
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    from tests.tokenizers_for_tests import load

    torch.set_num_threads(1)
    for name in ("bytes", "bpe", "sentencepiece", "llama_2_file", "phi_3", "gemma"):
        load(name)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="mutate_masks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", metavar="WORD", help="mutants with this in the name")
    arguments = parser.parse_args(argv)
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
    with copied_sources((*chosen, NO_PROOF)) as root:
        warm_up()
        start = time.monotonic()
        seen_by = partial(killer, root, tests=TESTS, options=("-k", LIGHT), kept=KEPT)
        if (broken := seen_by(())) is not None:
            print(f"error: {broken} fails without any mutant; fix it first", file=sys.stderr)
            return 1
        print(f"without a mutant all tests pass ({time.monotonic() - start:.0f} s)", flush=True)
        verdicts = [
            Verdict(mutant, seen_by((mutant,)), seen_by((mutant, NO_PROOF)))
            for mutant in track(chosen, description="mutants")
        ]
    return report(verdicts)


def report(verdicts: Sequence[Verdict]) -> int:
    """Print the table; 1 when a mutant survived."""
    width = max(len(v.mutant.name) for v in verdicts)
    print(f"{'mutant'.ljust(width)}  {'as it is':8}  {'no proof':8}  seen first by (no proof)")
    survived = 0
    for v in verdicts:
        states = ["killed" if by else "SURVIVED" for by in (v.with_proof, v.without_proof)]
        survived += "SURVIVED" in states
        by = v.without_proof or v.with_proof or ""
        print(f"{v.mutant.name.ljust(width)}  {states[0]:8}  {states[1]:8}  {by[:90]}")
    print(f"\n{len(verdicts)} mutants, {survived} survived")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
