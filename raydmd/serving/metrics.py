"""A replica's figures for Prometheus, by way of Ray, which exports what every node's processes count."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

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
        self._latency = Histogram("raydmd_latency_seconds", "Time of a request in a replica.", SECONDS, by)
        self._items = Counter("raydmd_items", "Samples answered.", by)
        self._failed = Counter("raydmd_failed", "Requests that ended in an error.", by)
        self._refused = Counter("raydmd_refused", "Requests that a full queue turned away.", by)

    def ran(self, items: int, seconds: float, queue: int, busy: float) -> None:
        """A forward is over.

        Args:
            items: samples in it.
            seconds: that it took.
            queue: requests that wait now.
            busy: seconds spent in forwards so far.
        """
        self._batch.observe(items, self._tags)
        self._forward.observe(max(seconds, 1e-9), self._tags)
        self._queue.set(queue, self._tags)
        self._busy.set(busy, self._tags)

    def answered(self, client: str, items: int, seconds: float) -> None:
        """A request of ``client`` has its answer, ``seconds`` after it came."""
        tags = {**self._tags, "trial": trial(client)}
        self._items.inc(items, tags)
        self._latency.observe(max(seconds, 1e-9), tags)

    def failed(self, client: str) -> None:
        """A request of ``client`` ended in an error."""
        self._failed.inc(1, {**self._tags, "trial": trial(client)})

    def refused(self, client: str, queue: int) -> None:
        """A request of ``client`` found the queue full."""
        self._refused.inc(1, {**self._tags, "trial": trial(client)})
        self._queue.set(queue, self._tags)


def trial(client: str) -> str:
    """The run that a client belongs to: ``run/rank0`` is run's."""
    return client.rpartition("/")[0] or client
