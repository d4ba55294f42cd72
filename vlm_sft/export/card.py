"""The model card of an export: README.md, whose header the model hub reads."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from huggingface_hub import ModelCard, ModelCardData

from vlm_sft.config.finished_files import is_hub_name
from vlm_sft.config.schema import RunConfig
from vlm_sft.errors import UserError
from vlm_sft.export.consumers import consumer_rows
from vlm_sft.export.formats import ExportResult
from vlm_sft.inference.loaded_model import LoadedModel
from vlm_sft.utils.reading import read_json

LICENSES: Final = (
    "apache-2.0",
    "mit",
    "bsd-3-clause",
    "gpl-3.0",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0",
    "openrail",
    "llama2",
    "llama3",
    "llama3.1",
    "llama3.2",
    "gemma",
)
"""Licenses that are named as the hub names them; others become `other` with a name."""

_MAX_ROWS: Final = 60
"""Rows of the table of results; the file has the others."""

_NO_RESULTS: Final = frozenset({"made_by", "checkpoint", "step", "seed", "rows", "interval"})
"""Keys of result files that are no results."""


@dataclass(frozen=True)
class CardFields:
    """What only the user knows of a model.

    Attributes:
        name: Repository or folder that the card's code loads.
        license: License of the model; None if it was not given.
        attribution: Lines on whose models and data it is based, as their licenses may demand.
        results: A file of `evaluate` or `score`, or None.
    """

    name: str
    license: str | None = None
    attribution: Sequence[str] = ()
    results: Path | None = None


def write_card(
    folder: Path, checkpoint: LoadedModel, source: Path, result: ExportResult, fields: CardFields
) -> None:
    """Write `README.md`.

    Args:
        folder: The exported folder.
        checkpoint: What was exported.
        source: Its folder, or the hub name of a finished model.
        result: What the format wrote.
        fields: What the user gave.

    Raises:
        UserError: The results cannot be read.
    """
    sections = [
        f"# {Path(fields.name).name}",
        "A vision-language model, trained and exported with vlm_sft.",
        "## How to use",
        f"```{'bash' if result.library == 'gguf' else 'python'}\n{usage(result, fields.name)}\n```",
        "## Recipe",
        _recipe(checkpoint),
        "## Training data",
        _data(checkpoint.config, source),
        *_results(fields.results),
        "## Verification",
        f"Comparison with the checkpoint: {result.summary}.",
        _table(("program", "loads", "evidence", "reason"), consumer_rows(result.consumers)),
        "## License and attribution",
        _license(checkpoint, fields),
    ]
    header = card_data(checkpoint, result, fields).to_yaml()
    text = f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n"
    ModelCard(text).save(folder / "README.md")


def usage(result: ExportResult, name: str) -> str:
    """Return the code that loads the exported folder `name`."""
    return result.usage.replace("FOLDER", name).strip()


def card_data(checkpoint: LoadedModel, result: ExportResult, fields: CardFields) -> ModelCardData:
    """Return the header of the card."""
    bases = [name for name in _bases(checkpoint).values() if is_hub_name(name)]
    settings: dict[str, Any] = {}
    if fields.license is not None:
        known = fields.license.lower() in LICENSES
        settings["license"] = fields.license.lower() if known else "other"
        if not known:
            settings["license_name"] = fields.license
    if bases:
        settings["base_model"] = bases
    return ModelCardData(
        library_name=result.library,
        pipeline_tag="image-text-to-text",
        tags=["vlm_sft", "vision-language-model"],
        **settings,
    )


def require_results(path: Path) -> dict[str, Any]:
    """Read a file of `evaluate` or `score`.

    Raises:
        UserError: It is not a JSON object.
    """
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--results {path}: cannot be read ({error}); give the file that evaluate or score "
            "writes"
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"--results {path}: is not an object; give a file of evaluate or score")
    return found


def _bases(checkpoint: LoadedModel) -> dict[str, str]:
    """Return the names of the base models by what they are; local ones without their path."""
    config = checkpoint.trained_config
    if config is None:
        return {}
    named = {
        "vision tower": config.model.vision_tower.name,
        "language model": config.model.language_model.name,
    }
    finished = config.model.from_checkpoint
    if finished is not None:  # its parts are named only if they are in another place
        others = {what: name for what, name in named.items() if name != finished}
        named = {"finished model": finished, **others}
    return {
        what: name if is_hub_name(name) else Path(name).name for what, name in named.items() if name
    }


def _recipe(checkpoint: LoadedModel) -> str:
    model, config = checkpoint.model, checkpoint.config
    rows: list[tuple[str, Any]] = list(_bases(checkpoint).items())
    rows += [
        ("vision features", f"layers {list(model.vision_tower.feature_layers)}"),
        ("image tokens", model.layout_rule.describe()),
        ("images", f"made square by `{checkpoint.image_aspect}`"),
        ("chat template", checkpoint.chat_tokenizer.template.name),
    ]
    if config is None:
        return "A finished model of another program, converted.\n\n" + _table(("", ""), rows)
    lora = config.lora
    rows += [
        ("stage", checkpoint.manifest.get("stage", "?")),
        ("steps", f"{checkpoint.manifest.get('step', 0):,}"),
        ("projector", config.model.projector_type),
        ("adapters", "none" if lora is None else f"LoRA, r {lora.r}, alpha {lora.alpha}"),
        ("learning rate", _spelled(config.optim.learning_rate)),
        ("records per step", config.train.global_batch_size),
        ("precision", config.train.precision),
        ("seed", config.seed),
    ]
    return _table(("setting", "value"), rows)


def _spelled(value: Any) -> str:
    tree = value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value
    if isinstance(tree, dict):
        return ", ".join(f"{key} {number:g}" for key, number in tree.items())
    return f"{tree:g}"


def _data(config: RunConfig | None, source: Path) -> str:
    if config is None:
        return "Unknown: the folder of a finished model does not state it."
    names = ", ".join(f"`{Path(file.path).name}`" for file in config.data.train)
    text = f"Training files: {names}."
    ledgers = {
        "ledger.jsonl": "training",
        "ledger_eval.jsonl": "held out",
        "ledger_text.jsonl": "held-out text",
    }
    for name, what in ledgers.items():
        counts = _ledger(source, name)
        if counts:
            rows = [(key.replace("_", " "), f"{count:,}") for key, count in counts.items()]
            text += f"\n\nThe ledger of the {what} records:\n\n"
            text += _table(("records", "number"), rows)
    return text


def _ledger(source: Path, name: str) -> dict[str, int]:
    """Return the counts at the top of a run's ledger; empty if the run is not there."""
    for folder in (source, source.parent, source.parent.parent):
        try:
            with open(folder / name, encoding="utf-8") as file:
                head = json.loads(file.readline())
        except (OSError, ValueError):
            continue
        if isinstance(head, dict):
            return {key: count for key, count in head.items() if isinstance(count, int)}
    return {}


def _results(path: Path | None) -> list[str]:
    if path is None:
        return ["## Evaluation", "No results were given (`--results`)."]
    found = list(_numbers(require_results(path)))
    text = _table(("measure", "value"), found[:_MAX_ROWS])
    if len(found) > _MAX_ROWS:
        text += f"\n\n{len(found) - _MAX_ROWS} more results are in {path.name}."
    return ["## Evaluation", text]


def _numbers(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield the numbers of a result file with the names on the way to them."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key not in _NO_RESULTS:
                yield from _numbers(value, (*path, str(key)))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield " / ".join(path), f"{tree:.4g}" if isinstance(tree, float) else f"{tree:,}"
    elif isinstance(tree, list) and tree and all(isinstance(item, float) for item in tree):
        yield " / ".join(path), " to ".join(f"{item:.4g}" for item in tree)


def _license(checkpoint: LoadedModel, fields: CardFields) -> str:
    lines = [f"License: {fields.license or 'not stated (`--license`)'}."]
    bases = _bases(checkpoint)
    if bases:
        listed = ", ".join(f"{what} {name}" for what, name in bases.items())
        lines.append(f"The licenses of what it was made from apply, too: {listed}.")
    if fields.attribution:
        lines.append("\n".join(f"- {line}" for line in fields.attribution))
    return "\n\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
