"""Export a checkpoint: `python -m vlm_sft.export CHECKPOINT OUT_DIR --to hf`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from vlm_sft.config import DataFile
from vlm_sft.data.formats import read_records
from vlm_sft.errors import RecordError, run_command
from vlm_sft.export.hf_llava import export_hf_llava
from vlm_sft.inference import VlmRun, load_run, question

EXAMPLES = """\
examples:
  # a folder for transformers' LlavaForConditionalGeneration and AutoProcessor, LoRA merged
  python -m vlm_sft.export runs/stage2_lora/final exported --to hf

  # the same, with logits compared on a picture of your own
  python -m vlm_sft.export runs/stage2_lora/final exported --to hf --image dog.jpg
"""


def main(argv: Sequence[str]) -> int:
    """Export, compare with the reloaded folder, print the difference; returns the exit code."""
    args = _parse(argv)
    run = load_run(args.checkpoint, device="cpu")
    sample = _sample(run, args.image or _first_picture(run), args.prompt)
    report = export_hf_llava(
        run.model,
        run.tokenizer,
        args.out,
        image_aspect=run.aspect,
        image_processing=run.processing,
        renderer_chat_template=run.renderer.to_jinja(),
        stop_token_ids=run.renderer.stop_token_ids,
        sample=sample,
    )
    print(
        f"{report.folder}: {report.dtype}; reloaded by stock LlavaForConditionalGeneration with "
        f"{len(report.missing_keys)} missing and {len(report.unexpected_keys)} unexpected keys; "
        f"largest logit difference {report.max_abs_logit_difference:.2e} (largest logit "
        f"{report.max_abs_logit:.2f}); pictures differ by at most "
        f"{report.max_pixel_difference:.1f} of 255 levels"
    )
    return 0


def _sample(
    run: VlmRun, image: Path | None, prompt: str
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Pixels and prompt to compare logits on; None (noise) where there is no picture at all."""
    if image is None:
        return None
    ids = run.prompt_ids(question(prompt, [image]))
    return run.pixels(image)[None], torch.tensor([ids])


def _first_picture(run: VlmRun) -> Path | None:
    """A picture of the training data, if it is still where it was."""
    for file in run.config.data.train:
        if not Path(file.path).exists():
            continue
        for record in read_records(DataFile.model_validate(file)):
            if isinstance(record, RecordError):
                continue
            for image in record.images:
                if isinstance(image, Path) and image.is_file():
                    return image
    return None


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vlm_sft.export",
        description="Write a checkpoint in another program's format and prove it the same.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="a run's final/ or checkpoints/step-N/")
    parser.add_argument("out", type=Path, help="the folder to write; must be new or empty")
    parser.add_argument("--to", default="hf", choices=["hf"], help="the format (hf)")
    parser.add_argument("--image", type=Path, help="picture to compare on (default: a trained one)")
    parser.add_argument("--prompt", default="What is in the picture?", help="text to compare on")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
