"""What one client believes about one replica: a pure state machine, the clock is passed in.

Probe failures and request failures are counted apart, because a replica whose forward is wedged
keeps answering probes: only an answered request or a new process clears the memory of failed ones.

::

    HEALTHY --request failed--> SUSPECT --more of them--> DEAD
    DEAD --cool-down over, probe answered--> SUSPECT
    any --process lost--> RESTARTING --probes fail--> DEAD
    RESTARTING or DEAD --probe answered by a new process--> HEALTHY
    any --request answered--> HEALTHY
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """What a replica is taken to be."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When opinions change.

    Attributes:
        dead_after_requests: failed requests in a row that make a suspect dead.
        dead_after_probes: failed probes in a row that make a restarting replica dead.
        probe_first: seconds from a loss to the second probe; doubles with every failed probe.
        probe_longest: longest pause between probes, seconds.
        cool_down: seconds a suspect is avoided after a failed request; doubles with each in a row.
        cool_down_longest: longest such pause, seconds.
    """

    dead_after_requests: int = 3
    dead_after_probes: int = 3
    probe_first: float = 0.2
    probe_longest: float = 2.0
    cool_down: float = 10.0
    cool_down_longest: float = 300.0


class Health:
    """State of one replica as its client sees it.

    Attributes:
        state: the current opinion.
        gone: the process is lost for good and will not be restarted.
        request_failures: failed requests in a row.
        probe_failures: failed probes in a row.
        last_error: text of the latest failure, empty before the first.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        """A healthy replica, until something is heard.

        Args:
            limits: when opinions change.
        """
        self._limits = limits if limits is not None else Limits()
        self.state = State.HEALTHY
        self.gone = False
        self.request_failures = 0
        self.probe_failures = 0
        self.last_error = ""
        self._incarnation: str | None = None
        self._avoid_until = 0.0
        self._probe_at = 0.0

    def tier(self, now: float) -> int | None:
        """How willingly to send it requests: 0 gladly, 1 if there is no better, ``None`` never.

        A suspect whose cool-down is over is tried like a healthy one, or a hiccup would shut it
        out for ever.
        """
        if self.state is State.HEALTHY:
            return 0
        if self.state is State.SUSPECT:
            return 0 if now >= self._avoid_until else 1
        return None

    def probe_due(self, now: float) -> bool:
        """Whether a probe should be sent now; only replicas that get no requests need one."""
        unusable = self.state in (State.DEAD, State.RESTARTING)
        return unusable and not self.gone and now >= self._probe_at

    def request_succeeded(self) -> None:
        """A request was answered: the replica works."""
        if not self.gone:
            self._recover()

    def request_failed(self, now: float, why: str) -> None:
        """A request failed or took too long while the process lives on."""
        self.last_error = why
        self.request_failures += 1
        limits = self._limits
        pause = limits.cool_down * 2.0 ** min(self.request_failures - 1, 30)
        self._avoid_until = now + min(pause, limits.cool_down_longest)
        if self.state in (State.HEALTHY, State.SUSPECT):
            dead = self.request_failures >= limits.dead_after_requests
            self.state = State.DEAD if dead else State.SUSPECT
            self._probe_at = self._avoid_until

    def process_lost(self, now: float, why: str) -> None:
        """The process died or cannot be reached; whoever supervises it may start another."""
        self.last_error = why
        if self.gone or self.state is State.RESTARTING:
            return
        self.state = State.RESTARTING
        self.request_failures = 0
        self.probe_failures = 0
        self._probe_at = now

    def probe_succeeded(self, now: float, incarnation: str) -> None:
        """A probe was answered.

        Args:
            now: clock reading, seconds.
            incarnation: names the process; a new one has forgotten the old one's troubles.
        """
        if self.gone:
            return
        self.probe_failures = 0
        fresh = self._incarnation not in (None, incarnation)
        self._incarnation = incarnation
        if self.state is State.RESTARTING or fresh or self.request_failures == 0:
            self._recover()
        elif self.state is State.DEAD and now >= self._avoid_until:
            self.state = State.SUSPECT
        else:
            self._probe_at = max(self._avoid_until, now + self._limits.probe_first)

    def probe_failed(self, now: float, why: str, *, gone: bool = False) -> None:
        """A probe failed or went unanswered.

        Args:
            now: clock reading, seconds.
            why: text of the failure.
            gone: whether the failure says that the process is lost for good.
        """
        self.last_error = why
        self.probe_failures += 1
        self.gone = self.gone or gone
        limits = self._limits
        pause = limits.probe_first * 2.0 ** min(self.probe_failures - 1, 30)
        self._probe_at = now + min(pause, limits.probe_longest)
        if self.gone or self.probe_failures >= limits.dead_after_probes:
            self.state = State.DEAD

    def _recover(self) -> None:
        self.state = State.HEALTHY
        self.request_failures = 0
        self.probe_failures = 0
        self._avoid_until = 0.0
