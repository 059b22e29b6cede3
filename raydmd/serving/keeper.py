"""The keeper of all pools of a cluster: one small named actor that starts, moves and ends their replicas.

No request passes through it: clients ask it once which replicas there are, and are told when that changes. It ends by
itself when nobody has held a lease for a while. If it dies, its replicas die with it, and the next renewal of a lease
finds a new one, which starts the pools again.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from raydmd.serving.fleet import DRAIN, Fleet, Move, Stage, Start
from raydmd.serving.leases import Lease, Leases
from raydmd.serving.metrics import Metrics
from raydmd.serving.order import Look, Members, Order, ReplicaLook, plain
from raydmd.serving.replica import Replica, ReplicaSettings

if TYPE_CHECKING:
    from raydmd.serving.engine import Build
    from raydmd.serving.fleet import Action
    from raydmd.serving.replica import ReplicaStats

TTL = 30.0
"""Seconds that a lease lasts; its holder renews it four times in that."""
IDLE = 30.0
"""Seconds without any lease after which the keeper ends."""
BEAT = 0.25
LOOK_EVERY = 1.0
PING = 10.0
_SPARE_CALLS = 32
"""Calls that may run in a replica beside the queued ones: pings, and refusals on their way out."""


@dataclass
class _Pool:
    orders: dict[str, Order]
    """By lease."""
    order: Order
    """What replicas are started by: the oldest lease's, whose holder and files are there."""
    fleet: Fleet
    actors: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, ReplicaStats] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    version: int = 0


class ReplicaActor(Replica):
    """A replica whose figures go to Ray; see :class:`~raydmd.serving.replica.Replica`."""

    def __init__(self, build: Build, settings: ReplicaSettings) -> None:
        super().__init__(build, settings, metrics=Metrics(settings.pool, settings.name))


class Keeper:
    """Keeps pools; see the module. All of it runs on one event loop.

    Args:
        ttl: seconds that a lease lasts.
        idle: seconds without a lease after which the process ends.
    """

    def __init__(self, ttl: float = TTL, idle: float = IDLE) -> None:
        self._leases = Leases(ttl, mark=f"@{os.getpid()}")
        self._idle = idle
        self._pools: dict[str, _Pool] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._beat: asyncio.Task[None] | None = None

    async def hold(self, order: Order, holder: str) -> str:
        """Get a pool, or start it, and hold a lease of it.

        Args:
            order: what is wanted; a pool of the same key is taken as it is.
            holder: who wants it.

        Returns:
            The lease's name, to be renewed before ``ttl`` seconds are over.
        """
        if self._beat is None:
            self._beat = asyncio.create_task(self._run())
        if order.key in self._pools and self._pools[order.key].fleet.broken:
            self._close(order.key)  # the next one may have more luck
        if order.key not in self._pools:
            experts = order.routing.experts if order.routing else ()
            self._pools[order.key] = _Pool({}, order, Fleet(order.key, experts=experts, each=order.asked.each))
        asked = order.asked
        lease = self._leases.take(order.key, holder, _now(), least=asked.copies, most=max(asked.most, asked.copies))
        self._pools[order.key].orders[lease.name] = order
        return lease.name

    async def renew(self, lease: str) -> Look | None:
        """Extend a lease.

        Returns:
            How its pool is doing; ``None`` if the lease has run out.
        """
        if not self._leases.renew(lease, _now()):
            return None
        held = self._leases.get(lease)
        return self._look(held.pool) if held else None

    async def release(self, lease: str) -> None:
        """Give a lease back; the last one frees the pool."""
        self._leases.drop(lease)

    async def members(
        self, key: str, since: int, patience: float, holder: str = "", client: str = "", wants: tuple[str, ...] = ()
    ) -> Members | None:
        """The replicas of a pool that may be asked.

        Args:
            key: of the pool.
            since: version that the caller knows; waits for another one.
            patience: seconds to wait at most.
            holder: of the lease that the caller works under.
            client: the caller.
            wants: experts that it asks, until it says otherwise or the lease ends.

        Returns:
            ``None`` if there is no such pool.
        """
        deadline = _now() + patience
        for lease in self._leases.of(key):
            if lease.holder == holder and wants:
                lease.wants[client] = wants
        while (pool := self._pools.get(key)) is not None:
            if pool.version != since or (left := deadline - _now()) <= 0:
                replicas = tuple((n, pool.actors[n], e) for n, e in pool.fleet.members().items() if n in pool.actors)
                return Members(pool.version, replicas, pool.fleet.broken, pool.fleet.last_error)
            try:
                await asyncio.wait_for(pool.changed.wait(), left)
            except TimeoutError:
                continue
        return None

    async def looks(self) -> list[Look]:
        """How every pool is doing."""
        return [self._look(key) for key in self._pools]

    async def leave(self) -> None:
        """End this process, unless somebody has come meanwhile."""
        if len(self._leases):
            self._beat = asyncio.create_task(self._run())
            return
        for key in list(self._pools):
            self._close(key)
        ray.actor.exit_actor()  # type: ignore[no-untyped-call]

    def _look(self, key: str) -> Look:
        pool = self._pools[key]
        replicas = {
            name: ReplicaLook(slot.stage.value, slot.experts, slot.error, pool.stats.get(name), slot.busy)
            for name, slot in pool.fleet.slots.items()
        }
        holders = tuple(lease.holder for lease in self._leases.of(key))
        return Look(key, replicas, holders, pool.fleet.broken, pool.fleet.last_error)

    async def _run(self) -> None:
        quiet_since = _now()
        while True:
            await asyncio.sleep(BEAT)
            now = _now()
            self._leases.expire(now)
            for key in list(self._pools):
                leases = self._leases.of(key)
                if not leases:
                    self._close(key)
                    continue
                pool = self._pools[key]
                try:
                    self._step(pool, leases, now)
                except Exception as error:  # of this pool alone: the others, and all leases, go on
                    self._break(pool, error)
                self._announce(pool)
            if len(self._leases):
                quiet_since = now
            elif now - quiet_since > self._idle:
                # Not restarted: whoever needs a keeper next starts one. By a call to itself, since Ray lets an actor
                # leave in peace from within a method alone.
                ray.get_runtime_context().current_actor.leave.remote()
                return

    def _step(self, pool: _Pool, leases: list[Lease], now: float) -> None:
        pool.order = pool.orders.get(leases[0].name, pool.order)
        pool.orders = {lease.name: pool.orders[lease.name] for lease in leases if lease.name in pool.orders}
        least, most = max(lease.least for lease in leases), max(lease.most for lease in leases)
        wants = [e for lease in leases for experts in lease.wants.values() for e in experts]
        if each := pool.order.asked.each:  # runs in other phases ask other experts: all of them need a place
            least = max(least, -(-len(set(wants)) // each))
        for action in pool.fleet.step(now, least=least, most=max(least, most), wants=wants):
            self._do(pool, action)

    def _break(self, pool: _Pool, error: BaseException) -> None:
        pool.fleet.broken = pool.fleet.last_error = f"{type(error).__name__}: {error}"

    def _do(self, pool: _Pool, action: Action) -> None:
        if isinstance(action, Start):
            pool.actors[action.name] = _start(pool.order, action)
            self._spawn(pool, self._watch(pool, action.name))
        elif isinstance(action, Move):
            self._spawn(pool, self._move(pool, action))
        else:
            self._kill(pool, action.name)

    async def _move(self, pool: _Pool, move: Move) -> None:
        try:
            await asyncio.wait_for(pool.actors[move.name].hold.remote(move.experts), DRAIN)
        except (ActorDiedError, ActorUnavailableError) as error:
            pool.fleet.lost(move.name, plain(error), _now())  # what it holds now, its watch will hear
        except (RayError, TimeoutError) as error:
            why = plain(error) if isinstance(error, RayError) else f"it did not move to its experts within {DRAIN:g} s"
            self._kill(pool, move.name)
            pool.fleet.failed(move.name, why, _now())
        else:
            pool.fleet.moved(move.name, _now())
        self._announce(pool)

    async def _watch(self, pool: _Pool, name: str) -> None:
        """Follow one replica from its start to its end."""
        while name in pool.fleet.slots and name in pool.actors:
            ping = pool.actors[name].ping.remote()
            slot = pool.fleet.slots[name]
            try:
                stats: ReplicaStats = await (ping if slot.stage is Stage.LOADING else asyncio.wait_for(ping, PING))
            except ActorDiedError as error:
                pool.actors.pop(name, None)
                pool.fleet.failed(name, plain(error), _now())
            except RayError as error:
                pool.fleet.lost(name, plain(error), _now())
            except TimeoutError:
                slot.error = f"no answer to a ping in {PING:g} s"
            else:
                pool.stats[name] = stats
                pool.fleet.loaded(name, tuple(stats["experts"]), _now())
                pool.fleet.heard(
                    name, open_requests=stats["open"], queued=stats["queue"], busy=stats["busy_seconds"], now=_now()
                )
            self._announce(pool)
            await asyncio.sleep(LOOK_EVERY)
        pool.stats.pop(name, None)

    def _announce(self, pool: _Pool) -> None:
        """Wake whoever waits for other members."""
        state = pool.fleet.version + (1 << 32) * bool(pool.fleet.broken)
        if pool.version != state:
            pool.version = state
            pool.changed.set()
            pool.changed = asyncio.Event()

    def _close(self, key: str) -> None:
        pool = self._pools.pop(key)
        for name in list(pool.actors):
            self._kill(pool, name)
        pool.fleet.slots.clear()
        pool.changed.set()

    def _kill(self, pool: _Pool, name: str) -> None:
        actor = pool.actors.pop(name, None)
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def _spawn(self, pool: _Pool, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # or it may be collected while it runs

        def over(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            if not done.cancelled() and (error := done.exception()):
                self._break(pool, error)

        task.add_done_callback(over)


def _start(order: Order, start: Start) -> Any:
    asked = order.asked
    settings = ReplicaSettings(
        name=start.name,
        device="cuda" if asked.gpus > 0 else "cpu",
        threads=asked.threads,
        batch_items=asked.batch_items,
        batch_wait=asked.batch_wait,
        queue_limit=order.queue_limit,
        deterministic=order.deterministic,
        experts=start.experts,
        pool=order.key,
        wire=asked.wire,
    )
    options = ray.remote(ReplicaActor).options(
        num_cpus=asked.cpus,
        num_gpus=asked.gpus,
        resources=dict(asked.resources),
        # A dead replica comes back, its calls do not: clients resend within deadlines.
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=2 * order.queue_limit + asked.batch_items + _SPARE_CALLS,
        scheduling_strategy="SPREAD",
        enable_tensor_transport=asked.wire == "nixl",
    )
    return options.remote(order.build, settings)


def _now() -> float:
    return time.monotonic()
