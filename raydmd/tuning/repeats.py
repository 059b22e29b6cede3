"""Settings that are run several times, with training seeds of their own, and count by their mean. Pure."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.tuning.rows import Row

SEED = "seed"
"""The recipe's key that tells repeats apart."""


def merged(rows: Sequence[Row], repeats: int) -> list[Row]:
    """One row for each setting, called after its first trial; lost trials are left out.

    Its values are the means of its trials once all of them have finished: fewer would favour the lucky.

    Args:
        rows: trials.
        repeats: of each setting.
    """
    living = [row for row in rows if row.state != "lost"]
    if repeats == 1:
        return living
    groups: dict[int, list[Row]] = {}
    for row in living:
        groups.setdefault(row.root if row.of is None else row.of, []).append(row)
    return [_mean(sorted(group, key=lambda row: row.root), repeats) for group in groups.values()]


def _mean(group: list[Row], repeats: int) -> Row:
    first = group[0]
    states = [row.state for row in group]
    state = next(s for s in ("running", "waiting", "stopped early", "failed", "finished") if s in states)
    done = [row for row in group if row.values]
    whole = len(done) >= repeats
    if not whole and state == "finished":
        state = "waiting"
    values = {k: statistics.mean(row.values[k] for row in done) for k in first.values} if whole else {}
    return replace(
        first,
        state=state,
        changes={k: v for k, v in first.changes.items() if k != SEED},
        values=values,
        spread={k: statistics.stdev(row.values[k] for row in done) for k in values},
        runs=tuple(row.root for row in group),
        error="; ".join(row.error for row in group if row.error),
    )
