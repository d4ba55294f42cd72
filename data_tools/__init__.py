"""Building instruction data from COCO-format annotations."""

from vlm_sft.commands.registry import refuse_other_modules

refuse_other_modules(__name__)
