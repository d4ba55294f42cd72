"""Export a checkpoint and print how the export differs from it."""

import argparse
import sys
from pathlib import Path

import torch

from vlm_sft.checkpoint.base_models import parse_bases
from vlm_sft.data.images import upright_size
from vlm_sft.data.records import read_records
from vlm_sft.errors import RecordError
from vlm_sft.export.hf_llava import ExportReport, Sample, export_hf_llava
from vlm_sft.export.stock import is_internvl
from vlm_sft.export.weights import require_shard_size
from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
from vlm_sft.inference.prompts import user_message
from vlm_sft.utils.console import echo


def run(args: argparse.Namespace) -> int:
    """Export, reload the export, and print how it differs; returns the exit code."""
    max_shard_size = require_shard_size(args.max_shard_size)
    loaded = load_checkpoint(
        args.checkpoint, device="cpu", bases=parse_bases(args.base), template=args.template
    )
    image = args.image or _first_image(loaded)
    sample = None  # without any image, the export compares logits on noise
    if image is not None:
        shown = loaded.load_image(image)
        ids = loaded.prompt_ids(user_message(args.prompt, [image]), [shown.layout])
        sample = Sample(shown.pixels, torch.tensor([ids]))
        if loaded.model.layout_rule.needs_sizes:
            sample = sample._replace(layout=shown.layout, size=upright_size(image)[:2])
    report = export_hf_llava(
        loaded.model,
        loaded.tokenizer,
        args.out,
        image_aspect=loaded.image_aspect,
        image_processing=loaded.image_processing,
        chat_template=loaded.chat_tokenizer.to_jinja(image_tokens=not is_internvl(loaded.model)),
        eot_token_ids=loaded.chat_tokenizer.eot_token_ids,
        image_tokens=loaded.chat_tokenizer.image_tokens,
        sample=sample,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        max_shard_size=max_shard_size,
    )
    print_report(report)
    return 0


def print_report(report: ExportReport) -> None:
    """Print the result of the comparison, and which programs load the exported directory."""
    echo(
        f"{report.folder}: {report.dtype}; reloaded by stock {report.model_class} in a new process "
        f"with {len(report.missing_keys)} missing and {len(report.unexpected_keys)} unexpected "
        f"keys; largest logit difference {report.max_abs_logit_difference:.2e} (largest logit "
        f"{report.max_abs_logit:.2f}); images differ by at most "
        f"{report.max_pixel_difference:.1f} of 255 levels",
        file=sys.stdout,
    )
    for consumer in report.consumers:
        row = f"  {consumer.name:<24} {consumer.loads:<9} {consumer.reason}"
        echo(row, file=sys.stdout)


def _first_image(loaded: LoadedModel) -> Path | None:
    """Return an image of the training data, or None if none of its files exists."""
    for file in loaded.config.data.train if loaded.config is not None else ():
        if not Path(file.path).exists():
            continue
        for record in read_records(file):
            if isinstance(record, RecordError):
                continue
            for image in record.images:
                if isinstance(image, Path) and image.is_file():
                    return image
    return None
