"""The micro-batcher: requests in, batches out. Pure: no Ray, no asyncio, the caller owns the clock.

A bucket holds requests that can share a forward. Inside a bucket clients take turns, one request
each, and ready buckets take turns too, so a client that floods a replica delays the others by one
batch of each bucket at most. The queue is bounded: a full one refuses, in its return value, all but
those who have less than their share of it, so that it holds at most twice its bound.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Key:
    """What requests of one forward have in common.

    Attributes:
        expert: which expert serves them.
        latent: shape of one latent, without the batch.
        guidance: guidance scale.
        kind: what else must be alike, e.g. the times of a walk.
        table: of conditions.
    """

    expert: str
    latent: tuple[int, ...]
    guidance: float
    kind: tuple[float, ...] | str = ""
    table: str = ""


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One queued request.

    Attributes:
        client: who asked.
        items: samples in it.
        payload: the caller's own record.
        arrived: clock reading at its offer, seconds.
    """

    client: str
    items: int
    payload: T
    arrived: float


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request is queued.

    Attributes:
        queued: requests now waiting, this one included.
    """

    queued: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The queue is full and the request was not taken.

    Attributes:
        queued: requests waiting, which is the bound.
    """

    queued: int


LOOK = 64
"""How far back in a client's line a request is looked for that fills a batch."""


class _Bucket(Generic[T]):
    """Requests of one key, a line per client; the client at the front is next."""

    def __init__(self) -> None:
        self.lines: OrderedDict[str, deque[Entry[T]]] = OrderedDict()
        self.items = 0

    def add(self, entry: Entry[T]) -> None:
        self.lines.setdefault(entry.client, deque()).append(entry)
        self.items += entry.items

    @property
    def oldest(self) -> float:
        return min(line[0].arrived for line in self.lines.values())

    def pull(self, max_items: int, max_requests: int | None) -> list[Entry[T]]:
        batch: list[Entry[T]] = []
        room = max_items
        passed: set[str] = set()
        while room > 0 and len(passed) < len(self.lines) and (max_requests is None or len(batch) < max_requests):
            client, line = next((c, q) for c, q in self.lines.items() if c not in passed)
            # An oversized request goes alone. One that does not fit lets others fill this batch, and stays in front:
            # it is the first of the next one, so nothing starves.
            if batch and line[0].items > room:
                passed.add(client)
                continue
            entry = line.popleft()
            batch.append(entry)
            room -= entry.items
            self.items -= entry.items
            if line:
                self.lines.move_to_end(client)
            else:
                del self.lines[client]
        if batch and max_requests is None:
            batch += self._fill(room)
        return batch

    def _fill(self, room: int) -> list[Entry[T]]:
        """Requests further back that still fit, where the first of each client do not."""
        found: list[Entry[T]] = []
        for line in self.lines.values():  # none of them is emptied: its first one did not fit
            at = 1
            while room > 0 and at < min(len(line), LOOK):
                entry = line[at]
                if entry.items > room:
                    at += 1
                    continue
                del line[at]
                found.append(entry)
                room -= entry.items
                self.items -= entry.items
        return found


class Batcher(Generic[T]):
    """Groups requests into batches of at most ``max_items`` samples."""

    def __init__(self, *, max_items: int, max_wait: float, max_queue: int, exact: bool = False) -> None:
        """Make an empty batcher.

        Args:
            max_items: samples in a batch; a larger request is a batch of its own, never split.
            max_wait: seconds a request waits for company.
            max_queue: requests that may wait; more are refused.
            exact: every request is its own batch at once. The company a sample has in a forward may
                change its last bits, so bit-identical runs need this.

        Raises:
            ValueError: if a bound is not positive, or the wait negative.
        """
        if max_items < 1 or max_queue < 1 or max_wait < 0:
            raise ValueError(
                f"batcher bounds: {max_items=} and {max_queue=} must be positive, {max_wait=} not negative"
            )
        self._max_items = max_items
        self._max_wait = max_wait
        self._max_queue = max_queue
        self._exact = exact
        self._buckets: OrderedDict[Key, _Bucket[T]] = OrderedDict()
        self._queued = 0
        self._of: Counter[str] = Counter()

    def __len__(self) -> int:
        """Requests waiting."""
        return self._queued

    def offer(self, key: Key, client: str, items: int, payload: T, now: float) -> Accepted | Refused:
        """Queue a request, or refuse it when the queue is full and its client has its share of it.

        Args:
            key: what it may share a forward with.
            client: who asks; clients of a bucket take turns.
            items: samples in it, at least 1.
            payload: handed back by :meth:`take`.
            now: clock reading, seconds.

        Returns:
            Whether it was taken, and how many requests wait.

        Raises:
            ValueError: if the request has no samples.
        """
        if items < 1:
            raise ValueError(f"a request of client {client!r} has {items} samples")
        if self._queued >= self._max_queue and not self._owed(client):
            return Refused(self._queued)
        self._of[client] += 1
        bucket = self._buckets.setdefault(key, _Bucket())
        bucket.add(Entry(client, items, payload, now))
        self._queued += 1
        return Accepted(self._queued)

    def take(self, now: float) -> list[Entry[T]] | None:
        """The next batch that is full or has waited long enough; ``None`` if none is ready.

        Args:
            now: clock reading, seconds.

        Returns:
            Entries of one key, in the order they are to be run.
        """
        for key, due in self._due():
            if due <= now:
                bucket = self._buckets[key]
                batch = bucket.pull(self._max_items, 1 if self._exact else None)
                self._queued -= len(batch)
                self._of -= Counter(entry.client for entry in batch)
                if bucket.lines:
                    self._buckets.move_to_end(key)
                else:
                    del self._buckets[key]
                return batch
        return None

    def next_due(self) -> float | None:
        """When :meth:`take` has a batch without new arrivals, seconds; ``None`` if empty."""
        return min((due for _, due in self._due()), default=None)

    def _owed(self, client: str) -> bool:
        """Whether a client has less than its share of a full queue, which others have filled."""
        return self._of[client] < self._max_queue // (len(self._of) + (client not in self._of))

    def _due(self) -> Iterator[tuple[Key, float]]:
        for key, bucket in self._buckets.items():
            at_once = self._exact or bucket.items >= self._max_items
            yield key, bucket.oldest if at_once else bucket.oldest + self._max_wait
