"""Answer one question about images, or talk in the terminal."""

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vlm_sft.checkpoint.base_models import parse_bases
from vlm_sft.commands.inputs import require_images
from vlm_sft.data.conversation import TextPart, Turn
from vlm_sft.data.images import open_image
from vlm_sft.errors import UserError, error_line
from vlm_sft.inference.loaded_model import VlmRun, load_run, question
from vlm_sft.utils.console import say
from vlm_sft.utils.image_paths import image_argument


@dataclass
class Chat:
    """A conversation in progress."""

    run: VlmRun
    max_new_tokens: int
    temperature: float
    seed: int | None
    images: list[Path] = field(default_factory=list)
    turns: tuple[Turn, ...] = ()

    def show(self, path: Path) -> None:
        """Put an image before the next question.

        Raises:
            ImageError: It is missing or broken.
        """
        require_images([path])
        open_image(path)
        self.images.append(path)

    def ask(self, text: str) -> Iterator[str]:
        """Pieces of the answer; it counts as said when the last piece is taken."""
        asked = question(text, self.images, history=self.turns)
        said: list[str] = []
        for piece in self.run.stream(
            asked,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        ):
            said.append(piece)
            yield piece
        answer = Turn("assistant", (TextPart("".join(said).strip()),))
        self.turns = (*asked.turns, answer)

    def reset(self) -> None:
        """Forget turns and images."""
        self.turns, self.images = (), []


def run(arguments: argparse.Namespace) -> int:
    """Answer `--prompt`, or talk; returns the exit code."""
    for path in arguments.image:
        open_image(path)  # before the model is loaded, which takes long
    vlm_run = load_run(
        arguments.checkpoint, device=arguments.device, bases=parse_bases(arguments.base)
    )
    chat = Chat(vlm_run, arguments.max_new_tokens, arguments.temperature, arguments.seed)
    chat.images = list(arguments.image)
    if arguments.prompt is not None:
        _print_answer(chat, arguments.prompt)
        return 0
    _talk(chat)
    return 0


def _talk(chat: Chat) -> None:
    given = f"; images given so far: {len(chat.images)}" if chat.images else ""
    _say(f"Ask a question, or type /image FILE, /reset or /quit{given}.")
    while True:
        try:
            line = _read()
            if line == "/quit":
                return
            if line:
                _obey_or_ask(chat, line)
        except EOFError:
            _say("")
            return
        except KeyboardInterrupt:
            _say("\n(stopped; Ctrl-D leaves)")
        except UserError as error:
            _say(error_line(error))


def _obey_or_ask(chat: Chat, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/reset":
        chat.reset()
        _say("forgotten")
    elif command == "/image":
        names = _split(rest)
        if len(names) != 1:
            raise UserError(f"/image {rest}: expected one file; quote a name with spaces")
        chat.show(image_argument(names[0]))
        _say(f"image {len(chat.images)} goes with the next question")
    elif command.startswith("/"):
        raise UserError(f"{command}: unknown command; known: /image FILE, /reset, /quit")
    else:
        _print_answer(chat, line)


def _print_answer(chat: Chat, text: str) -> None:
    for piece in chat.ask(text):
        say(piece, end="", file=sys.stdout)
    say(file=sys.stdout)


def _read() -> str:
    say("> ", end="")
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.strip()


def _split(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"/image {text}: {error}") from None


def _say(text: str) -> None:
    say(text)
