"""A worker's side of a pool: route, resend, give up in time.

Every client keeps its own view of the replicas' health, so there is no central router to lose.
Requests are pure, so sending one twice is exact: the first answer wins. All waiting happens in
``result``.
"""

from __future__ import annotations

import dataclasses
import re
import time
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from raydmd.errors import PoolExhausted, RaydmdError, ScoreTimeout
from raydmd.methods.terms import Answer
from raydmd.serving.client import Client, Pending, ReplicaBusy, ReplicaFailed
from raydmd.serving.codec import decode_reply, encode_request
from raydmd.serving.health import Health, Limits
from raydmd.serving.router import Candidate, choose

if TYPE_CHECKING:
    from collections.abc import Callable

    from raydmd.serving.messages import Reply, Request

_SLICE = 0.2
_BACKOFF_FIRST, _BACKOFF_LONGEST = 0.2, 2.0
_PROBE_TIMEOUT = 10.0
_FETCH_TIMEOUT = 60.0
_GRACE = 30.0
"""Seconds that replicas may load longer than the first of their pool before a client does without them."""


@dataclass(frozen=True)
class ReplicaHandle:
    """A replica by name.

    Attributes:
        name: e.g. ``teacher/0``.
        actor: its Ray handle.
    """

    name: str
    actor: Any


@dataclass(frozen=True, kw_only=True)
class ClientSpec:
    """All a worker needs to talk to a pool. Picklable inside the cluster.

    Attributes:
        pool: its name.
        replicas: in one order for all clients.
        deterministic: route by request name.
        start_timeout: seconds that a client's first request waits for replicas that are still loading.
        request_timeout: seconds from submit to a request's deadline.
        attempt_timeout: seconds after which a silent attempt is repeated elsewhere.
        max_retries: failed attempts after which a request gives up.
        limits: when opinions of a replica change.
    """

    pool: str
    replicas: tuple[ReplicaHandle, ...]
    deterministic: bool
    start_timeout: float
    request_timeout: float
    attempt_timeout: float
    max_retries: int
    limits: Limits = field(default_factory=Limits)


@dataclass
class _Attempt:
    ref: Any
    replica: str
    sent: float
    overdue: bool = False


@dataclass
class _Replica:
    actor: Any
    health: Health
    sent: int = 0
    probe: Any = None
    probe_sent: float = 0.0


class PoolPending(Pending):
    """A request under way in a pool."""

    def __init__(self, client: PoolClient, request: Request, payload: Any, submitted: float) -> None:
        """Made by :meth:`PoolClient.submit`.

        Args:
            client: who drives it.
            request: for its name and device.
            payload: object reference of the encoded request, sent again by retries.
            submitted: clock reading, seconds.
        """
        self.name = request.name
        self.device = request.x_t.device
        self.payload = payload
        self.submitted = submitted
        self.attempts: list[_Attempt] = []
        self.sends = 0
        self.failures = 0
        self.refusals = 0
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
    ) -> None:
        """Connect; costs nothing.

        Args:
            spec: from :meth:`raydmd.serving.pool.Pool.client_spec`.
            client_id: who asks, e.g. ``trial 3 rank 0``; replicas serve clients in turns.
            clock: seconds.
        """
        self._spec = spec
        self._id = client_id
        self._clock = clock
        self._replicas = {r.name: _Replica(r.actor, Health(spec.limits)) for r in spec.replicas}
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
        return {name: replica.health.state.value for name, replica in self._replicas.items()}

    def submit(self, request: Request) -> PoolPending:
        """Send a request to one replica, at once; if none is usable now, ``result`` will.

        Only the first one waits, for replicas that still load.
        """
        if not self._met:
            self._meet()
            self._met = True
        now = self._clock()
        # Stored once: a resend cannot see later changes of the tensors, and costs no second copy.
        payload = ray.put(encode_request(request, self._id))
        pending = PoolPending(self, request, payload, now)
        self._open.add(pending)
        self._probe(now)
        target = self._choose(pending, set())
        if target is not None:
            self._send(pending, target, now)
        return pending

    def drive(self, pending: PoolPending) -> tuple[Reply | RaydmdError, float]:
        """Bring one request to its end; for :meth:`PoolPending.result`.

        Args:
            pending: made by this client.

        Returns:
            The answer or the error to raise, and the seconds this took.
        """
        start = self._clock()
        outcome: Reply | RaydmdError | None = None
        while outcome is None:
            now = self._clock()
            self._probe(now)
            outcome = self._collect(pending)
            if outcome is None and now >= pending.submitted + self._spec.request_timeout:
                what = f"no answer after {self._spec.request_timeout:g} s"
                outcome = ScoreTimeout(self._story(pending, what))
            if outcome is None:
                outcome = self._advance(pending, now)
            if outcome is None:
                self._pause(pending)
        pending.attempts.clear()
        self._open.discard(pending)
        return outcome, self._clock() - start

    def _collect(self, pending: PoolPending) -> Reply | RaydmdError | None:
        """Take in finished attempts: the answer, a final error, or nothing yet."""
        if not pending.attempts:
            return None
        refs = [a.ref for a in pending.attempts]
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        for attempt in [a for a in pending.attempts if a.ref in done]:
            pending.attempts.remove(attempt)
            replica = self._replicas[attempt.replica]
            now = self._clock()
            try:
                reply = decode_reply(ray.get(attempt.ref, timeout=_FETCH_TIMEOUT))
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, ReplicaBusy):
                    self._refusals += 1
                    pending.refusals += 1
                    self._back_off(pending, pending.refusals, str(cause), now)
                elif isinstance(cause, RaydmdError) and not isinstance(cause, ReplicaFailed):
                    replica.health.request_succeeded()
                    return cause
                else:
                    why = str(cause) if isinstance(cause, ReplicaFailed) else plain(error)
                    replica.health.request_failed(now, why)
                    self._fail(pending, why, now)
            except RayActorError as error:
                why = f"replica {attempt.replica!r}: {plain(error)}"
                replica.health.process_lost(now, why)
                self._fail(pending, why, now)
            except RayError as error:
                why = f"replica {attempt.replica!r}: {plain(error)}"
                replica.health.request_failed(now, why)
                self._fail(pending, why, now)
            else:
                replica.health.request_succeeded()
                if pending.device.type == "cpu":
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
                    why = f"replica {attempt.replica!r} was silent for {limit:g} s"
                    pending.last_error = why
                    self._replicas[attempt.replica].health.request_failed(now, why)
            if all(a.overdue for a in pending.attempts):
                # A late answer is as good, so old attempts stay; no replica is asked twice.
                target = self._choose(pending, {a.replica for a in pending.attempts})
                if target is not None:
                    self._send(pending, target, now)
            return None
        if pending.failures > self._spec.max_retries:
            return PoolExhausted(self._story(pending, f"{pending.failures} attempts failed"))
        if all(r.health.gone for r in self._replicas.values()):
            return PoolExhausted(self._story(pending, "no replica is alive, and none will restart"))
        if now >= pending.retry_at:
            target = self._choose(pending, set())
            if target is not None:
                self._send(pending, target, now)
        return None

    def _meet(self) -> None:
        """Wait until every replica has loaded; those late behind one that has are left to the probes."""
        pings = {replica.actor.ping.remote(): replica for replica in self._replicas.values()}
        deadline, answered = self._clock() + self._spec.start_timeout, False
        while pings and (left := deadline - self._clock()) > 0:
            done, _ = ray.wait(list(pings), num_returns=1, timeout=left)
            for ref in done:
                replica = pings.pop(ref)
                try:
                    ray.get(ref, timeout=_FETCH_TIMEOUT)
                except ActorDiedError as error:
                    replica.health.process_lost(self._clock(), plain(error))
                except RayError:  # its process died while loading; Ray starts another
                    time.sleep(_SLICE)
                    pings[replica.actor.ping.remote()] = replica
                else:
                    if not answered:
                        answered, deadline = True, min(deadline, self._clock() + _GRACE)
        for replica in pings.values():
            replica.health.process_lost(self._clock(), "it still loads")

    def _probe(self, now: float) -> None:
        """Take in answers of probes, and send those that are due. Never blocks."""
        for replica in self._replicas.values():
            if replica.probe is not None:
                done, _ = ray.wait([replica.probe], timeout=0)
                if done:
                    ref, replica.probe = replica.probe, None
                    try:
                        stats = ray.get(ref, timeout=_FETCH_TIMEOUT)
                        replica.health.probe_succeeded(now, stats["incarnation"])
                    except RayError as error:
                        # Of a restartable actor, only a fresh call says that it is dead for good.
                        gone = isinstance(error, ActorDiedError)
                        replica.health.probe_failed(now, plain(error), gone=gone)
                elif now - replica.probe_sent >= _PROBE_TIMEOUT:
                    # Loading or hung. The probe stays out, so that its answer is seen at once.
                    replica.probe_sent = now
                    why = f"no answer to a probe in {_PROBE_TIMEOUT:g} s"
                    replica.health.probe_failed(now, why)
            if replica.probe is None and replica.health.probe_due(now):
                replica.probe = replica.actor.ping.remote()
                replica.probe_sent = now

    def _choose(self, pending: PoolPending, exclude: set[str]) -> str | None:
        now = self._clock()
        busy = [a.replica for p in self._open for a in p.attempts]
        candidates = [
            Candidate(
                name=name,
                tier=None if name in exclude else replica.health.tier(now),
                outstanding=busy.count(name),
                sent=replica.sent,
            )
            for name, replica in self._replicas.items()
        ]
        return choose(
            candidates,
            request=pending.name,
            client=self._id,
            deterministic=self._spec.deterministic,
        )

    def _send(self, pending: PoolPending, target: str, now: float) -> None:
        # A refused attempt was never served, so what follows it is no recovery.
        if pending.sends > pending.refusals:
            self._retries += 1
        replica = self._replicas[target]
        pending.attempts.append(_Attempt(replica.actor.score.remote(pending.payload), target, now))
        pending.sends += 1
        replica.sent += 1

    def _fail(self, pending: PoolPending, why: str, now: float) -> None:
        pending.failures += 1
        self._back_off(pending, pending.failures, why, now)

    def _back_off(self, pending: PoolPending, times: int, why: str, now: float) -> None:
        pending.last_error = why
        pause = _BACKOFF_FIRST * 2.0 ** min(times - 1, 30)
        pending.retry_at = now + min(pause, _BACKOFF_LONGEST)

    def _pause(self, pending: PoolPending) -> None:
        """Wait a slice for any news of this request, or of a replica that may come back."""
        refs = [a.ref for a in pending.attempts]
        refs += [r.probe for r in self._replicas.values() if r.probe is not None]
        if refs:
            ray.wait(refs, num_returns=1, timeout=_SLICE)
        else:
            time.sleep(_SLICE / 4)

    def _story(self, pending: PoolPending, what: str) -> str:
        views = ", ".join(f"{name} {state}" for name, state in self.health().items())
        last = pending.last_error or "none"
        errors = {n: r.health.last_error for n, r in self._replicas.items() if r.health.gone}
        lost = "".join(f"; {name}: {text}" for name, text in errors.items() if text != last)
        return (
            f"pool {self._spec.pool!r}, client {self._id!r}, request {pending.name!r}: {what} "
            f"({pending.sends} sent, {pending.refusals} refused); replicas: {views}; "
            f"last error: {last}{lost}"
        )


def plain(error: RayError) -> str:
    """A Ray error's text without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
