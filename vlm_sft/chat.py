"""Ask a trained model about pictures: `python -m vlm_sft.chat CHECKPOINT --image FILE`."""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlm_sft.data.conversation import TextPart, Turn
from vlm_sft.data.images import open_image
from vlm_sft.errors import UserError, error_line, run_command
from vlm_sft.inference import VlmRun, load_run, question

EXAMPLES = """examples:
  python -m vlm_sft.chat runs/stage2/final --image cat.jpg --prompt "What is this?"
  python -m vlm_sft.chat runs/stage2/final --image a.jpg --image b.jpg
commands of the interactive chat:
  /image FILE   show a picture with the next question
  /reset        forget the conversation and its pictures
  /quit         leave (or Ctrl-D)
"""


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
        """Put a picture before the next question.

        Raises:
            ImageError: It is missing or broken.
        """
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
        """Forget turns and pictures."""
        self.turns, self.images = (), []


def main(argv: Sequence[str]) -> int:
    """Answer `--prompt`, or talk; returns the exit code."""
    arguments = _parse(argv)
    for path in arguments.image:
        open_image(path)  # before the model is loaded, which takes long
    run = load_run(arguments.checkpoint, device=arguments.device)
    chat = Chat(run, arguments.max_new_tokens, arguments.temperature, arguments.seed)
    chat.images = list(arguments.image)
    if arguments.prompt is not None:
        _print_answer(chat, arguments.prompt)
        return 0
    _talk(chat)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vlm_sft.chat",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="RUN/final or RUN/checkpoints/step-N")
    parser.add_argument(
        "--image", type=Path, action="append", default=[], metavar="FILE", help="may be repeated"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token"
    )
    parser.add_argument("--seed", type=int, help="makes answers with a temperature repeatable")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda where it is")
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: expected 1 or more")
    if not 0 <= arguments.temperature < float("inf"):
        raise UserError(f"--temperature {arguments.temperature}: expected 0 or more")
    return arguments


def _talk(chat: Chat) -> None:
    _say(f"{len(chat.images)} picture(s); /image FILE, /reset, /quit")
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
        chat.show(Path(names[0]).expanduser())
        _say(f"picture {len(chat.images)} goes with the next question")
    elif command.startswith("/"):
        raise UserError(f"{command}: unknown command; known: /image FILE, /reset, /quit")
    else:
        _print_answer(chat, line)


def _print_answer(chat: Chat, text: str) -> None:
    for piece in chat.ask(text):
        print(piece, end="", flush=True)
    print(flush=True)


def _read() -> str:
    print("> ", end="", file=sys.stderr, flush=True)
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
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
