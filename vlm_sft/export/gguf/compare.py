"""Compare an exported GGUF pair with the model that was trained, through llama.cpp itself."""

import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import torch
from PIL import Image

from vlm_sft.data.images import open_image
from vlm_sft.errors import UserError
from vlm_sft.export.gguf.files import EXTRA, OutType
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.inference.prompts import user_message
from vlm_sft.utils.constants import IMAGE_TOKEN_ID
from vlm_sft.utils.libraries import install_command
from vlm_sft.utils.progress import track

SIZES: Final = (
    (336, 336), (640, 480), (480, 640), (512, 512), (1024, 256), (256, 1024), (300, 301),
    (700, 500), (500, 700), (161, 184), (90, 60), (60, 90), (640, 360), (360, 640), (333, 77),
    (77, 333), (448, 448), (800, 200), (200, 800), (41, 40),
)  # fmt: skip
"""Width and height of the images that are compared."""

TEXTS: Final = (
    "Is there a dog?",
    "  Two spaces, a tab\t and\n\nempty lines. ",
    "In 2024, 3.14159 and 1000000 people won't agree: naïve café, 東京, 🦙!",
)
"""Questions whose tokens are compared, besides the prompt."""

RATIOS: Final = {"f16": 0.1, "q8_0": 0.3}
"""Largest allowed difference, relative to the largest difference between two images' answers."""

FLOOR: Final = 0.05
"""A difference of log-probabilities that is always allowed: f16 and llama.cpp's GELU round."""

_PROGRAM: Final = Path(__file__).with_name("run_llama_cpp.py")


@dataclass(frozen=True)
class Comparison:
    """Log-probabilities of llama.cpp and of the trained model, over the whole vocabulary.

    Attributes:
        runtime: Name and version of the runtime.
        num_images: Number of images.
        prepared: Largest difference when both get the same square image.
        as_given: Largest difference when each makes the image square itself.
        between_images: Largest difference between two images in the trained model, as a scale.
        same_prompts: Whether all prompts have the same tokens.
        fault: What llama.cpp computes differently; empty if nothing.
    """

    runtime: str
    num_images: int
    prepared: float
    as_given: float
    between_images: float
    same_prompts: bool
    fault: str


def compare_with_llama_cpp(
    checkpoint: LoadedModel,
    model: Path,
    mmproj: Path,
    outtype: OutType,
    *,
    image: Path | None,
    prompt: str,
    python: str = sys.executable,
) -> Comparison:
    """Run both on 20 images of different aspect ratios and compare the first token's distribution.

    Args:
        checkpoint: The trained model.
        model: GGUF file of the language model.
        mmproj: GGUF file of the vision tower and projector.
        outtype: Type of the matrices, for the limit.
        image: An image from which the 20 are made; None: smooth noise.
        prompt: The question about each image.
        python: Interpreter with the package `xllamacpp`.

    Raises:
        UserError: llama.cpp cannot load the files or ends with an error.
    """
    given = [_png(picture) for picture in compared_images(image)]
    prepared = [_png(_prepared(checkpoint, data)) for data in given]
    shown = [data for pair in zip(given, prepared, strict=True) for data in pair]
    expected = np.stack(
        [
            _log_probabilities(checkpoint, prompt, data)
            for data in track(shown, description="computing with the trained model")
        ]
    )
    asked = [(prompt, data) for data in shown] + [(text, given[0]) for text in TEXTS]
    found, report = _run(checkpoint, model, mmproj, asked, len(shown), python)
    difference = np.abs(found - expected[:, : found.shape[1]]).max(axis=1)
    between = max(float(np.abs(row - expected[1]).max()) for row in expected[1::2])
    prompts = _different_prompt(checkpoint, asked, report["prompts"])
    largest = float(difference[1::2].max())
    limit = max(FLOOR, RATIOS[outtype] * between)
    fault = prompts
    if not largest <= limit:  # also refuses NaN
        fault = fault or (
            f"llama.cpp ({report['version']}) computes log-probabilities that differ by up to "
            f"{largest:.3g} on {len(given)} images, expected at most {limit:.3g}"
        )
    return Comparison(
        runtime=f"xllamacpp {report['version']}",
        num_images=len(given),
        prepared=largest,
        as_given=float(difference[::2].max()),
        between_images=between,
        same_prompts=not prompts,
        fault=fault,
    )


def compared_images(image: Path | None) -> Iterator[Image.Image]:
    """Yield 20 images of the sizes of `SIZES`, from one image or from smooth noise."""
    if image is not None:
        base = open_image(image)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (7, 7, 3), dtype=np.uint8)
        base = Image.fromarray(noise).resize((512, 512), Image.Resampling.BICUBIC)
    for number, size in enumerate(SIZES):
        # Turned and flipped, so that images of one shape have different contents.
        turned = base.rotate(90 * (number % 4), expand=True)
        yield turned.resize(size, Image.Resampling.BICUBIC)


def _prepared(checkpoint: LoadedModel, data: bytes) -> Image.Image:
    """Return the square image that the tower gets, before normalization."""
    pixels = checkpoint.load_image(data).pixels[0]
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@torch.no_grad()
def _log_probabilities(checkpoint: LoadedModel, prompt: str, data: bytes) -> np.ndarray:
    """Return the natural log-probabilities `[V]` of the first token of the answer."""
    shown = checkpoint.load_image(data)
    ids = torch.tensor([checkpoint.prompt_ids(user_message(prompt, [data]), [shown.layout])])
    mask = torch.ones_like(ids, dtype=torch.bool)
    logits = checkpoint.model.logits(ids, pixel_values=shown.pixels, attention_mask=mask)
    return logits[0, -1].float().log_softmax(-1).numpy()


def _run(
    checkpoint: LoadedModel,
    model: Path,
    mmproj: Path,
    asked: Sequence[tuple[str, bytes]],
    scored: int,
    python: str,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return llama.cpp's log-probabilities `[scored, V]` and its report."""
    with tempfile.TemporaryDirectory(prefix="vlm_sft-gguf-") as scratch:
        requests, out = Path(scratch, "requests.json"), Path(scratch, "out")
        longest = max(len(checkpoint.prompt_ids(user_message(*_pair(one)))) for one in asked)
        requests.write_text(
            json.dumps(
                {
                    "context": longest + 64,
                    "token": _ordinary_token(checkpoint),
                    "scored": scored,
                    "messages": [_messages(text, data) for text, data in asked],
                }
            )
        )
        argv = [python, "-P", str(_PROGRAM), str(model), str(mmproj), str(requests), str(out)]
        with (
            tempfile.TemporaryFile("w+", errors="replace") as errors,
            subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
        ):
            assert child.stdout is not None
            for _ in track(child.stdout, len(asked), "computing with llama.cpp"):
                pass
            if child.wait() != 0:
                raise UserError(_failure(errors, child.returncode))
        report = json.loads(out.with_suffix(".json").read_text())
        rows = np.fromfile(out.with_suffix(".f32"), dtype=np.float32)
    return rows.reshape(scored, -1), report


def _failure(errors: IO[str], code: int) -> str:
    errors.seek(0)
    lines = [line for line in errors.read().splitlines() if line.strip()]
    last = lines[-1] if lines else f"exit code {code}"
    if "No module named 'xllamacpp'" in last:
        return (
            "the package 'xllamacpp', which runs llama.cpp for the comparison, is not installed; "
            f"install it with `{install_command(EXTRA)}`, or write the files without "
            "comparison: --unverified"
        )
    return f"llama.cpp cannot run the exported files: {last}"


def _pair(asked: tuple[str, bytes]) -> tuple[str, list[bytes]]:
    return asked[0], [asked[1]]


def _messages(text: str, data: bytes) -> list[dict[str, Any]]:
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def _ordinary_token(checkpoint: LoadedModel) -> int:
    """Return a token that does not end an answer: llama.cpp reports nothing about one that does."""
    tokenizer: Any = checkpoint.tokenizer
    return int(tokenizer.encode("a", add_special_tokens=False)[-1])


def _different_prompt(
    checkpoint: LoadedModel, asked: Sequence[tuple[str, bytes]], found: Sequence[list[list[int]]]
) -> str:
    """Return how the first differing prompt differs; empty if all have the same tokens."""
    for (text, data), pieces in zip(asked, found, strict=True):
        expected: list[list[int]] = [[]]
        for token in checkpoint.chat_tokenizer.prompt(user_message(text, [data])):
            if token == IMAGE_TOKEN_ID:
                expected.append([])
            else:
                expected[-1].append(token)
        if pieces != expected:
            return (
                f"llama.cpp reads the prompt {text!r} as the tokens {pieces}, and training as "
                f"{expected}"
            )
    return ""
