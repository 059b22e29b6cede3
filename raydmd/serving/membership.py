"""Which replicas a client can ask: what the keeper says of them, and what the client has seen itself."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, RayError

from raydmd.serving.health import Health
from raydmd.serving.order import find_keeper, plain

if TYPE_CHECKING:
    from raydmd.serving.order import ClientSpec, Members

FETCH_TIMEOUT = 60.0
"""Seconds for an answer that is there to arrive."""
_PROBE_TIMEOUT = 10.0
_POLL = 30.0
"""Seconds that the keeper holds back a question for news of members."""
_ASK_AGAIN = 1.0
_LOOK = 0.05
"""Seconds between two looks for news: each costs more than a small request."""


@dataclass
class Known:
    """A replica as its client knows it.

    Attributes:
        actor: its Ray handle.
        health: the client's own opinion.
        experts: that it holds; empty for all.
        present: whether it is among the pool's members now.
    """

    actor: Any
    health: Health
    experts: tuple[str, ...] = ()
    present: bool = True
    probe: Any = None
    probe_sent: float = 0.0


class Membership:
    """A client's view of its pool.

    Args:
        spec: of the pool.
        client: who asks.

    Attributes:
        replicas: all that were ever known, by name.
        broken: why there are none and will be none; empty while there may be.
        error: the pool's last.
    """

    def __init__(self, spec: ClientSpec, client: str) -> None:
        self._spec, self._client = spec, client
        self.replicas: dict[str, Known] = {}
        self.broken = self.error = ""
        self._version = -1
        self._news: Any = None
        self._ask_at = self._look_at = 0.0
        self._wants: tuple[str, ...] = ()

    def present(self) -> list[tuple[str, Known]]:
        """The pool's members, in one order for all clients."""
        return [(name, self.replicas[name]) for name in sorted(self.replicas) if self.replicas[name].present]

    def refs(self) -> list[Any]:
        """What news will come by."""
        return [r for r in [self._news, *(known.probe for _, known in self.present())] if r is not None]

    def follow(self, now: float) -> None:
        """Take in news and ask for the next, where it is time to look. Never blocks."""
        if now < self._look_at:
            return
        self._look_at = now + _LOOK
        self._listen(now)
        self._probe(now)

    def expect(self, experts: tuple[str, ...], now: float) -> None:
        """See :meth:`raydmd.serving.client.Client.expect`."""
        if self._spec.routing is not None and experts != self._wants:
            self._wants, self._news, self._ask_at = experts, None, now
            self._listen(now)

    def _listen(self, now: float) -> None:
        if self._news is not None and ray.wait([self._news], timeout=0)[0]:
            ref, self._news = self._news, None
            members: Members | None = None
            with contextlib.suppress(RayError):
                members = ray.get(ref, timeout=FETCH_TIMEOUT)
            if members is None:  # the keeper died, or the pool is being started again
                self._version, self._ask_at = -1, now + _ASK_AGAIN
            else:
                self._welcome(members)
        if self._news is None and now >= self._ask_at:
            spec = self._spec
            try:
                self._news = find_keeper().members.remote(
                    spec.pool, self._version, _POLL, spec.holder, self._client, self._wants
                )
            except (ValueError, RayError):
                self._ask_at = now + _ASK_AGAIN

    def _welcome(self, members: Members) -> None:
        self._version, self.broken, self.error = members.version, members.broken, members.last_error
        for known in self.replicas.values():
            known.present = False
        for name, actor, experts in members.replicas:
            if name not in self.replicas or self.replicas[name].actor._actor_id != actor._actor_id:
                self.replicas[name] = Known(actor, Health(self._spec.limits))
            self.replicas[name].present, self.replicas[name].experts = True, experts

    def _probe(self, now: float) -> None:
        """Take in answers of probes, and send those that are due. Never blocks."""
        for replica in [known for _, known in self.present()]:
            if replica.probe is not None:
                done, _ = ray.wait([replica.probe], timeout=0)
                if done:
                    ref, replica.probe = replica.probe, None
                    try:
                        stats = ray.get(ref, timeout=FETCH_TIMEOUT)
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
