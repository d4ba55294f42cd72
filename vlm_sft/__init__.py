"""Visual instruction tuning in LLaVA's two stages, with nothing silent.

The names of `__all__` are the public Python API (`docs/python-api.md`). They are imported on first
use, so that `import vlm_sft` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlm_sft.commands.registry import prepare_command

if TYPE_CHECKING:
    from vlm_sft.commands.api import TrainResult, build_model, tokenize_record, train_stage
    from vlm_sft.config.schema import RunConfig, load_config
    from vlm_sft.data.tokenize import ChatTokenizer
    from vlm_sft.errors import (
        CheckpointError,
        ConfigError,
        ImageError,
        RecordError,
        TemplateError,
        UserError,
    )
    from vlm_sft.inference.loaded_model import LoadedModel, load_checkpoint
    from vlm_sft.inspection.tokens import TokenView

__version__ = "0.1.0"

__all__ = [
    "ChatTokenizer",
    "CheckpointError",
    "ConfigError",
    "ImageError",
    "LoadedModel",
    "RecordError",
    "RunConfig",
    "TemplateError",
    "TokenView",
    "TrainResult",
    "UserError",
    "build_model",
    "load_checkpoint",
    "load_config",
    "tokenize_record",
    "train_stage",
]

_MODULE_OF = {
    "ChatTokenizer": "vlm_sft.data.tokenize",
    "CheckpointError": "vlm_sft.errors",
    "ConfigError": "vlm_sft.errors",
    "ImageError": "vlm_sft.errors",
    "LoadedModel": "vlm_sft.inference.loaded_model",
    "RecordError": "vlm_sft.errors",
    "RunConfig": "vlm_sft.config.schema",
    "TemplateError": "vlm_sft.errors",
    "TokenView": "vlm_sft.inspection.tokens",
    "TrainResult": "vlm_sft.commands.api",
    "UserError": "vlm_sft.errors",
    "build_model": "vlm_sft.commands.api",
    "load_checkpoint": "vlm_sft.inference.loaded_model",
    "load_config": "vlm_sft.config.schema",
    "tokenize_record": "vlm_sft.commands.api",
    "train_stage": "vlm_sft.commands.api",
}

prepare_command(__name__)


def __getattr__(name: str) -> Any:
    """Import a name of the public API on first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
