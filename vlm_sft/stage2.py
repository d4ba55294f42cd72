"""Stage 2: teach the model to follow instructions about pictures; the vision tower stays frozen."""

from collections.abc import Sequence

from vlm_sft.assemble import require_language_model_rate, run_from_command_line
from vlm_sft.errors import run_command
from vlm_sft.stage import run_stage

ABOUT = """\
Train projector and language model on instructions (LLaVA's stage 2, visual instruction tuning).

The language model is trained in full, or through LoRA adapters where the configuration has a
`lora` section. The vision tower stays frozen, bit for bit. The same command resumes from the
newest checkpoint; a finished run says so. Results: OUTPUT_DIR/final."""

EXAMPLES = """\
examples:
  python -m vlm_sft.stage2 configs/tiny/stage2.yaml projector=runs/tiny/stage1/final
  python -m vlm_sft.stage2 configs/tiny/stage2_lora.yaml projector=runs/tiny/stage1/final
  python -m vlm_sft.stage2 configs/tiny/stage2_qlora.yaml projector=runs/tiny/stage1/final
  torchrun --nproc-per-node 8 -m vlm_sft.stage2 configs/llava-1.5/stage2_lora.yaml"""


def main(argv: Sequence[str]) -> int:
    """Run stage 2 and return the exit code."""
    config, allowed = run_from_command_line(
        argv, prog="python -m vlm_sft.stage2", about=ABOUT, more=EXAMPLES
    )
    require_language_model_rate(config)
    # The projector learns in both ways; adapters take the language model's place where asked for.
    language = "language_model" if config.lora is None else "adapter"
    trainable = {"projector", language}
    return run_stage(config, stage="stage2", trainable=trainable, allowed=allowed)


if __name__ == "__main__":
    run_command(main)
