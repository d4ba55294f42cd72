"""Find the chat template of a finished vision-language model.

Its own template is Jinja for its processor. It is compared with the built-in templates by what both
write; if none is equal, the model's own is used as it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from vlm_sft.config.finished_files import WHERE, FinishedModel
from vlm_sft.config.schema import DataConfig
from vlm_sft.data.chat_template import ChatTemplate, JinjaTemplate, Slot, load_template
from vlm_sft.data.conversation import Conversation, ImagePart, Role, TextPart, Turn
from vlm_sft.data.llava_quirks import LlavaQuirks
from vlm_sft.data.template_names import builtin_templates
from vlm_sft.data.tokenize import ChatTokenizer
from vlm_sft.errors import TemplateError, UserError
from vlm_sft.utils.console import echo
from vlm_sft.utils.constants import IMAGE_PLACEHOLDER
from vlm_sft.utils.reading import read_json, read_text

_QUESTION, _ANSWER, _SECOND, _SYSTEM = (
    "vlmsftQuestion",
    "vlmsftAnswer",
    "vlmsftSecond",
    "vlmsftSystem",
)
_PROMPT: Final[tuple[Role, ...]] = ("user",)
_DIALOG: Final[tuple[Role, ...]] = ("user", "assistant", "user")


@dataclass(frozen=True)
class _Recognized:
    """A template that writes what the model's own writes.

    Attributes:
        template: The template.
        system: System text of conversations without one.
        stop_written: Whether the model's own writes the stop token after an answer, too.
        header: What the model's own writes between a question and an answer, if that is not what it
            writes for an answer to be generated, which is before every answer in training.
    """

    template: ChatTemplate
    system: str
    stop_written: bool
    header: str | None = None


def finished_chat_tokenizer(
    found: FinishedModel, tokenizer: PreTrainedTokenizerBase, data: DataConfig | None = None
) -> ChatTokenizer:
    """Return the chat tokenizer of a finished model, with its own template.

    Args:
        found: The description of the model.
        tokenizer: Its tokenizer.
        data: Settings of a run: system text, image separator, quirks; None for those of the model.

    Raises:
        TemplateError: The model has no template, or one that training cannot reproduce.
    """
    source = own_template(found.folder, tokenizer)
    if source is None:
        raise TemplateError(
            f"{WHERE}: {found.name} has no chat template; set data.template (--template) to the "
            "one that it was trained with, for example vicuna_v1 for LLaVA-1.5; built in are "
            + ", ".join(builtin_templates())
        )
    theirs = _Theirs(
        source, tokenizer, _image_token(found, tokenizer), _tokens_around_images(found, tokenizer)
    )
    prompt = theirs.write(_PROMPT)
    before, _, rest = prompt.partition(IMAGE_PLACEHOLDER)
    separator, question, _ = rest.partition(_QUESTION)
    if not question or _QUESTION in before:
        raise _unusable(found, f"it writes {prompt[:200]!r} for an image and a question")
    recognized = _recognize(theirs, tokenizer, separator)
    if recognized is None:
        recognized = _own(theirs, tokenizer)
        for roles in (_PROMPT, _DIALOG):
            expected, written = (
                theirs.write(roles),
                _ours(recognized.template, roles, "", separator),
            )
            if written != expected:
                raise _unusable(found, f"it writes {expected!r}, and without images {written!r}")
    separator = _separator(recognized.template, separator)
    is_default = recognized.system == (recognized.template.default_system or "")
    system = None if is_default else recognized.system
    if data is not None and data.system is not None:
        system = data.system
    given_separator = data.image_separator if data is not None else None
    chat_tokenizer = ChatTokenizer(
        recognized.template,
        tokenizer,
        default_system=system,
        llava_quirks=LlavaQuirks.from_name("none" if data is None else data.llava_quirks),
        image_separator=separator if given_separator is None else given_separator,
    )
    is_own = data is None or (data.system is None and data.image_separator is None)
    if is_own and chat_tokenizer.keeps_layout:
        _require_same_ids(found, theirs, chat_tokenizer)
    _report(found, recognized)
    return chat_tokenizer


def own_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the Jinja text of a folder's processor, else that of its tokenizer, if any."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    for name in ("chat_template.json", "processor_config.json"):
        try:
            found = read_json(folder / name).get("chat_template")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(found, str):
            return found
    own: Any = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return str(own) if own else None


class _Theirs:
    """What a model's own template and processor write, with `<image>` for its image token.

    Args:
        source: The template.
        tokenizer: Of the model.
        image_token: What the template writes for an image.
        image_tokens: What the processor puts before and after an image.
    """

    def __init__(
        self,
        source: str,
        tokenizer: PreTrainedTokenizerBase,
        image_token: str,
        image_tokens: tuple[str, str],
    ) -> None:
        self.source, self._image_token, self.image_tokens = source, image_token, image_tokens
        self._tokenizer = tokenizer
        ids = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token
        # A processor encodes the written text as any other: its tokenizer may add BOS.
        self.adds_bos = bos is not None and ids[:1] == [tokenizer.bos_token_id]

    def write(self, roles: Sequence[Role], question: str = _QUESTION) -> str:
        """Return the text for turns of these roles, with an image in the first one.

        Raises:
            TemplateError: The template fails.
        """
        texts = iter((question, _SECOND))
        turns: list[list[dict[str, str]]] = []
        for role in roles:
            text = _ANSWER if role == "assistant" else next(texts)
            turns.append([{"type": "text", "text": text}])
        turns[0].insert(0, {"type": "image"})
        as_parts: list[dict[str, Any]] = [
            {"role": role, "content": content} for role, content in zip(roles, turns, strict=True)
        ]
        as_text = [
            {
                "role": m["role"],
                "content": "".join(p.get("text", "<image>\n") for p in m["content"]),
            }
            for m in as_parts
        ]
        reason = ""
        for messages in (as_parts, as_text):
            try:
                text = self._render(messages)
            except Exception as error:
                reason = reason or " ".join(str(error).split())[:200]
                continue
            if question in text:
                return text
        raise TemplateError(
            f"{WHERE}: its chat template does not write an image and a question"
            + (f" ({reason})" if reason else "")
            + f"; set data.template (--template) to one of {', '.join(builtin_templates())}"
        )

    def _render(self, messages: list[dict[str, Any]]) -> str:
        text = str(
            self._tokenizer.apply_chat_template(
                messages, chat_template=self.source, tokenize=False, add_generation_prompt=True
            )
        ).replace(self._image_token, IMAGE_PLACEHOLDER.join(self.image_tokens))
        bos = str(self._tokenizer.bos_token)
        return bos + text if self.adds_bos and not text.startswith(bos) else text

    def ids(self, question: str) -> list[int]:
        """Return the ids of a prompt as the processor gives them, with one image token."""
        text = self.write(_PROMPT, question).replace(IMAGE_PLACEHOLDER, self._image_token)
        bos = str(self._tokenizer.bos_token)
        if self.adds_bos:
            text = text.removeprefix(bos)
        return list(self._tokenizer(text)["input_ids"])

    def image_token_id(self) -> int:
        return int(self._tokenizer.convert_tokens_to_ids(self._image_token))


def _image_token(found: FinishedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    tree: dict[str, Any] = read_json(found.folder / "config.json")
    index = tree.get("image_token_index", tree.get("image_token_id"))
    token: Any = None
    if isinstance(index, int) and 0 <= index < len(tokenizer):
        token = tokenizer.convert_ids_to_tokens(index)
    return str(token or IMAGE_PLACEHOLDER)


def _tokens_around_images(
    found: FinishedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """Return what the processor of a model writes before and after an image; "" for nothing.

    Raises:
        TemplateError: The tokenizer does not name the tokens that the processor writes.
    """
    if found.settings.get("image_tiling.layout") != "dynamic":
        return "", ""
    named = [getattr(tokenizer, f"{side}_image_token", None) for side in ("start", "end")]
    if not all(isinstance(token, str) and token for token in named):
        raise TemplateError(
            f"{WHERE}: the tokenizer of {found.name} does not name the start_image_token and "
            "end_image_token that its processor writes around an image; copy the folder again from "
            "where the model is from"
        )
    return str(named[0]), str(named[1])


def _recognize(
    theirs: _Theirs, tokenizer: PreTrainedTokenizerBase, separator: str
) -> _Recognized | None:
    """Return the built-in template that writes the same, or None."""
    prompt, dialog = theirs.write(_PROMPT), theirs.write(_DIALOG)
    bos = str(tokenizer.bos_token)
    if prompt.startswith(f"{bos} "):  # written because its tokenizer adds no space after BOS
        prompt, dialog = (bos + text[len(bos) + 1 :] for text in (prompt, dialog))
    matches = []
    # From the end of the alphabet: vicuna_v1 before llava_v1, which has other default words only.
    for name in reversed(builtin_templates()):
        try:
            template = load_template(name, tokenizer)
        except TemplateError:
            continue  # it has special tokens that this tokenizer does not have
        if template.images_only_users:
            continue
        for system in _possible_systems(template, prompt, separator):
            for written, stop in ((True, None), (False, ""), (False, " ")):
                ours = _ours(template, _DIALOG, system, separator, stop)
                if not _same_dialog(ours, dialog):
                    continue
                header = None if ours == dialog else _header(dialog)
                recognized = _Recognized(template, system, written, header)
                is_default = system == (template.default_system or "")
                matches.append(((header is None, written, is_default), recognized))
    # `max` keeps the first of equals.
    return max(matches, key=lambda match: match[0])[1] if matches else None


def _possible_systems(template: ChatTemplate, prompt: str, separator: str) -> Iterator[str]:
    """Yield the system texts with which a template writes a prompt: none, or one."""
    if _ours(template, _PROMPT, "", separator) == prompt:
        yield ""
        return
    try:
        text = _ours(template, _PROMPT, _SYSTEM, separator)
    except UserError:
        return  # it has no place for a system text
    before, _, after = text.partition(_SYSTEM)
    is_longer = len(prompt) > len(before) + len(after)
    if prompt.startswith(before) and prompt.endswith(after) and is_longer:
        yield prompt[len(before) : len(prompt) - len(after)]


def _ours(
    template: ChatTemplate,
    roles: Sequence[Role],
    system: str,
    separator: str,
    stop: str | None = None,
) -> str:
    """Return what a template writes; `stop` replaces the stop token after an answer.

    `separator` is what the model writes between the image and the question, including what the
    template itself puts there.
    """
    start = template.text_start
    contents = [_ANSWER if role == "assistant" else start + _SECOND for role in roles]
    image = f"{template.image_start}{IMAGE_PLACEHOLDER}{template.image_end}"
    contents[0] = f"{image}{_separator(template, separator)}{start}{_QUESTION}"
    if system:
        roles, contents = ("system", *roles), [start + system, *contents]
    text = "".join(
        contents[piece.turn] if isinstance(piece, Slot) else piece.text
        for piece in template.pieces(roles)
    )
    return text if stop is None else text.replace(_ANSWER + template.eot_token, _ANSWER + stop)


def _separator(template: ChatTemplate, written: str) -> str:
    """Return the separator, given all that is written between an image and text after it."""
    return written.removeprefix(template.image_end).removesuffix(template.text_start)


def _header(dialog: str) -> str:
    """Return what is written between the question and the answer of a dialog."""
    return dialog.partition(_QUESTION)[2].partition(_ANSWER)[0]


def _same_dialog(ours: str, theirs: str) -> bool:
    """Return whether two dialogs differ at most by white space in the header of the answer.

    LLaVA-OneVision's template writes another one before an answer than for one to be generated.
    """
    headers = _header(ours), _header(theirs)
    as_theirs = ours.replace(headers[0] + _ANSWER, headers[1] + _ANSWER, 1)
    return as_theirs == theirs and headers[0].split() == headers[1].split()


def _own(theirs: _Theirs, tokenizer: PreTrainedTokenizerBase) -> _Recognized:
    """Return the model's own template, cut at the contents of turns.

    Raises:
        TemplateError: It cannot be cut; see `JinjaTemplate`.
    """
    source = theirs.source
    if theirs.adds_bos and not _renders_bos(source, tokenizer):
        source = "{{- bos_token -}}" + source
    tokenizer.chat_template = source
    template = JinjaTemplate(tokenizer, theirs.image_tokens)
    return _Recognized(template, "", stop_written=True)


def _renders_bos(source: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    messages = [{"role": "user", "content": _QUESTION}]
    text = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
    return str(text).startswith(str(tokenizer.bos_token))


def _require_same_ids(found: FinishedModel, theirs: _Theirs, ours: ChatTokenizer) -> None:
    """Check that a prompt has the ids that the model's own processor gives.

    Raises:
        TemplateError: It has others.
    """
    question = "What is in the image?"
    turn = Turn("user", (ImagePart(0), TextPart(question)), image_separator=None)
    conversation = Conversation("probe", (turn,))
    image_id = theirs.image_token_id()
    expected = theirs.ids(question)
    written = [image_id if token < 0 else token for token in ours.prompt(conversation)]
    if written != expected:
        raise _unusable(
            found, f"a question has the ids {expected[:12]}... there and {written[:12]}... here"
        )


def _unusable(found: FinishedModel, reason: str) -> TemplateError:
    return TemplateError(
        f"{WHERE}: training cannot reproduce the chat template of {found.name}: {reason}; set "
        f"data.template (--template) to one of {', '.join(builtin_templates())} or to a YAML file"
    )


def _report(found: FinishedModel, recognized: _Recognized) -> None:
    template = recognized.template
    if template.name == "auto":
        text = "its own, which is none of the built-in ones"
    else:
        text = f"{template.name}, recognized by what it writes"
        if recognized.system != (template.default_system or ""):
            system = recognized.system
            text += f", with the system text {system!r}" if system else ", without a system text"
    if not recognized.stop_written:
        text += (
            f"; it writes no stop token after an answer, but the model is trained to end answers "
            f"with {template.eot_token}"
        )
    if recognized.header is not None:
        text += (
            f"; it writes {recognized.header!r} between a question and an answer, but training "
            "writes what it writes for an answer to be generated"
        )
    echo(f"note: chat template of {found.name}: {text}")
