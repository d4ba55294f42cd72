"""Stage 1: teach the projector to speak to the language model; everything else stays frozen."""

from collections.abc import Sequence

from vlm_sft.assemble import run_from_command_line
from vlm_sft.errors import ConfigError, run_command
from vlm_sft.stage import run_stage

ABOUT = """\
Train the projector alone on picture-caption pairs (LLaVA's stage 1, feature alignment).

The vision tower and the language model stay frozen, bit for bit. The same command resumes from
the newest checkpoint; a finished run says so. Results: OUTPUT_DIR/final."""

EXAMPLES = """\
examples:
  python -m vlm_sft.stage1 configs/tiny/stage1.yaml
  python -m vlm_sft.stage1 configs/tiny/stage1.yaml output_dir=runs/mine train.epochs=2
  python -m vlm_sft.stage1 configs/tiny/stage1.yaml optim.learning_rate.projector=5e-4 \\
    --allow-change optim.learning_rate        # go on with a run under another rate
  torchrun --nproc-per-node 8 -m vlm_sft.stage1 configs/llava-1.5/stage1.yaml"""


def main(argv: Sequence[str]) -> int:
    """Run stage 1 and return the exit code."""
    config, allowed = run_from_command_line(
        argv, prog="python -m vlm_sft.stage1", about=ABOUT, more=EXAMPLES
    )
    # Adapters would stay at zero while nothing but the projector learns.
    if config.lora is not None:
        raise ConfigError("lora: stage 1 trains the projector alone; remove it, or run stage 2")
    return run_stage(config, stage="stage1", trainable={"projector"}, allowed=allowed)


if __name__ == "__main__":
    run_command(main)
