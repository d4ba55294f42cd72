"""Load a checkpoint, and generate responses to text and images with it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vlm_sft.checkpoint.base_models import (
    LANGUAGE_MODEL,
    VISION_TOWER,
    find_bases,
    with_recorded_paths,
)
from vlm_sft.checkpoint.components import (
    ADAPTER,
    PROJECTOR,
    load_adapter,
    load_language_model,
)
from vlm_sft.checkpoint.digests import base_identity
from vlm_sft.checkpoint.format import require_checkpoint, verify
from vlm_sft.checkpoint.tensor_files import copy_tensors, load_tensors
from vlm_sft.config.fields import ImageAspect, ImageProcessing
from vlm_sft.config.finished import (
    is_finished,
    read_finished,
    require_aspect,
    resolve_model,
)
from vlm_sft.config.finished_files import is_hub_name
from vlm_sft.config.schema import (
    LanguageModelConfig,
    ModelConfig,
    RunConfig,
    load_stored_config,
)
from vlm_sft.data.conversation import Conversation, ImageSource
from vlm_sft.data.finished_template import finished_chat_tokenizer
from vlm_sft.data.hf_tokenizer import load_tokenizer, padding_id
from vlm_sft.data.image_layout import ImageLayout
from vlm_sft.data.image_separator import DEFAULT_SEPARATOR, separated_parts
from vlm_sft.data.images import ImageCrops, ImageSpec, read_crops, upright_size
from vlm_sft.data.records import read_records
from vlm_sft.data.tokenize import ChatTokenizer, expand
from vlm_sft.errors import CheckpointError, UserError
from vlm_sft.inference.generate import generate_greedy
from vlm_sft.inference.limits import TEMPERATURES, is_temperature
from vlm_sft.inference.prompts import ImageInput, Prompt, as_conversation
from vlm_sft.inference.stream import stream_text
from vlm_sft.model.build import build_model
from vlm_sft.model.dtypes import DTYPES
from vlm_sft.model.finished import language_config, stored_dtype
from vlm_sft.model.language_model import causal_lm
from vlm_sft.model.positions import position_limit
from vlm_sft.model.vlm import VisionLanguageModel
from vlm_sft.utils.progress import waiting
from vlm_sft.utils.reading import read_json

MAX_NEW_TOKENS: Final = 256
"""Default of `max_new_tokens`."""

_UNLIMITED_TOKENS: Final = 10**6
"""Longest response of a model whose configuration has no number of positions."""

_RECORDS_READ: Final = 1000
"""Records of a training file that are read to find the image separator of an old checkpoint."""


@dataclass(frozen=True)
class LoadedModel:
    """A trained model with its tokenizer, chat template and image preprocessing.

    Attributes:
        model: In evaluation mode, without trainable parameters.
        tokenizer: The language model's tokenizer.
        chat_tokenizer: Applies the chat template that the model was trained with.
        image_spec: Input size and normalization of the vision tower.
        image_aspect: How images become square.
        image_processing: How exactly images are decoded and resized.
        config: The configuration of the training run; None for a finished model of another program.
        manifest: The checkpoint's manifest: step, stage, versions of libraries, ...; empty for a
            finished model of another program.
        trained_config: The configuration as the run had it, with the base models that it was given;
            in `config`, they are where they are now, or parts of the checkpoint. None for a
            finished model of another program.
    """

    model: VisionLanguageModel
    tokenizer: PreTrainedTokenizerBase
    chat_tokenizer: ChatTokenizer
    image_spec: ImageSpec
    image_aspect: ImageAspect
    image_processing: ImageProcessing
    config: RunConfig | None
    manifest: dict[str, Any]
    trained_config: RunConfig | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.vision_tower.device

    @property
    def pad_token_id(self) -> int:
        """The token that pads shorter prompts of a batch; it is masked out everywhere."""
        return padding_id(self.tokenizer)

    def generate(
        self,
        prompt: Prompt,
        images: Sequence[ImageInput] = (),
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str:
        """Return the model's response to a prompt.

        Args:
            prompt: A question, chat messages, or a `Conversation`; see `as_conversation`.
            images: The images of the prompt: paths, bytes of image files, or PIL images.
            max_new_tokens: The response is cut after this number of tokens, or where the model has
                no more positions.
            temperature: 0 takes the most likely token in every step; otherwise tokens are sampled
                from the distribution with its logits divided by this number.
            seed: Seed for sampling; None uses the state of torch's global generator.

        Raises:
            ImageError: An image is missing or cannot be decoded.
            UserError: The prompt is malformed, or longer than the model's number of positions.
        """
        pieces = self.stream(
            prompt, images, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
        )
        return "".join(pieces).strip()

    def stream(
        self,
        prompt: Prompt,
        images: Sequence[ImageInput] = (),
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yield the response in pieces while it is generated; arguments and errors as `generate`.

        White space before the response (which some chat templates have) is skipped.
        """
        _require_limits(max_new_tokens, temperature)
        conversation = as_conversation(prompt, images)
        loaded = self.load_images(conversation)
        layouts = [image.layout for image in loaded]
        prompt_ids = self.prompt_ids(conversation, layouts)
        if seed is not None:
            torch.manual_seed(seed)
        sampling: dict[str, Any] = {"do_sample": temperature > 0, "top_p": None, "top_k": None}
        pieces = stream_text(
            self.model,
            self.tokenizer,
            torch.tensor([prompt_ids], device=self.device),
            _pixels(loaded, self.device),
            layouts,
            max_new_tokens=min(max_new_tokens, self.free_positions(len(prompt_ids))),
            eos_token_id=list(self.chat_tokenizer.eot_token_ids),
            pad_token_id=self.pad_token_id,
            temperature=temperature if temperature > 0 else None,
            **sampling,
        )
        has_begun = False
        for piece in pieces:
            text = piece if has_begun else piece.lstrip()
            has_begun = has_begun or bool(text)
            if text:
                yield text

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        images: Sequence[Sequence[ImageInput]] | None = None,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        batch_size: int = 16,
    ) -> list[str]:
        """Return the responses to several prompts, which are generated together.

        Always takes the most likely token. The responses are those of `generate`, up to the
        rounding of batched kernels.

        Args:
            prompts: The prompts, each as for `generate`.
            images: The images of each prompt; None if the prompts need none.
            max_new_tokens: As for `generate`.
            batch_size: Number of prompts that go through the model together.

        Returns:
            One response per prompt, in the same order.

        Raises:
            ImageError: As `generate`, before anything is generated.
            UserError: As `generate`, before anything is generated.
        """
        _require_limits(max_new_tokens)
        images = [()] * len(prompts) if images is None else images
        if len(images) != len(prompts):
            raise UserError(
                f"images: expected one sequence for each of the {len(prompts)} prompts, found "
                f"{len(images)}"
            )
        conversations = [as_conversation(*pair) for pair in zip(prompts, images, strict=True)]
        loaded = [self.load_images(conversation) for conversation in conversations]
        prompt_ids = [
            self.prompt_ids(conversation, [image.layout for image in found])
            for conversation, found in zip(conversations, loaded, strict=True)
        ]
        lengths = [min(max_new_tokens, self.free_positions(len(ids))) for ids in prompt_ids]
        # Prompts of similar length share a batch, so that little is padded; and only prompts whose
        # responses may be equally long, so that none is cut or continued because of another one.
        order = sorted(range(len(prompts)), key=lambda i: (lengths[i], len(prompt_ids[i])))
        responses = [""] * len(prompts)
        for length, group in groupby(order, key=lengths.__getitem__):
            remaining = list(group)
            while remaining:
                batch, remaining = remaining[:batch_size], remaining[batch_size:]
                shown = [image for index in batch for image in loaded[index]]
                texts = generate_greedy(
                    self.model,
                    self.chat_tokenizer,
                    [prompt_ids[index] for index in batch],
                    pixel_values=_pixels(shown, self.device),
                    layouts=[image.layout for image in shown],
                    max_new_tokens=length,
                )
                for index, text in zip(batch, texts, strict=True):
                    responses[index] = text
        return responses

    def prompt_ids(
        self, conversation: Conversation, layouts: Sequence[ImageLayout] | None = None
    ) -> list[int]:
        """Return the token ids to generate from, with `IMAGE_TOKEN_ID` once per image token.

        Args:
            conversation: The prompt.
            layouts: The layout of each of its images; None: from the headers of the images.

        Raises:
            ImageError: A header cannot be read, without `layouts`.
        """
        if layouts is None:
            layouts = self.model.layout_rule.layouts(
                [upright_size(source)[:2] for source in conversation.images]
                if self.model.layout_rule.needs_sizes
                else [(0, 0)] * len(conversation.images)
            )
        tokens = [layout.num_tokens for layout in layouts]
        return expand(self.chat_tokenizer.prompt(conversation), tokens)

    def load_images(self, conversation: Conversation) -> list[ImageCrops]:
        """Return the images of a prompt as the model takes them.

        Raises:
            ImageError: An image is missing or cannot be decoded.
        """
        count = len(conversation.images)
        return [self.load_image(source, num_images=count) for source in conversation.images]

    def load_image(self, source: ImageSource, *, num_images: int = 1) -> ImageCrops:
        """Return an image as the model takes it.

        Args:
            source: A file or its bytes.
            num_images: Number of images in the prompt, on which the crops can depend.

        Raises:
            ImageError: The image is missing or cannot be decoded.
        """
        return read_crops(
            source,
            self.model.layout_rule,
            self.image_spec,
            self.image_aspect,
            self.image_processing,
            num_images=num_images,
        )

    @torch.no_grad()
    def encode_images(self, images: Sequence[ImageCrops]) -> list[Tensor]:
        """Return the embeddings of images as the language model takes them, `[tokens, D]` each.

        Args:
            images: At least one image from `load_image`.
        """
        layouts = [image.layout for image in images]
        pixels = torch.cat([image.pixels for image in images]).to(self.device)
        crops = self.model.encode_images(pixels)
        tokens = self.model.arrange(crops, layouts).reshape(-1, crops.shape[-1])
        return list(tokens.split([layout.num_tokens for layout in layouts]))

    def free_positions(self, num_tokens: int) -> int:
        """Return how many tokens can follow a prompt of `num_tokens`.

        Raises:
            UserError: None can.
        """
        limit = position_limit(causal_lm(self.model.language_model))
        if limit is None:
            return _UNLIMITED_TOKENS
        if num_tokens >= limit.tokens:
            raise UserError(
                f"the conversation has {num_tokens:,} tokens, but the model has only "
                f"{limit.tokens:,} positions ({limit.key}); shorten it, or start a new one",
                code="too_long",
            )
        return limit.tokens - num_tokens


def _pixels(images: Sequence[ImageCrops], device: torch.device) -> Tensor | None:
    """Return the crops of all images `[N, 3, H, W]` on a device; None if there are none."""
    return torch.cat([image.pixels for image in images]).to(device) if images else None


def _require_limits(max_new_tokens: int, temperature: float = 0.0) -> None:
    """Check the settings of a generation.

    Raises:
        UserError: One of them is out of range.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    if not is_temperature(temperature):
        raise UserError(f"temperature: expected {TEMPERATURES}, found {temperature}")


def load_checkpoint(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    bases: Mapping[str, str] | None = None,
    template: str | None = None,
) -> LoadedModel:
    """Load a checkpoint for inference, after verifying the checksums of its files.

    Args:
        path: `RUN/final`, `RUN/checkpoints/step-N`, or a run directory (its `final`); or the folder
            or hub name of a finished model, as for `model.from_checkpoint`.
        device: E.g. `cuda:1`; None uses CUDA if it is available, else the CPU.
        bases: New locations of base models that were moved, by configuration key; see
            `checkpoint.base_models`.
        template: Chat template of a finished model that has none: a built-in name or a YAML file.

    Raises:
        CheckpointError: The directory is not a complete checkpoint, or its base models cannot be
            loaded or are not those that it was trained with.
        UserError: The device is not available, or a finished model cannot be loaded.
    """
    target = _device(device)
    folder = Path(path)
    if is_hub_name(str(path)) or (folder.is_dir() and is_finished(folder)):
        return _load_finished(str(path), target, bases or {}, template)
    require_checkpoint(folder)
    if template is not None:
        raise UserError(
            f"--template {template}: the checkpoint {folder} has a template of its own; remove it"
        )
    if not (folder / "manifest.json").exists() and (folder / "final" / "manifest.json").exists():
        folder = folder / "final"
    with waiting(f"verifying {folder}"):
        manifest = verify(folder).manifest
    stored_config = load_stored_config(folder / "config.yaml")
    config = find_bases(stored_config, folder, bases or {})
    files = (folder / "tokenizer").absolute()
    tokenizer = load_tokenizer(LanguageModelConfig(name=str(files)), str(folder / "tokenizer"))
    described = _read_json(folder / "template.json")
    if "image_separator" not in described:
        described["image_separator"] = _trained_separator(config)
    preprocessing = _read_json(folder / "processor.json")
    model = _load_model(config, manifest, folder)
    return LoadedModel(
        model=model.to(target),
        tokenizer=tokenizer,
        chat_tokenizer=ChatTokenizer.from_description(described, tokenizer),
        image_spec=model.vision_tower.image_spec,
        image_aspect=preprocessing["image_aspect"],
        # Checkpoints from before `data.image_processing` existed were trained with Pillow.
        image_processing=preprocessing.get("image_processing", "exact"),
        config=config,
        manifest=manifest,
        trained_config=with_recorded_paths(stored_config, folder),
    )


def _load_finished(
    name: str, device: torch.device, bases: Mapping[str, str], template: str | None
) -> LoadedModel:
    """Load a finished model of another program; see `load_checkpoint`."""
    found = read_finished(name)
    tree: dict[str, Any] = {"from_checkpoint": name}
    for key, place in bases.items():
        _, section, field = key.split(".")
        tree.setdefault(section, {})[field] = place
    config = resolve_model(ModelConfig.model_validate(tree), found)
    remedy = (
        'in a copy of the folder, set "do_pad": true for the image processor (in its '
        "processor_config.json, or else preprocessor_config.json) to pad images instead, which may "
        "change the answers"
    )
    image_aspect = require_aspect(found, remedy)
    if found.weights == "full":
        language_config(found)  # the tokenizer's library would report an error in it as its own
    tokenizer = load_tokenizer(config.language_model)
    if template is None:
        chat_tokenizer = finished_chat_tokenizer(found, tokenizer)
    else:
        chat_tokenizer = ChatTokenizer.from_name(template, tokenizer)
    model = build_model(config, dtype=stored_dtype(found), seed=0)
    model.requires_grad_(False).eval()
    return LoadedModel(
        model=model.to(device),
        tokenizer=tokenizer,
        chat_tokenizer=chat_tokenizer,
        image_spec=model.vision_tower.image_spec,
        image_aspect=image_aspect,
        image_processing="exact",
        config=None,
        manifest={},
    )


def _device(name: str | torch.device | None) -> torch.device:
    """Return the device of that name after putting a tensor on it."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # fails on "meta", which has no values
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"device '{name}': {reason}; give cpu, cuda or cuda:N") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], read_json(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); the checkpoint is damaged",
            code="checkpoint_damaged",
        ) from None


def _trained_separator(config: RunConfig) -> str | None:
    """Return the image separator of a checkpoint whose template.json does not contain it yet.

    Such versions wrote no separator into records whose content is a list of parts. So the first
    such record of the training data, if the file still exists, shows what the model was trained
    with. None means the separator of the template.
    """
    for file in config.data.train:
        if not Path(file.path).exists():
            continue
        for record in islice(read_records(file), _RECORDS_READ):
            for turn in record.turns if isinstance(record, Conversation) else ():
                if turn.image_separator is None:
                    has_separator = separated_parts(turn.parts, DEFAULT_SEPARATOR) == list(
                        turn.parts
                    )
                    return None if has_separator else ""
    return None


def _load_model(config: RunConfig, manifest: dict[str, Any], folder: Path) -> VisionLanguageModel:
    """Build the model of a checkpoint and load its trained weights.

    Raises:
        CheckpointError: A base model is missing or another one than in training, or the adapter
            and the configuration do not agree.
    """
    dtype = DTYPES[config.train.precision]
    try:
        model = build_model(config.model, dtype=dtype, seed=config.seed, lora=config.lora)
    except UserError as error:
        raise CheckpointError(
            f"{folder / 'config.yaml'}: {error} (the checkpoint was trained with it: put it back, "
            "or give its new location with --base KEY=PATH)"
        ) from None
    _require_same_base(config, model, manifest, folder)
    path = folder / PROJECTOR
    copy_tensors(load_tensors(path), model.projector_state(), path)
    if (folder / ADAPTER).is_dir():
        if config.lora is None:
            raise CheckpointError(f"{folder}: has an adapter, but its config.yaml has no lora")
        load_adapter(model, folder)
    elif config.lora is not None:
        raise CheckpointError(f"{folder}: its config.yaml has lora, but adapter/ is missing")
    is_loaded = config.model.language_model.name == str((folder / LANGUAGE_MODEL).absolute())
    if (folder / LANGUAGE_MODEL).is_dir() and not is_loaded:
        load_language_model(model, folder)
    model.requires_grad_(False).eval()
    return model


def _require_same_base(
    config: RunConfig, model: VisionLanguageModel, manifest: dict[str, Any], folder: Path
) -> None:
    recorded, found = manifest.get("base_model"), base_identity(config, model)
    if (folder / VISION_TOWER).is_dir():
        del found["language_model"]  # the checkpoint contains the trained one instead of its base
    for key, value in found.items():
        if recorded is not None and recorded.get(key) != value:
            raise CheckpointError(
                f"{folder}: its {key.replace('_', ' ')} is not the one that it was trained with "
                f"(the base named in config.yaml has changed, expected {recorded.get(key)!r}, "
                f"found {value!r}); put the original back",
                code="shapes_differ" if key == "features" else "wrong_base",
            )
