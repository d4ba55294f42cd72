"""Ask a model behind an OpenAI-compatible server."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from vlm_sft.errors import UserError
from vlm_sft.utils.addresses import is_loopback
from vlm_sft.utils.escape import encodable
from vlm_sft.utils.libraries import import_extra, one_line

if TYPE_CHECKING:
    import openai

DEFAULT_KEY_ENV: Final = "OPENAI_API_KEY"
ATTEMPTS: Final = 6
"""Attempts per request. Between them, the client waits longer each time, or as the server asks."""

_REFUSALS: Final = ("content_filter", "content_policy_violation", "content_policy")


@dataclass(frozen=True)
class Reply:
    """A server's answer.

    Attributes:
        text: The text; empty if the server refused.
        tokens: Length in tokens; None if the server does not say.
        problem: Why there is no answer; None if there is one.
    """

    text: str
    tokens: int | None = None
    problem: str | None = None


@dataclass
class Endpoint:
    """A model of a server.

    Attributes:
        base_url: Address, e.g. `http://127.0.0.1:8000/v1`.
        model: Name of the model.
        key_env: Environment variable of the API key; not needed for a server on this machine.
        timeout: Seconds that an answer may take.
    """

    base_url: str
    model: str
    key_env: str = DEFAULT_KEY_ENV
    timeout: float = 600.0
    _key: str = field(default="", init=False, repr=False)
    _limit_name: str = field(default="max_tokens", init=False)
    """The parameter that limits the answer; newer models of OpenAI know another one."""

    def __post_init__(self) -> None:
        """Check the address and the key.

        Raises:
            UserError: The address is malformed, would send the key unencrypted, or needs a key that
                is not set; or the package `openai` is missing.
        """
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            raise UserError("--base-url: expected http://HOST:PORT/v1 or https://HOST/v1")
        key, local = os.environ.get(self.key_env, ""), is_loopback(parts.hostname)
        if not key and parts.scheme == "https" and not local:
            raise UserError(
                f"the environment variable {self.key_env} is not set; put the key of "
                f"{parts.hostname} into it, or name another one with --api-key-env"
            )
        if key and parts.scheme == "http" and not local:
            raise UserError(
                f"--base-url: http would send the key in {self.key_env} unencrypted to "
                f"{parts.hostname}; use https, or unset the variable"
            )
        self._key = key
        library = import_extra("openai", "scores")
        self._client: openai.OpenAI = library.OpenAI(
            base_url=self.base_url,
            api_key=key or "none",
            max_retries=ATTEMPTS - 1,
            timeout=self.timeout,
        )

    def ask(self, messages: Sequence[dict[str, Any]], max_tokens: int) -> Reply:
        """Return the answer to chat messages, at temperature 0; safe to call from threads.

        Raises:
            UserError: The server cannot be reached or refuses the request for a reason other than
                its content.
        """
        import openai

        for name in (self._limit_name, "max_completion_tokens"):
            try:
                found = self._client.chat.completions.create(
                    model=self.model,
                    messages=messages,  # type: ignore[arg-type]
                    extra_body={name: max_tokens, "temperature": 0},
                )
            except openai.BadRequestError as error:
                if error.code in _REFUSALS:
                    return Reply("", problem=self._described(error))
                if name == "max_tokens" and "max_tokens" in str(error):
                    self._limit_name = "max_completion_tokens"
                    continue
                raise self._failure(error) from None
            except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
                raise self._failure(error) from None
            return self._reply(found)
        raise AssertionError("the second name raises or returns")

    def _reply(self, found: Any) -> Reply:
        choices = getattr(found, "choices", None)
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = getattr(choice, "message", None)
        text = getattr(message, "content", None)
        if message is None or not isinstance(text, str | None):
            raise self._failure(ValueError("the response has no message with a text"))
        finish, usage = getattr(choice, "finish_reason", None), getattr(found, "usage", None)
        problem = "the server's content filter" if finish in _REFUSALS else None
        tokens = getattr(usage, "completion_tokens", None)
        return Reply(encodable(text or "").strip(), tokens, problem)

    def _failure(self, error: Exception) -> UserError:
        host = urlsplit(self.base_url).netloc
        return UserError(f"the server {host} did not answer: {self._described(error)}")

    def _described(self, error: Exception) -> str:
        """Return what is wrong on one line, without the key, which servers may repeat."""
        text = encodable(one_line(error))
        return text.replace(self._key, "(key)") if self._key else text


def user_message(text: str, image: bytes | None, kind: str = "png") -> dict[str, Any]:
    """Return a user's message with an image before the text, as the chat API takes it."""
    if image is None:
        return {"role": "user", "content": text}
    url = f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}
