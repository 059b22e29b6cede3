"""What goes between the keeper of pools and those who use them."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import ray
from ray import cloudpickle

from raydmd import __version__
from raydmd.serving.health import Limits

if TYPE_CHECKING:
    from collections.abc import Mapping

    from raydmd.models.base import Routing
    from raydmd.serving.direct import Wire
    from raydmd.serving.engine import Build, Engine
    from raydmd.serving.replica import ReplicaStats

NAMESPACE = "raydmd"
ANYWHERE = "DEFAULT"
"""Ray's scheduling strategy of what must not run within its starter's placement group: that of a sweep's trial is
small, and ends with it."""
NAME = f"keeper-{__version__}"
"""Releases do not share keepers: one would run the other's code."""


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """How many replicas a pool has and what each gets.

    Attributes:
        copies: at least so many.
        most: at most so many, under load.
        cpus: of each.
        gpus: of each; above 0 the model runs on one.
        resources: custom resources of each.
        threads: CPU threads of a forward.
        batch_items: samples in one forward.
        batch_wait: seconds a request waits for company.
        each: experts that each holds, of a model that has several; 0 for all.
        wire: how large tensors come and go.
    """

    copies: int
    most: int = 0
    cpus: float
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1
    batch_items: int = 64
    batch_wait: float = 0.003
    each: int = 0
    wire: Wire = "plasma"


@dataclass(frozen=True)
class Packed:
    """A :data:`~raydmd.serving.engine.Build` that crosses the keeper without being unpacked, and its imports with it.

    Attributes:
        data: the pickle.
    """

    data: bytes

    @classmethod
    def of(cls, build: Build) -> Self:
        """Pack one."""
        return cls(cloudpickle.dumps(build))  # type: ignore[no-untyped-call]

    def __call__(self, device: str, experts: tuple[str, ...]) -> Engine:
        """Unpack and call it."""
        build: Build = cloudpickle.loads(self.data)
        return build(device, experts)


@dataclass(frozen=True, kw_only=True)
class Order:
    """A pool that somebody wants.

    Attributes:
        key: pools of one key are one pool.
        build: loads the frozen model. It runs in every replica, and again after a restart, so it must read from what
            a replica's node can reach.
        asked: how many replicas, what each gets, and its batch bounds.
        deterministic: deterministic kernels, no batching across requests.
        queue_limit: requests that may wait in a replica.
        routing: the model's experts, where each replica holds some of them.
    """

    key: str
    build: Packed
    asked: Replicas
    deterministic: bool = False
    queue_limit: int = 256
    routing: Routing | None = None


@dataclass(frozen=True, kw_only=True)
class ClientSpec:
    """All a worker needs to talk to a pool. Picklable inside the cluster.

    Attributes:
        pool: its key.
        holder: of the lease that the client works under.
        table: file of the condition table that requests are about.
        deterministic: route by request name.
        routing: the model's experts, where each replica holds some of them.
        wire: how large tensors come and go.
        start_timeout: seconds that a client's first request waits for replicas that are still loading.
        request_timeout: seconds from submit to a request's deadline.
        attempt_timeout: seconds after which a silent attempt is repeated elsewhere.
        max_retries: failed attempts after which a request gives up.
        limits: when opinions of a replica change.
    """

    pool: str
    holder: str
    table: str
    deterministic: bool
    routing: Routing | None
    wire: Wire
    start_timeout: float
    request_timeout: float
    attempt_timeout: float
    max_retries: int
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Members:
    """Replicas that may be asked.

    Attributes:
        version: changes when they do.
        replicas: name, Ray handle and experts (none: all) of each, in one order for all clients.
        broken: why there are none and will be none; empty while there may be.
        last_error: of any replica.
    """

    version: int
    replicas: tuple[tuple[str, Any, tuple[str, ...]], ...]
    broken: str
    last_error: str


@dataclass(frozen=True)
class ReplicaLook:
    """How a replica is doing.

    Attributes:
        stage: see :class:`~raydmd.serving.fleet.Stage`.
        experts: that it holds; empty for all.
        error: what became of it last, if that was bad.
        stats: what it last said.
        busy: fraction of the last seconds spent in forwards.
    """

    stage: str
    experts: tuple[str, ...]
    error: str
    stats: ReplicaStats | None
    busy: float


@dataclass(frozen=True)
class Look:
    """How a pool is doing.

    Attributes:
        key: of the pool.
        replicas: by name.
        holders: of leases.
        broken: see :class:`Members`.
        last_error: of any replica.
    """

    key: str
    replicas: dict[str, ReplicaLook]
    holders: tuple[str, ...]
    broken: str
    last_error: str


def key_of(kind: str, facts: Mapping[str, Any]) -> str:
    """A key, as of a pool: equal for equal facts, whatever process asks.

    Args:
        kind: what people call it, e.g. ``teacher-wan22-tiny``.
        facts: all that decides what it gives and how, as JSON knows it.

    Returns:
        The kind and a digest.
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    return f"{kind}-{hashlib.blake2b(text.encode(), digest_size=5).hexdigest()}"


def find_keeper() -> Any:
    """The cluster's keeper of pools.

    Raises:
        ValueError: if there is none.
    """
    return ray.get_actor(NAME, namespace=NAMESPACE)


def plain(error: Exception) -> str:
    """An error's text without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
