"""Curves of many runs, thinned for a page. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raydmd.comparing.runs import EVALUATION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.comparing.runs import Curve, Run

MOST = 500
"""Points of a curve."""
COUNTERS = ("cycles", "phase", "monitor/attempt", "time", f"{EVALUATION}clips", f"{EVALUATION}evaluations")
"""Metrics that only count."""


@dataclass
class Drawn:
    """Curves as a page has them.

    Attributes:
        metrics: by metric and run's place: cycles, and values.
        thinned: metrics of which not every point is here.
        not_finite: how many points were left out because they are no numbers.
    """

    metrics: dict[str, dict[int, tuple[list[int], list[float]]]] = field(default_factory=dict)
    thinned: list[str] = field(default_factory=list)
    not_finite: int = 0


def drawn(runs: Sequence[Run], *, most: int = MOST) -> Drawn:
    """The curves of all runs; figures of evaluations first, then by name.

    Args:
        runs: that are compared.
        most: points of a curve.
    """
    found = Drawn()
    names = {name for run in runs for name in run.curves} - set(COUNTERS)
    for name in sorted(names, key=lambda n: (not n.startswith(EVALUATION), n)):
        of_runs = {}
        for i, run in enumerate(runs):
            whole = run.curves.get(name, [])
            kept = [(x, y) for x, y in whole if math.isfinite(y)]
            found.not_finite += len(whole) - len(kept)
            less = thin(kept, most)
            # A server that thins by itself gives no more than as many.
            if (len(less) < len(kept) or len(whole) >= most) and name not in found.thinned:
                found.thinned.append(name)
            if less:
                of_runs[i] = [x for x, _ in less], [y for _, y in less]
        if of_runs:
            found.metrics[name] = of_runs
    return found


def thin(curve: Curve, most: int) -> Curve:
    """At most so many points: the ends, and the lowest and highest of each stretch between, so that spikes stay.

    Args:
        curve: values by cycle, rising.
        most: points, at least 4.
    """
    if len(curve) <= most:
        return list(curve)
    inner, stretches = curve[1:-1], (most - 2) // 2
    kept = {0: curve[0], len(curve) - 1: curve[-1]}
    for k in range(stretches):
        low, high = k * len(inner) // stretches, (k + 1) * len(inner) // stretches
        places = range(low, high)
        for place in (min(places, key=lambda i: inner[i][1]), max(places, key=lambda i: inner[i][1])):
            kept[place + 1] = inner[place]
    return [kept[i] for i in sorted(kept)]
