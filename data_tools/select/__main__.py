"""Select a part of the training records by scores, beside a random part of the same size.

Writes scores.parquet (one row per record: scores, whether it is selected, and why not),
selected.jsonl and random.jsonl (messages), and selection.json. Scores by a model are cached by the
records' content; a repeated command goes on.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlm_sft.commands.parser import CommandParser, add_overrides, heavy_imports, require_file
from vlm_sft.commands.run_command import run_command
from vlm_sft.errors import UserError

if TYPE_CHECKING:
    from data_tools.review.records import Reviews
    from data_tools.select.choose import Decision, Table
    from data_tools.select.config import SelectConfig

KIND: Final = "selection"
"""Kind of output in the marker of the directory."""
OUTPUTS: Final = ("scores.parquet", "selected.jsonl", "random.jsonl", "selection.json")

EXAMPLES: Final = """examples:
  vlm-sft data select select.yaml
  vlm-sft data select select.yaml preset=ifd share=0.15 model=runs/stage2/final
  vlm-sft data select select.yaml --train-control stage2.yaml --held-out suite.yaml

The file needs `output_dir` and `path`; all settings are in docs/data-engine.md."""


def main(argv: Sequence[str]) -> int:
    """Score, select and write; return the exit code."""
    arguments = parser().read(argv)
    if (arguments.train_control is None) != (arguments.held_out is None):
        raise UserError("--train-control CONFIG.yaml and --held-out SUITE.yaml: give both or none")
    for option in ("train_control", "held_out"):
        if (path := getattr(arguments, option)) is not None:
            require_file(f"--{option.replace('_', '-')}", path)

    from data_tools.select.config import SelectConfig
    from vlm_sft.commands.inputs import require_records
    from vlm_sft.config import loading as settings
    from vlm_sft.utils.console import echo
    from vlm_sft.utils.owned_files import own_output, write_owned_json

    config = settings.load(SelectConfig, arguments.config, arguments.overrides)
    require_records("path", config.path)
    if config.annotations is not None:
        require_records("annotations", config.annotations)
    folder = Path(config.output_dir)
    inputs = [arguments.config, config.path, config.annotations, config.samples]
    inputs.append(config.teacher_samples)
    inputs += [config.decisions, config.instances, config.captions]
    own_output(
        folder, KIND, OUTPUTS, inputs=[name for name in inputs if name],
        image_roots=[config.data_file().images_start_in()], overwrite=arguments.overwrite,
    )  # fmt: skip
    with heavy_imports():
        from data_tools.select.choose import decide
        from data_tools.select.control import require_control, train_control
        from data_tools.select.records import read_reviews

    if arguments.train_control is not None:
        require_control(arguments.train_control, arguments.held_out)
    reviews = read_reviews(config)
    table = _scored(config, folder, reviews)
    decision = decide(table, config)
    if not len(decision.selected):
        reasons = ", ".join(f"{why} {n:,}" for why, n in _why_not(decision).most_common())
        raise UserError(
            f"{config.path}: no record is selected ({reasons}); nothing was replaced. Widen `keep` "
            "or `middle`, or rank by a column that the records have",
            code="no_records",
        )
    # It describes both parts: none of an earlier selection may stay beside new ones.
    (folder / "selection.json").unlink(missing_ok=True)
    root = _write(config, folder, table, decision, reviews)
    report = _report(config, table, decision, root)
    if reviews is not None:
        report["review"] = reviews.verdicts.summary() | {"unverified": len(reviews.unverified)}
        echo(reviews.lines(), file=sys.stdout)
    _finish(folder, report)
    if arguments.train_control is not None:
        found = train_control(folder, root, arguments.train_control, arguments.held_out)
        write_owned_json(folder / "selection.json", report | {"control": found})
        for pair in found["comparisons"]:
            difference = pair["difference"]
            echo(
                f"control, {pair['task']} ({pair['condition']}): selected minus random "
                f"{difference['estimate']:+.3f} "
                f"[{difference['low']:+.3f}, {difference['high']:+.3f}]",
                file=sys.stdout,
            )
    return 0


def parser() -> CommandParser:
    """Return the command's parser."""
    parser = CommandParser(
        "vlm-sft data select", __doc__, EXAMPLES, settings="data_tools.select.config:SelectConfig"
    )
    add = parser.add_argument
    add("config", metavar="SELECT.yaml", help="the records, and how to select")
    add_overrides(parser, "share=0.1")
    control = "configuration of stage 2: train it on the selected and on the random records"
    add("--train-control", type=Path, metavar="CONFIG.yaml", help=control)
    suite = "suite that both models are evaluated on"
    add("--held-out", type=Path, metavar="SUITE.yaml", help=suite)
    replace = "replace files in output_dir that were edited or that this command did not write"
    add("--overwrite", action="store_true", help=replace)
    return parser


def _scored(config: "SelectConfig", folder: Path, reviews: "Reviews | None") -> "Table":
    """Return all records with all scores that the configuration gives the means for."""
    import numpy as np

    from data_tools.select.choose import Table
    from data_tools.select.model_scores import clip_scores, model_scores
    from data_tools.select.records import conversations, read_table
    from vlm_sft.data.conversation import Conversation

    found = read_table(config, reviews)
    if not any(problem == "" for problem in found.problems):
        reasons = ", ".join(f"{why} {n:,}" for why, n in Counter(found.problems).most_common())
        where = ""
        if "image_missing" in found.problems:
            where = f"; images start in {config.data_file().images_start_in()}, set image_root"
        raise UserError(
            f"{config.path}: has no usable record ({reasons or 'it is empty'}){where}",
            code="no_records",
        )
    columns, problems, embeddings = found.columns, found.problems, None

    def records() -> Iterator[Conversation]:
        read = (one.record for one in conversations(config, reviews) if not one.problem)
        return (record for record in read if isinstance(record, Conversation))

    if config.model is not None:
        scores = model_scores(folder, config.model, config)
        scores.compute(records(), len(found.ids))
        wanted = config.diversity != "none" or config.merge_similar is not None
        by_model, bad, embeddings = scores.read(found.digests, with_embeddings=wanted)
        problems = [old or bad.get(d, "") for old, d in zip(problems, found.digests, strict=True)]
        loss = by_model["loss"]
        columns["answer_tokens"], columns["loss"] = by_model["num_tokens"], loss
        columns["perplexity"] = np.exp(loss)
        columns["ifd"] = loss / by_model["loss_alone"]
        columns["necessity"] = by_model["loss_blank"] - loss
    if config.weak_model is not None:
        weak = model_scores(folder, config.weak_model, config, only_loss=True)
        weak.compute(records(), len(found.ids))
        columns["weak_loss"] = weak.read(found.digests)[0]["loss"]
    truncated = None
    if config.clip_model is not None:
        clip = clip_scores(folder, config.clip_model, config)
        clip.compute(records(), len(found.ids))
        by_clip, bad, _ = clip.read(found.digests)
        problems = [old or bad.get(d, "") for old, d in zip(problems, found.digests, strict=True)]
        columns["clip"] = by_clip["clip"]
        usable = np.array([not problem for problem in problems])
        truncated = int(np.nansum(by_clip["truncated"][usable]))
    return Table(found.ids, found.categories, problems, columns, embeddings, truncated)


def _write(
    config: "SelectConfig",
    folder: Path,
    table: "Table",
    decision: "Decision",
    reviews: "Reviews | None",
) -> Path:
    """Write both parts and the table of scores; return where the image names start."""
    import pyarrow as pa
    from pyarrow import parquet

    from data_tools.select.records import conversations
    from vlm_sft.data.conversation import Conversation
    from vlm_sft.data.record_writer import as_messages
    from vlm_sft.utils.owned_files import owned_open

    path = Path(config.path)
    start = config.data_file().images_start_in()
    root = Path(os.path.abspath(start))
    selected, random = set(decision.selected.tolist()), set(decision.random.tolist())
    with owned_open(folder / "selected.jsonl") as one, owned_open(folder / "random.jsonl") as other:
        for row, read in enumerate(conversations(config, reviews)):
            record = read.record
            if row not in selected and row not in random:
                continue
            if row >= len(table.ids) or not isinstance(record, Conversation):
                raise UserError(f"{path}: has changed while it was read; start again")
            messages = as_messages(record, start)
            line = json.dumps({"id": table.ids[row], "messages": messages}, ensure_ascii=False)
            for taken, file in ((selected, one), (random, other)):
                if row in taken:
                    file.write(line.encode() + b"\n")
    columns: dict[str, Any] = {"id": table.ids, "category": table.categories}
    columns |= {name: pa.array(values, from_pandas=True) for name, values in table.columns.items()}
    columns["selected"] = [row in selected for row in range(len(table.ids))]
    columns["random"] = [row in random for row in range(len(table.ids))]
    columns["why_not"] = decision.reasons
    with owned_open(folder / "scores.parquet") as file:
        parquet.write_table(pa.table(columns), file)
    return root


def _report(
    config: "SelectConfig", table: "Table", decision: "Decision", root: Path
) -> dict[str, Any]:
    """Return the content of `selection.json`."""
    import numpy as np

    from vlm_sft.utils.ownership import MADE_BY, made_by

    parts = {"selected": decision.selected, "random": decision.random}
    usable = [row for row, problem in enumerate(table.problems) if not problem]
    means = {
        name: {
            part: float(known.mean())
            if len(known := values[rows][np.isfinite(values[rows])])
            else None
            for part, rows in {"all": np.array(usable), **parts}.items()
        }
        for name, values in table.columns.items()
    }
    categories = {
        name: {
            "usable": sum(table.categories[row] == name for row in usable),
            **{
                part: sum(table.categories[row] == name for row in rows)
                for part, rows in parts.items()
            },
        }
        for name in sorted({table.categories[row] for row in usable})
    }
    return {
        MADE_BY: made_by("data select"),
        "settings": config.model_dump(mode="json"),
        "image_root": str(root),
        "records": len(table.ids),
        "usable": len(usable),
        "selected": len(decision.selected),
        "in_both": len(set(decision.selected.tolist()) & set(decision.random.tolist())),
        "not_selected": dict(_why_not(decision).most_common()),
        **({} if table.truncated is None else {"clip_truncated": table.truncated}),
        "means": means,
        "categories": categories,
    }


def _why_not(decision: "Decision") -> "Counter[str]":
    """Count the reasons; records that are similar to another one have one reason."""
    return Counter(reason.split(" to ")[0] for reason in decision.reasons if reason)


def _finish(folder: Path, report: dict[str, Any]) -> None:
    """Print the report and write it."""
    from rich import box
    from rich.table import Table as Shown

    from vlm_sft.utils.console import Console, echo
    from vlm_sft.utils.owned_files import write_owned_json

    shown = Shown("mean", "usable", "selected", "random", box=box.SIMPLE_HEAD)
    for name, values in report["means"].items():
        if any(value is not None for value in values.values()):
            numbers = ("-" if value is None else f"{value:.3f}" for value in values.values())
            shown.add_row(name, *numbers)
    console = Console()
    console.print(shown)
    reasons = ", ".join(f"{why} {count:,}" for why, count in report["not_selected"].items())
    echo(f"{report['selected']:,} of {report['usable']:,} usable records selected; "
         f"not selected: {reasons or 'none'}", file=sys.stdout)  # fmt: skip
    if report.get("clip_truncated"):
        echo(
            f"clip: the answers of {report['clip_truncated']:,} records are longer than the "
            "context of clip_model and were cut",
            file=sys.stdout,
        )
    write_owned_json(folder / "selection.json", report)
    echo(
        f"{folder / 'selected.jsonl'} and random.jsonl; images are relative to image_root "
        f"{report['image_root']}",
        file=sys.stdout,
    )


if __name__ == "__main__":
    run_command(main)
