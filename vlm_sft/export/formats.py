"""The formats of an export: their registry, and what each format's module offers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast

from vlm_sft.utils.constants import MAX_SHARD_SIZE

if TYPE_CHECKING:  # the parser of the command reads this registry and imports nothing heavy
    import torch

    from vlm_sft.export.consumers import Consumer
    from vlm_sft.export.sample import Sample
    from vlm_sft.inference.loaded_model import LoadedModel


@dataclass(frozen=True)
class Format:
    """A format that `--to` names.

    Attributes:
        about: What is written, for `--help`.
        module: Module that offers `obstacles` and `export`; see `FormatModule`.
    """

    about: str
    module: str


FORMATS: Final[Mapping[str, Format]] = {
    "hf": Format("a folder of transformers, adapters merged", "vlm_sft.export.hf"),
    "llava": Format(
        "a folder of the original LLaVA code: all weights, or what was trained",
        "vlm_sft.export.llava",
    ),
    "gguf": Format(
        "a language model and an mmproj file for llama.cpp", "vlm_sft.export.gguf.export"
    ),
    "peft": Format(
        "adapters and projector for peft, on a base of --to hf --without-adapters",
        "vlm_sft.export.peft",
    ),
}
"""All formats, by name."""


@dataclass(frozen=True)
class ExportOptions:
    """What the user chose, the same for all formats.

    Attributes:
        sample: Image and prompt on which the export is compared with the checkpoint; None: noise.
        image: File of the image in `sample`, if there is one.
        prompt: Text of the prompt in `sample`.
        dtype: Dtype of the weights; None for that of the language model.
        max_shard_size: Larger weights are split into several files.
        merge: `llava`: whether all weights are written where a run trained only a part of them.
        without_adapters: `hf`: whether adapters are left out instead of merged.
        tower_name: `llava`: folder or hub name of the vision tower; None for the model's own.
        outtype: `gguf`: type of the matrices of a GGUF file.
        unverified: `gguf`: whether files are kept that llama.cpp computes differently, or that were
            not compared.
    """

    sample: "Sample | None" = None
    image: Path | None = None
    prompt: str = ""
    dtype: "torch.dtype | None" = None
    max_shard_size: str = MAX_SHARD_SIZE
    merge: bool = False
    without_adapters: bool = False
    tower_name: str | None = None
    outtype: Literal["f16", "q8_0"] = "f16"
    unverified: bool = False


@dataclass(frozen=True)
class ExportResult:
    """What a format wrote, and how it was verified.

    Attributes:
        summary: How the export was compared and with which result, as a sentence without a period.
        consumers: Programs, and whether they load the folder.
        usage: Python code that loads the folder `FOLDER`, for the model card.
        facts: Results of the comparison for `export.json`.
        library: Name of the library that loads the folder, as the model hub knows it.
    """

    summary: str
    consumers: "list[Consumer]"
    usage: str
    facts: dict[str, Any] = field(default_factory=dict)
    library: str = "transformers"


class FormatModule(Protocol):
    """What the module of a format offers."""

    def obstacles(self, checkpoint: "LoadedModel") -> list[str]:
        """Return one sentence for each part that the format cannot express; empty if none."""

    def export(self, checkpoint: "LoadedModel", out: Path, options: ExportOptions) -> ExportResult:
        """Write the format's files and compare them with the checkpoint.

        Args:
            checkpoint: A checkpoint without obstacles; it is not changed.
            out: An existing empty folder, which is deleted if anything is raised.
            options: The user's choices.

        Raises:
            UserError: The files differ from the checkpoint, or cannot be written.
        """


def format_module(name: str) -> FormatModule:
    """Import the module of a format."""
    return cast(FormatModule, import_module(FORMATS[name].module))
