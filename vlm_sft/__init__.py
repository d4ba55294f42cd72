"""Visual instruction tuning in LLaVA's two stages, with nothing silent."""

from vlm_sft.commands.registry import refuse_other_modules

__version__ = "0.1.0"

refuse_other_modules(__name__)
