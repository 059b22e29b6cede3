"""Which replica gets a request. Pure functions of what the client knows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A replica as the router sees it.

    Attributes:
        name: of the replica.
        tier: from :meth:`raydmd.serving.health.Health.tier`; ``None`` is never chosen.
        outstanding: this client's unanswered requests at it.
    """

    name: str
    tier: int | None
    outstanding: int = 0


def stable_hash(text: str) -> int:
    """A 64 bit hash that is the same in every process, unlike ``hash``."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def choose(candidates: Sequence[Candidate], *, request: str, turn: int, deterministic: bool) -> str | None:
    """The replica for a request.

    A run's workers ask in step, and what each knows of its own requests is the same for all. They spread because each
    goes round from a place of its own by the number of the request, whatever became of the ones before.

    Args:
        candidates: all replicas, in one order for all clients.
        request: its name.
        turn: the client's place and how many requests it made before.
        deterministic: choose by the request's name alone among the usable replicas of the best tier
            (rendezvous hashing, so the loss of a replica moves no request of another one); else the
            fewest outstanding, then the next in turn.

    Returns:
        Its name, or ``None`` if no replica is usable.
    """
    tiers = [c.tier for c in candidates if c.tier is not None]
    if not tiers:
        return None
    best = [c for c in candidates if c.tier == min(tiers)]
    if deterministic:
        return max((stable_hash(f"{request}\0{c.name}"), c.name) for c in best)[1]
    first = turn % len(best)
    return min(best[first:] + best[:first], key=lambda c: c.outstanding).name


def seat(run: str, share: int) -> int:
    """Where a client begins: those of a run one after the other, from a place of the run's own."""
    return stable_hash(run) + share
