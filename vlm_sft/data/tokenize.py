"""Conversations to token ids and labels: labeled by construction, then proven answer by answer."""

import contextlib
import functools
import gc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from transformers import PreTrainedTokenizerBase

from vlm_sft.data.chat_template import (
    ChatTemplate,
    Slot,
    load_template,
    template_from_description,
)
from vlm_sft.data.conversation import Conversation, TextPart, Turn
from vlm_sft.data.image_separator import separated
from vlm_sft.data.jinja_export import (
    jinja_prelude,
    jinja_with_first_space,
    jinja_with_image_tokens,
)
from vlm_sft.data.llava_quirks import NO_QUIRKS, LlavaQuirks
from vlm_sft.data.template_runs import FilledRun, Layout, TemplateRun, find_runs
from vlm_sft.data.text_encoder import Context, TextEncoder, UnencodableText
from vlm_sft.errors import RecordError, TemplateError, UserError
from vlm_sft.utils.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER, IMAGE_TOKEN_ID

CHUNK: Final = 256
"""Number of records that `tokenize_all` encodes at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class AnswerSpan:
    """The half-open range of token positions of an answer and its EOT token.

    Attributes:
        turn: Index of the assistant turn.
        start: First position.
        end: Position after the last.
        prefix: Text that the template or the tokenizer puts before the answer (a space).
        suffix: Text that the template puts between the answer and its EOT token.
    """

    turn: int
    start: int
    end: int
    prefix: str = ""
    suffix: str = ""


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

    def expanded_length(self, image_tokens: Sequence[int]) -> int:
        """Return the number of tokens when every image takes its number in `image_tokens`."""
        assert len(image_tokens) == self.num_images
        return len(self.input_ids) - len(image_tokens) + sum(image_tokens)


class ChatTokenizer:
    """Turns conversations into ids and labels, under one chat template and tokenizer.

    Args:
        template: The chat template.
        tokenizer: The language model's tokenizer.
        default_system: System text for conversations without one; None: the template's, "": none.
        llava_quirks: The quirks of LLaVA to reproduce.
        image_separator: Text between an image and its neighbors where content is given as a list
            of parts; None: the template's.

    Attributes:
        eot_token_id: The special token that ends an answer; None if the template has none.
        special_token_ids: Every token that the text of a record must never become.

    Raises:
        TemplateError: The tokenizer lacks the template's EOT token, or the image separator is not
            ordinary text.
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
        self.image_separator = (
            template.image_separator if image_separator is None else image_separator
        )
        self._require_ordinary_text(self.image_separator)
        self._image = [*self._token_ids(template.image_start), IMAGE_TOKEN_ID]
        self._image += self._token_ids(template.image_end)
        self._system = template.default_system if default_system is None else default_system
        self._runs = functools.lru_cache(maxsize=1024)(
            functools.partial(find_runs, template, self.encoder)
        )
        self.eot_token_id = self.encoder.special_tokens.get(template.eot_token)
        if template.eot_token and self.eot_token_id is None:
            raise TemplateError(
                f"template {template.name!r} ends answers with {template.eot_token!r}, which is "
                "not a special token of this tokenizer"
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

    def tokenize(self, conversation: Conversation) -> TokenizedRecord:
        """Return the ids and labels of a training record.

        Raises:
            RecordError: The template has no place for the turns, the vocabulary cannot encode the
                text, or the labels are not exactly the supervised answers.
        """
        tokenized = next(self.tokenize_all([conversation]))
        if isinstance(tokenized, RecordError):
            raise tokenized
        return tokenized

    def tokenize_all(
        self, conversations: Iterable[Conversation]
    ) -> Iterator[TokenizedRecord | RecordError]:
        """Yield the ids and labels of each conversation in order, or the error of that one."""
        for chunk in batched(conversations, CHUNK):
            with _garbage_collection_paused():
                results = self._tokenize_chunk(chunk)
            yield from results

    def _tokenize_chunk(self, chunk: Sequence[Conversation]) -> list[TokenizedRecord | RecordError]:
        # 1. Put each conversation's text into the template: a sequence of special tokens' ids and
        #    ordinary text. From here on, text cannot become a special token.
        layouts = [self._lay_out(conversation) for conversation in chunk]

        # 2. Encode all ordinary text of the chunk in one call, which is faster than one by one.
        texts = (text for layout in layouts if isinstance(layout, Layout) for text in layout.texts)
        encoded = self.encoder.encode_all(texts)

        # 3. Concatenate the ids. The labels of a supervised answer and its EOT token are its ids;
        #    everything else is masked.
        results = [
            layout if isinstance(layout, RecordError) else self._join(layout, encoded)
            for layout in layouts
        ]

        # 4. Prove it: decode every answer from its ids and compare it with the conversation.
        decoded = iter(self._decode_answers(results))
        for index, (layout, tokenized) in enumerate(zip(layouts, results, strict=True)):
            if isinstance(layout, RecordError) or isinstance(tokenized, RecordError):
                continue
            answers = [next(decoded) for _ in tokenized.answer_spans]
            try:
                self._prove(layout, tokenized, answers)
            except RecordError as error:
                results[index] = error
        return results

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids to generate from: the turns so far, then the header of the answer.

        They are a prefix of the training ids of the same turns followed by an answer.

        Raises:
            RecordError: The last turn is an answer, or as `tokenize`.
        """
        if not conversation.turns or conversation.turns[-1].role == "assistant":
            raise self._error(
                conversation, "prompt_ends_in_answer", "a prompt must end in a user's turn"
            )
        layout = self._lay_out(conversation)
        if isinstance(layout, RecordError):
            raise layout
        tokenized = self._join(layout, self.encoder.encode_all(layout.texts))
        if isinstance(tokenized, RecordError):
            raise tokenized
        return tokenized.input_ids

    def answer_ids(self, text: str) -> list[int]:
        """Return the ids of an answer as it is trained, with its prefix and its EOT token."""
        turns = (Turn("user", (TextPart(""),)), Turn("assistant", (TextPart(text),)))
        tokenized = self.tokenize(Conversation("answer", turns))
        (span,) = tokenized.answer_spans
        return tokenized.input_ids[span.start : span.end]

    # --- 1. conversation to special tokens and text

    def _lay_out(self, conversation: Conversation) -> Layout | RecordError:
        """Put a conversation's text into the runs of the template."""
        try:
            conversation = separated(conversation, self.image_separator, self.text_separator)
            conversation = self.llava_quirks.rearrange(conversation)
            turns = conversation.turns
            if self._system and not (turns and turns[0].role == "system"):
                turns = (Turn("system", (TextPart(self._system),)), *turns)
            template_runs = self._runs(tuple(turn.role for turn in turns))
        except RecordError as error:
            return error
        except UserError as error:
            return self._error(conversation, "template", str(error))
        runs: list[FilledRun] = []
        context: Context = "start"
        for template_run in template_runs:
            run, context = self._fill(template_run, turns, context)
            runs.append(run)
        num_special = sum(run.num_special for run in template_runs)
        num_special += (len(self._image) - 1) * sum(1 for _ in conversation.image_parts())
        return Layout(conversation, runs, len(turns) - len(conversation.turns), num_special)

    def _fill(
        self, template_run: TemplateRun, turns: Sequence[Turn], context: Context
    ) -> tuple[FilledRun, Context]:
        """Put the turns' text into a run; also return the context of the run after it."""
        parts: list[str | int] = []
        for piece in template_run.parts:
            for part in self._turn_parts(turns[piece.turn]) if isinstance(piece, Slot) else [piece]:
                # Join adjacent texts before they are encoded: "USER: " and the question are one
                # text to the tokenizer, which may merge letters across the border.
                if isinstance(part, str) and parts and isinstance(parts[-1], str):
                    parts[-1] += part
                elif part != "":
                    parts.append(part)
        prefix = template_run.prefix
        for index, part in enumerate(parts):
            if isinstance(part, int):
                context = self._context_after(part, context)
                continue
            # SentencePiece tokenizers put a dummy space before a text, depending on what precedes
            # it. Before an answer it is part of the labels, so the proof has to expect it.
            text = self.encoder.with_prefix_space(part, context)
            if template_run.turn is not None and index == 0:
                prefix = text[: len(text) - len(part)] + prefix
            parts[index], context = text, "continuation"
        return FilledRun(parts, template_run.turn, prefix, template_run.suffix), context

    def _turn_parts(self, turn: Turn) -> list[str | int]:
        parts: list[str | int] = []
        for part in turn.parts:
            parts += [part.text] if isinstance(part, TextPart) else self._image
        if turn.role == "user" and self.template.images_only_users:
            return [part for part in parts if isinstance(part, int)]
        if turn.role != "assistant" and self.template.text_start:
            parts = [part for part in parts if part != ""]
            if parts and isinstance(parts[0], str):
                return [self.template.text_start, *parts]
        return parts

    def _context_after(self, token_id: int, context: Context) -> Context:
        """Return the context of text after a special token or an image."""
        if token_id == IMAGE_TOKEN_ID:
            # LLaVA tokenizes the text after an image on its own, as if it began the sequence.
            return "start" if "space_behind_image" in self.llava_quirks else "after_special_token"
        # Some templates are written so that text after BOS is still the start of a text.
        still_start = context == "start" and self.template.begins_text
        return "start" if still_start else "after_special_token"

    # --- 3. ids and labels

    def _join(
        self, layout: Layout, encoded: Mapping[str, Sequence[int] | UnencodableText]
    ) -> TokenizedRecord | RecordError:
        """Concatenate the ids of a conversation and label its supervised answers."""
        ids: list[int] = []
        labels: list[int] = []
        answer_spans: list[AnswerSpan] = []
        for run in layout.runs:
            start = len(ids)
            for part in run.parts:
                if isinstance(part, int):
                    ids.append(part)
                    continue
                text_ids = encoded[part]
                if isinstance(text_ids, UnencodableText):
                    return self._error(layout.conversation, "unspellable", str(text_ids))
                ids += text_ids
            supervised = False
            if run.turn is not None:
                turn = run.turn - layout.num_added_turns
                answer_spans.append(AnswerSpan(turn, start, len(ids), run.prefix, run.suffix))
                supervised = layout.conversation.turns[turn].supervised
            # A run is an answer or contains none, so its labels are all of its ids or none.
            labels += ids[start:] if supervised else [IGNORE_INDEX] * (len(ids) - start)
        return TokenizedRecord(ids, labels, tuple(answer_spans))

    # --- 4. the proof

    def _decode_answers(self, results: Sequence[TokenizedRecord | RecordError]) -> list[str]:
        """Return the text of every answer of every record, from its ids without special tokens."""
        answers = []
        for tokenized in results:
            if isinstance(tokenized, RecordError):
                continue
            for span in tokenized.answer_spans:
                ids = tokenized.input_ids[span.start : span.end]
                if not self.special_token_ids.isdisjoint(ids):
                    ids = [token for token in ids if token not in self.special_token_ids]
                answers.append(ids)
        return self.encoder.decode_all(answers)

    def _prove(self, layout: Layout, tokenized: TokenizedRecord, answers: Sequence[str]) -> None:
        """Check ids and labels against the conversation itself, not against the runs.

        Raises:
            RecordError: They differ, which is a bug in a template, a tokenizer or this module.
        """
        conversation, ids = layout.conversation, tokenized.input_ids
        turns = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        found = [span.turn for span in tokenized.answer_spans]
        if found != turns:
            raise self._disproof(
                conversation, f"answers were found for turns {found}, expected turns {turns}"
            )
        # Every answer is complete: its exact text, then the EOT token.
        expected = [IGNORE_INDEX] * len(ids)
        for span, text in zip(tokenized.answer_spans, answers, strict=True):
            self._prove_answer(conversation, span, ids[span.start : span.end], text)
            if conversation.turns[span.turn].supervised:
                expected[span.start : span.end] = ids[span.start : span.end]
        # The supervised answers are labeled, and nothing else is.
        if tokenized.labels != expected:
            pairs = enumerate(zip(tokenized.labels, expected, strict=True))
            position, (label, wanted) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
            raise self._disproof(
                conversation, f"token {position} has label {label}, expected {wanted}"
            )
        num_images = sum(1 for _ in conversation.image_parts())
        if tokenized.num_images != num_images:
            raise self._disproof(
                conversation, f"{tokenized.num_images} image placeholders for {num_images} images"
            )
        # No text of the record became a special token.
        num_special = sum(ids.count(token) for token in self.special_token_ids.intersection(ids))
        if num_special != layout.num_special:
            raise self._disproof(
                conversation,
                f"{num_special} special tokens, expected the {layout.num_special} that the "
                "template writes",
            )

    def _prove_answer(
        self, conversation: Conversation, span: AnswerSpan, ids: Sequence[int], text: str
    ) -> None:
        if self.eot_token_id is not None and (not ids or ids[-1] != self.eot_token_id):
            raise self._disproof(
                conversation,
                f"turn {span.turn} does not end with the stop token {self.template.eot_token!r}",
            )
        expected = span.prefix + conversation.turns[span.turn].text + span.suffix
        # A tokenizer's own normalizer may rewrite text (NFC), which decoding cannot undo.
        if text != expected and text != self.encoder.normalized(expected):
            raise self._disproof(
                conversation,
                f"turn {span.turn} is supervised as {text[:80]!r}, expected {expected[:80]!r}",
            )

    def _disproof(self, conversation: Conversation, message: str) -> RecordError:
        return self._error(conversation, "mask_proof", message)

    def _error(self, conversation: Conversation, reason: str, message: str) -> RecordError:
        return RecordError(reason, message, record_id=conversation.id, where=conversation.where)

    # --- checkpoints and export

    @classmethod
    def from_description(
        cls, description: dict[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> "ChatTokenizer":
        """Return the chat tokenizer that `describe` describes."""
        return cls(
            template_from_description(description["template"], tokenizer),
            tokenizer,
            default_system=description["default_system"],
            llava_quirks=LlavaQuirks.from_name(description.get("recipe", "fixed")),
            image_separator=description.get("image_separator"),
        )

    def describe(self) -> dict[str, Any]:
        """Return plain values for a checkpoint's `template.json`."""
        return {
            "template": self.template.describe(),
            "default_system": self._system,
            "recipe": self.llava_quirks.stored_name,
            "image_separator": self.image_separator,
        }

    def to_jinja(self, *, image_tokens: bool = True) -> str:
        """Return a `chat_template` for transformers that writes the text of `tokenize`.

        It accepts contents as text, and as lists of text and image parts. It cannot reproduce
        LLaVA's space after an image, which is a matter of tokenization.

        Args:
            image_tokens: Whether it writes the template's tokens around an image. InternVL's
                processor adds them when it replaces `<image>`.
        """
        prelude = jinja_prelude(
            self._system,
            image_separator=self.image_separator,
            image_first="image_first" in self.llava_quirks,
            text_start=self.template.text_start,
        )
        body = self.template.jinja_body()
        bos = self.tokenizer.bos_token
        if bos and self.template.begins_text and self.encoder.spaces_first_text_only:
            body = jinja_with_first_space(body, str(bos))
        if image_tokens and len(self._image) > 1:
            start, end = self.template.image_start, self.template.image_end
            body = jinja_with_image_tokens(body, start, end)
        return prelude + body

    @property
    def keeps_layout(self) -> bool:
        """Whether images stay where a record has them: no quirk and no template moves them."""
        return not ("image_first" in self.llava_quirks or self.template.images_only_users)

    @property
    def text_separator(self) -> str:
        """The text between an image and text after it, where a turn is given as a list of parts."""
        start = self.template.text_start
        separator = self.image_separator
        return separator if separator.endswith(start) else separator + start

    @property
    def image_tokens(self) -> tuple[str, str]:
        """The special tokens before and after each image; "" for none."""
        return self.template.image_start, self.template.image_end

    @property
    def eot_token_ids(self) -> tuple[int, ...]:
        """The tokens at which generation stops: the template's EOT and the tokenizer's EOS."""
        found = dict.fromkeys((self.eot_token_id, self.tokenizer.eos_token_id))
        return tuple(int(token) for token in found if token is not None)

    def _token_ids(self, token: str) -> list[int]:
        """Return the id of a special token next to an image in a list; empty for no token."""
        if token and token not in self.encoder.special_tokens:
            raise TemplateError(
                f"template {self.template.name!r} writes {token!r} next to images, which is not a "
                "special token of this tokenizer"
            )
        return [self.encoder.special_tokens[token]] if token else []

    def _require_ordinary_text(self, separator: str) -> None:
        """Refuse a separator that an exported chat template could not write as ordinary text."""
        found = self.encoder.find_special_tokens(separator)
        if IMAGE_PLACEHOLDER in separator:
            found = [IMAGE_PLACEHOLDER]
        if found:
            raise TemplateError(
                f"image separator {separator!r}: contains {found[0]!r}, which is not ordinary "
                "text; use white space or words"
            )


def expand(
    ids: Sequence[int], image_tokens: Sequence[int], values: Sequence[int] | None = None
) -> list[int]:
    """Return the ids, or `values` of the same length, with each image repeated for its tokens.

    The value at an image's position is repeated too.

    Args:
        ids: Ids with one `IMAGE_TOKEN_ID` per image.
        image_tokens: Tokens of each image.
        values: One value per id.
    """
    times, expanded = iter(image_tokens), list[int]()
    for token_id, value in zip(ids, ids if values is None else values, strict=True):
        expanded += [value] * (next(times) if token_id == IMAGE_TOKEN_ID else 1)
    assert next(times, None) is None, "more images than placeholders"
    return expanded


@contextlib.contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Pause Python's cyclic garbage collector.

    Tokenizing makes many small objects and no reference cycles, so that collections free nothing;
    but each one walks all imported modules, which takes a fifth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` values, the last one shorter (`itertools.batched` of Python 3.12)."""
    iterator = iter(values)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
