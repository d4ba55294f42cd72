"""Count objects in descriptions that are not in the image: CHAIR (arXiv 1809.02156).

An object is there if a box or a reference caption has it. The words for COCO's categories are our
own, so figures differ from those computed with the list of CHAIR's authors.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from vlm_sft.evaluation.intervals import cluster_bootstrap_ratio, interval_of_shares
from vlm_sft.evaluation.scores.files import Answers, Row, match, read_rows, unique_ids
from vlm_sft.evaluation.scores.object_words import category_named, find_objects
from vlm_sft.evaluation.scores.results import Options, Results, image_of, question_row

_IDS: Final = ("question_id", "id", "image_id")


def read_chair_truth(paths: Sequence[Path]) -> list[Row]:
    """Return one row per image, with its `objects`: COCO's category names.

    Args:
        paths: COCO's instances_*.json and captions_*.json, or files with rows that have `objects`
            (names) or `captions`.

    Raises:
        UserError: A file is malformed, or a row has neither boxes, objects nor captions.
    """
    objects: dict[str, set[str]] = {}
    first: dict[str, Row] = {}
    for path in paths:
        rows = read_rows(path, ("annotations", "images", "questions", "data"))
        is_instances = any("category_id" in row.values for row in rows)
        names = _category_names(path) if is_instances else {}
        for row in rows:
            key = ("image_id",) if is_instances or "caption" in row.values else _IDS
            name = row.text(*key)
            objects.setdefault(name, set()).update(_objects_of(row, names))
            first.setdefault(name, row)
    return [
        Row(first[name].place, {**_kept(first[name]), "id": name, "objects": sorted(there)})
        for name, there in objects.items()
    ]


def score_chair(answers: Answers, truth: Sequence[Row], options: Options) -> Results:
    """Return CHAIR of descriptions, recall of objects, and the length that both depend on.

    `chair_i` is the share of mentions of objects that are not in the image, `chair_s` the share of
    descriptions with at least one, `recall` the share of the objects in the images that are
    mentioned. Mentions that the text itself denies (`there is no dog`) are counted apart. Images
    without a description are not counted.

    Args:
        answers: Descriptions by image or question id.
        truth: Rows of `read_chair_truth`.
        options: Seed of the bootstrap.

    Raises:
        UserError: No description belongs to an image.
    """
    images = unique_ids(truth, *_IDS)
    coverage = match(answers, list(images))
    rows = []
    for name, row in images.items():
        if name not in answers.by_id:
            continue
        there = set(row.require("objects"))
        mentions = find_objects(answers.by_id[name])
        said = [mention for mention in mentions if not mention.denied]
        wrong = [mention for mention in said if mention.category not in there]
        rows.append(
            question_row(
                name, row, answers, not wrong,
                objects=sorted(there),
                mentioned=[[mention.word, mention.category] for mention in said],
                hallucinated=[[mention.word, mention.category] for mention in wrong],
                denied=[m.category for m in mentions if m.denied],
                recalled=sorted(there & {mention.category for mention in said}),
                words=len(answers.by_id[name].split()),
            )
        )  # fmt: skip
    clusters = [image_of(row["id"], images[row["id"]]) for row in rows]
    scores: dict[str, Any] = {"kind": "chair", **coverage.as_dict()}
    shares = interval_of_shares([row["score"] == 0.0 for row in rows], clusters, seed=options.seed)
    scores["chair_s"], scores["chair_s_interval"] = shares.estimate, [shares.low, shares.high]
    for name, above, below in (
        ("chair_i", "hallucinated", "mentioned"),
        ("recall", "recalled", "objects"),
    ):
        scores |= _ratio(name, rows, above, below, clusters, options.seed)
    scores |= {
        "descriptions": len(rows),
        "mentions": sum(len(row["mentioned"]) for row in rows),
        "denied": sum(len(row["denied"]) for row in rows),
        "empty": sum(not row["answer"].strip() for row in rows),
        "mean_words": sum(row["words"] for row in rows) / len(rows),
        "hallucinated": dict(
            Counter(name for row in rows for _, name in row["hallucinated"]).most_common(10)
        ),
    }
    return Results(scores, rows)


def _ratio(
    name: str,
    rows: Sequence[dict[str, Any]],
    above: str,
    below: str,
    clusters: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Return the share of the things `below` that are `above`; None without any."""
    pairs = [
        (len(row[above]), len(row[below]), cluster)
        for row, cluster in zip(rows, clusters, strict=True)
        if row[below]
    ]
    if not pairs:
        return {name: None}
    found = cluster_bootstrap_ratio(*map(list, zip(*pairs, strict=True)), seed=seed)
    return {name: found.estimate, f"{name}_interval": [found.low, found.high]}


def _category_names(path: Path) -> dict[str, str]:
    """Return the names in the `categories` of an instances file, by id."""
    rows = read_rows(path, ("categories",))
    return {row.text("id"): row.text("name") for row in rows if "name" in row.values}


def _objects_of(row: Row, names: dict[str, str]) -> set[str]:
    """Return the categories that a row says are in its image."""
    if "category_id" in row.values:
        number = row.text("category_id")
        if number not in names:
            raise row.refusal(f"the category {number} is not in 'categories'")
        return {_category(names[number], row)}
    if "caption" in row.values:
        return {mention.category for mention in find_objects(row.text("caption"))}
    listed, captions = row.get("objects"), row.get("captions")
    if listed is None and captions is None:
        raise row.refusal("has none of the keys category_id, caption, objects, captions")
    for key, value in (("objects", listed), ("captions", captions)):
        if value is not None and not (
            isinstance(value, list) and all(isinstance(item, str) for item in value)
        ):
            raise row.refusal(f"{key!r} is not a list of texts")
    found = {_category(name, row) for name in listed or []}
    return found | {m.category for text in captions or [] for m in find_objects(text)}


def _category(name: str, row: Row) -> str:
    if (found := category_named(name)) is None:
        raise row.refusal(f"{name!r} is not one of COCO's 80 categories, whose words CHAIR counts")
    return found


def _kept(row: Row) -> dict[str, Any]:
    """Return what the results show of a row."""
    return {key: row.values[key] for key in ("image", "image_id", "type") if key in row.values}
