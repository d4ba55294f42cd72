"""The labels that an answer says it rests on, as annotation ids."""

from collections.abc import Iterator

from data_tools.instruct.schema import Check, Shown, Turn, Verdict


def check_citations(turn: Turn, index: int, shown: Shown) -> Iterator[Check]:
    """One finding for the labels of a turn: all known, some unknown, or none given.

    Rules and people cite nothing, which is noted and rejects nothing.
    """
    if not turn.evidence:
        yield _found("unknown", None, index, "cites nothing", ())
        return
    resolved = {label: resolve(label, shown) for label in turn.evidence}
    unknown = [label for label, number in resolved.items() if number is None]
    if unknown:
        known = f"c1 to c{len(shown.captions)}, b1 to b{len(shown.boxes)}"
        claim = f"cites {', '.join(unknown[:3])}; shown were {known}"
        yield _found("contradicted", "LABEL_UNKNOWN", index, claim, ())
        return
    ids = tuple(number for number in resolved.values() if number)
    yield _found("supported", None, index, ", ".join(turn.evidence), ids)


def resolve(label: str, shown: Shown) -> int | None:
    """The annotation id of `c2` or `b1`; None for a label that was not given."""
    of = {"c": shown.captions, "b": shown.boxes}.get(label[:1])
    digits = label[1:]
    if (
        of is None
        or not digits.isascii()
        or not digits.isdigit()
        or digits.startswith("0")
        or len(digits) > 9
    ):
        return None
    return of[int(digits) - 1] if int(digits) <= len(of) else None


def _found(
    verdict: Verdict, code: str | None, index: int, claim: str, ids: tuple[int, ...]
) -> Check:
    return Check(
        rule="citation", verdict=verdict, code=code, turn=index, part="answer", span=None,
        claim=claim, evidence=ids,
    )  # fmt: skip
