"""Tune an exported model on preference pairs with TRL: dpo.py EXPORTED TRL.jsonl OUT [OPTIONS].

    python scripts/after_sft/dpo.py exported trl.jsonl tuned --steps 200
    python scripts/after_sft/dpo.py exported trl.jsonl tuned --lora 16 --learning-rate 1e-5

A stand-alone program for an environment of its own (docs/after-sft.md): it needs torch,
transformers, trl, peft and pillow, and does not import vlm_sft. EXPORTED is a folder of
`vlm-sft export --to hf`, TRL.jsonl a file of convert_pairs.py. Prints loss, reward margin and
accuracy of every step, and writes a folder of transformers with adapters merged, for
`model.from_checkpoint`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from datasets import Sequence as ListOf
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer


def main(argv: Sequence[str]) -> int:
    """Tune, print the progress, save; returns the exit code."""
    options = parse(argv)
    if options.out.exists():
        print(f"error: {options.out} exists already; give a new folder", file=sys.stderr)
        return 2
    model: Any = AutoModelForImageTextToText.from_pretrained(options.exported, dtype=torch.float32)
    for parameter in model.model.vision_tower.parameters():
        parameter.requires_grad = False
    processor: Any = AutoProcessor.from_pretrained(options.exported)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(options.out) + ".trainer",
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant",
            beta=options.beta,
            loss_type=["sigmoid", "sft"] if options.sft_weight else ["sigmoid"],
            loss_weights=[1.0, options.sft_weight] if options.sft_weight else None,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            max_length=None,  # an image's tokens must not be cut
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            seed=0,
        ),
        train_dataset=pairs(options.pairs),
        processing_class=processor,
        peft_config=adapters(options.lora),
    )
    trainer.train()
    for row in trainer.state.log_history:
        if "loss" in row:
            print(
                f"step {row['step']:>4}  loss {row['loss']:.4f}  "
                f"margin {row['rewards/margins']:+.4f}  accuracy {row['rewards/accuracies']:.2f}"
            )
    tuned = trainer.model
    tuned = tuned.merge_and_unload() if options.lora else tuned
    tuned.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"{options.out}: saved")
    return 0


def pairs(path: Path) -> Dataset:
    """Return the rows of a file of convert_pairs.py, with images that are decoded when used."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row.pop("id")
    return Dataset.from_list(rows).cast_column("images", ListOf(Image()))


def adapters(rank: int) -> LoraConfig | None:
    """Return LoRA on every linear layer of the language model, or None for rank 0."""
    if rank == 0:
        return None
    layers = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers, task_type="CAUSAL_LM")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(
        prog="dpo.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("exported", type=Path, metavar="EXPORTED", help="folder of `vlm-sft export --to hf`")
    add("pairs", type=Path, metavar="TRL.jsonl", help="pairs of convert_pairs.py")
    add("out", type=Path, metavar="OUT", help="new folder for the tuned model")
    add("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    add("--batch-size", type=int, default=4, help="pairs of a step (default: 4)")
    add("--learning-rate", type=float, default=1e-6, help="constant (default: 1e-6)")
    add("--beta", type=float, default=0.1, help="of the DPO loss (default: 0.1)")
    add(
        "--sft-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="add W times the supervised loss of the chosen answers (default: 0)",
    )
    add("--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank, merged")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
