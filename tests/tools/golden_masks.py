"""Masks as a person reads them: tests/golden/masks/<template>.txt, written and compared here.

    scripts/golden_masks            # tell what differs
    scripts/golden_masks --write    # rewrite the files, for review

`⟦ ... ⟧` is what is trained. `▁` is a space within a token, `↵` a newline, `→` a tab; a control
token is one token; the same text in a record is several ordinary tokens.
"""

import argparse
import difflib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.data.mask_oracle import (
    IMAGE_ID,
    MAIN_PAIRS,
    MASKED,
    Pair,
    chat_tokenizer,
    control_names,
    supervised_runs,
    token_bytes,
)
from tests.tokenizers_for_tests import missing
from vlm_sft.data.conversation import Conversation, ImagePart, Part, Role, TextPart, Turn
from vlm_sft.errors import RecordError

FOLDER = Path(__file__).parent.parent / "golden" / "masks"
WIDTH = 100

PAIRS = (*MAIN_PAIRS, Pair("smollm2", "smollm2", "smollm2"))
"""Each template on its tokenizer; SmolLM2's on Qwen's too, which is always there."""

Said = str | int


def _record(*turns: tuple[Role, Sequence[Said], bool]) -> Conversation:
    made: list[Turn] = []
    for role, said, supervised in turns:
        parts: list[Part] = [TextPart(s) if isinstance(s, str) else ImagePart(s) for s in said]
        made.append(Turn(role, tuple(parts), supervised))
    images = sum(isinstance(s, int) for _, said, _ in turns for s in said)
    return Conversation("r1", tuple(made), (b"",) * images)


def _ask(*said: Said) -> tuple[Role, Sequence[Said], bool]:
    return ("user", said, True)


def _answer(text: str, supervised: bool = True) -> tuple[Role, Sequence[Said], bool]:
    return ("assistant", [text], supervised)


CASES = {
    "one turn": _record(_ask(0, "\nWhat colour is the car?"), _answer("Red.")),
    "three turns": _record(
        _ask(0, "\nWhat colour is the car?"),
        _answer("Red."),
        _ask("Who drives?"),
        _answer("Nobody; it is parked."),
        _ask("Why?"),
        _answer("It is night."),
    ),
    "system text": _record(
        ("system", ["Be brief."], True), _ask(0, "\nWhat colour is the car?"), _answer("Red.")
    ),
    "image first": _record(_ask(0, "Describe it."), _answer("A red car.\nA wet street.")),
    "image later": _record(
        _ask("Hello!"), _answer("Hi."), _ask("Is there a dog in ", 0, "?"), _answer("No.")
    ),
    "two images": _record(_ask(0, "\n", 1, "\nWhat differs?"), _answer("The colour.")),
    "text only": _record(_ask("What is 2 + 2?"), _answer("4")),
    "a turn that is not trained": _record(
        _ask("Who?"), _answer("A man.", False), _ask("Where?"), _answer("Outside.")
    ),
    "an empty answer": _record(_ask("Who?"), _answer(""), _ask("Where?"), _answer("Outside.")),
    "control strings in the data": _record(
        _ask("Say </s><|im_end|><|eot_id|> [/INST] ASSISTANT: <image>"),
        _answer("</s><|im_end|><end_of_turn><|end|>"),
    ),
}


def page(pair: Pair) -> str:
    """All cases of a template on its tokenizer."""
    lines = [f"template {pair.template}, tokenizer {pair.tokenizer}", ""]
    for name, conversation in CASES.items():
        lines += [f"== {name}", *_case(pair, conversation), ""]
    return "\n".join(lines)


def _case(pair: Pair, conversation: Conversation) -> list[str]:
    try:
        tokenized = chat_tokenizer(pair).tokenize(conversation)
    except RecordError as error:
        return [f"refused: {str(error).split(': ', 2)[-1]}"]
    trained = sum(label != MASKED for label in tokenized.labels)
    lines = [f"{len(tokenized.input_ids)} tokens, {trained} trained"]
    starts = {start for start, _ in supervised_runs(tokenized.labels)}
    ends = {end - 1 for _, end in supervised_runs(tokenized.labels)}
    words = []
    for position, token in enumerate(tokenized.input_ids):
        shown = _shown(pair.tokenizer, token)
        words.append("⟦" * (position in starts) + shown + "⟧" * (position in ends))
    return lines + list(_wrapped(words))


def _shown(tokenizer: str, token: int) -> str:
    if token == IMAGE_ID:
        return "<image>"
    if token in control_names(tokenizer):
        return control_names(tokenizer)[token]
    text = token_bytes(tokenizer, token).decode("utf-8", errors="backslashreplace")
    return text.replace(" ", "▁").replace("\n", "↵").replace("\t", "→")


def _wrapped(words: Sequence[str]) -> Iterator[str]:
    """Yield lines that end after a newline or an answer, or when they are full."""
    line: list[str] = []
    for word in words:
        if (line and len(" ".join([*line, word])) > WIDTH) or (line and word.startswith("⟦")):
            yield " ".join(line)
            line = []
        line.append(word)
        if word.endswith(("↵", "⟧")):
            yield " ".join(line)
            line = []
    if line:
        yield " ".join(line)


def file_of(pair: Pair) -> Path:
    """Where a template's page is kept."""
    own = "" if pair in MAIN_PAIRS else f".{pair.tokenizer}_tokenizer"
    return FOLDER / f"{pair.template}{own}.txt"


def difference(pair: Pair) -> str:
    """What differs between the kept page and today's, line by line; "" when nothing does."""
    path = file_of(pair)
    kept = path.read_text("utf-8") if path.is_file() else ""
    return "\n".join(
        difflib.unified_diff(
            kept.splitlines(), page(pair).splitlines(), f"kept {path.name}", "today", lineterm=""
        )
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="golden_masks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="rewrite the files")
    arguments = parser.parse_args(argv)
    found = False
    for pair in PAIRS:
        if missing(pair.tokenizer) is not None:
            print(f"{pair.name}: not looked at: {missing(pair.tokenizer)}")
            continue
        text = difference(pair)
        found |= bool(text)
        print(text or f"{file_of(pair).name}: as kept")
        if arguments.write:
            FOLDER.mkdir(parents=True, exist_ok=True)
            file_of(pair).write_text(page(pair), encoding="utf-8")
    return int(found and not arguments.write)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
