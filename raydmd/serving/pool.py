"""The driver's side of a pool of teacher replicas: start, watch, close."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.exceptions import ActorDiedError, RayError

from raydmd.errors import PoolError
from raydmd.serving.pool_client import ClientSpec, ReplicaHandle, plain
from raydmd.serving.replica import ReplicaSettings, ReplicaStats, TeacherReplica

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from raydmd.models.base import Experts
    from raydmd.recipe import Placement

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


class TeacherPool:
    """Replicas of one frozen teacher. Owned by the process that started them; they end with it."""

    def __init__(self, spec: ClientSpec) -> None:
        """Take charge of running replicas; :meth:`start` makes them.

        Args:
            spec: the replicas and how clients talk to them.
        """
        self._spec = spec
        self._open = True

    @classmethod
    def start(
        cls,
        placement: Placement,
        build: Callable[[], Experts],
        conditions_file: str,
        *,
        name: str = "teacher",
        deterministic: bool = False,
        sample_shape: tuple[int, ...] | None = None,
        queue_limit: int = 256,
        start_timeout: float = 600.0,
        request_timeout: float = 600.0,
        attempt_timeout: float | None = None,
        max_retries: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Start the replicas and wait until each has loaded and answered.

        Args:
            placement: how many replicas, what each gets, and its batch bounds.
            build: loads the frozen teacher; picklable. It runs in every replica, and again after a
                restart, so it must read from what a replica's node can reach.
            conditions_file: safetensors with ``embeds``, reachable from the replicas' nodes.
            name: of the pool, for messages.
            deterministic: deterministic kernels, no batching across requests, routing by name.
            sample_shape: shape of one latent, for a warm-up; ``None`` skips it.
            queue_limit: requests that may wait in a replica.
            start_timeout: seconds until all must have answered.
            request_timeout: seconds from submit to the deadline of a request.
            attempt_timeout: seconds after which a silent attempt is repeated elsewhere; default: a
                third of ``request_timeout``.
            max_retries: failed attempts after which a request gives up.
            clock: seconds.

        Returns:
            The pool; close it, or use it as a context.

        Raises:
            PoolError: if a replica cannot load (with its own error) or does not answer in time. All
                replicas are ended then.
        """
        actor = ray.remote(TeacherReplica)
        handles = []
        for i in range(placement.teachers):
            settings = ReplicaSettings(
                name=f"{name}/{i}",
                device="cuda" if placement.teacher_gpus > 0 else "cpu",
                threads=placement.threads,
                batch_items=placement.batch_items,
                batch_wait=placement.batch_wait,
                queue_limit=queue_limit,
                deterministic=deterministic,
                sample_shape=sample_shape,
            )
            options = actor.options(
                num_cpus=placement.teacher_cpus,
                num_gpus=placement.teacher_gpus,
                resources=dict(placement.teacher_resources),
                # A dead replica comes back, its calls do not: clients resend within deadlines.
                max_restarts=-1,
                max_task_retries=0,
                max_concurrency=queue_limit + placement.batch_items + _SPARE_CALLS,
                scheduling_strategy="SPREAD",
            )
            handle = options.remote(build, conditions_file, settings)
            handles.append(ReplicaHandle(settings.name, handle))
        pool = cls(
            ClientSpec(
                pool=name,
                replicas=tuple(handles),
                deterministic=deterministic,
                request_timeout=request_timeout,
                attempt_timeout=(request_timeout / 3 if attempt_timeout is None else attempt_timeout),
                max_retries=max_retries,
            )
        )
        try:
            pool._await_all(start_timeout, placement, clock)
        except BaseException:
            pool.close()
            raise
        return pool

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

    def _await_all(self, timeout: float, placement: Placement, clock: Callable[[], float]) -> None:
        deadline = clock() + timeout
        waiting: dict[Any, ReplicaHandle] = {r.actor.ping.remote(): r for r in self._spec.replicas}
        last = ""
        while waiting:
            left = deadline - clock()
            if left <= 0:
                names = sorted(r.name for r in waiting.values())
                raise PoolError(
                    f"pool {self._spec.pool!r}: {', '.join(names)} did not load within "
                    f"{timeout:g} s. "
                    f"Asked for {placement.teachers} x {_asked(placement)}; the cluster has "
                    f"{_cluster()}{f'; last error: {last}' if last else ''}"
                )
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=min(left, _SLICE))
            for ref in done:
                replica = waiting.pop(ref)
                try:
                    ray.get(ref, timeout=_SLICE)
                except ActorDiedError as error:
                    text = plain(error)
                    raise PoolError(
                        f"pool {self._spec.pool!r}: replica {replica.name!r} could not load: "
                        f"{text.splitlines()[-1]}\n{text}"
                    ) from None
                except RayError as error:  # its process died while loading; Ray starts another
                    last = plain(error)
                    time.sleep(0.2)
                    waiting[replica.actor.ping.remote()] = replica


def _asked(placement: Placement) -> dict[str, float]:
    asked = {"CPU": placement.teacher_cpus, "GPU": placement.teacher_gpus}
    return {k: v for k, v in {**asked, **placement.teacher_resources}.items() if v}


def _cluster() -> str:
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    rows = [f"{k} {free.get(k, 0):g} of {v:g}" for k, v in total.items() if ":" not in k]
    return f"free: {', '.join(rows)}"
