"""Chat templates as data: the text around turns, and the slots for the turns' own text."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from vlm_sft.config.yaml_text import parse_yaml
from vlm_sft.data.conversation import Role
from vlm_sft.data.image_separator import DEFAULT_SEPARATOR
from vlm_sft.data.jinja_export import affixes_to_jinja, hide_contents_from
from vlm_sft.data.template_names import builtin_templates
from vlm_sft.errors import TemplateError
from vlm_sft.utils.reading import read_text


@dataclass(frozen=True)
class TemplateText:
    """Text that the template writes; the special tokens in it are encoded as special tokens."""

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class Slot:
    """The position of a turn's own text and images."""

    turn: int
    supervised: bool = False


TemplatePiece = TemplateText | Slot


class ChatTemplate(Protocol):
    """A chat template. Its pieces depend on the roles alone, never on the text of the turns."""

    name: str
    images_only_users: bool
    """The template drops the text of user turns and keeps their images (LLaVA's `plain`)."""
    begins_text: bool
    """The first text is tokenized as the start of the sequence, even after BOS."""
    eot_token: str
    """The special token that ends an answer; "" if answers do not end with one."""
    default_system: str | None
    """System text for conversations without one."""
    image_separator: str
    """Text between an image and its neighbors where content is given as a list of parts."""
    image_start: str
    """The special token before each image; "" for none."""
    image_end: str
    """The special token after each image; "" for none."""
    text_start: str
    """Text before the text of a user's or the system's turn, after an image in front of it; ""."""

    def pieces(self, roles: Sequence[Role]) -> tuple[TemplatePiece, ...]:
        """Return the pieces for these turns, with the generation prompt after a user turn."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return plain values for `template_from_description`."""
        ...

    def jinja_body(self) -> str:
        """Return a `chat_template` for transformers that writes the same text.

        It expects contents that are text; `ChatTokenizer.to_jinja` adds the conversion to text.
        """
        ...


class _Affixes(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: str = ""
    suffix: str = ""


class _SystemAffixes(_Affixes):
    inside_user: bool = False
    """The system text is in the first user turn, after its prefix (Llama 2, Gemma)."""


class _UserAffixes(_Affixes):
    images_only: bool = False


class _AssistantAffixes(_Affixes):
    answer_prefix: str = ""
    """Supervised text between the generation prompt and the answer (the space of Vicuna)."""
    answer_suffix: str = ""
    """Supervised text between the answer and its EOT token (the space of Llama 2)."""
    stop: str = "{eos}"


class TemplateFile(BaseModel):
    """A template file: the text around each role's turns.

    `{bos}` and `{eos}` are replaced by the tokenizer's. `control` lists the texts that must be
    special tokens of the tokenizer; without them a header would silently be ordinary text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str
    begin: str = ""
    begins_text: bool = False
    default_system: str | None = None
    image_separator: str = DEFAULT_SEPARATOR
    image_start: str = ""
    """The special token before each image (InternVL's `<img>`), never supervised."""
    image_end: str = ""
    """The special token after each image, never supervised."""
    text_start: str = ""
    """Text before the text of every turn that is no answer: behind the images, if there are any
    (LLaVA-OneVision's line end)."""
    system: _SystemAffixes | None = None
    user: _UserAffixes = _UserAffixes()
    assistant: _AssistantAffixes = _AssistantAffixes()
    max_exchanges: int | None = None
    control: tuple[str, ...] = ()


class FileTemplate:
    """A template read from YAML.

    Args:
        file: The validated file.
        bos: Replaces `{bos}`; "" if the tokenizer has none.
        eos: Replaces `{eos}`.
    """

    def __init__(self, file: TemplateFile, *, bos: str, eos: str) -> None:
        self._file, self._bos, self._eos = file, bos, eos
        self.name = file.name
        self.images_only_users = file.user.images_only
        self.begins_text = file.begins_text
        self.default_system = file.default_system
        self.image_separator = file.image_separator
        self.image_start, self.image_end = file.image_start, file.image_end
        self.text_start = file.text_start
        self.eot_token = self._fill(file.assistant.stop)
        self._cached = functools.lru_cache(maxsize=1024)(self._pieces)

    def pieces(self, roles: Sequence[Role]) -> tuple[TemplatePiece, ...]:
        return self._cached(tuple(roles))

    def _pieces(self, roles: tuple[Role, ...]) -> tuple[TemplatePiece, ...]:
        self._check(roles)
        pieces: list[TemplatePiece] = [TemplateText(self._fill(self._file.begin))]
        for turn, role in enumerate(roles):
            if role == "assistant":
                pieces += self._answer(turn)
            elif role == "system":
                pieces += self._system(turn)
            else:
                inside = turn == 1 and roles[0] == "system" and self._system_is_inside
                pieces += self._user(turn)[1 if inside else 0 :]
        if roles[-1] != "assistant":
            pieces.append(TemplateText(self._fill(self._file.assistant.prefix)))
        return tuple(p for p in pieces if isinstance(p, Slot) or p.text)

    @property
    def _system_is_inside(self) -> bool:
        return self._file.system is not None and self._file.system.inside_user

    def _system(self, turn: int) -> list[TemplatePiece]:
        around = self._file.system
        assert around is not None  # checked
        opening = self._file.user.prefix if around.inside_user else ""
        return [
            TemplateText(self._fill(opening + around.prefix)),
            Slot(turn),
            TemplateText(self._fill(around.suffix)),
        ]

    def _user(self, turn: int) -> list[TemplatePiece]:
        around = self._file.user
        return [
            TemplateText(self._fill(around.prefix)),
            Slot(turn),
            TemplateText(self._fill(around.suffix)),
        ]

    def _answer(self, turn: int) -> list[TemplatePiece]:
        answer = self._file.assistant
        return [
            TemplateText(self._fill(answer.prefix)),
            TemplateText(self._fill(answer.answer_prefix), supervised=True),
            Slot(turn, supervised=True),
            TemplateText(self._fill(answer.answer_suffix), supervised=True),
            TemplateText(self.eot_token, supervised=True),
            TemplateText(self._fill(answer.suffix)),
        ]

    def describe(self) -> dict[str, Any]:
        file = self._file.model_dump(mode="json")
        if self.image_separator == DEFAULT_SEPARATOR:
            del file["image_separator"]  # keeps the digest of templates of older runs
        for name in ("image_start", "image_end", "text_start"):
            if not file[name]:
                del file[name]  # likewise
        return {
            "kind": "file",
            "file": file,
            "bos": self._bos,
            "eos": self._eos,
        }

    def jinja_body(self) -> str:
        file = self._file
        return affixes_to_jinja(
            {key: self._fill(text) for key, text in _texts(file).items()},
            has_system=file.system is not None,
            system_inside_user=self._system_is_inside,
            images_only_users=file.user.images_only,
        )

    def _fill(self, text: str) -> str:
        return text.replace("{bos}", self._bos).replace("{eos}", self._eos)

    def _check(self, roles: Sequence[Role]) -> None:
        if "system" in roles and self._file.system is None:
            raise TemplateError(
                f"template {self.name!r} has no place for a system message; remove it or choose "
                "another template"
            )
        limit = self._file.max_exchanges
        if limit is not None and sum(role == "user" for role in roles) > limit:
            raise TemplateError(
                f"template {self.name!r} takes {limit} question and answer a record, found "
                f"{sum(role == 'user' for role in roles)}; choose a chat template"
            )


class JinjaTemplate:
    """A model's own chat template, evaluated without the text of the turns.

    The template is rendered with a marker in place of each turn's content and cut at the markers,
    so that the text of a record can neither become a special token nor change what the template
    writes. Differences from `apply_chat_template`: contents are never trimmed, and conditions on
    contents see the marker.

    Args:
        tokenizer: The tokenizer with the `chat_template`.
        image_tokens: Special tokens before and after each image, which the template does not write;
            "" for none.

    Raises:
        TemplateError: It has none.
    """

    images_only_users = False
    begins_text = False
    default_system: str | None = None
    image_separator = DEFAULT_SEPARATOR
    text_start = ""
    name = "auto"

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, image_tokens: tuple[str, str] = ("", "")
    ) -> None:
        if not tokenizer.chat_template:
            raise TemplateError(
                "data.template is 'auto' but the tokenizer has no chat template of its own; "
                f"choose one of {', '.join(builtin_templates())}"
            )
        self._tokenizer = tokenizer
        self.image_start, self.image_end = image_tokens
        self._cached = functools.lru_cache(maxsize=1024)(self._pieces)
        self._takes_parts = self._find_content_form()
        self.eot_token = self._find_eot_token()

    def pieces(self, roles: Sequence[Role]) -> tuple[TemplatePiece, ...]:
        return self._cached(tuple(roles))

    def _pieces(self, roles: tuple[Role, ...]) -> tuple[TemplatePiece, ...]:
        text = self._render(roles, generate=roles[-1] != "assistant")
        pieces: list[TemplatePiece] = []
        rest = text
        for turn, role in enumerate(roles):
            before, found, rest = rest.partition(_marker(turn))
            if not found or _marker(turn) in rest:
                raise TemplateError(
                    f"the model's own chat template does not write the {role} message exactly "
                    "once; choose one of " + ", ".join(builtin_templates())
                )
            if role != "assistant":
                pieces += [TemplateText(before), Slot(turn)]
                continue
            pieces += self._answer(roles, turn, text, before)
            if not rest.startswith(self.eot_token):
                raise TemplateError(
                    f"the model's own chat template ends an answer with {rest[:40]!r} here and "
                    f"with {self.eot_token!r} elsewhere; choose one of "
                    + ", ".join(builtin_templates())
                )
            rest = rest.removeprefix(self.eot_token)
        pieces.append(TemplateText(rest))
        return tuple(p for p in pieces if isinstance(p, Slot) or p.text)

    def _answer(
        self, roles: tuple[Role, ...], turn: int, text: str, before: str
    ) -> list[TemplatePiece]:
        """Return the header, text that the model itself writes before its answer, answer, EOT."""
        prompt = self._render(roles[:turn], generate=True)
        if not text.startswith(prompt):
            raise TemplateError(
                "the model's own chat template gives a generation prompt that its training text "
                f"does not begin with (prompt ends {prompt[-60:]!r}); choose one of "
                + ", ".join(builtin_templates())
            )
        start = text.index(_marker(turn))
        header_length = len(before) - (start - len(prompt))
        return [
            TemplateText(before[:header_length]),
            TemplateText(before[header_length:], supervised=True),
            Slot(turn, supervised=True),
            TemplateText(self.eot_token, supervised=True),
        ]

    def _find_eot_token(self) -> str:
        text = self._render(("user", "assistant", "user", "assistant"), generate=False)
        after_first = text.partition(_marker(1))[2]
        special = sorted(map(str, self._tokenizer.added_tokens_decoder.values()), key=len)
        for token in reversed(special):
            if after_first.startswith(token):
                return token
        raise TemplateError(
            "the model's own chat template writes no special token right after an answer (found "
            f"{after_first[:40]!r}), so the model could not learn to stop; choose one of "
            + ", ".join(builtin_templates())
        )

    def _find_content_form(self) -> bool:
        """Return whether contents must be lists of parts, as processors of images expect."""
        for takes_parts in (False, True):
            self._takes_parts = takes_parts
            try:
                text = self._render(("user",), generate=False)
            except TemplateError:
                continue
            if _marker(0) in text:
                return takes_parts
        return False  # the first use reports what is wrong

    def _render(self, roles: Sequence[Role], *, generate: bool) -> str:
        contents: list[Any] = [_marker(i) for i, _ in enumerate(roles)]
        if self._takes_parts:
            contents = [[{"type": "text", "text": content}] for content in contents]
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generate
                )
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise TemplateError(
                f"the model's own chat template refuses the roles {', '.join(roles)}: {reason}"
            ) from None

    def describe(self) -> dict[str, Any]:
        described = {"kind": "jinja", "chat_template": self._tokenizer.chat_template}
        if self.image_start or self.image_end:
            described |= {"image_start": self.image_start, "image_end": self.image_end}
        return described

    def jinja_body(self) -> str:
        source = str(self._tokenizer.chat_template)
        return hide_contents_from(source, as_parts=self._takes_parts)


def _marker(turn: int) -> str:
    return f"vlmsftTurn{turn}Content"


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Load a template by its built-in name, from a YAML file, or the tokenizer's own (`auto`).

    Raises:
        TemplateError: No such template, an invalid file, or a special token of it is missing.
    """
    if name == "auto":
        return JinjaTemplate(tokenizer)
    if name in builtin_templates():
        text = (resources.files("vlm_sft.data") / "templates" / f"{name}.yaml").read_text("utf-8")
    elif name.endswith((".yaml", ".yml")) and Path(name).is_file():
        text = read_text(name)
    else:
        raise TemplateError(
            f"data.template: no template {name!r}; expected 'auto', a YAML file, or one of "
            + ", ".join(builtin_templates())
        )
    try:
        file = TemplateFile.model_validate(parse_yaml(text))
    except (ValidationError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TemplateError(f"template {name}: {reason}") from None
    return _for_tokenizer(file, tokenizer)


def template_from_description(
    description: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> ChatTemplate:
    """Return the template that a checkpoint's `template.json` describes."""
    if description["kind"] == "jinja":
        tokenizer.chat_template = description["chat_template"]
        image_tokens = (description.get("image_start", ""), description.get("image_end", ""))
        return JinjaTemplate(tokenizer, image_tokens)
    file = TemplateFile.model_validate(description["file"])
    return FileTemplate(file, bos=description["bos"], eos=description["eos"])


def _for_tokenizer(file: TemplateFile, tokenizer: PreTrainedTokenizerBase) -> FileTemplate:
    template = FileTemplate(file, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "")
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    if template.eot_token and template.eot_token not in known:
        raise TemplateError(
            f"template {file.name!r} ends answers with the special token {template.eot_token!r}, "
            "which this tokenizer does not have; choose another template or add the token"
        )
    around_images = [token for token in (file.image_start, file.image_end) if token]
    missing = [token for token in (*file.control, *around_images) if token not in known]
    if missing:
        raise TemplateError(
            f"template {file.name!r} needs the special tokens {', '.join(missing)}, which this "
            "tokenizer would encode as ordinary text; choose another template or add the tokens"
        )
    for token in tokenizer.added_tokens_decoder.values():
        if str(token) in around_images and (token.lstrip or token.rstrip):
            raise TemplateError(
                f"template {file.name!r} writes {token} next to an image, and this tokenizer's "
                f"{token} removes the white space around it (lstrip or rstrip); choose another "
                "template or a tokenizer that keeps the white space"
            )
    return template


def _texts(file: TemplateFile) -> dict[str, str]:
    flat = {"begin": file.begin}
    for role in ("system", "user", "assistant"):
        section = getattr(file, role)
        for key, value in (section.model_dump() if section is not None else {}).items():
            if isinstance(value, str):
                flat[f"{role}_{key}"] = value
    return flat
