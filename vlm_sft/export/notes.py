"""The README of an exported folder."""

from pathlib import Path

from vlm_sft.export.formats import ExportResult
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.utils.atomic_files import write_text


def write_notes(folder: Path, checkpoint: LoadedModel, result: ExportResult) -> None:
    """Write `README.md`: how the folder is loaded, and how it was verified."""
    rule = checkpoint.model.layout_rule
    shape = f"were made square by `{checkpoint.image_aspect}`"
    if rule.needs_sizes:
        shape = f"were divided into crops by `{rule.tiling}`"
    usage = result.usage.replace("FOLDER", "this folder").strip()
    write_text(
        folder / "README.md",
        "# A vision-language model, exported by vlm_sft\n\n"
        f"```python\n{usage}\n```\n\n"
        f"In training, images {shape}. Comparison with the checkpoint: {result.summary}.\n",
    )
