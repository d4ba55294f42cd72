"""Answer the questions of a suite: by a loaded model, or by a model behind a server."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final, Protocol

from vlm_sft.errors import UserError
from vlm_sft.evaluation.endpoint import Endpoint, Reply, user_message
from vlm_sft.evaluation.suites.answer_log import Answer
from vlm_sft.evaluation.suites.tasks import Ask, ImageAsks, Key, Shown
from vlm_sft.utils.reading import read_bytes

BATCH_SIZE: Final = 32
"""Questions that go through a model together."""

_SAMPLES: Final = 16
_SAMPLE_BYTES: Final = 256
"""Places, and bytes of each, at which a tensor of a finished model is read to recognize it."""

IsAnswered = Callable[[Key], bool]


class Answerer(Protocol):
    """Something that answers questions about images."""

    def answer(self, batch: Sequence[ImageAsks], is_answered: IsAnswered) -> Iterator[list[Answer]]:
        """Yield answers of a batch; each list is complete before the next one is computed.

        Args:
            batch: The questions.
            is_answered: Whether an earlier start has answered a question.
        """


def answer_all(
    answerer: Answerer, batches: Sequence[Sequence[ImageAsks]], is_answered: IsAnswered
) -> Iterator[list[Answer]]:
    """Yield the answers of all batches in which one is missing.

    A batch is answered as a whole, so that its answers are those of an evaluation without an
    interruption.
    """
    for batch in batches:
        keys = [key for group in batch for ask in group.asks for key in ask.keys]
        if not all(map(is_answered, keys)):
            yield from answerer.answer(batch, is_answered)


class LocalAnswerer:
    """Answers with a loaded model, all questions of a batch together.

    Args:
        loaded: The model, in evaluation mode.
        whole_prompts: Share no prefixes, as sharded weights need.
    """

    def __init__(self, loaded: Any, *, whole_prompts: bool = False) -> None:
        from vlm_sft.evaluation.questions import require_questions_in_prompt
        from vlm_sft.inference.loaded_model import LoadedModel

        require_questions_in_prompt(loaded)
        self._loaded: LoadedModel = loaded
        self._whole_prompts = whole_prompts
        red, green, blue = (round(255 * value) for value in loaded.image_spec.mean)
        self._color = (red, green, blue)

    def answer(self, batch: Sequence[ImageAsks], is_answered: IsAnswered) -> Iterator[list[Answer]]:
        """Yield the answers of a batch as one list.

        Raises:
            ImageError: An image is missing or broken.
            UserError: A prompt is longer than the model's positions.
        """
        from vlm_sft.inference.shared_prefix import answer_prompts

        groups = [self._prompts(group) for group in batch]
        found = answer_prompts(self._loaded, groups, whole_prompts=self._whole_prompts)
        yield [
            answer
            for group, generated in zip(batch, found, strict=True)
            for ask, one in zip(group.asks, generated, strict=True)
            for answer in answers_of(group, ask, Reply(one.text, one.num_tokens))
        ]

    def _prompts(self, group: ImageAsks) -> Any:
        from vlm_sft.evaluation.suites.shown_images import image_source
        from vlm_sft.inference.prompts import user_message as conversation
        from vlm_sft.inference.shared_prefix import Prompts

        source = image_source(group.shown, self._color)
        image = None if source is None else self._loaded.load_image(source)
        images, layouts = ([], []) if image is None else ([b""], [image.layout])
        prompts, limits = [], []
        for ask in group.asks:
            ids = self._loaded.prompt_ids(conversation(ask.prompt, images), layouts)
            prompts.append(ids)
            limits.append(min(ask.max_tokens, self._loaded.free_positions(len(ids))))
        return Prompts(() if image is None else (image,), prompts, limits)


class EndpointAnswerer:
    """Asks a server, several questions at a time.

    Args:
        endpoint: The model.
        concurrency: Questions that are under way at a time.
    """

    def __init__(self, endpoint: Endpoint, *, concurrency: int) -> None:
        self._endpoint, self._concurrency = endpoint, concurrency

    def answer(self, batch: Sequence[ImageAsks], is_answered: IsAnswered) -> Iterator[list[Answer]]:
        """Yield the answers to each prompt as they arrive; answered prompts are not asked again.

        Raises:
            ImageError: An image is missing or broken.
            UserError: The server fails; answers that arrive are yielded before.
        """
        open_asks = [
            (group, ask) for group in batch for ask in group.asks
            if not all(map(is_answered, ask.keys))
        ]  # fmt: skip
        images = {group.shown: _encoded(group.shown) for group, _ in open_asks}
        failures: list[UserError] = []

        def reply(group: ImageAsks, ask: Ask) -> Reply | None:
            if failures:
                return None
            try:
                message = user_message(ask.prompt, *images[group.shown])
                return self._endpoint.ask([message], ask.max_tokens)
            except UserError as error:  # those under way are waited for: they may have been paid
                failures.append(error)
                return None

        pool = ThreadPoolExecutor(self._concurrency)
        try:
            waiting = {pool.submit(reply, *asked): asked for asked in open_asks}
            for done in as_completed(waiting):
                if (found := done.result()) is not None:
                    yield list(answers_of(*waiting[done], found))
        finally:
            pool.shutdown(cancel_futures=True)
        if failures:
            raise failures[0]


def answers_of(group: ImageAsks, ask: Ask, reply: Reply) -> Iterator[Answer]:
    """Yield the lines of `answers.jsonl` that a reply answers."""
    for key in ask.keys:
        yield Answer(
            key.task, key.condition, key.id, group.name, ask.prompt, reply.text, reply.tokens,
            reply.problem,
        )  # fmt: skip


def model_identity(checkpoint: str) -> dict[str, Any]:
    """Return what identifies a checkpoint: its manifest, or the files of a finished model.

    Args:
        checkpoint: Folder or hub name, as `load_checkpoint` takes it.
    """
    folder = Path(checkpoint)
    for place in (folder, folder / "final"):
        if (place / "manifest.json").is_file():
            return {"manifest": _digest(place / "manifest.json")}
    if not folder.is_dir():
        return {"hub": checkpoint}
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            sampled = path.suffix == ".safetensors"
            files[path.name] = _sample_digest(path) if sampled else _digest(path)
    return {"files": files}


def file_digests(paths: Sequence[Path]) -> Mapping[str, str]:
    """Return the SHA-256 of every file."""
    return {str(path): _digest(path) for path in paths}


def _sample_digest(path: Path) -> str:
    """Return the SHA-256 of the header and of some bytes of every tensor of a safetensors file.

    Training changes all of a tensor, so that two models with files of equal size differ here. A
    file whose header cannot be read is hashed whole; loading it tells what is wrong.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < path.stat().st_size:
            return _digest(path)
        header = file.read(length)
        digest.update(header)
        try:
            tensors: dict[str, Any] = json.loads(header)
            spans = sorted(
                value["data_offsets"] for name, value in tensors.items() if name != "__metadata__"
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return _digest(path)
        for begin, end in spans:
            for part in range(_SAMPLES):
                offset = begin + (end - begin) * part // _SAMPLES
                file.seek(8 + length + offset)
                digest.update(file.read(min(_SAMPLE_BYTES, end - offset)))
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encoded(shown: Shown) -> tuple[bytes | None, str]:
    """Return the bytes of an image and the kind of file; a file in another format as PNG."""
    from vlm_sft.data.images import open_image
    from vlm_sft.evaluation.suites.shown_images import image_source, png

    source = image_source(shown)
    if isinstance(source, bytes) or source is None:
        return source, "png"
    data = read_bytes(source)
    if data.startswith(b"\xff\xd8\xff"):
        return data, "jpeg"
    return (data if data.startswith(b"\x89PNG") else png(open_image(source))), "png"
