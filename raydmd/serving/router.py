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
        sent: requests this client ever sent it.
    """

    name: str
    tier: int | None
    outstanding: int = 0
    sent: int = 0


def stable_hash(text: str) -> int:
    """A 64 bit hash that is the same in every process, unlike ``hash``."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def choose(candidates: Sequence[Candidate], *, request: str, client: str, deterministic: bool) -> str | None:
    """The replica for a request.

    Args:
        candidates: all replicas, in one order for all clients.
        request: its name.
        client: who asks; clients break ties differently, so that their first requests spread.
        deterministic: choose by the request's name alone among the usable replicas of the best tier
            (rendezvous hashing, so the loss of a replica moves no request of another one); else the
            fewest outstanding, then the fewest sent.

    Returns:
        Its name, or ``None`` if no replica is usable.
    """
    tiers = [c.tier for c in candidates if c.tier is not None]
    if not tiers:
        return None
    best = [(i, c) for i, c in enumerate(candidates) if c.tier == min(tiers)]
    if deterministic:
        return max((stable_hash(f"{request}\0{c.name}"), c.name) for _, c in best)[1]
    offset = stable_hash(client) % len(candidates)

    def load(pair: tuple[int, Candidate]) -> tuple[int, int, int]:
        index, c = pair
        return c.outstanding, c.sent, (index - offset) % len(candidates)

    return min(best, key=load)[1].name
