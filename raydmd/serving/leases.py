"""Who uses which pool, and until when. Pure: the caller owns the clock.

A pool lives as long as somebody holds a lease of it. A lease that nobody renews runs out, so that a holder which
died without a word keeps nothing alive.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Lease:
    """One holder's claim to a pool.

    Attributes:
        name: of the lease.
        pool: key of the pool.
        holder: who holds it, e.g. a run's name.
        least: replicas the holder wants at all times.
        most: replicas it allows under load.
        ends: clock reading at which it runs out, seconds.
        wants: experts that each of the holder's clients asks now, by client.
    """

    name: str
    pool: str
    holder: str
    least: int
    most: int
    ends: float
    wants: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Leases:
    """All leases.

    Args:
        ttl: seconds that a lease lasts unless it is renewed.
        mark: tells these leases from those of an earlier process.
    """

    def __init__(self, ttl: float, mark: str = "") -> None:
        if ttl <= 0:
            raise ValueError(f"a lease of {ttl:g} s is none")
        self._ttl, self._mark, self._count = ttl, mark, 0
        self._leases: dict[str, Lease] = {}

    def __len__(self) -> int:
        """How many are held."""
        return len(self._leases)

    def take(self, pool: str, holder: str, now: float, *, least: int = 1, most: int = 1) -> Lease:
        """A new lease of a pool; see :class:`Lease` for the arguments."""
        self._count += 1
        name = f"{holder}#{self._count}{self._mark}"
        lease = Lease(name, pool, holder, least, max(least, most), now + self._ttl)
        self._leases[name] = lease
        return lease

    def get(self, name: str) -> Lease | None:
        """The lease of a name, while it is held."""
        return self._leases.get(name)

    def renew(self, name: str, now: float) -> bool:
        """Extend a lease; false if it has run out, and its holder must take a new one."""
        lease = self._leases.get(name)
        if lease is None:
            return False
        lease.ends = now + self._ttl
        return True

    def drop(self, name: str) -> None:
        """Give a lease back; one that is not held is no error."""
        self._leases.pop(name, None)

    def expire(self, now: float) -> list[Lease]:
        """Drop and return the leases that have run out."""
        over = [lease for lease in self._leases.values() if lease.ends <= now]
        for lease in over:
            del self._leases[lease.name]
        return over

    def of(self, pool: str) -> list[Lease]:
        """Those of a pool, the oldest first."""
        return [lease for lease in self._leases.values() if lease.pool == pool]
