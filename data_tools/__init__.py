"""Building instruction data from COCO-format annotations."""

from vlm_sft.commands.registry import prepare_command

prepare_command(__name__)
