"""Export a checkpoint and print the result of the verification."""

import argparse
import sys
from pathlib import Path

import torch

from vlm_sft.checkpoint.base_models import parse_bases
from vlm_sft.config.schema import DataFile
from vlm_sft.data.records import read_records
from vlm_sft.errors import RecordError
from vlm_sft.export.hf_llava import ExportReport, export_hf_llava
from vlm_sft.export.weights import require_shard_size
from vlm_sft.inference.loaded_model import VlmRun, load_run, question
from vlm_sft.utils.console import say


def run(args: argparse.Namespace) -> int:
    """Export a checkpoint, verify the reloaded folder, print the result; return the exit code."""
    max_shard_size = require_shard_size(args.max_shard_size)
    loaded = load_run(args.checkpoint, device="cpu", bases=parse_bases(args.base))
    sample = _sample(loaded, args.image or _first_image(loaded), args.prompt)
    report = export_hf_llava(
        loaded.model,
        loaded.tokenizer,
        args.out,
        image_aspect=loaded.aspect,
        image_processing=loaded.processing,
        chat_template=loaded.chat_tokenizer.to_jinja(),
        eot_token_ids=loaded.chat_tokenizer.eot_token_ids,
        sample=sample,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        max_shard_size=max_shard_size,
    )
    print_report(report)
    return 0


def print_report(report: ExportReport) -> None:
    """Print the result of the comparison, and which programs load the folder."""
    say(
        f"{report.folder}: {report.dtype}; reloaded by stock {report.model_class} in a new process "
        f"with {len(report.missing_keys)} missing and {len(report.unexpected_keys)} unexpected "
        f"keys; largest logit difference {report.max_abs_logit_difference:.2e} (largest logit "
        f"{report.max_abs_logit:.2f}); images differ by at most "
        f"{report.max_pixel_difference:.1f} of 255 levels",
        file=sys.stdout,
    )
    for consumer in report.consumers:
        row = f"  {consumer.name:<24} {consumer.loads:<9} {consumer.reason}"
        say(row, file=sys.stdout)


def _sample(
    loaded: VlmRun, image: Path | None, prompt: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return pixels and prompt for the comparison of logits; None (noise) without an image."""
    if image is None:
        return None
    ids = loaded.prompt_ids(question(prompt, [image]))
    return loaded.pixels(image)[None], torch.tensor([ids])


def _first_image(loaded: VlmRun) -> Path | None:
    """Return an image of the training data; None if none exists any more."""
    for file in loaded.config.data.train:
        if not Path(file.path).exists():
            continue
        for record in read_records(DataFile.model_validate(file)):
            if isinstance(record, RecordError):
                continue
            for image in record.images:
                if isinstance(image, Path) and image.is_file():
                    return image
    return None
