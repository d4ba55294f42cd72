"""Group the pieces of a chat template into runs of text that are tokenized together."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vlm_sft.data.chat_template import ChatTemplate, Slot, TemplatePiece, TemplateText
from vlm_sft.data.conversation import Conversation, Role
from vlm_sft.data.text_encoder import TextEncoder


@dataclass(frozen=True)
class TemplateRun:
    """Adjacent pieces of a template that are tokenized together.

    An answer with its EOT token is a run of its own. Its tokens can therefore not merge with the
    header before it, and its labels are whole tokens, whatever the tokenizer.

    Attributes:
        parts: Ordinary text, ids of special tokens, and the slots of turns.
        turn: The assistant turn whose answer this is; None if nothing in the run is supervised.
        prefix: Template text that is supervised before the answer (the space of Vicuna).
        suffix: Template text that is supervised between answer and EOT (the space of Llama 2).
        num_special: Number of special tokens among `parts`.
    """

    parts: tuple[str | int | Slot, ...]
    turn: int | None = None
    prefix: str = ""
    suffix: str = ""
    num_special: int = 0


@dataclass(slots=True)
class FilledRun:
    """A `TemplateRun` with the turns' text in it: ids of special tokens and images, and text."""

    parts: list[str | int]
    turn: int | None
    prefix: str
    suffix: str


@dataclass(slots=True)
class Layout:
    """A conversation in its template, before its text is encoded.

    Attributes:
        conversation: The conversation, with separators written out and quirks applied.
        runs: Its text in the runs of the template.
        num_added_turns: Turns before the conversation's own: 1 for a default system text, else 0.
        num_special: Special tokens that the template writes for these roles.
    """

    conversation: Conversation
    runs: list[FilledRun]
    num_added_turns: int
    num_special: int

    @property
    def texts(self) -> Iterator[str]:
        """The texts to encode."""
        return (part for run in self.runs for part in run.parts if isinstance(part, str))


def find_runs(
    template: ChatTemplate, encoder: TextEncoder, roles: tuple[Role, ...]
) -> tuple[TemplateRun, ...]:
    """Return the runs for these roles: one per answer, one for what is between two answers."""
    runs: list[TemplateRun] = []
    pieces = _without_stripped_space(template.pieces(roles), encoder)
    for supervised, group in itertools.groupby(pieces, key=lambda piece: piece.supervised):
        run: list[TemplatePiece] = []
        for piece in group:
            run.append(piece)
            # Two answers can be adjacent (a template without headers): each is its own run.
            if supervised and _ends_answer(run, template.eot_token):
                runs.append(_make_run(run, encoder))
                run = []
        if run:
            runs.append(_make_run(run, encoder))
    return tuple(runs)


def _without_stripped_space(
    pieces: Sequence[TemplatePiece], encoder: TextEncoder
) -> list[TemplatePiece]:
    """Remove the white space that neighboring special tokens strip (those of Phi 3)."""
    kept = list(pieces)
    for index in range(1, len(kept)):
        before, after = kept[index - 1], kept[index]
        if isinstance(before, TemplateText) and isinstance(after, TemplateText):
            left, right = encoder.strip_around_special(before.text, after.text)
            kept[index - 1] = replace(before, text=left)
            kept[index] = replace(after, text=right)
    return [piece for piece in kept if isinstance(piece, Slot) or piece.text]


def _ends_answer(pieces: Sequence[TemplatePiece], eot_token: str) -> bool:
    last = pieces[-1]
    is_eot = isinstance(last, TemplateText) and last.text == eot_token
    return is_eot and any(isinstance(piece, Slot) for piece in pieces)


def _make_run(pieces: Sequence[TemplatePiece], encoder: TextEncoder) -> TemplateRun:
    parts: list[str | int | Slot] = []
    turn: int | None = None
    prefix = suffix = ""
    for piece in pieces:
        if isinstance(piece, Slot):
            turn = piece.turn if piece.supervised else turn
            parts.append(piece)
            continue
        split = encoder.split_special_tokens(piece.text)
        if piece.supervised:
            text = "".join(part for part in split if isinstance(part, str))
            if turn is None:
                prefix += text
            else:
                suffix += text
        parts += split
    num_special = sum(isinstance(part, int) for part in parts)
    return TemplateRun(tuple(parts), turn, prefix, suffix, num_special)
