"""How many records of which source: counts, weights and shares made into numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_tools.mix.config import MOST_RECORDS, MixConfig, SourceConfig
from vlm_sft.errors import UserError


@dataclass(frozen=True)
class Available:
    """What a source has after everything unusable is left out; `cap` is not applied.

    Attributes:
        plain: Records that are not of the second kind.
        cannot_tell: Records with an answer of kind `cannot_tell`; 0 where no share of them
            is wanted, since all count as plain then.
    """

    plain: int
    cannot_tell: int = 0


@dataclass(frozen=True)
class Quota:
    """What is taken of a source; more than it has means that records are repeated."""

    plain: int
    cannot_tell: int = 0


def quotas(config: MixConfig, available: Mapping[str, Available]) -> dict[str, Quota]:
    """What to take of each source.

    Records come from three pools: replay sources (`replay_share` of the mixture), records that
    say that the image does not show it (`cannot_tell_share`, from every other source in proportion
    to its number of them), and the rest, by the sources' counts and weights. A share that is None
    has no pool of its own.

    Raises:
        UserError: More is wanted than there is and `when_short` is `error`, the counts exceed the
            total, or only some sources have a weight.
    """
    replay = [s for s in config.sources if s.replay and config.replay_share is not None]
    rest = [s for s in config.sources if s not in replay]
    share = (config.replay_share or 0) + (config.cannot_tell_share or 0)
    total = config.total
    room = None if total is None else total - _of(total, share)
    plain = _pool(rest, {s.name: available[s.name].plain for s in rest}, room)
    if total is None:
        total = round(sum(plain.values()) / (1 - share))
    replayed = _pool(
        replay,
        {s.name: available[s.name].plain for s in replay},
        _of(total, config.replay_share or 0),
    )
    unsure = _in_proportion(
        {s.name: available[s.name].cannot_tell for s in rest},
        _of(total, share) - sum(replayed.values()) if config.cannot_tell_share else 0,
    )
    found = {
        s.name: Quota({**plain, **replayed}[s.name], unsure.get(s.name, 0)) for s in config.sources
    }
    _require_enough(config, available, found)
    return found


def _of(total: int, share: float) -> int:
    return round(total * share)


def _pool(
    sources: Sequence[SourceConfig], available: Mapping[str, int], room: int | None
) -> dict[str, int]:
    """Counts first, what is left by weight; without a room, as much as no source runs short of."""
    if not sources:
        return {}
    capped = {s.name: min(available[s.name], s.cap or available[s.name]) for s in sources}
    fixed = {s.name: s.count for s in sources if s.count is not None}
    weighted = [s for s in sources if s.count is None]
    given = [s for s in weighted if s.weight is not None]
    if given and len(given) < len(weighted):
        names = ", ".join(s.name for s in weighted if s.weight is None)
        raise UserError(
            f"sources: some have a weight and {names} neither weight nor count; give every such "
            "source a weight, or none"
        )
    weights = {s.name: s.weight or float(capped[s.name]) for s in weighted}
    total_weight = sum(weights.values())
    if room is None:
        left = min(
            (capped[n] * total_weight / weight for n, weight in weights.items() if weight),
            default=0,
        )
        return fixed | _by_weight(weights, int(left + 1e-9))
    left = room - sum(fixed.values())
    if left < 0 or (left > 0 and not weighted):
        raise UserError(
            f"the counts of {', '.join(fixed)} add up to {sum(fixed.values()):,} and {room:,} "
            "records are wanted of them; change the counts, the total or the shares, or give "
            "weights in place of counts"
        )
    if left and not total_weight:
        raise UserError(
            f"more is wanted than there is: {left:,} records of {', '.join(weights)}, which have "
            "none that can be used"
        )
    return fixed | _by_weight(weights, left)


def _by_weight(weights: Mapping[str, float], number: int) -> dict[str, int]:
    """`number` in these proportions, the largest remainders rounded up."""
    total = sum(weights.values())
    if not total:
        return dict.fromkeys(weights, 0)
    exact = {name: number * weight / total for name, weight in weights.items()}
    found = {name: int(value + 1e-9) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: found[name] - exact[name])
    for name in by_remainder[: number - sum(found.values())]:
        found[name] += 1
    return found


def _in_proportion(available: Mapping[str, int], number: int) -> dict[str, int]:
    if number and not sum(available.values()):
        raise UserError(
            f"cannot_tell_share: {number:,} records are wanted and no source has one; leave the "
            "share out, add a source with such answers, or change cannot_tell_pattern"
        )
    return _by_weight(available, number)


def _require_enough(
    config: MixConfig, available: Mapping[str, Available], found: Mapping[str, Quota]
) -> None:
    wanted_of_all = sum(quota.plain + quota.cannot_tell for quota in found.values())
    if wanted_of_all > MOST_RECORDS:
        raise UserError(
            f"sources: counts and shares give a mixture of {wanted_of_all:,} records, expected "
            f"{MOST_RECORDS:,} at most; lower the total, counts or shares"
        )
    short = []
    for source in config.sources:
        has, wanted = available[source.name], found[source.name]
        plain = min(has.plain, source.cap or has.plain)
        if plain and wanted.plain > plain and config.when_short == "upsample":
            continue  # reported in the table
        if wanted.plain > plain:
            short.append(f"{wanted.plain:,} of {source.name}, which has {plain:,}")
        if wanted.cannot_tell > has.cannot_tell and config.when_short == "error":
            short.append(
                f"{wanted.cannot_tell:,} answers of {source.name} of kind `cannot_tell`, which has "
                f"{has.cannot_tell:,}"
            )
    if short:
        raise UserError(
            f"more is wanted than there is: {'; '.join(short)}; lower the total, weight, count or "
            "share, or set `when_short: upsample` to repeat records"
        )
