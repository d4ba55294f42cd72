"""Run `python -m vlm_sft.show`."""

from vlm_sft.errors import run_command
from vlm_sft.show import main

if __name__ == "__main__":
    run_command(main)
