"""Conversations to token ids and labels: masked by construction, then proven turn by turn."""

import contextlib
import functools
import gc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from transformers import PreTrainedTokenizerBase

from vlm_sft.data.chat_template import (
    ChatTemplate,
    Slot,
    TemplatePiece,
    TemplateText,
    jinja_prelude,
    jinja_with_first_space,
    load_template,
    template_from_description,
)
from vlm_sft.data.conversation import Conversation, Role, TextPart, Turn
from vlm_sft.data.image_separator import separated
from vlm_sft.data.llava_quirks import NO_QUIRKS, LlavaQuirks
from vlm_sft.data.text_encoder import Context, TextEncoder, UnencodableText
from vlm_sft.errors import RecordError, TemplateError, UserError
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID

CHUNK: Final = 256
"""Records that `tokenize_all` tokenizes at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class AnswerSpan:
    """The half-open range of token positions that an answer and its stop token take."""

    turn: int
    start: int
    end: int
    prefix: str = ""
    """Ordinary text that is not the answer's own and begins it (Vicuna's space)."""
    suffix: str = ""
    """Ordinary text that is not the answer's own and ends it (Llama 2's space)."""


@dataclass(frozen=True)
class TokenizedRecord:
    """The ids and labels of a conversation, with one placeholder per image.

    Attributes:
        input_ids: [T]; one `IMAGE_TOKEN_ID` per image.
        labels: [T]; the id itself where it is supervised, else `IGNORE_INDEX`; not shifted.
        answer_spans: The tokens of each assistant turn, supervised or not; empty if the record
            comes from the tokenize cache.
    """

    input_ids: list[int]
    labels: list[int]
    answer_spans: tuple[AnswerSpan, ...] = ()

    @property
    def num_images(self) -> int:
        """Number of image placeholders."""
        return self.input_ids.count(IMAGE_TOKEN_ID)

    @property
    def num_targets(self) -> int:
        """Number of supervised tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    def expanded_length(self, num_image_tokens: int) -> int:
        """Return the number of tokens when every image takes `num_image_tokens` of them."""
        return len(self.input_ids) + self.num_images * (num_image_tokens - 1)


@dataclass(frozen=True)
class _Run:
    """Adjacent pieces that are tokenized together: an answer with its stop, or what is between.

    `parts` are text, control ids, and the slots of turns.
    """

    parts: tuple[str | int | Slot, ...]
    turn: int | None = None
    """The assistant turn whose answer and stop this is; None: nothing here is supervised."""
    prefix: str = ""
    suffix: str = ""
    num_control: int = 0


@dataclass(slots=True)
class _Filled:
    """A run with its turns' words in it: ids of control tokens and images, and text to encode."""

    parts: list[str | int]
    turn: int | None
    prefix: str
    suffix: str


@dataclass(slots=True)
class _Draft:
    """A conversation on its way to ids."""

    conversation: Conversation
    runs: list[_Filled]
    offset: int
    """Turns that the chat tokenizer put before the conversation's own (its system text)."""
    num_control: int
    """Control tokens that the template writes for these roles."""

    def texts(self) -> Iterator[str]:
        """All that must be encoded."""
        return (part for run in self.runs for part in run.parts if isinstance(part, str))


class ChatTokenizer:
    """Turns conversations into ids and labels under one template and tokenizer.

    Args:
        template: The chat template.
        tokenizer: The language model's tokenizer.
        default_system: System text for conversations that bring none; None: the template's, "":
            none.
        llava_quirks: The quirks of LLaVA to reproduce.
        image_separator: Text between an image and its neighbors where content is given as a list
            of parts; None: the template's.

    Attributes:
        eot_token_id: The control token that ends an answer; None where the template has none.
        special_token_ids: Every token that data must never become.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerBase,
        *,
        default_system: str | None = None,
        llava_quirks: LlavaQuirks = NO_QUIRKS,
        image_separator: str | None = None,
    ) -> None:
        self.template = template
        self.tokenizer = tokenizer
        self.llava_quirks = llava_quirks
        self.encoder = TextEncoder(tokenizer)
        self.special_token_ids = frozenset(self.encoder.special_tokens.values())
        self._system = template.default_system if default_system is None else default_system
        self.image_separator = (
            template.image_separator if image_separator is None else image_separator
        )
        self._require_plain(self.image_separator)
        self._behind_image: Context = (
            "start" if "space_behind_image" in llava_quirks else "after_special_token"
        )
        self._runs = functools.lru_cache(maxsize=1024)(self._find_runs)
        self.eot_token_id = self.encoder.special_tokens.get(template.eot_token)
        if template.eot_token and self.eot_token_id is None:
            raise TemplateError(
                f"template {template.name!r} ends answers with {template.eot_token!r}, which is no "
                "control token of this tokenizer"
            )

    @classmethod
    def from_name(
        cls,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        default_system: str | None = None,
        llava_quirks: str = "none",
        image_separator: str | None = None,
    ) -> "ChatTokenizer":
        """Build one from names; see `load_template` and `LlavaQuirks.from_name`."""
        quirks = LlavaQuirks.from_name(llava_quirks)
        template = load_template(quirks.template_name(name), tokenizer)
        return cls(
            template,
            tokenizer,
            default_system=default_system,
            llava_quirks=quirks,
            image_separator=image_separator,
        )

    @classmethod
    def from_description(
        cls, description: dict[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> "ChatTokenizer":
        """The chat tokenizer that `describe` was called on."""
        return cls(
            template_from_description(description["template"], tokenizer),
            tokenizer,
            default_system=description["default_system"],
            llava_quirks=LlavaQuirks.from_name(description.get("recipe", "fixed")),
            image_separator=description.get("image_separator"),
        )

    def describe(self) -> dict[str, Any]:
        """Plain values for a checkpoint's `template.json`."""
        return {
            "template": self.template.describe(),
            "default_system": self._system,
            "recipe": self.llava_quirks.stored_name,
            "image_separator": self.image_separator,
        }

    def to_jinja(self) -> str:
        """A `chat_template` for transformers that writes what this chat tokenizer tokenizes.

        It takes contents as text, or as lists of text and image parts. Repeated quirks of
        tokenization (the space after an image) are beyond a chat template.
        """
        prelude = jinja_prelude(
            self._system,
            image_separator=self.image_separator,
            image_first="image_first" in self.llava_quirks,
        )
        body = self.template.jinja_body()
        bos = self.tokenizer.bos_token
        if bos and self.template.begins_text and self.encoder.spaces_first_text_only:
            body = jinja_with_first_space(body, str(bos))
        return prelude + body

    @property
    def keeps_layout(self) -> bool:
        """Whether images stay where a record has them: no quirk and no template moves them."""
        return not ("image_first" in self.llava_quirks or self.template.images_only_users)

    @property
    def eot_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the template's stop, and the tokenizer's EOS."""
        found = dict.fromkeys((self.eot_token_id, self.tokenizer.eos_token_id))
        return tuple(int(token) for token in found if token is not None)

    def tokenize(self, conversation: Conversation) -> TokenizedRecord:
        """Ids and labels of a training record, proven to supervise its answers and nothing else.

        Raises:
            RecordError: The text cannot be spelled, the template cannot hold the turns, or the
                proof failed; with record id, turn, expected and found.
        """
        tokenized = next(self.tokenize_all([conversation]))
        if isinstance(tokenized, RecordError):
            raise tokenized
        return tokenized

    def tokenize_all(
        self, conversations: Iterable[Conversation]
    ) -> Iterator["TokenizedRecord | RecordError"]:
        """As `tokenize`, for many: faster, in order, a fault in the place of its record."""
        for chunk in batched(conversations, CHUNK):
            with _collector_paused():
                made = self._tokenize_chunk(chunk)
            yield from made

    def _tokenize_chunk(
        self, chunk: Sequence[Conversation]
    ) -> list["TokenizedRecord | RecordError"]:
        drafts = [self._draft(conversation) for conversation in chunk]
        texts = (t for d in drafts if isinstance(d, _Draft) for t in d.texts())
        encoded = self.encoder.encode_all(texts)
        made = [d if isinstance(d, RecordError) else self._join(d, encoded) for d in drafts]
        answers = iter(self._decoded_answers(made))
        for index, (draft, tokenized) in enumerate(zip(drafts, made, strict=True)):
            if isinstance(draft, RecordError) or isinstance(tokenized, RecordError):
                continue
            spoken = [next(answers) for _ in tokenized.answer_spans]
            try:
                self._prove(draft, tokenized, spoken)
            except RecordError as error:
                made[index] = error
        return made

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids to generate from: the turns so far, then the answer's header.

        A prefix of the training ids of the same turns with an answer behind them.

        Raises:
            RecordError: The turns end in an answer, or as for `tokenize`.
        """
        if not conversation.turns or conversation.turns[-1].role == "assistant":
            raise self._error(
                conversation, "prompt_ends_in_answer", "a prompt must end in a user's turn"
            )
        draft = self._draft(conversation)
        if isinstance(draft, RecordError):
            raise draft
        tokenized = self._join(draft, self.encoder.encode_all(draft.texts()))
        if isinstance(tokenized, RecordError):
            raise tokenized
        return tokenized.input_ids

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer as it is trained: its text behind the answer's header, then the stop."""
        turns = (Turn("user", (TextPart(""),)), Turn("assistant", (TextPart(text),)))
        tokenized = self.tokenize(Conversation("answer", turns))
        (span,) = tokenized.answer_spans
        return tokenized.input_ids[span.start : span.end]

    def _draft(self, conversation: Conversation) -> "_Draft | RecordError":
        try:
            arranged = self.llava_quirks.rearrange(separated(conversation, self.image_separator))
            turns = self._with_system(arranged.turns)
            runs = self._runs(tuple(turn.role for turn in turns))
        except RecordError as error:
            return error
        except UserError as error:
            return self._error(conversation, "template", str(error))
        filled: list[_Filled] = []
        context: Context = "start"
        for run in runs:
            made, context = self._fill(run, turns, context)
            filled.append(made)
        num_control = sum(run.num_control for run in runs)
        return _Draft(arranged, filled, len(turns) - len(arranged.turns), num_control)

    def _require_plain(self, separator: str) -> None:
        """Refuse a separator that an exported chat template could not write as ordinary text."""
        found = self.encoder.find_special_tokens(separator)
        if IMAGE_PLACEHOLDER in separator:
            found = [IMAGE_PLACEHOLDER]
        if found:
            raise TemplateError(
                f"image separator {separator!r}: contains {found[0]!r}, which is not ordinary "
                "text; use white space or words"
            )

    def _with_system(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if not self._system or (turns and turns[0].role == "system"):
            return turns
        return (Turn("system", (TextPart(self._system),)), *turns)

    def _find_runs(self, roles: tuple[Role, ...]) -> tuple[_Run, ...]:
        """The template's pieces for these roles: one run an answer, one between two answers."""
        runs: list[_Run] = []
        pieces = self._swallowed(self.template.pieces(roles))
        for supervised, group in itertools.groupby(pieces, key=lambda piece: piece.supervised):
            answer: list[TemplatePiece] = []
            for piece in group:
                answer.append(piece)
                if supervised and self._ends_answer(answer):
                    runs.append(self._run(answer))
                    answer = []
            if answer:
                runs.append(self._run(answer))
        return tuple(runs)

    def _swallowed(self, pieces: Sequence[TemplatePiece]) -> list[TemplatePiece]:
        """The pieces without the white space that control tokens beside it swallow (Phi 3's)."""
        kept = list(pieces)
        for index in range(1, len(kept)):
            before, after = kept[index - 1], kept[index]
            if isinstance(before, TemplateText) and isinstance(after, TemplateText):
                left, right = self.encoder.swallow(before.text, after.text)
                kept[index - 1] = replace(before, text=left)
                kept[index] = replace(after, text=right)
        return [piece for piece in kept if isinstance(piece, Slot) or piece.text]

    def _ends_answer(self, pieces: Sequence[TemplatePiece]) -> bool:
        last = pieces[-1]
        ends = isinstance(last, TemplateText) and last.text == self.template.eot_token
        return ends and any(isinstance(piece, Slot) for piece in pieces)

    def _run(self, pieces: Sequence[TemplatePiece]) -> _Run:
        parts: list[str | int | Slot] = []
        turn: int | None = None
        around = ["", ""]
        for piece in pieces:
            if isinstance(piece, Slot):
                turn = piece.turn if piece.supervised else turn
                parts.append(piece)
                continue
            added = self.encoder.split_special_tokens(piece.text)
            if piece.supervised:
                text = "".join(part for part in added if isinstance(part, str))
                around[turn is not None] += text
            parts += added
        num_control = sum(isinstance(part, int) for part in parts)
        prefix, suffix = around
        return _Run(tuple(parts), turn, prefix, suffix, num_control)

    def _fill(self, run: _Run, turns: Sequence[Turn], context: Context) -> tuple[_Filled, Context]:
        """The run with its turns' words, every text as the tokenizer spells it in its place."""
        parts: list[str | int] = []
        for part in run.parts:
            if isinstance(part, Slot):
                for inner in self._turn_parts(turns[part.turn]):
                    _append(parts, inner)
            else:
                _append(parts, part)
        prefix = run.prefix
        for index, part in enumerate(parts):
            if isinstance(part, int):
                first = context == "start" and self.template.begins_text
                control: Context = "start" if first else "after_special_token"
                context = self._behind_image if part == IMAGE_TOKEN_ID else control
                continue
            spelled = self.encoder.spelled(part, context)
            if run.turn is not None and index == 0:
                prefix = spelled[: len(spelled) - len(part)] + prefix
            parts[index], context = spelled, "continuation"
        return _Filled(parts, run.turn, prefix, run.suffix), context

    def _turn_parts(self, turn: Turn) -> list[str | int]:
        parts: list[str | int] = [
            part.text if isinstance(part, TextPart) else IMAGE_TOKEN_ID for part in turn.parts
        ]
        if turn.role == "user" and self.template.images_only_users:
            return [part for part in parts if isinstance(part, int)]
        return parts

    def _join(
        self, draft: _Draft, encoded: Mapping[str, Sequence[int] | UnencodableText]
    ) -> "TokenizedRecord | RecordError":
        """Ids and labels of a draft, by construction."""
        ids: list[int] = []
        labels: list[int] = []
        answer_spans: list[AnswerSpan] = []
        for run in draft.runs:
            start = len(ids)
            for part in run.parts:
                if isinstance(part, int):
                    ids.append(part)
                    continue
                found = encoded[part]
                if isinstance(found, UnencodableText):
                    return self._error(draft.conversation, "unspellable", str(found))
                ids += found
            trained = False
            if run.turn is not None:
                turn = run.turn - draft.offset
                answer_spans.append(AnswerSpan(turn, start, len(ids), run.prefix, run.suffix))
                trained = draft.conversation.turns[turn].supervised
            labels += ids[start:] if trained else [IGNORE_INDEX] * (len(ids) - start)
        return TokenizedRecord(ids, labels, tuple(answer_spans))

    def _decoded_answers(self, made: Sequence["TokenizedRecord | RecordError"]) -> list[str]:
        """What the ids of every answer spell, control tokens aside."""
        bodies = []
        for tokenized in (row for row in made if isinstance(row, TokenizedRecord)):
            for span in tokenized.answer_spans:
                body = tokenized.input_ids[span.start : span.end]
                if not self.special_token_ids.isdisjoint(body):
                    body = [token for token in body if token not in self.special_token_ids]
                bodies.append(body)
        return self.encoder.decode_all(bodies)

    def _prove(self, draft: _Draft, tokenized: TokenizedRecord, spoken: Sequence[str]) -> None:
        """Check the labels against the conversation, not against how they were made."""
        conversation, ids = draft.conversation, tokenized.input_ids
        assistants = [i for i, t in enumerate(conversation.turns) if t.role == "assistant"]
        found = [span.turn for span in tokenized.answer_spans]
        if found != assistants:
            raise self._violation(
                conversation, f"answers were found for turns {found}, expected turns {assistants}"
            )
        wanted = [IGNORE_INDEX] * len(ids)
        for span, text in zip(tokenized.answer_spans, spoken, strict=True):
            turn = conversation.turns[span.turn]
            self._prove_answer(conversation, span, ids[span.start : span.end], text)
            if turn.supervised:
                wanted[span.start : span.end] = ids[span.start : span.end]
        if tokenized.labels != wanted:
            at = next(
                i for i, (a, b) in enumerate(zip(tokenized.labels, wanted, strict=True)) if a != b
            )
            raise self._violation(
                conversation, f"token {at} has label {tokenized.labels[at]}, expected {wanted[at]}"
            )
        images = sum(1 for _ in conversation.image_parts())
        if tokenized.num_images != images:
            raise self._violation(
                conversation, f"{tokenized.num_images} image placeholders for {images} images"
            )
        self._prove_control(draft, ids)

    def _prove_answer(
        self, conversation: Conversation, span: AnswerSpan, ids: Sequence[int], text: str
    ) -> None:
        if self.eot_token_id is not None and (not ids or ids[-1] != self.eot_token_id):
            raise self._violation(
                conversation,
                f"turn {span.turn} does not end with the stop token {self.template.eot_token!r}",
            )
        answer = conversation.turns[span.turn].text
        expected = span.prefix + answer + span.suffix
        if text != expected and text != self.encoder.normalized(expected):
            raise self._violation(
                conversation,
                f"turn {span.turn} is supervised as {text[:80]!r}, expected {expected[:80]!r}",
            )

    def _prove_control(self, draft: _Draft, ids: list[int]) -> None:
        """Data became no control token: there are as many as the template writes."""
        found = sum(ids.count(token) for token in self.special_token_ids.intersection(ids))
        if found != draft.num_control:
            raise self._violation(
                draft.conversation,
                f"{found} control tokens, expected the {draft.num_control} that the template "
                "writes",
            )

    def _violation(self, conversation: Conversation, message: str) -> RecordError:
        return self._error(conversation, "mask_proof", message)

    def _error(self, conversation: Conversation, reason: str, message: str) -> RecordError:
        return RecordError(reason, message, record_id=conversation.id, where=conversation.where)


def expand(ids: Sequence[int], num_tokens: int, values: Sequence[int] | None = None) -> list[int]:
    """Ids, or `values` that lie beside them, with each image's position `num_tokens` times."""
    pairs = zip(ids, ids if values is None else values, strict=True)
    return [v for i, v in pairs for _ in range(num_tokens if i == IMAGE_TOKEN_ID else 1)]


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Without Python's garbage collector, which finds nothing here and takes a fifth of the time.

    Tokenization makes many small objects and no cycle; each collection walks all that is imported.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _append(into: list[str | int], part: str | int) -> None:
    """Add a part, joining text to text so that it is tokenized together."""
    if isinstance(part, str) and into and isinstance(into[-1], str):
        into[-1] += part
    elif part != "":
        into.append(part)


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` values, the last one shorter (`itertools.batched` needs Python 3.12)."""
    iterator = iter(values)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
