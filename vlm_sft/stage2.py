"""Stage 2, visual instruction tuning: train the projector and the language model or adapters."""

from collections.abc import Sequence

from vlm_sft.commands.parser import CommandParser, heavy_imports, training_parser
from vlm_sft.commands.run_command import run_command

ABOUT = """\
Train projector and language model on conversations (LLaVA's stage 2, visual instruction tuning).

With a `lora` section in the configuration LoRA adapters are trained, else the whole language
model. The vision tower stays frozen, bit for bit. The same command resumes from the newest
checkpoint, or reports that the run is finished. Result: OUTPUT_DIR/final."""

EXAMPLES = """\
examples:
  vlm-sft stage2 configs/tiny/stage2.yaml projector=runs/tiny/stage1/final
  vlm-sft stage2 configs/tiny/stage2_lora.yaml projector=runs/tiny/stage1/final
  vlm-sft stage2 configs/tiny/stage2_qlora.yaml projector=runs/tiny/stage1/final
  torchrun --nproc-per-node 8 -m vlm_sft.stage2 configs/llava-1.5/stage2_lora.yaml"""


def main(argv: Sequence[str]) -> int:
    """Run stage 2 and return the exit code."""
    arguments = parser().read(argv)
    from vlm_sft.commands.inputs import read_config
    from vlm_sft.config.method import require_stage2
    from vlm_sft.config.resume import require_changeable

    config = read_config(arguments.config, arguments.overrides)
    require_stage2(config)
    require_changeable(config, arguments.allow_change)
    with heavy_imports():
        from vlm_sft.commands.train import run_stage
        from vlm_sft.utils.logs import configure_logging
    configure_logging()
    return run_stage(config, stage="stage2", allowed=arguments.allow_change).exit_code


def parser() -> CommandParser:
    """Return the command's parser."""
    return training_parser("vlm-sft stage2", ABOUT, EXAMPLES)


if __name__ == "__main__":
    run_command(main)
