"""Run `python -m vlm_sft.plan`."""

from vlm_sft.errors import run_command
from vlm_sft.plan import main

if __name__ == "__main__":
    run_command(main)
