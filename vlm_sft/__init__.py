"""Visual instruction tuning in LLaVA's two stages, with nothing silent."""

from vlm_sft.commands.registry import prepare_command

__version__ = "0.1.0"

prepare_command(__name__)
