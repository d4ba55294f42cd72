"""Answer one question about images, or chat in the terminal."""

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
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.inference.prompts import user_message
from vlm_sft.utils.console import echo
from vlm_sft.utils.image_paths import image_argument


@dataclass
class Chat:
    """A conversation in progress.

    Attributes:
        images: All images so far; those that no question has shown yet go with the next one.
        turns: The turns so far; they end with an answer.
    """

    model: LoadedModel
    max_new_tokens: int
    temperature: float
    seed: int | None
    images: list[Path] = field(default_factory=list)
    turns: tuple[Turn, ...] = ()

    def add_image(self, path: Path) -> None:
        """Show an image with the next question.

        Raises:
            ImageError: The image is missing or cannot be decoded.
        """
        require_images([path])
        open_image(path)
        self.images.append(path)

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer in pieces; only a complete answer becomes part of the conversation."""
        question = user_message(text, self.images, history=self.turns)
        pieces: list[str] = []
        for piece in self.model.stream(
            question,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        ):
            pieces.append(piece)
            yield piece
        answer = Turn("assistant", (TextPart("".join(pieces).strip()),))
        self.turns = (*question.turns, answer)

    def reset(self) -> None:
        """Clear the turns and images."""
        self.turns, self.images = (), []


def run(arguments: argparse.Namespace) -> int:
    """Answer `--prompt`, or chat until the user quits; returns the exit code."""
    for path in arguments.image:
        open_image(path)  # before the model is loaded, which takes long
    model = load_checkpoint(
        arguments.checkpoint,
        device=arguments.device,
        bases=parse_bases(arguments.base),
        template=arguments.template,
    )
    chat = Chat(model, arguments.max_new_tokens, arguments.temperature, arguments.seed)
    chat.images = list(arguments.image)
    if arguments.prompt is not None:
        _print_answer(chat, arguments.prompt)
    else:
        _chat(chat)
    return 0


def _chat(chat: Chat) -> None:
    """Read lines and answer them until `/quit` or the end of input."""
    given = f"; images given so far: {len(chat.images)}" if chat.images else ""
    echo(f"Ask a question, or type /image FILE, /reset or /quit{given}.")
    while True:
        try:
            echo("> ", end="")
            line = sys.stdin.readline()
            if not line:  # Ctrl-D
                echo()
                return
            if line.strip() == "/quit":
                return
            if line.strip():
                _handle_line(chat, line.strip())
        except KeyboardInterrupt:
            echo("\n(stopped; Ctrl-D quits)")
        except UserError as error:
            echo(error_line(error))


def _handle_line(chat: Chat, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/reset":
        chat.reset()
        echo("conversation cleared")
    elif command == "/image":
        try:
            names = shlex.split(rest)
        except ValueError as error:
            raise UserError(f"/image {rest}: {error}") from None
        if len(names) != 1:
            raise UserError(f"/image {rest}: expected one file; quote a name with spaces")
        chat.add_image(image_argument(names[0]))
        echo(f"image {len(chat.images)} goes with the next question")
    elif command.startswith("/"):
        raise UserError(f"{command}: unknown command; known: /image FILE, /reset, /quit")
    else:
        _print_answer(chat, line)


def _print_answer(chat: Chat, text: str) -> None:
    for piece in chat.ask(text):
        echo(piece, end="", file=sys.stdout)
    echo(file=sys.stdout)
