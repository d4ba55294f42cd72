"""Run `python -m vlm_sft.evaluate`."""

from vlm_sft.errors import run_command
from vlm_sft.evaluate import main

if __name__ == "__main__":
    run_command(main)
