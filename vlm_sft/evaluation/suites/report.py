"""The report of a suite's results: one self-contained HTML page."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from vlm_sft.data.images import thumbnail
from vlm_sft.errors import ImageError
from vlm_sft.evaluation.scores.files import Row
from vlm_sft.evaluation.suites.results import NOT_SHARES, RIGHT, TaskResult
from vlm_sft.evaluation.suites.tasks import Task, row_id
from vlm_sft.utils.escape import shortened
from vlm_sft.utils.html import data_uri, render_page
from vlm_sft.utils.image_paths import image_path
from vlm_sft.utils.libraries import is_installed

SHOWN: Final = 6
"""Right answers, and as many wrong ones, that a task's gallery shows."""

_THUMBNAIL_SIZE: Final = 320
_CONDITIONS: Final = {
    "right": "its own",
    "blank": "blank",
    "shuffled": "another one",
    "blurred": "its own, blurred",
    "cropped": "its own, cropped away",
}
_EXPECTED: Final = ("label", "answer", "caption", "box", "bbox", "answers", "objects")


def suite_page(
    results: Mapping[str, Any], tasks: Sequence[Task], found: Sequence[TaskResult]
) -> str:
    """Return the page.

    Args:
        results: The content of `results.json`.
        tasks: The tasks, whose images are shown.
        found: Their results, in the same order.
    """
    return render_page(
        __package__,
        "suite_report.html",
        title="Evaluation",
        lead=f"{results['model']} on {results['suite']}",
        command="evaluate",
        styles=["suite_report.css"],
        headline=list(_headline(results, found)),
        intervals=results["interval"],
        plot=data_uri(_plot(found)) if is_installed("matplotlib") else None,
        tasks=[
            {
                "name": result.name,
                "kind": result.kind,
                "questions": f"{len(result.questions):,}",
                "images": f"{len({question.image for question in result.questions}):,}",
                "columns": ["score", *(_CONDITIONS[name] for name in result.scores)],
                "rows": list(_score_rows(result)),
                "readings": list(_reading_rows(result)),
                "categories": list(_category_rows(results["tasks"][result.name])),
                "looks": _looks_text(results["tasks"][result.name]["looks"], result),
                "gallery": _gallery(task, result),
                "graded": result.kind in NOT_SHARES,
            }
            for task, result in zip(tasks, found, strict=True)
        ],
    )


def _headline(
    results: Mapping[str, Any], found: Sequence[TaskResult]
) -> Iterator[tuple[str, str, str]]:
    """Yield value, caption and note: whether the model looks, then each task's main score."""
    total = results["looks"]
    if total is not None:
        yield (
            f"{100 * total['difference']['estimate']:+.1f} points",
            "accuracy with its own image minus with another one",
            f"95 % interval {_bounds(total['difference'], 100)}; {total['questions']:,} questions: "
            f"{_percent(total['own_image'])} and {_percent(total['another_image'])}",
        )
    for task in found:
        scores = task.scores.get("right", next(iter(task.scores.values())))
        interval = scores.get(f"{task.main}_interval")
        note = f"95 % interval {_range(interval, task.main)}" if interval else ""
        yield _shown(scores[task.main], task.main), f"{task.name}: {task.main}", note


def _score_rows(task: TaskResult) -> Iterator[dict[str, str]]:
    first = next(iter(task.scores.values()))
    for name, value in first.items():
        if isinstance(value, str | list | dict) or name == "questions":
            continue
        row = {"score": name}
        for condition, scores in task.scores.items():
            interval = scores.get(f"{name}_interval")
            bounds = f" [{_range(interval, name)}]" if interval else ""
            row[_CONDITIONS[condition]] = f"{_shown(scores[name], name)}{bounds}"
        yield row


def _reading_rows(task: TaskResult) -> Iterator[dict[str, str]]:
    for reading, scores in task.scores.get("right", {}).get("readings", {}).items():
        names = ("accuracy", "precision", "recall", "f1", "yes_share", "unclear")
        yield {"reading": reading, **{name: _shown(scores[name], name) for name in names}}


def _category_rows(task: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    for name, found in task["by_category"].items():
        score = found["score"]
        yield {
            "category": name,
            "questions": f"{found['questions']:,}",
            "score [95 % interval]": f"{score['estimate']:.3f} [{_bounds(score)}]",
        }


def _looks_text(found: Mapping[str, Any] | None, task: TaskResult) -> str:
    if found is None:
        return ""
    scale, unit = (1, "") if task.kind in NOT_SHARES else (100, " points")
    difference = found["difference"]
    return (
        f"{scale * difference['estimate']:+.{1 if scale == 100 else 3}f}{unit} "
        f"[{_bounds(difference, scale)}]"
    )


def _gallery(task: Task, result: TaskResult) -> list[dict[str, Any]]:
    """Return the first answers that are right, and that are wrong, with their images.

    Of captions, those with the best and the worst scores.
    """
    condition = "right" if "right" in result.scores else next(iter(result.scores))
    questions = {question.id: question for question in task.questions}
    scored = [(q.scores[condition], q.id) for q in result.questions if condition in q.scores]
    if result.kind in NOT_SHARES:
        scored.sort(key=lambda pair: -pair[0])
        groups = [(True, scored[:SHOWN]), (False, scored[SHOWN:][-SHOWN:])]
    else:
        right = [pair for pair in scored if pair[0] >= RIGHT]
        wrong = [pair for pair in scored if pair[0] < RIGHT]
        groups = [(True, _spread(right)), (False, _spread(wrong))]
    truth = {row_id(row, result.kind): row for row in reversed(task.truth)}
    return [
        {
            "is_right": is_right,
            "score": f"{score:.2f}",
            "id": name,
            "prompt": shortened(questions[name].prompt, 400),
            "answer": shortened(result.answers[condition][name], 600),
            "expected": _expected(truth.get(name)),
            "uri": _thumbnail(task, questions[name].image) if condition != "blank" else None,
        }
        for is_right, group in groups
        for score, name in group
    ]


def _spread(pairs: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return up to SHOWN of them, evenly spread."""
    count = min(SHOWN, len(pairs))
    return [pairs[number * len(pairs) // count] for number in range(count)]


def _expected(row: Row | None) -> str:
    """Return the true answer, as text."""
    value = None if row is None else row.get(*_EXPECTED)
    if row is not None and isinstance(value, int) and "choices" in row.values:
        value = row.values["choices"][value]
    if isinstance(value, list):
        texts = [item["answer"] if isinstance(item, dict) else item for item in value]
        value = ", ".join(dict.fromkeys(map(str, texts)))
    return "" if value is None else shortened(str(value), 300)


def _thumbnail(task: Task, name: str | None) -> Any:
    if name is None or task.config.images is None:
        return None
    try:
        path = image_path(task.config.images, name, follow_symlinks=True)
        return data_uri(thumbnail(path, _THUMBNAIL_SIZE), "jpeg")
    except ImageError:
        return None  # the answers are there, so the image was removed after the evaluation


def _plot(found: Sequence[TaskResult]) -> bytes:
    """Draw each task's main score under every condition, with its interval, as a PNG."""
    from matplotlib.figure import Figure

    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows), dpi=130, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, task in zip(panels, found, strict=False):
        names = list(task.scores)
        values = [scores[task.main] or 0.0 for scores in task.scores.values()]
        panel.bar(range(len(names)), values, color="#8fb3ee", width=0.62)
        for place, scores in enumerate(task.scores.values()):
            interval = scores.get(f"{task.main}_interval")
            if interval is not None:
                panel.plot([place, place], interval, color="#123a7a", lw=1.8)
        panel.set_xticks(range(len(names)), names, fontsize=8)
        panel.set_xlim(-0.6, max(len(names), 3) - 0.4)
        panel.set_title(f"{task.name}: {task.main}", fontsize=9)
        if task.main == "accuracy":
            panel.set_ylim(0, 1)
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _is_percent(name: str) -> bool:
    return name in ("accuracy", "precision", "recall", "f1", "chair_i", "chair_s") or (
        name.endswith("_share")
    )


def _shown(value: Any, name: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return _percent(value) if _is_percent(name) else f"{value:.3f}"
    return f"{value:,}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _range(interval: Sequence[float], name: str) -> str:
    low, high = interval
    return f"{100 * low:.1f}, {100 * high:.1f}" if _is_percent(name) else f"{low:.3f}, {high:.3f}"


def _bounds(interval: Mapping[str, Any], scale: float = 1) -> str:
    digits = 1 if scale == 100 else 3
    low, high = (scale * interval[key] for key in ("low", "high"))
    return f"{low:.{digits}f}, {high:.{digits}f}"
