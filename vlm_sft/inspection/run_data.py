"""Read what a run directory says about its run, be it running, interrupted or finished."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from vlm_sft.checkpoint.jsonl import Rows, has_step, read_rows
from vlm_sft.checkpoint.run_dir import EXPORT_OUTLOOK, STARTS, require_unlocked
from vlm_sft.config.loading import read_tree
from vlm_sft.config.renamed import translate_renamed
from vlm_sft.config.resume import flat_tree
from vlm_sft.errors import ConfigError, UserError
from vlm_sft.utils.output_files import has_mark
from vlm_sft.utils.ownership import MANIFEST
from vlm_sft.utils.reading import read_json

Row = Mapping[str, Any]

MAX_MESSAGES: Final = 3
"""Messages that are kept for each reason of the ledger."""

LEDGERS: Final = {
    "ledger.jsonl": "training",
    "ledger_eval.jsonl": "validation",
    "ledger_text.jsonl": "held-out text",
}
"""Names of the ledgers, and what their records are called."""

_MISSING: Final = "(not set)"


@dataclass
class RunData:
    """What a run directory says.

    Attributes:
        run_dir: The directory.
        state: `running`, `finished` or `interrupted`.
        stage: `stage1` or `stage2`; "" if that is not known.
        metrics: Rows of `metrics.jsonl`.
        samples: Rows of `samples.jsonl`.
        starts: The starts of the run, oldest first; empty for a run of an earlier version.
        ledgers: Number of records by bucket and reason, for each of `LEDGERS`.
        messages: A few messages of each of these.
        steps: Steps, records and skipped updates of `trained.jsonl`; None without it.
        modules: Rows of `parts.json`.
        export: Whether the model can be exported; "" if that is not known.
        manifest: That of the newest checkpoint; empty without one.
        settings: The configuration by full keys; empty if it cannot be read.
        evaluations: The main scores of suites in the run directory, by the name of their folder.
        damaged: Number of lines (or 1 for a whole file) that could not be read, by file.
    """

    run_dir: Path
    state: str = "interrupted"
    stage: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    starts: list["Start"] = field(default_factory=list)
    ledgers: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    messages: dict[str, dict[tuple[str, str], list[str]]] = field(default_factory=dict)
    steps: dict[str, int] | None = None
    modules: list[dict[str, Any]] = field(default_factory=list)
    export: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    damaged: dict[str, int] = field(default_factory=dict)

    @property
    def train_rows(self) -> list[dict[str, Any]]:
        """Rows of training steps."""
        return [row for row in self.metrics if "loss" in row and "eval_loss" not in row]

    @property
    def last_step(self) -> int:
        """The last step that was logged or saved."""
        saved = _whole(self.manifest.get("step"))
        return max([saved, *(row["step"] for row in self.train_rows)])

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None if that is not known."""
        found = [start.total_steps for start in self.starts] + [self.manifest.get("total_steps")]
        known = [value for value in found[-2:] if isinstance(value, int) and value > 0]
        return known[0] if known else None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase over all starts."""
        total: Counter[str] = Counter()
        for start in self.starts:
            total.update(start.seconds)
        return dict(total)

    @property
    def software(self) -> dict[str, str]:
        """Versions that the newest checkpoint, or else the last start, was made with."""
        found = self.manifest.get("software") or (self.starts[-1].software if self.starts else {})
        return {str(name): str(value) for name, value in found.items()}

    def points(self, key: str) -> list[tuple[float, float]]:
        """Return step and value of a number of the rows, e.g. `loss` or `learning_rate.projector`.

        Values that are not finite are left out.
        """
        found = []
        for row in self.metrics:
            value: Any = row.get(key)
            if value is None and "." in key:
                section, _, name = key.partition(".")
                inner = row.get(section)
                value = inner.get(name) if isinstance(inner, dict) else None
            if (usable := number(value)) is not None:
                found.append((row["step"], usable))
        return found

    @property
    def text_loss(self) -> dict[str, Any] | None:
        """Loss of held-out text before training and at the last evaluation; None without both."""
        points = self.points("text_loss")
        if len(points) < 2 or points[0][0] != 0:
            return None
        tokens = [row["text_num_targets"] for row in self.metrics if "text_num_targets" in row]
        (_, before), (step, after) = points[0], points[-1]
        return {
            "before": before,
            "after": after,
            "change": after - before,
            "step": step,
            "tokens": _whole(tokens[-1]) if tokens else 0,
        }

    def names(self, section: str) -> list[str]:
        """Return the keys inside a section of the rows, e.g. of `learning_rate`."""
        found: dict[str, None] = {}
        for row in self.metrics:
            inner = row.get(section)
            found |= dict.fromkeys(inner) if isinstance(inner, dict) else {}
        return list(found)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        losses = ("loss", "eval_loss", "text_loss")
        keys = (*losses, "grad_norm", "samples_per_second", "target_tokens_per_second")
        nested = [
            f"{section}.{name}"
            for section in ("learning_rate", "eval_suite")
            for name in self.names(section)
        ]
        return {
            "run_dir": str(self.run_dir),
            "state": self.state,
            "stage": self.stage,
            "step": self.last_step,
            "total_steps": self.total_steps,
            "curves": {key: self.points(key) for key in (*keys, "memory_bytes", *nested)},
            "text_loss": self.text_loss,
            "failed_evaluations": sum("eval_error" in row for row in self.metrics),
            "seconds": self.seconds,
            "starts": [start.as_dict() for start in self.starts],
            "records": {
                name: [
                    {"bucket": bucket, "reason": reason, "records": count}
                    for (bucket, reason), count in counts.most_common()
                ]
                for name, counts in self.ledgers.items()
            },
            "trained": self.steps,
            "answers": self.samples,
            "evaluations": self.evaluations,
            "settings": self.settings,
            "software": self.software,
            "damaged": self.damaged,
        }


@dataclass(frozen=True)
class Start:
    """One start of a run.

    Attributes:
        at: When training started (UTC, ISO 8601).
        step: Steps done before.
        total_steps: Steps of the run.
        last_step: The last step that this start saved.
        how: How it ended; "" if that was not logged, as of a killed process.
        changed: Settings that differ from the start before: key, value then, value now.
        seconds: Seconds of each phase, up to the last event.
        software: Versions of libraries, and a digest of this package.
        machine: Device and number of ranks.
    """

    at: str
    step: int
    total_steps: int
    last_step: int
    how: str
    changed: list[tuple[str, Any, Any]]
    seconds: dict[str, float]
    software: dict[str, str]
    machine: str

    def as_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON values."""
        return {**vars(self), "changed": [list(change) for change in self.changed]}


def read_run(run_dir: str | Path, *, is_running: bool | None = None) -> RunData:
    """Read a run directory; damaged lines and files are skipped and counted.

    Args:
        run_dir: The directory.
        is_running: Whether the run is being trained; None: whether a process has locked it.

    Raises:
        OSError: A file cannot be read.
    """
    run = RunData(Path(run_dir))
    run.metrics = _rows(run, "metrics.jsonl")
    run.samples = _rows(run, "samples.jsonl")
    events = _rows(run, STARTS, is_row=lambda row: isinstance(row.get("event"), str))
    run.starts = list(_starts(events))
    for name, title in LEDGERS.items():
        _read_ledger(run, name, title)
    run.steps = _trained_steps(_rows(run, "trained.jsonl"))
    run.modules = _json(run, "parts.json", lambda rows: [dict(row) for row in rows]) or []
    run.export = _json(run, EXPORT_OUTLOOK, lambda value: value["hf"].strip()) or ""
    run.manifest = _newest_manifest(run.run_dir)
    run.settings = _settings(run)
    run.evaluations = dict(_evaluations(run))
    stages = [event["stage"] for event in events if isinstance(event.get("stage"), str)]
    run.stage = str(run.manifest.get("stage") or (stages[-1] if stages else ""))
    if is_running if is_running is not None else _is_locked(run.run_dir):
        run.state = "running"
    elif (run.run_dir / "final" / MANIFEST).is_file() and not _was_continued(run):
        run.state = "finished"
    return run


def number(value: Any) -> float | None:
    """Return a finite number; None for anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < 1e300 else None  # no NaN, infinity or huge integer


def different_settings(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of every key whose values differ, one for each run.

    A key that a run does not have, as one of another version, has the value `(not set)` there.
    """
    keys = sorted({key for values in settings for key in values})
    rows = {key: [values.get(key, _MISSING) for values in settings] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _rows(
    run: RunData, name: str, *, is_row: Callable[[dict[str, Any]], bool] = has_step
) -> list[dict[str, Any]]:
    found: Rows = read_rows(run.run_dir / name, is_row=is_row)
    if found.num_damaged:
        run.damaged[name] = found.num_damaged
    return found.rows


def _json(run: RunData, name: str, select: Callable[[Any], Any]) -> Any:
    """Return what `select` takes from a JSON file; None if the file is missing or damaged."""
    path = run.run_dir / name
    if not path.exists():
        return None
    try:
        return select(read_json(path))
    except (ValueError, TypeError, LookupError, AttributeError):
        run.damaged[name] = 1
        return None


def _starts(events: Sequence[Row]) -> Iterator[Start]:
    """Yield the starts that the rows of `starts.jsonl` describe."""
    bounds = [i for i, event in enumerate(events) if event["event"] == "started"]
    settings: Mapping[str, Any] | None = None
    for begin, end in pairwise([*bounds, len(events)]):
        row, later = events[begin], events[begin + 1 : end]
        now = row.get("settings") if isinstance(row.get("settings"), dict) else {}
        changes = different_settings([settings, now]) if settings and now else {}
        seconds = [event["seconds"] for event in later if isinstance(event.get("seconds"), dict)]
        known = {k: v for k, v in (seconds[-1] if seconds else {}).items() if number(v) is not None}
        software = row.get("software")
        yield Start(
            at=str(row.get("at", "")),
            step=_whole(row.get("step")),
            total_steps=_whole(row.get("total_steps")),
            last_step=max(_whole(event.get("step")) for event in (row, *later)),
            how=next((str(e.get("how", "")) for e in reversed(later) if e["event"] == "ended"), ""),
            changed=[(key, before, after) for key, (before, after) in changes.items()],
            seconds={str(name): float(value) for name, value in known.items()},
            software=dict(software) if isinstance(software, dict) else {},
            machine=f"{row.get('device', '')}, {row.get('ranks', 1)} rank(s)",
        )
        settings = now


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _read_ledger(run: RunData, name: str, title: str) -> None:
    counts: Counter[tuple[str, str]] = Counter()
    messages: dict[tuple[str, str], list[str]] = {}
    for row in _rows(run, name, is_row=lambda row: True):
        if bucket := row.get("bucket"):
            key = str(bucket), str(row.get("reason") or "")
            counts[key] += 1
            if row.get("message") and counts[key] <= MAX_MESSAGES:
                messages.setdefault(key, []).append(str(row["message"]))
    if counts:
        run.ledgers[title], run.messages[title] = counts, messages


def _trained_steps(rows: Sequence[Row]) -> dict[str, int] | None:
    if not rows:
        return None
    lists = [row["records"] for row in rows if isinstance(row.get("records"), list)]
    return {
        "steps": len(rows),
        "records": len({str(record) for records in lists for record in records}),
        "uses": sum(map(len, lists)),
        "skipped_updates": sum("update_left_out" in row for row in rows),
    }


def _newest_manifest(run_dir: Path) -> dict[str, Any]:
    """Return the manifest of the newest checkpoint that has a readable one."""
    steps = sorted((run_dir / "checkpoints").glob(f"step-*/{MANIFEST}"))
    newest: dict[str, Any] = {}
    for path in (*steps, run_dir / "final" / MANIFEST):
        try:
            found = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and isinstance(found.get("software"), dict):
            newest = max(newest, found, key=lambda manifest: _whole(manifest.get("step")))
    return newest


def _settings(run: RunData) -> dict[str, Any]:
    path = run.run_dir / "config.yaml"
    if not path.exists():
        return {}
    try:
        # Not as a `RunConfig`: another version may have written it.
        return flat_tree(translate_renamed(read_tree(path)))
    except ConfigError:
        run.damaged["config.yaml"] = 1
        return {}


def _evaluations(run: RunData) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the main scores of suites that were evaluated into the run directory."""
    for path in sorted(run.run_dir.glob("*/results.json")):
        try:
            if path.is_file() and has_mark(path, "evaluate"):
                yield path.parent.name, list(_main_scores(read_json(path)["tasks"]))
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            run.damaged[f"{path.parent.name}/{path.name}"] = 1


def _main_scores(tasks: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the main score of every task under every condition."""
    for name, task in tasks.items():
        main = task["main"]
        for condition, scores in task["conditions"].items():
            interval = scores.get(f"{main}_interval")
            yield {
                "task": name,
                "image": condition,
                "score": main,
                "questions": int(scores["questions"]),
                "value": number(scores[main]),
                "interval": None if interval is None else [float(bound) for bound in interval],
            }


def _is_locked(run_dir: Path) -> bool:
    try:
        require_unlocked(run_dir)
    except UserError as error:
        return error.reason == "folder_in_use"
    return False


def _was_continued(run: RunData) -> bool:
    """Return whether a finished run was started again with more steps, and did not end."""
    if not run.starts or run.starts[-1].how == "finished":
        return False
    return _whole(run.manifest.get("step")) < run.starts[-1].total_steps


def minutes_since(at: str) -> float | None:
    """Return the minutes since a time in ISO 8601; None if it is none."""
    try:
        then = datetime.fromisoformat(at)
        return max(0.0, (datetime.now(UTC) - then).total_seconds() / 60)
    except (ValueError, TypeError):
        return None


def mean_of_last(points: Sequence[tuple[float, float]], count: int = 20) -> float:
    """Return the mean of the last values of a curve; NaN without any."""
    values = [value for _, value in points[-count:]]
    return sum(values) / len(values) if values else math.nan
