"""Conversations to token ids and labels: masked by construction, then proven turn by turn."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from vlm_sft.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from vlm_sft.data.conversation import Conversation, ImagePart, TextPart, Turn
from vlm_sft.data.template import (
    ChatTemplate,
    Slot,
    TemplatePiece,
    TemplateText,
    load_template,
    template_from_description,
)
from vlm_sft.data.tokenizer import Context, TextEncoder
from vlm_sft.errors import RecordError, UserError


@dataclass(frozen=True)
class Span:
    """The half-open range of token positions that an answer and its stop token take."""

    turn: int
    start: int
    end: int
    prefix: str = ""
    """Ordinary text of the template's own that the answer begins with (Vicuna's space)."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids, before pictures are expanded.

    Attributes:
        input_ids: One `IMAGE_TOKEN_ID` a picture.
        labels: The id itself where it is supervised, else `IGNORE_INDEX`; unshifted.
        answers: Where each assistant turn's answer lies, supervised or not.
    """

    input_ids: list[int]
    labels: list[int]
    answers: tuple[Span, ...]

    @property
    def num_images(self) -> int:
        """Pictures in the sequence."""
        return self.input_ids.count(IMAGE_TOKEN_ID)


@dataclass(frozen=True)
class _Run:
    """Adjacent text that is tokenised together, all of it supervised or none of it."""

    parts: tuple[str | int, ...]
    """Text, `IMAGE_TOKEN_ID`, or a control id that the template wrote."""
    turn: int | None = None
    """The assistant turn whose answer and stop this is; None: nothing here is supervised."""
    prefix: str = ""


class Renderer:
    """Turns conversations into ids and labels under one template and tokenizer.

    Args:
        template: The chat template.
        tokenizer: The language model's tokenizer.
        default_system: System text for conversations that bring none; None: the template's.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerBase,
        *,
        default_system: str | None = None,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.encoder = TextEncoder(tokenizer)
        self._system = template.default_system if default_system is None else default_system
        stop_id = self.encoder.control_ids.get(template.stop)
        if stop_id is None:
            raise UserError(
                f"template {template.name!r} ends answers with {template.stop!r}, which is no "
                "control token of this tokenizer"
            )
        self._stop_id = stop_id

    @classmethod
    def from_name(
        cls, name: str, tokenizer: PreTrainedTokenizerBase, *, default_system: str | None = None
    ) -> "Renderer":
        """A renderer for a template by name (`load_template`)."""
        return cls(load_template(name, tokenizer), tokenizer, default_system=default_system)

    @classmethod
    def from_description(
        cls, description: dict[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> "Renderer":
        """The renderer that `describe` was called on."""
        template = template_from_description(description["template"], tokenizer)
        return cls(template, tokenizer, default_system=description["default_system"])

    def describe(self) -> dict[str, Any]:
        """Plain values for a checkpoint's `template.json`."""
        return {"template": self.template.describe(), "default_system": self._system}

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the template's stop, and the tokenizer's EOS."""
        eos = self.tokenizer.eos_token_id
        return (self._stop_id,) if eos in (None, self._stop_id) else (self._stop_id, eos)

    def render(self, conversation: Conversation) -> Rendered:
        """Ids and labels of a training record, proven to supervise its answers and nothing else.

        Raises:
            RecordError: The text cannot be spelled, the template cannot hold the turns, or the
                proof failed; with record id, turn, expected and found.
        """
        turns = self._with_system(conversation.turns)
        offset = len(turns) - len(conversation.turns)
        ids: list[int] = []
        labels: list[int] = []
        answers: list[Span] = []
        for run, encoded in self._encoded_runs(conversation, turns):
            trained = False
            if run.turn is not None:
                end = len(ids) + len(encoded)
                answers.append(Span(run.turn - offset, len(ids), end, run.prefix))
                trained = turns[run.turn].supervised
            labels += encoded if trained else [IGNORE_INDEX] * len(encoded)
            ids += encoded
        rendered = Rendered(ids, labels, tuple(answers))
        self._prove(conversation, rendered)
        return rendered

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids to generate from: the turns so far, then the answer's header.

        A prefix of the training ids of the same turns with an answer behind them.
        """
        turns = self._with_system(conversation.turns)
        if not turns or turns[-1].role == "assistant":
            raise self._error(
                conversation, "prompt_ends_in_answer", "a prompt must end in a user's turn"
            )
        return [i for _, encoded in self._encoded_runs(conversation, turns) for i in encoded]

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer as it is trained: its text behind the answer's header, then the stop."""
        turns = (Turn("user", (TextPart(""),)), Turn("assistant", (TextPart(text),)))
        runs = self._runs(self.template.pieces(("user", "assistant")), turns)
        return next(
            ids for run, ids in zip(runs, self._encode(runs), strict=True) if run.turn is not None
        )

    def _with_system(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if self._system is None or (turns and turns[0].role == "system"):
            return turns
        return (Turn("system", (TextPart(self._system),)), *turns)

    def _encoded_runs(
        self, conversation: Conversation, turns: Sequence[Turn]
    ) -> list[tuple[_Run, list[int]]]:
        try:
            pieces = self.template.pieces([turn.role for turn in turns])
            runs = list(self._runs(pieces, turns))
            return list(zip(runs, self._encode(runs), strict=True))
        except RecordError:
            raise
        except UserError as error:
            raise self._error(conversation, "template", str(error)) from None

    def _runs(self, pieces: Sequence[TemplatePiece], turns: Sequence[Turn]) -> list[_Run]:
        """What the template and the turns say: one run an answer, one between two answers."""
        runs: list[_Run] = []
        for supervised, group in itertools.groupby(pieces, key=lambda piece: piece.supervised):
            answer: list[TemplatePiece] = []
            for piece in group:
                answer.append(piece)
                if supervised and self._ends_answer(answer):
                    runs.append(self._run(answer, turns))
                    answer = []
            if answer:
                runs.append(self._run(answer, turns))
        return runs

    def _ends_answer(self, pieces: Sequence[TemplatePiece]) -> bool:
        last = pieces[-1]
        ends = isinstance(last, TemplateText) and last.text == self.template.stop
        return ends and any(isinstance(piece, Slot) for piece in pieces)

    def _run(self, pieces: Sequence[TemplatePiece], turns: Sequence[Turn]) -> _Run:
        parts: list[str | int] = []
        turn: int | None = None
        prefix = ""
        for piece in pieces:
            if isinstance(piece, Slot):
                turn = piece.turn if piece.supervised else None
                added = self._slot_parts(turns[piece.turn])
            else:
                added = self.encoder.split_control(piece.text)
                if piece.supervised and turn is None:
                    prefix += "".join(part for part in added if isinstance(part, str))
            for part in added:
                _append(parts, part)
        return _Run(tuple(parts), turn, prefix)

    def _slot_parts(self, turn: Turn) -> list[str | int]:
        keep_text = turn.role != "user" or not self.template.images_only_users
        parts: list[str | int] = []
        for part in turn.parts:
            if isinstance(part, ImagePart):
                parts.append(IMAGE_TOKEN_ID)
            elif keep_text:
                parts.append(part.text)
        return parts

    def _encode(self, runs: Sequence[_Run]) -> list[list[int]]:
        encoded: list[list[int]] = []
        context: Context = "start"
        for run in runs:
            ids: list[int] = []
            for part in run.parts:
                if isinstance(part, int):
                    ids.append(part)
                    first = context == "start" and self.template.begins_text
                    control: Context = "start" if first else "after_control"
                    context = "continuation" if part == IMAGE_TOKEN_ID else control
                else:
                    # An answer begins at a forced border, so that its prompt is its prefix.
                    at = "continuation" if run.turn is not None else context
                    ids += self.encoder.encode(part, at)
                    context = "continuation"
            encoded.append(ids)
        return encoded

    def _prove(self, conversation: Conversation, rendered: Rendered) -> None:
        """Check the labels against the conversation, not against how they were made."""
        assistants = [i for i, t in enumerate(conversation.turns) if t.role == "assistant"]
        found = [span.turn for span in rendered.answers]
        if found != assistants:
            raise self._error(
                conversation,
                "mask_proof",
                f"answers were found for turns {found}, expected turns {assistants}",
            )
        wanted = [IGNORE_INDEX] * len(rendered.input_ids)
        for span in rendered.answers:
            turn = conversation.turns[span.turn]
            self._prove_answer(conversation, rendered, span, turn)
            if turn.supervised:
                wanted[span.start : span.end] = rendered.input_ids[span.start : span.end]
        if rendered.labels != wanted:
            at = next(
                i for i, (a, b) in enumerate(zip(rendered.labels, wanted, strict=True)) if a != b
            )
            raise self._error(
                conversation,
                "mask_proof",
                f"token {at} has label {rendered.labels[at]}, expected {wanted[at]}",
            )
        pictures = sum(1 for _ in conversation.image_parts())
        if rendered.num_images != pictures:
            raise self._error(
                conversation,
                "mask_proof",
                f"{rendered.num_images} image placeholders for {pictures} pictures",
            )

    def _prove_answer(
        self, conversation: Conversation, rendered: Rendered, span: Span, turn: Turn
    ) -> None:
        *body, last = rendered.input_ids[span.start : span.end]
        if last != self._stop_id:
            raise self._error(
                conversation,
                "mask_proof",
                f"turn {span.turn} does not end with the stop token {self.template.stop!r}",
            )
        control = set(self.encoder.control_ids.values())
        text = self.encoder.decode([i for i in body if i not in control])
        expected = self.encoder.normalized(span.prefix + turn.text)
        if text != expected:
            raise self._error(
                conversation,
                "mask_proof",
                f"turn {span.turn} is supervised as {text[:80]!r}, expected {expected[:80]!r}",
            )

    def _error(self, conversation: Conversation, reason: str, message: str) -> RecordError:
        return RecordError(reason, message, record_id=conversation.id, where=conversation.where)


def expand(ids: Sequence[int], num_tokens: int, values: Sequence[int] | None = None) -> list[int]:
    """Ids, or `values` that lie beside them, with each picture's position `num_tokens` times."""
    pairs = zip(ids, ids if values is None else values, strict=True)
    return [v for i, v in pairs for _ in range(num_tokens if i == IMAGE_TOKEN_ID else 1)]


def _append(into: list[str | int], part: str | int) -> None:
    """Add a part, joining text to text so that it is tokenised together."""
    if isinstance(part, str) and into and isinstance(into[-1], str):
        into[-1] += part
    elif part != "":
        into.append(part)
