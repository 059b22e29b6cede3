"""The driver's side of a pool of replicas: start, watch, close."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.exceptions import ActorDiedError, RayError

from raydmd.errors import PoolError
from raydmd.serving.pool_client import ClientSpec, ReplicaHandle, plain
from raydmd.serving.replica import Replica, ReplicaSettings, ReplicaStats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from raydmd.serving.engine import Engine

# Calls that may run in an actor beside the queued ones: pings, and refusals on their way out.
_SPARE_CALLS = 32
_SLICE = 1.0


@dataclass(frozen=True)
class PoolStats:
    """A look at all replicas.

    Attributes:
        replicas: what each reachable replica says, by name.
        unreachable: why a replica said nothing, by name.
    """

    replicas: dict[str, ReplicaStats]
    unreachable: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Replicas:
    """How many replicas a pool has and what each gets.

    Attributes:
        copies: how many.
        cpus: of each.
        gpus: of each; above 0 the model runs on one.
        resources: custom resources of each.
        threads: CPU threads of a forward.
        batch_items: samples in one forward.
        batch_wait: seconds a request waits for company.
    """

    copies: int
    cpus: float
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1
    batch_items: int = 64
    batch_wait: float = 0.003


class Pool:
    """Replicas of one frozen model. Owned by the process that started them; they end with it."""

    def __init__(self, spec: ClientSpec, asked: Replicas, clock: Callable[[], float]) -> None:
        """Take charge of replicas that load; :meth:`launch` and :meth:`start` make them.

        Args:
            spec: the replicas and how clients talk to them.
            asked: what each has been given.
            clock: seconds.
        """
        self._spec, self._asked, self._clock = spec, asked, clock
        self._open = True
        self._deadline = clock() + spec.start_timeout
        self._loading: dict[Any, ReplicaHandle] = {r.actor.ping.remote(): r for r in spec.replicas}
        self._last, self._late = "", False

    @classmethod
    def start(cls, asked: Replicas, build: Callable[[str], Engine], **settings: Any) -> Self:
        """:meth:`launch`, and wait until every replica has loaded and answered.

        Returns:
            The pool; close it, or use it as a context.

        Raises:
            PoolError: as :meth:`loaded` does. All replicas are ended then.
        """
        pool = cls.launch(asked, build, **settings)
        try:
            while not pool.loaded(patience=_SLICE):
                pass
        except BaseException:
            pool.close()
            raise
        return pool

    @classmethod
    def launch(
        cls,
        asked: Replicas,
        build: Callable[[str], Engine],
        *,
        name: str = "teacher",
        deterministic: bool = False,
        queue_limit: int = 256,
        start_timeout: float = 600.0,
        request_timeout: float = 600.0,
        attempt_timeout: float | None = None,
        max_retries: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Start the replicas; they load while other things start.

        Args:
            asked: how many replicas, what each gets, and its batch bounds.
            build: loads the frozen model onto a device; picklable. It runs in every replica, and again after a
                restart, so it must read from what a replica's node can reach.
            name: of the pool, for messages.
            deterministic: deterministic kernels, no batching across requests, routing by name.
            queue_limit: requests that may wait in a replica.
            start_timeout: seconds until all must have answered.
            request_timeout: seconds from submit to the deadline of a request.
            attempt_timeout: seconds after which a silent attempt is repeated elsewhere; default: a
                third of ``request_timeout``.
            max_retries: failed attempts after which a request gives up.
            clock: seconds.

        Returns:
            The pool; close it, or use it as a context. Ask :meth:`loaded` until it says yes.
        """
        actor = ray.remote(Replica)
        handles = []
        for i in range(asked.copies):
            settings = ReplicaSettings(
                name=f"{name}/{i}",
                device="cuda" if asked.gpus > 0 else "cpu",
                threads=asked.threads,
                batch_items=asked.batch_items,
                batch_wait=asked.batch_wait,
                queue_limit=queue_limit,
                deterministic=deterministic,
            )
            options = actor.options(
                num_cpus=asked.cpus,
                num_gpus=asked.gpus,
                resources=dict(asked.resources),
                # A dead replica comes back, its calls do not: clients resend within deadlines.
                max_restarts=-1,
                max_task_retries=0,
                max_concurrency=queue_limit + asked.batch_items + _SPARE_CALLS,
                scheduling_strategy="SPREAD",
            )
            handle = options.remote(build, settings)
            handles.append(ReplicaHandle(settings.name, handle))
        spec = ClientSpec(
            pool=name,
            replicas=tuple(handles),
            deterministic=deterministic,
            start_timeout=start_timeout,
            request_timeout=request_timeout,
            attempt_timeout=(request_timeout / 3 if attempt_timeout is None else attempt_timeout),
            max_retries=max_retries,
        )
        return cls(spec, asked, clock)

    def loaded(self, patience: float = 0.0, *, enough: int | None = None) -> bool:
        """Whether every replica has loaded and answered.

        Args:
            patience: seconds to wait for the next answer.
            enough: replicas that will do once ``start_timeout`` is over; default: all. The others may still come, and
                are said to be late once.

        Raises:
            PoolError: if a replica cannot load (with its own error), or fewer than ``enough`` did within
                ``start_timeout``.
        """
        if not self._loading:
            return True
        left = max(self._deadline - self._clock(), 0.0)
        ray.wait(list(self._loading), num_returns=1, timeout=min(left, patience))
        done, _ = ray.wait(list(self._loading), num_returns=len(self._loading), timeout=0)
        for ref in done:
            replica = self._loading.pop(ref)
            try:
                ray.get(ref, timeout=_SLICE)
            except ActorDiedError as error:
                text = plain(error)
                raise PoolError(
                    f"pool {self._spec.pool!r}: replica {replica.name!r} could not load: "
                    f"{text.splitlines()[-1]}\n{text}"
                ) from None
            except RayError as error:  # its process died while loading; Ray starts another
                self._last = plain(error)
                time.sleep(0.2)
                self._loading[replica.actor.ping.remote()] = replica
        if self._loading and not left and not self._late:
            names = sorted(r.name for r in self._loading.values())
            text = (
                f"pool {self._spec.pool!r}: {', '.join(names)} did not load within {self._spec.start_timeout:g} s. "
                f"Asked for {self._asked.copies} x {_demand(self._asked)}; the cluster has "
                f"{_cluster()}{f'; last error: {self._last}' if self._last else ''}"
            )
            if self._asked.copies - len(names) < (self._asked.copies if enough is None else enough):
                raise PoolError(text)
            self._late = True
            print(f"{text}. The run goes on without.", flush=True)
        return not self._loading

    def client_spec(self) -> ClientSpec:
        """What a worker needs to make a client: picklable, goes into the workers' configuration."""
        return self._spec

    def stats(self, timeout: float = 5.0) -> PoolStats:
        """Ask every replica how it is doing.

        Args:
            timeout: seconds for all of them together.

        Returns:
            What each said; a replica that says nothing is listed, not waited for.
        """
        refs = {r.actor.ping.remote(): r.name for r in self._spec.replicas}
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout)
        replicas: dict[str, ReplicaStats] = {}
        unreachable = {name: f"no answer within {timeout:g} s" for name in refs.values()}
        for ref in done:
            name = refs[ref]
            try:
                replicas[name] = ray.get(ref, timeout=timeout)
                del unreachable[name]
            except RayError as error:
                unreachable[name] = plain(error)
        return PoolStats(replicas, unreachable)

    def close(self) -> None:
        """End the replicas; may be called again."""
        if self._open:
            self._open = False
            for replica in self._spec.replicas:
                ray.kill(replica.actor, no_restart=True)

    def __enter__(self) -> Self:
        """The pool itself; leaving the block closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def _demand(asked: Replicas) -> dict[str, float]:
    return {k: v for k, v in {"CPU": asked.cpus, "GPU": asked.gpus, **asked.resources}.items() if v}


def _cluster() -> str:
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    rows = [f"{k} {free.get(k, 0):g} of {v:g}" for k, v in total.items() if ":" not in k]
    return f"free: {', '.join(rows)}"
