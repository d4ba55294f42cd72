"""Compute how many records to take from which source, from counts, weights and shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_tools.mix.config import MOST_RECORDS, MixConfig, SourceConfig
from vlm_sft.errors import UserError


@dataclass(frozen=True)
class RecordCounts:
    """Number of records of a source that are available, or that are wanted.

    Attributes:
        plain: Records of the first kind; all of them if no `cannot_tell_share` is set.
        cannot_tell: Records with an answer that refuses or says that the image does not show it.
    """

    plain: int
    cannot_tell: int = 0

    @property
    def total(self) -> int:
        """Records of both kinds."""
        return self.plain + self.cannot_tell


def quotas(config: MixConfig, available: Mapping[str, RecordCounts]) -> dict[str, RecordCounts]:
    """Return how many records to take from each source; more than available are repeated.

    There are three pools: replay sources (`replay_share` of the mixture), records that cannot tell
    (`cannot_tell_share`, from every other source in proportion to what it has), and the rest, by
    the sources' counts and weights. A share that is None has no pool of its own.

    Args:
        config: The mixture.
        available: The usable records of each source; `cap` is not applied.

    Raises:
        UserError: More is wanted than there is and `when_short` is `error`, the counts exceed the
            total, or only some sources have a weight.
    """
    replay = [s for s in config.sources if s.replay and config.replay_share is not None]
    rest = [s for s in config.sources if s not in replay]
    plain = {name: counts.plain for name, counts in available.items()}
    share = (config.replay_share or 0) + (config.cannot_tell_share or 0)
    total = config.total
    room = None if total is None else total - round(total * share)
    found = _pool(rest, plain, room)
    if total is None:
        total = round(sum(found.values()) / (1 - share))
    replayed = _pool(replay, plain, round(total * (config.replay_share or 0)))
    wanted = round(total * share) - sum(replayed.values()) if config.cannot_tell_share else 0
    unsure = {s.name: available[s.name].cannot_tell for s in rest}
    if wanted and not sum(unsure.values()):
        raise UserError(
            f"cannot_tell_share: {wanted:,} records are wanted and no source has one; remove the "
            "share, add a source with such answers, or change cannot_tell_pattern"
        )
    unsure = by_weight(unsure, wanted)
    found |= replayed
    result = {s.name: RecordCounts(found[s.name], unsure.get(s.name, 0)) for s in config.sources}
    _require_enough(config, available, result)
    return result


def _pool(
    sources: Sequence[SourceConfig], available: Mapping[str, int], room: int | None
) -> dict[str, int]:
    """Return the counts, and what is left by weight; without a room, as many as no source lacks."""
    if not sources:
        return {}
    capped = {s.name: min(available[s.name], s.cap or available[s.name]) for s in sources}
    fixed = {s.name: s.count for s in sources if s.count is not None}
    weighted = [s for s in sources if s.count is None]
    without = [s.name for s in weighted if s.weight is None]
    if 0 < len(without) < len(weighted):
        raise UserError(
            f"sources: some have a weight and {', '.join(without)} neither weight nor count; give "
            "every such source a weight, or none"
        )
    weights = {s.name: s.weight or float(capped[s.name]) for s in weighted}
    total_weight = sum(weights.values())
    if room is None:
        left = min(
            (capped[n] * total_weight / weight for n, weight in weights.items() if weight),
            default=0,
        )
        return fixed | by_weight(weights, int(left + 1e-9))
    left = room - sum(fixed.values())
    if left < 0 or (left > 0 and not weighted):
        raise UserError(
            f"the counts of {', '.join(fixed)} add up to {sum(fixed.values()):,} and {room:,} "
            "records are wanted of them; change the counts, the total or the shares, or give "
            "weights instead of counts"
        )
    if left and not total_weight:
        raise UserError(
            f"more is wanted than there is: {left:,} records of {', '.join(weights)}, which have "
            "none that can be used"
        )
    return fixed | by_weight(weights, left)


def by_weight(weights: Mapping[str, float], number: int) -> dict[str, int]:
    """Distribute `number` in proportion to weights, by the largest-remainder method."""
    total = sum(weights.values())
    if not total:
        return dict.fromkeys(weights, 0)
    exact = {name: number * weight / total for name, weight in weights.items()}
    found = {name: int(value + 1e-9) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: found[name] - exact[name])
    for name in by_remainder[: number - sum(found.values())]:
        found[name] += 1
    return found


def _require_enough(
    config: MixConfig,
    available: Mapping[str, RecordCounts],
    wanted: Mapping[str, RecordCounts],
) -> None:
    total = sum(counts.total for counts in wanted.values())
    if total > MOST_RECORDS:
        raise UserError(
            f"sources: counts and shares give a mixture of {total:,} records, expected "
            f"{MOST_RECORDS:,} at most; lower the total, counts or shares"
        )
    short = []
    for source in config.sources:
        name, has, asked = source.name, available[source.name], wanted[source.name]
        plain = min(has.plain, source.cap or has.plain)
        can_repeat = plain > 0 and config.when_short == "upsample"
        if asked.plain > plain and not can_repeat:
            short.append(f"{asked.plain:,} of {name}, which has {plain:,}")
        if asked.cannot_tell > has.cannot_tell and config.when_short == "error":
            short.append(
                f"{asked.cannot_tell:,} answers of {name} of kind `cannot_tell`, which has "
                f"{has.cannot_tell:,}"
            )
    if short:
        raise UserError(
            f"more is wanted than there is: {'; '.join(short)}; lower the total, weight, count or "
            "share, or set `when_short: upsample` to repeat records"
        )
