"""The driver's side of a pool of replicas: hold a lease, watch, give it back."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayError

from raydmd.errors import PoolError
from raydmd.serving.attendance import Attendance, News
from raydmd.serving.keeper import TTL, Keeper
from raydmd.serving.order import ANYWHERE, NAME, NAMESPACE, ClientSpec, find_keeper, plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from raydmd.serving.order import Look, Members, Order, Replicas
    from raydmd.serving.replica import ReplicaStats

_CALL = 30.0
"""Seconds that the keeper has to answer."""
_NEWS = 3.0
"""Seconds that it has where nobody waits for more than news."""
_CALLS = 1000
"""Calls that may wait for news at the keeper: a few per client."""


@dataclass(frozen=True)
class PoolStats:
    """A look at all replicas.

    Attributes:
        replicas: what each reachable replica says, by name.
        unreachable: why a replica said nothing, by name.
    """

    replicas: dict[str, ReplicaStats]
    unreachable: dict[str, str]


class Pool:
    """A lease of a pool, renewed as long as this object is open. Whoever dies with one loses it after a while.

    Args:
        order: what is wanted; whoever holds a pool of the same key already shares it.
        holder: who wants it, e.g. the run's name.
        start_timeout: seconds until all replicas must have loaded.
        request_timeout: seconds from submit to the deadline of a request.
        attempt_timeout: seconds after which a silent attempt is repeated elsewhere; default: a third of
            ``request_timeout``.
        max_retries: failed attempts after which a request gives up.
        table: file of the condition table that the holder's requests are about.
        clock: seconds.

    Raises:
        PoolError: if the cluster gives no keeper.
    """

    def __init__(
        self,
        order: Order,
        holder: str,
        *,
        start_timeout: float = 600.0,
        request_timeout: float = 600.0,
        attempt_timeout: float | None = None,
        max_retries: int = 8,
        table: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Its own, since two users' runs may have one name.
        self._order, self._holder, self._clock = order, f"{holder}-{uuid.uuid4().hex[:6]}", clock
        self._spec = ClientSpec(
            pool=order.key,
            holder=self._holder,
            table=table,
            deterministic=order.deterministic,
            routing=order.routing,
            wire=order.asked.wire,
            start_timeout=start_timeout,
            request_timeout=request_timeout,
            attempt_timeout=request_timeout / 3 if attempt_timeout is None else attempt_timeout,
            max_retries=max_retries,
        )
        self._deadline = clock() + start_timeout
        self._late = self._ready = False
        self._attendance = Attendance()
        self._closed = threading.Event()
        self._lease = self._take()
        self._renewer = threading.Thread(target=self._renew, name=f"lease of {order.key}", daemon=True)
        self._renewer.start()

    @classmethod
    def start(cls, order: Order, holder: str, **settings: Any) -> Self:
        """A pool all of whose replicas have loaded.

        Raises:
            PoolError: as :meth:`loaded` does; the lease is given back then.
        """
        pool = cls(order, holder, **settings)
        try:
            pool.wait()
        except BaseException:
            pool.close()
            raise
        return pool

    def wait(self) -> None:
        """Wait until every replica has loaded.

        Raises:
            PoolError: as :meth:`loaded` does.
        """
        ready = False
        while not ready:
            ready = self.loaded(patience=1.0)

    @property
    def key(self) -> str:
        """The pool's key."""
        return self._order.key

    def loaded(self, patience: float = 0.0, *, enough: int | None = None) -> bool:
        """Whether every replica has loaded and answered.

        Args:
            patience: seconds to wait.
            enough: replicas that will do once ``start_timeout`` is over; default: all. The others may still come, and
                are said to be late once.

        Raises:
            PoolError: if no replica can load (with its own error), or fewer than ``enough`` did within
                ``start_timeout``.
        """
        until = self._clock() + patience
        while not self._ready:
            look = self.look()
            if look is not None and look.broken:
                short = look.broken.splitlines()[-1]
                raise PoolError(f"pool {self.key!r}: no replica could load: {short}\n{look.broken}")
            wanted = self._order.asked.copies
            here = 0 if look is None else sum(r.stage in ("ready", "moving") for r in look.replicas.values())
            self._ready = here >= wanted
            if not self._ready and self._clock() >= self._deadline:
                self._say_late(look, here, wanted if enough is None else enough)
                break
            if self._ready or self._clock() >= until:
                break
            time.sleep(0.1)
        return self._ready

    def client_spec(self) -> ClientSpec:
        """What a worker needs to make a client: picklable, goes into the workers' configuration."""
        return self._spec

    def look(self, timeout: float = _CALL) -> Look | None:
        """How the keeper sees the pool; ``None`` while there is none, or none that answers within so many seconds."""
        with contextlib.suppress(RayError, ValueError):
            look: Look | None = ray.get(find_keeper().renew.remote(self._lease), timeout=timeout)
            return look
        return None

    def news(self) -> list[News]:
        """Replicas that came to harm since this was last asked, and those that are back; takes seconds at most."""
        return self._attendance.news(self.look(_NEWS))

    def stats(self, timeout: float = 5.0) -> PoolStats:
        """Ask every replica that serves how it is doing, now.

        Args:
            timeout: seconds for all of them together.

        Returns:
            What each said; a replica that says nothing is listed, not waited for.
        """
        look = self.look()
        unreachable = {n: r.error or r.stage for n, r in look.replicas.items()} if look else {}
        members: Members | None = None
        with contextlib.suppress(RayError, ValueError):
            members = ray.get(find_keeper().members.remote(self.key, -1, 0.0), timeout=_CALL)
        refs = {actor.ping.remote(): name for name, actor, _ in (members.replicas if members else ())}
        done, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout) if refs else ([], [])
        replicas: dict[str, ReplicaStats] = {}
        unreachable |= {name: f"no answer within {timeout:g} s" for name in refs.values()}
        for ref in done:
            name = refs[ref]
            try:
                replicas[name] = ray.get(ref, timeout=timeout)
                del unreachable[name]
            except RayError as error:
                unreachable[name] = plain(error)
        return PoolStats(replicas, unreachable)

    def close(self) -> None:
        """Give the lease back; may be called again."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._renewer.join(timeout=_CALL)
        # If this is lost, the lease runs out by itself.
        with contextlib.suppress(RayError, ValueError):
            ray.get(find_keeper().release.remote(self._lease), timeout=_CALL)

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

    def _take(self) -> str:
        """Take a lease, from a new keeper if the old one is ending just now."""
        last, deadline = "", self._clock() + 2 * _CALL
        while self._clock() < deadline:
            try:
                lease: str = ray.get(start_keeper().hold.remote(self._order, self._holder), timeout=_CALL)
                return lease
            except (RayError, ValueError) as error:
                last = plain(error) if isinstance(error, RayError) else str(error)
                time.sleep(0.5)
        raise PoolError(f"pool {self.key!r}: the cluster gives no keeper of pools: {last}")

    def _renew(self) -> None:
        while not self._closed.wait(TTL / 4):
            try:
                if ray.get(find_keeper().renew.remote(self._lease), timeout=_CALL) is None:
                    self._lease = self._take()
            except (ValueError, GetTimeoutError, RayError, PoolError):
                # It died, or answers late: a new one starts the pool again.
                with contextlib.suppress(PoolError):
                    self._lease = self._take()

    def _say_late(self, look: Look | None, here: int, enough: int) -> None:
        asked = self._order.asked
        late = sorted(n for n, r in look.replicas.items() if r.stage == "loading") if look else []
        last = look.last_error if look else "no keeper answers"
        text = (
            f"pool {self.key!r}: {', '.join(late) or 'replicas'} did not load within {self._spec.start_timeout:g} s. "
            f"Asked for {asked.copies} x {_demand(asked)}; the cluster has {_cluster()}"
            f"{f'; last error: {last}' if last else ''}"
        )
        if here < enough:
            raise PoolError(text)
        if not self._late:
            self._late = True
            print(f"{text}. The run goes on without.", flush=True)


def start_keeper() -> Any:
    """The cluster's keeper of pools, started if there is none."""
    options = ray.remote(Keeper).options(
        name=NAME,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_concurrency=_CALLS,
        scheduling_strategy=ANYWHERE,
    )
    return options.remote()


def _demand(asked: Replicas) -> dict[str, float]:
    return {k: v for k, v in {"CPU": asked.cpus, "GPU": asked.gpus, **asked.resources}.items() if v}


def _cluster() -> str:
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    rows = [f"{k} {free.get(k, 0):g} of {v:g}" for k, v in total.items() if ":" not in k]
    return f"free: {', '.join(rows)}"
