"""Stage 1, feature alignment: train the projector; everything else stays frozen."""

from collections.abc import Sequence

from vlm_sft.commands.parser import CommandParser, heavy_imports, training_parser
from vlm_sft.commands.run_command import run_command

ABOUT = """\
Train only the projector, on image-caption pairs (LLaVA's stage 1, feature alignment).

The vision tower and the language model stay frozen, bit for bit. The same command resumes from
the newest checkpoint, or reports that the run is finished. Result: OUTPUT_DIR/final."""

EXAMPLES = """\
examples:
  vlm-sft stage1 configs/tiny/stage1.yaml
  vlm-sft stage1 configs/tiny/stage1.yaml output_dir=runs/mine train.epochs=2
  vlm-sft stage1 configs/tiny/stage1.yaml optim.learning_rate.projector=5e-4 \\
    --allow-change optim.learning_rate        # resume a run with another learning rate
  torchrun --nproc-per-node 8 -m vlm_sft.stage1 configs/llava-1.5/stage1.yaml"""


def main(argv: Sequence[str]) -> int:
    """Run stage 1 and return the exit code."""
    arguments = parser().read(argv)
    from vlm_sft.commands.inputs import read_config
    from vlm_sft.config.method import require_stage1
    from vlm_sft.config.resume import require_changeable

    config = read_config(arguments.config, arguments.overrides)
    require_stage1(config)
    require_changeable(config, arguments.allow_change)
    with heavy_imports():
        from vlm_sft.commands.train import run_stage
        from vlm_sft.utils.logs import configure_logging
    configure_logging()
    return run_stage(config, stage="stage1", allowed=arguments.allow_change).exit_code


def parser() -> CommandParser:
    """Return the command's parser."""
    return training_parser("vlm-sft stage1", ABOUT, EXAMPLES)


if __name__ == "__main__":
    run_command(main)
