"""How many replicas a pool should have, and which expert each should hold. Pure functions and a small state machine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, kw_only=True)
class Pace:
    """When a pool grows and shrinks.

    Attributes:
        busy: fraction of the time in forwards above which replicas count as loaded, if requests wait as well.
        waits: requests that wait, on average, above which the pool is not keeping up.
        spare: the same fraction below which, shared by one replica fewer, the load would still fit.
        grow_after: seconds of load before another replica is asked for.
        shrink_after: seconds without it before one goes.
    """

    busy: float = 0.9
    waits: float = 0.5
    spare: float = 0.7
    grow_after: float = 10.0
    shrink_after: float = 120.0


class Scaler:
    """Follows the load of a pool, between bounds that may move.

    Args:
        pace: when it acts.
    """

    def __init__(self, pace: Pace | None = None) -> None:
        self._pace = pace or Pace()
        self._target = 0
        self._loaded_since: float | None = None
        self._spare_since: float | None = None

    def target(self, now: float, *, least: int, most: int, busy: Sequence[float], waiting: float) -> int:
        """How many replicas there should be.

        Args:
            now: clock reading, seconds.
            least: at all times.
            most: at any time.
            busy: of each replica that serves, the fraction of the last seconds that it spent in forwards.
            waiting: requests that waited in them meanwhile, on average, over all replicas.
        """
        self._target = min(max(self._target, least), most)
        total, pace = sum(busy), self._pace
        # No more are asked for while what was asked for last is still on its way.
        loaded = len(busy) == self._target and waiting > pace.waits and total >= pace.busy * len(busy)
        spare = waiting <= pace.waits and self._target > 1 and total <= pace.spare * min(self._target - 1, len(busy))
        self._loaded_since = (now if self._loaded_since is None else self._loaded_since) if loaded else None
        self._spare_since = (now if self._spare_since is None else self._spare_since) if spare else None
        if self._loaded_since is not None and now - self._loaded_since >= pace.grow_after:
            self._target, self._loaded_since = min(self._target + 1, most), None
        elif self._spare_since is not None and now - self._spare_since >= pace.shrink_after:
            self._target, self._spare_since = max(self._target - 1, least), None
        return self._target


def assign(
    held: Mapping[str, tuple[str, ...]], wants: Sequence[str], each: int, experts: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Which experts each replica should hold, moving as few as possible.

    Every wanted expert gets a replica if there is room, and those wanted more often get more of them. What nobody
    wants stays where it is until its place is needed.

    Args:
        held: what each replica holds, in one order.
        wants: an entry for each client and expert that it asks.
        each: experts that a replica holds.
        experts: all there are, from noisy to clean.

    Returns:
        Replica to experts, in the order of ``held``.
    """
    counts = Counter(w for w in wants if w in experts)
    asked = sorted(counts, key=lambda e: (-counts[e], experts.index(e))) or [experts[0]]
    slots = len(held) * each
    # Largest remainders: one place for each expert while places last, the others by demand.
    share = {e: 1 for e in asked[:slots]}
    while sum(share.values()) < slots and len(share) * len(held) > sum(share.values()):
        open_to = [e for e in share if share[e] < len(held)]
        needy = max(open_to, key=lambda e: (max(counts[e], 1) / share[e], -experts.index(e)))
        share[needy] += 1
    result: dict[str, list[str]] = {name: [] for name in held}
    for name, has in held.items():  # first whoever has it keeps it
        for e in has:
            if share.get(e, 0) and len(result[name]) < each:
                result[name].append(e)
                share[e] -= 1
    for expert, places in share.items():
        for _ in range(places):
            free = [n for n in result if len(result[n]) < each and expert not in result[n]]
            if free:
                result[min(free, key=lambda n: len(result[n]))].append(expert)
    for name, has in held.items():  # what is left free keeps what it had
        result[name] += [e for e in has if e not in result[name]][: each - len(result[name])]
    return {name: tuple(sorted(has, key=experts.index)) for name, has in result.items()}
