"""A worker's side of a pool: route, resend, give up in time.

Every client keeps its own view of the replicas' health, so there is no central router to lose; the keeper only tells
it which replicas there are. Requests are pure, so sending one twice is exact: the first answer wins. All waiting
happens in ``result``.
"""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from raydmd.errors import PoolExhausted, RaydmdError, ScoreTimeout
from raydmd.methods.terms import Answer
from raydmd.serving.client import Client, Pending, ReplicaBusy, ReplicaFailed, TransferFailed
from raydmd.serving.codec import INLINE, ArrayWire, RequestWire, decode_reply, encode_request
from raydmd.serving.direct import fetch, lend
from raydmd.serving.membership import FETCH_TIMEOUT, Membership
from raydmd.serving.messages import split
from raydmd.serving.order import plain
from raydmd.serving.router import Candidate, choose, stable_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from raydmd.serving.messages import Reply, Request
    from raydmd.serving.order import ClientSpec

Waits = Callable[[str], None]
"""Is told for whom a client waits, and with an empty text that it waits no longer."""

Again = Callable[[str, str], None]
"""Is told which request is sent once more after a failure or a silence, and why."""

_SLICE = 0.2
_TOLD = 1.0
"""Seconds of waiting after which it is told for whom."""
FORWARDS = 3
"""Forwards that may raise for one request before it gives up; a dead process or a silence is no such failure."""
_BACKOFF_FIRST, _BACKOFF_LONGEST = 0.2, 2.0


@dataclass(frozen=True)
class _Leg:
    """A part of a request that one replica can answer: all of it, or a walk's steps of one expert."""

    payload: Any
    experts: frozenset[str]


@dataclass
class _Attempt:
    """A request on its way: a call for each leg, each waiting for the one before."""

    refs: list[Any]
    replicas: list[str]
    sent: float
    overdue: bool = False

    @property
    def ref(self) -> Any:
        """The answer."""
        return self.refs[-1]

    @property
    def replica(self) -> str:
        """Who is at it: the one whose leg is not over, or has failed."""
        if len(self.replicas) == 1:
            return self.replicas[0]
        done = set(ray.wait(self.refs, num_returns=len(self.refs), timeout=0)[0])
        for ref, name in zip(self.refs, self.replicas, strict=True):
            if ref not in done or _failed(ref):
                return name
        return self.replicas[-1]


class PoolPending(Pending):
    """A request under way in a pool."""

    def __init__(self, client: PoolClient, request: Request, legs: list[_Leg], submitted: float, turn: int) -> None:
        """Made by :meth:`PoolClient.submit`.

        Args:
            client: who drives it.
            request: for its name and device.
            legs: the encoded request, sent again by retries; the whole of it first and then, if it has several legs,
                each.
            submitted: clock reading, seconds.
            turn: of the client, see :func:`raydmd.serving.router.choose`.
        """
        self.name = request.name
        self.device = request.x_t.device
        self.whole, *self.legs = legs
        self.submitted = submitted
        self.turn = turn
        self.attempts: list[_Attempt] = []
        self.sends = 0
        self.failures = 0
        self.refusals = 0
        self.raised = 0
        self.retry_at = submitted
        self.last_error = ""
        self._client = client
        self._waited = 0.0
        self._outcome: Reply | RaydmdError | None = None

    @property
    def waited(self) -> float:
        """See :class:`~raydmd.serving.client.Pending`."""
        return self._waited

    def result(self) -> Reply:
        """See :class:`~raydmd.serving.client.Pending`."""
        if self._outcome is None:
            self._outcome, seconds = self._client.drive(self)
            self._waited += seconds
        if isinstance(self._outcome, RaydmdError):
            raise self._outcome
        return self._outcome


class PoolClient(Client):
    """Asks a pool. One per worker, used by one thread."""

    def __init__(
        self,
        spec: ClientSpec,
        client_id: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        waits: Waits = lambda _: None,
        again: Again = lambda *_: None,
        seat: int | None = None,
    ) -> None:
        """Connect; costs nothing.

        Args:
            spec: from :meth:`raydmd.serving.pool.Pool.client_spec`.
            client_id: who asks, e.g. ``trial 3 rank 0``; replicas serve clients in turns.
            clock: seconds.
            waits: see :data:`Waits`.
            again: see :data:`Again`.
            seat: among the clients that ask in step with it, see :func:`raydmd.serving.router.seat`; by default
                one of its name.
        """
        self._spec = spec
        self._again = again
        self._waits = waits
        self._id = client_id
        self._turn = stable_hash(client_id) if seat is None else seat
        self._clock = clock
        self._lend = lend if spec.wire == "nixl" else None
        self._members = Membership(spec, client_id)
        # Weak, so that a request its trainer forgot does not count as outstanding for ever.
        self._open: weakref.WeakSet[PoolPending] = weakref.WeakSet()
        self._retries = 0
        self._refusals = 0
        self._met = False

    @property
    def retries(self) -> int:
        """See :class:`~raydmd.serving.client.Client`; refusals are not among them."""
        return self._retries

    @property
    def refusals(self) -> int:
        """Attempts that a full queue turned away."""
        return self._refusals

    def health(self) -> dict[str, str]:
        """This client's opinion of every replica, e.g. ``healthy``."""
        return {name: replica.health.state.value for name, replica in self._members.present()}

    def submit(self, request: Request) -> PoolPending:
        """Send a request to one replica, at once; if none is usable now, ``result`` will.

        Only the first one waits, for replicas that still load.
        """
        if not self._met:
            self._meet()
            self._met = True
        now = self._clock()
        parts = split(request, self._spec.routing)
        legs = [_Leg(_kept(self._encoded(part)), experts) for part, experts in parts]
        pending = PoolPending(self, request, legs, now, self._turn)
        self._turn += 1
        self._open.add(pending)
        self._members.follow(now)
        self._try(pending, set(), now)
        return pending

    def expect(self, experts: Sequence[str]) -> None:
        """See :class:`~raydmd.serving.client.Client`."""
        self._members.expect(tuple(experts), self._clock())

    def drive(self, pending: PoolPending) -> tuple[Reply | RaydmdError, float]:
        """Bring one request to its end; for :meth:`PoolPending.result`.

        Args:
            pending: made by this client.

        Returns:
            The answer or the error to raise, and the seconds this took.
        """
        start, said = self._clock(), ""
        outcome: Reply | RaydmdError | None = None
        while outcome is None:
            now = self._clock()
            self._members.follow(now)
            outcome = self._collect(pending)
            if outcome is None and now >= pending.submitted + self._spec.request_timeout:
                what = f"no answer after {self._spec.request_timeout:g} s"
                outcome = ScoreTimeout(self._story(pending, what))
            if outcome is None:
                outcome = self._advance(pending, now)
            if outcome is None and now - start > _TOLD:
                said = self._told(pending, said)
            if outcome is None:
                self._rest([ref for a in pending.attempts for ref in a.refs[-1:]] + self._members.refs())
        if said:
            self._waits("")
        pending.attempts.clear()
        self._open.discard(pending)
        return outcome, self._clock() - start

    def _told(self, pending: PoolPending, before: str) -> str:
        """Say for which replicas a request waits, if that has not been said."""
        names = " and ".join(f"replica {a.replica!r}" for a in pending.attempts) or "any replica"
        if names != before:
            when = time.strftime("%H:%M:%S")
            self._waits(f"waits for {names} of pool {self._spec.pool!r} since {when}, request {pending.name!r}")
        return names

    def _encoded(self, request: Request) -> RequestWire:
        try:
            return encode_request(request, self._id, self._spec.table, self._lend)
        except TransferFailed:  # the object store will do
            return encode_request(request, self._id, self._spec.table)

    def _collect(self, pending: PoolPending) -> Reply | RaydmdError | None:
        """Take in finished attempts: the answer, a final error, or nothing yet."""
        if not pending.attempts:
            return None
        refs = [a.ref for a in pending.attempts]
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for attempt in [a for a in pending.attempts if a.ref in done]:
            pending.attempts.remove(attempt)
            name = attempt.replica
            replica = self._members.replicas[name]
            now = self._clock()
            try:
                reply = decode_reply(ray.get(attempt.ref, timeout=FETCH_TIMEOUT), fetch)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, ReplicaBusy):
                    self._refusals += 1
                    pending.refusals += 1
                    self._back_off(pending, pending.refusals, str(cause), now)
                elif isinstance(cause, RayActorError):  # of a leg before, whose replica died
                    replica.health.process_lost(now, plain(cause))
                    self._fail(pending, plain(cause), now)
                elif isinstance(cause, RaydmdError) and not isinstance(cause, ReplicaFailed | TransferFailed):
                    replica.health.request_succeeded()
                    return cause
                elif isinstance(cause, TransferFailed):
                    self._fail(pending, str(cause), now)
                else:
                    why = str(cause) if isinstance(cause, ReplicaFailed) else plain(error)
                    replica.health.request_failed(now, why)
                    self._fail(pending, why, now)
                    pending.raised += 1
                    if pending.raised >= FORWARDS:  # wherever it runs: the fault is the request's own
                        return PoolExhausted(self._story(pending, f"its forward failed {pending.raised} times"))
            except RayActorError as error:
                why = f"replica {name!r}: {plain(error)}"
                replica.health.process_lost(now, why)
                self._fail(pending, why, now)
            except (RayError, TransferFailed) as error:
                why = f"replica {name!r}: {plain(error)}"
                replica.health.request_failed(now, why)
                self._fail(pending, why, now)
            else:
                replica.health.request_succeeded()
                if reply.answer.value.device == pending.device:
                    return reply
                uncond = reply.answer.uncond
                there = Answer(
                    value=reply.answer.value.to(pending.device),
                    uncond=None if uncond is None else uncond.to(pending.device),
                )
                return dataclasses.replace(reply, answer=there)
        return None

    def _advance(self, pending: PoolPending, now: float) -> RaydmdError | None:
        """Send again what failed or is overdue, or say that there is nobody left to ask."""
        if pending.attempts:
            limit = self._spec.attempt_timeout
            for attempt in pending.attempts:
                if not attempt.overdue and now - attempt.sent >= limit:
                    attempt.overdue = True
                    name = attempt.replica
                    why = f"replica {name!r} was silent for {limit:g} s"
                    pending.last_error = why
                    self._members.replicas[name].health.request_failed(now, why)
            if all(a.overdue for a in pending.attempts):
                # A late answer is as good, so old attempts stay; no replica is asked twice.
                self._try(pending, {name for a in pending.attempts for name in a.replicas}, now)
            return None
        if pending.failures > self._spec.max_retries:
            return PoolExhausted(self._story(pending, f"{pending.failures} attempts failed"))
        if self._members.broken:
            return PoolExhausted(self._story(pending, "no replica is alive, and none can be started"))
        if now >= pending.retry_at:
            self._try(pending, set(), now)
        return None

    def _meet(self) -> None:
        """Wait until a replica has loaded."""
        deadline = self._clock() + self._spec.start_timeout
        while not self._members.present() and not self._members.broken and self._clock() < deadline:
            self._members.follow(self._clock())
            self._rest(self._members.refs())

    def _try(self, pending: PoolPending, exclude: set[str], now: float) -> None:
        """Send a request to a replica that has all it needs, or its legs to one each, if there are such."""
        route = self._route(pending, [pending.whole], exclude) or self._route(pending, pending.legs, exclude)
        if not route:
            pending.last_error = pending.last_error or self._nobody(pending)
            return
        # A refused attempt was never served, so what follows it is no recovery.
        if pending.sends > pending.refusals:
            self._retries += 1
            self._again(pending.name, pending.last_error)
        refs: list[Any] = []
        for leg, name in route:
            replica = self._members.replicas[name]
            ask = replica.actor.walk_on if refs else replica.actor.score
            refs.append(ask.remote(leg.payload, *refs[-1:]))
        pending.attempts.append(_Attempt(refs, [name for _, name in route], now))
        pending.sends += 1

    def _route(self, pending: PoolPending, legs: list[_Leg], exclude: set[str]) -> list[tuple[_Leg, str]]:
        """A replica for each leg; nothing if one has none."""
        found = [(leg, self._choose(pending, leg, exclude)) for leg in legs]
        route = [(leg, replica) for leg, replica in found if replica is not None]
        return route if len(route) == len(legs) else []

    def _nobody(self, pending: PoolPending) -> str:
        held = "; ".join(f"{name} holds {', '.join(r.experts) or 'all'}" for name, r in self._members.present())
        wanted = ", ".join(sorted(pending.whole.experts)) or "the model"
        return f"no usable replica has {wanted} ({held or 'none is up'})"

    def _choose(self, pending: PoolPending, leg: _Leg, exclude: set[str]) -> str | None:
        now = self._clock()
        busy = [r for p in self._open for a in p.attempts for r in a.replicas]
        candidates = [
            Candidate(
                name=other,
                tier=None if other in exclude else replica.health.tier(now),
                outstanding=busy.count(other),
            )
            for other, replica in self._members.present()
            if not replica.experts or leg.experts <= {*replica.experts}
        ]
        turn = pending.turn + pending.sends  # once more is another one's turn, and the next request is where it was
        return choose(candidates, request=pending.name, turn=turn, deterministic=self._spec.deterministic)

    def _fail(self, pending: PoolPending, why: str, now: float) -> None:
        pending.failures += 1
        self._back_off(pending, pending.failures, why, now)

    def _back_off(self, pending: PoolPending, times: int, why: str, now: float) -> None:
        pending.last_error = why
        pause = _BACKOFF_FIRST * 2.0 ** min(times - 1, 30)
        pending.retry_at = now + min(pause, _BACKOFF_LONGEST)

    def _rest(self, refs: list[Any]) -> None:
        """Wait a slice for any news."""
        if refs:
            ray.wait(refs, num_returns=1, timeout=_SLICE)
        else:
            time.sleep(_SLICE / 4)

    def _story(self, pending: PoolPending, what: str) -> str:
        views = ", ".join(f"{name} {state}" for name, state in self.health().items()) or "none"
        last = pending.last_error or "none"
        lost = f"; the pool's: {self._members.error}" if self._members.error not in ("", last) else ""
        return (
            f"pool {self._spec.pool!r}, client {self._id!r}, request {pending.name!r}: {what} "
            f"({pending.sends} sent, {pending.refusals} refused); replicas: {views}; "
            f"last error: {last}{lost}"
        )


def _kept(wire: RequestWire) -> Any:
    """A request as it is now, for as often as it is sent: a large one in the object store, a small one as it goes."""
    arrays = [a for a in (wire["x_t"], wire["t"]) if a is not None]
    if sum(a["data"].nbytes for a in arrays) > INLINE:
        return ray.put(wire)
    return RequestWire(**{**wire, "x_t": _copied(wire["x_t"]), "t": wire["t"] and _copied(wire["t"])})


def _copied(wire: ArrayWire) -> ArrayWire:
    return ArrayWire(data=wire["data"].copy(), bf16=wire["bf16"], lent=wire["lent"])


def _failed(ref: Any) -> bool:
    try:
        ray.get(ref, timeout=FETCH_TIMEOUT)
    except RayError:
        return True
    return False
