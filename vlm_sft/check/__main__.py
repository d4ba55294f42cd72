"""Run `python -m vlm_sft.check`."""

from vlm_sft.check import main
from vlm_sft.errors import run_command

if __name__ == "__main__":
    run_command(main)
