"""Run `python -m vlm_sft.chat`."""

from vlm_sft.chat import main
from vlm_sft.errors import run_command

if __name__ == "__main__":
    run_command(main)
