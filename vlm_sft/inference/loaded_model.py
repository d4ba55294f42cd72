"""A checkpoint brought back to life: images and a question in, an answer out, token by token."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextIteratorStreamer

from vlm_sft.checkpoint.base_models import find_bases
from vlm_sft.checkpoint.components import (
    ADAPTER,
    LANGUAGE_MODEL,
    PROJECTOR,
    dtype_of,
    load_adapter,
    load_language_model,
)
from vlm_sft.checkpoint.digests import base_identity
from vlm_sft.checkpoint.format import verify
from vlm_sft.checkpoint.tensor_files import copy_tensors, load_tensors
from vlm_sft.commands.inputs import require_checkpoint
from vlm_sft.config.fields import ImageAspect, ImageProcessing
from vlm_sft.config.schema import LanguageModelConfig, RunConfig, load_stored_config
from vlm_sft.data.conversation import Conversation, ImagePart, ImageSource, Part, TextPart, Turn
from vlm_sft.data.image_separator import DEFAULT_SEPARATOR, separated_parts
from vlm_sft.data.images import ImageSpec, read_pixels
from vlm_sft.data.records import read_records
from vlm_sft.data.text_encoder import load_tokenizer, padding_id
from vlm_sft.data.tokenize import ChatTokenizer, expand
from vlm_sft.errors import CheckpointError, UserError, as_text
from vlm_sft.model.build import build_model
from vlm_sft.model.positions import position_limit
from vlm_sft.model.vlm import VisionLanguageModel, causal_lm
from vlm_sft.utils.reading import read_json

_LOOKED_AT: Final = 1000
"""Records of a training file that are read for the layout of an older checkpoint."""

_MOST_NEW_TOKENS: Final = 10**6
"""Of an answer by a model whose configuration names no positions."""


@dataclass(frozen=True)
class VlmRun:
    """A trained model with everything that it needs to be asked.

    Attributes:
        model: In eval mode, nothing trainable.
        aspect: How images are made square.
        processing: How exactly they are resized.
        manifest: The checkpoint's manifest (step, stage, libraries, ...).
    """

    model: VisionLanguageModel
    tokenizer: PreTrainedTokenizerBase
    chat_tokenizer: ChatTokenizer
    image_spec: ImageSpec
    aspect: ImageAspect
    processing: ImageProcessing
    config: RunConfig
    manifest: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.vision_tower.device

    @property
    def pad_token_id(self) -> int:
        """Fills up shorter prompts; masked out everywhere."""
        return padding_id(self.tokenizer)

    def pixels(self, source: ImageSource) -> Tensor:
        """An image as the tower wants it, uint8 `[3, size, size]`.

        Raises:
            ImageError: It is missing or broken.
        """
        return read_pixels(source, self.image_spec, self.aspect, self.processing)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """Ids to generate from, `IMAGE_TOKEN_ID` once for each token of each image."""
        return expand(self.chat_tokenizer.prompt(conversation), self.model.vision_tower.num_tokens)

    def answer(self, conversation: Conversation, **sampling: Any) -> str:
        """The whole answer; `sampling` as for `stream`."""
        return "".join(self.stream(conversation, **sampling)).strip()

    @torch.no_grad()
    def image_embeds(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """What the language model sees of images, `[tokens, D]` each; for `answers`.

        Args:
            pixels: uint8 `[3, size, size]` each, at least one.
        """
        return list(self.model.encode_images(torch.stack(list(pixels)).to(self.device)))

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        images: Sequence[Tensor],
        *,
        max_new_tokens: int = 64,
    ) -> list[str]:
        """Greedy answers to several prompts at once.

        Args:
            prompts: What `prompt_ids` gave, padded here on the left.
            images: Every image of every prompt in order, each as `image_embeds` gave it.
            max_new_tokens: Answers are cut there.
        """
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_token_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, width - len(prompt) :] = 1
        ids = ids.to(self.device)
        self.model.require_matching_images(ids, len(images))
        found = self.model.generate_from_embeds(
            self.model.embed(ids, torch.stack(list(images)) if images else None),
            mask.to(self.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(self.chat_tokenizer.eot_token_ids),
            pad_token_id=self.pad_token_id,
        )
        decode = cast(Any, self.tokenizer).decode
        return [str(decode(row, skip_special_tokens=True)).strip() for row in found]

    def stream(
        self,
        conversation: Conversation,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Pieces of the answer as they are made; ends at the template's stop token.

        White space before the answer (Vicuna's space) is left out.

        Args:
            conversation: Ends in a user's turn.
            max_new_tokens: The answer is cut there, or where the model's positions end.
            temperature: 0 takes the likeliest token each time, larger values draw.
            seed: Of the drawing; None leaves torch's generator as it is.

        Raises:
            ImageError: An image is missing or broken.
            UserError: The conversation does not end in a user's turn, or is longer than what the
                model has positions for.
        """
        prompt = self.prompt_ids(conversation)
        max_new_tokens = min(max_new_tokens, self._room(len(prompt)))
        ids = torch.tensor([prompt], device=self.device)
        pixels = [self.pixels(source) for source in conversation.images]
        stacked = torch.stack(pixels).to(self.device) if pixels else None
        drawing = {"do_sample": True, "temperature": temperature, "top_p": None, "top_k": None}
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if seed is not None:
            torch.manual_seed(seed)
        arguments = {
            "max_new_tokens": max_new_tokens,
            "eos_token_id": list(self.chat_tokenizer.eot_token_ids),
            "pad_token_id": self.pad_token_id,
            **(drawing if temperature > 0 else greedy),
        }
        begun = False
        for piece in self._stream(ids, stacked, arguments):
            shown = piece if begun else piece.lstrip()
            begun = begun or bool(shown)
            if shown:
                yield shown

    def _room(self, num_tokens: int) -> int:
        """Return how many tokens an answer to a prompt of so many can have."""
        limit = position_limit(causal_lm(self.model.language_model))
        if limit is None:
            return _MOST_NEW_TOKENS
        if num_tokens >= limit.tokens:
            raise UserError(
                f"the conversation has {num_tokens:,} tokens, but the model has only "
                f"{limit.tokens:,} positions ({limit.key}); shorten it, or begin a new one",
                code="too_long",
            )
        return limit.tokens - num_tokens

    def _stream(
        self, ids: Tensor, pixels: Tensor | None, arguments: dict[str, Any]
    ) -> Iterator[str]:
        # `generate` with embeddings hands the streamer the answer only: there is no prompt to skip.
        streamer = TextIteratorStreamer(cast(Any, self.tokenizer), skip_special_tokens=True)
        stop = _Stop()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                self.model.generate(
                    ids,
                    torch.ones_like(ids),
                    pixels,
                    streamer=_AnswerOnly(streamer),
                    stopping_criteria=[stop],
                    **arguments,
                )
            except BaseException as error:
                failures.append(error)
            finally:
                streamer.end()

        thread = threading.Thread(target=work, name="answer", daemon=True)
        thread.start()
        try:
            for piece in streamer:
                if piece:
                    yield piece
        finally:
            stop.asked.set()
            thread.join()
        if failures:
            raise failures[0]


def load_run(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    bases: Mapping[str, str] | None = None,
) -> VlmRun:
    """Load a checkpoint after comparing every file with its manifest.

    Args:
        folder: A checkpoint (`RUN/final`, `RUN/checkpoints/step-N`), or a finished run's folder.
        device: None takes CUDA where it is, else the CPU.
        bases: Current places of base models that were moved, by configuration key; see
            `checkpoint.base_models`.

    Raises:
        CheckpointError: The folder is no complete checkpoint, or the base models that its
            configuration names cannot be loaded or are not those that it was trained on.
        UserError: `device` is none.
    """
    place = _device(device)
    folder = _checkpoint_folder(Path(folder))
    checkpoint = verify(folder)
    config = find_bases(load_stored_config(folder / "config.yaml"), folder, bases or {})
    files = (folder / "tokenizer").absolute()
    tokenizer = load_tokenizer(LanguageModelConfig(name=str(files)), str(folder / "tokenizer"))
    description = _json(folder / "template.json")
    if "image_separator" not in description:
        description["image_separator"] = _trained_separator(config)
    chat_tokenizer = ChatTokenizer.from_description(description, tokenizer)
    model = _build(config, folder)
    _require_same_base(config, model, checkpoint.manifest, folder)
    _read_parts(config, model, folder)
    model.requires_grad_(False).eval()
    prepared = _json(folder / "processor.json")
    return VlmRun(
        model=model.to(place),
        tokenizer=tokenizer,
        chat_tokenizer=chat_tokenizer,
        image_spec=model.vision_tower.image_spec,
        aspect=prepared["image_aspect"],
        processing=prepared.get("image_processing", "exact"),  # before it was a choice
        config=config,
        manifest=checkpoint.manifest,
    )


def question(
    text: str, images: Sequence[ImageSource] = (), *, history: Sequence[Turn] = ()
) -> Conversation:
    """Return a conversation that asks `text` about the new images, which stand before it.

    The run's template says what separates an image from the text.

    Args:
        text: The user's words.
        images: Every image so far, those of `history` first.
        history: Earlier turns, ending in an assistant's.

    Raises:
        UserError: `text` is not Unicode text.
    """
    text = as_text(text, "question")
    shown = sum(isinstance(part, ImagePart) for turn in history for part in turn.parts)
    parts: list[Part] = [ImagePart(index) for index in range(shown, len(images))]
    asked = Turn("user", (*parts, TextPart(text)), image_separator=None if parts else "")
    turns = (*history, asked)
    return Conversation("question", turns, tuple(images))


def _device(name: str | torch.device | None) -> torch.device:
    """The device of that name, proven to be there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # "meta" holds no numbers
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"device '{name}': {reason}; give cpu, cuda or cuda:N") from None


def _checkpoint_folder(folder: Path) -> Path:
    require_checkpoint(folder)
    if not (folder / "manifest.json").exists() and (folder / "final" / "manifest.json").exists():
        return folder / "final"
    return folder


def _json(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], read_json(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); the checkpoint is damaged",
            code="checkpoint_damaged",
        ) from None


def _trained_separator(config: RunConfig) -> str | None:
    """Return the image separator of a checkpoint made before template.json named one.

    Then nothing was added to records whose content is a list of parts, so the first such record
    of the training data, where it is still there, shows what the model saw. None: the template's.
    """
    for file in config.data.train:
        if not Path(file.path).exists():
            continue
        for record in islice(read_records(file), _LOOKED_AT):
            for turn in record.turns if isinstance(record, Conversation) else ():
                if turn.image_separator is None:
                    return (
                        ""
                        if separated_parts(turn.parts, DEFAULT_SEPARATOR) != list(turn.parts)
                        else None
                    )
    return None


def _build(config: RunConfig, folder: Path) -> VisionLanguageModel:
    try:
        return build_model(config.model, dtype=dtype_of(config), seed=config.seed, lora=config.lora)
    except UserError as error:
        raise CheckpointError(
            f"{folder / 'config.yaml'}: {error} (the checkpoint was trained on that one: put it "
            "back, or give its new place with --base KEY=PATH)"
        ) from None


def _require_same_base(
    config: RunConfig, model: VisionLanguageModel, manifest: dict[str, Any], folder: Path
) -> None:
    recorded, found = manifest.get("base_model"), base_identity(config, model)
    for key, value in found.items():
        if recorded is not None and recorded.get(key) != value:
            raise CheckpointError(
                f"{folder}: its {key.replace('_', ' ')} is not the one that it was trained with "
                f"(the base named in config.yaml has changed, expected {recorded.get(key)!r}, "
                f"found {value!r}); put the original back",
                code="shapes_differ" if key == "features" else "wrong_base",
            )


def _read_parts(config: RunConfig, model: VisionLanguageModel, folder: Path) -> None:
    path = folder / PROJECTOR
    copy_tensors(load_tensors(path), model.multi_modal_projector.state_dict(), path)
    if (folder / ADAPTER).is_dir():
        if config.lora is None:
            raise CheckpointError(f"{folder}: has an adapter, but its config.yaml has no lora")
        load_adapter(model, folder)
    elif config.lora is not None:
        raise CheckpointError(f"{folder}: its config.yaml has lora, but adapter/ is missing")
    if (folder / LANGUAGE_MODEL).is_dir():
        load_language_model(model, folder)


class _Stop(StoppingCriteria):
    """Ends generation when the reader of the stream has gone away."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full(
            (input_ids.shape[0],), self.asked.is_set(), dtype=torch.bool, device=input_ids.device
        )


class _AnswerOnly:
    """Passes tokens on; `generate` first hands over its (empty) prompt ids, which are none."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer

    def put(self, value: Tensor) -> None:
        if value.numel():
            self._streamer.put(value)

    def end(self) -> None:
        """Left to the worker, which also ends the stream after an error."""
