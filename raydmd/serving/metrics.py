"""A replica's figures for Prometheus, by way of Ray, which exports what every node's processes count."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping

SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
ITEMS = [1.5, 2.5, 4.5, 8.5, 16.5, 32.5, 64.5, 128.5, 256.5]


class Metrics:
    """What a replica exports; names begin with ``ray_raydmd_`` in Prometheus.

    Args:
        pool: the replica's.
        replica: its name.
    """

    def __init__(self, pool: str, replica: str) -> None:
        self._tags = {"pool": pool, "replica": replica}
        here, by = ("pool", "replica"), ("pool", "replica", "trial")
        self._queue = Gauge("raydmd_queue", "Requests that wait in a replica.", here)
        self._busy = Gauge("raydmd_busy_seconds", "Seconds a replica has spent in forwards.", here)
        self._batch = Histogram("raydmd_batch_items", "Samples in a forward.", ITEMS, here)
        self._forward = Histogram("raydmd_forward_seconds", "Time of a forward.", SECONDS, here)
        self._latency = Histogram(
            "raydmd_latency_seconds", "Longest time of a batch's requests in a replica.", SECONDS, by
        )
        self._items = Counter("raydmd_items", "Samples answered.", by)
        self._failed = Counter("raydmd_failed", "Requests that ended in an error.", by)
        self._refused = Counter("raydmd_refused", "Requests that a full queue turned away.", by)

    def ran(self, trials: Mapping[str, tuple[int, float]], seconds: float, queue: int, busy: float) -> None:
        """A forward is over. Called once for a batch, since each figure costs as much as a small request.

        Args:
            trials: samples answered, and the longest time from a request's arrival to its answer, by run.
            seconds: that the forward took.
            queue: requests that wait now.
            busy: seconds spent in forwards so far.
        """
        items = sum(answered for answered, _ in trials.values())
        self._batch.observe(items, self._tags)
        self._forward.observe(max(seconds, 1e-9), self._tags)
        self._queue.set(queue, self._tags)
        self._busy.set(busy, self._tags)
        for name, (answered, longest) in trials.items():
            tags = {**self._tags, "trial": name}
            if answered:
                self._items.inc(answered, tags)
            self._latency.observe(max(longest, 1e-9), tags)

    def failed(self, trial: str) -> None:
        """A request of a run ended in an error."""
        self._failed.inc(1, {**self._tags, "trial": trial})

    def refused(self, trial: str, queue: int) -> None:
        """A request of a run found the queue full."""
        self._refused.inc(1, {**self._tags, "trial": trial})
        self._queue.set(queue, self._tags)
