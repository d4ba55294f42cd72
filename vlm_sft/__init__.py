"""Visual instruction tuning in LLaVA's two stages, with nothing silent."""

__version__ = "0.1.0"
