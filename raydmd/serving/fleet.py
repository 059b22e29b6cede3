"""What a pool's replicas are to do: a pure state machine; the keeper carries out its actions and tells it the news.

::

    start --> LOADING --loaded--> READY --too many--> LEAVING --nothing left to answer--> stop
                 |                 |  ^
                 | cannot load     |  | moved
                 v                 v  |
               stop              MOVING (to another expert)

A replica that dies is restarted by Ray and loads again. One that cannot load is replaced after a pause that doubles;
when that has failed several times running and no replica is left, the fleet is broken and says why. It goes on trying,
and is whole again when one has loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from raydmd.serving.scaling import Pace, Scaler, assign

if TYPE_CHECKING:
    from collections.abc import Sequence

GIVE_UP = 3
"""Attempts in a row that could not load any replica before the fleet is broken."""
PAUSE_FIRST, PAUSE_LONGEST = 1.0, 60.0
NOTICE = 3.0
"""Seconds that a leaving replica still answers, so that every client has heard of it."""
DRAIN = 1800.0
"""Seconds that a leaving replica has to answer what it has begun."""
WINDOW = 5.0
"""Seconds over which a replica's busy fraction is taken."""


class Stage(Enum):
    """Where a replica is in its life."""

    LOADING = "loading"
    READY = "ready"
    MOVING = "moving"
    LEAVING = "leaving"


@dataclass(frozen=True)
class Start:
    """Start a replica.

    Attributes:
        name: of it.
        experts: that it is to hold; empty for all.
    """

    name: str
    experts: tuple[str, ...]


@dataclass(frozen=True)
class Move:
    """Have a replica hold other experts; see :class:`Start`."""

    name: str
    experts: tuple[str, ...]


@dataclass(frozen=True)
class Stop:
    """End a replica.

    Attributes:
        name: of it.
    """

    name: str


Action = Start | Move | Stop


@dataclass
class Slot:
    """A replica as the fleet knows it.

    Attributes:
        stage: of its life.
        experts: that it holds, or will once it has loaded or moved; empty for all.
        since: when it came to this stage, seconds.
        open: requests it has not answered.
        busy: fraction of the last seconds spent in forwards.
        waiting: requests that waited, on average over the last seconds.
        error: what became of it last, if that was bad.
    """

    stage: Stage
    experts: tuple[str, ...]
    since: float
    open: int = 0
    busy: float = 0.0
    waiting: float = 0.0
    error: str = ""
    heard: tuple[float, float] | None = None
    queues: list[int] = field(default_factory=list)


class Fleet:
    """The replicas of one pool.

    Args:
        name: of the pool; its replicas are ``name/0``, ``name/1`` and so on.
        experts: of a model whose replicas hold some each, from noisy to clean; empty where each holds all.
        each: experts that a replica holds.
        pace: when it grows and shrinks.
    """

    def __init__(self, name: str, *, experts: Sequence[str] = (), each: int = 0, pace: Pace | None = None) -> None:
        self._name, self._experts, self._each = name, tuple(experts), each
        self._scaler = Scaler(pace)
        self._started = 0
        self._failures = 0
        self._retry_at = 0.0
        self.slots: dict[str, Slot] = {}
        self.version = 0
        """Rises whenever :meth:`members` changes."""
        self.broken = ""
        """Why there is no replica, and none soon; else empty."""
        self.last_error = ""

    def members(self) -> dict[str, tuple[str, ...]]:
        """Replicas that may be asked, and the experts each holds (none named: all)."""
        return {name: slot.experts for name, slot in self.slots.items() if slot.stage is Stage.READY}

    def step(self, now: float, *, least: int, most: int, wants: Sequence[str] = ()) -> list[Action]:
        """What is to be done now.

        Args:
            now: clock reading, seconds.
            least: replicas wanted at all times.
            most: at any time.
            wants: an entry for each client and expert that it asks.
        """
        actions: list[Action] = []
        ready = [slot for slot in self.slots.values() if slot.stage is Stage.READY]
        staying = {name: slot for name, slot in self.slots.items() if slot.stage is not Stage.LEAVING}
        waiting = sum(slot.waiting for slot in ready)
        target = self._scaler.target(now, least=least, most=most, busy=[s.busy for s in ready], waiting=waiting)
        if now >= self._retry_at:
            for _ in range(target - len(staying)):
                actions.append(self._start(now, wants))
        # Whoever is not needed leaves: those that never came up first, then the youngest.
        late = sorted(staying, key=lambda n: (staying[n].stage is Stage.LOADING, self._number(n)), reverse=True)
        for name in late[: max(len(staying) - target, 0)]:
            if not self._alone(name, wants):
                self._set(name, Stage.LEAVING, now)
        for name, slot in list(self.slots.items()):
            over = slot.open == 0 and now - slot.since >= NOTICE
            if slot.stage is Stage.LEAVING and (over or now - slot.since >= DRAIN):
                del self.slots[name]
                actions.append(Stop(name))
        return actions + self._moves(now, wants)

    def loaded(self, name: str, experts: tuple[str, ...], now: float) -> None:
        """A replica has loaded these experts and answers, for the first time or again after its process died."""
        slot = self.slots.get(name)
        if slot is not None and slot.stage is Stage.LOADING:
            self._failures, self.broken, slot.error = 0, "", ""
            slot.experts = experts
            self._set(name, Stage.READY, now)

    def moved(self, name: str, now: float) -> None:
        """A replica holds the experts it was to move to."""
        if name in self.slots and self.slots[name].stage is Stage.MOVING:
            self._set(name, Stage.READY, now)

    def lost(self, name: str, why: str, now: float) -> None:
        """A replica's process died; Ray starts another, which has to load."""
        slot = self.slots.get(name)
        if slot is None:
            return
        slot.error = self.last_error = why
        slot.heard, slot.open, slot.busy, slot.waiting = None, 0, 0.0, 0.0
        slot.queues.clear()
        if slot.stage is not Stage.LEAVING:
            self._set(name, Stage.LOADING, now)

    def failed(self, name: str, why: str, now: float) -> None:
        """A replica cannot load, and is gone for good."""
        slot = self.slots.pop(name, None)
        if slot is None:
            return
        self.last_error = why
        if slot.stage is Stage.LEAVING:
            return
        if now >= self._retry_at:  # those that were started together fail together, and count once
            self._failures += 1
            self._retry_at = now + min(PAUSE_FIRST * 2.0 ** min(self._failures - 1, 30), PAUSE_LONGEST)
        self.version += 1
        if self._failures >= GIVE_UP and not any(s.stage is not Stage.LEAVING for s in self.slots.values()):
            self.broken = why
            self._retry_at = now + PAUSE_LONGEST

    def heard(self, name: str, *, open_requests: int, queued: int, busy: float, now: float) -> None:
        """A replica said how it is doing.

        Args:
            name: of it.
            open_requests: that it has not answered.
            queued: those of them that are in no forward yet.
            busy: seconds spent in forwards since it loaded.
            now: clock reading, seconds.
        """
        slot = self.slots.get(name)
        if slot is None:
            return
        if slot.stage is Stage.READY:
            slot.error = ""  # a ping before this one may have been late
        slot.open = open_requests
        slot.queues.append(queued)
        if slot.heard is None:
            slot.heard = (now, busy)
        elif now - slot.heard[0] >= WINDOW:
            # One look says little: a replica that has just answered its last request is about to be asked again.
            slot.busy = (busy - slot.heard[1]) / (now - slot.heard[0])
            slot.waiting = sum(slot.queues) / len(slot.queues)
            slot.heard = (now, busy)
            slot.queues.clear()

    def _start(self, now: float, wants: Sequence[str]) -> Start:
        name = f"{self._name}/{self._started}"
        self._started += 1
        self.slots[name] = Slot(Stage.LOADING, (), now)
        if self._each:
            self.slots[name].experts = self._assigned(wants)[name]
        return Start(name, self.slots[name].experts)

    def _moves(self, now: float, wants: Sequence[str]) -> list[Action]:
        if not self._each or not wants:
            return []
        actions: list[Action] = []
        for name, experts in self._assigned(wants).items():
            slot = self.slots[name]
            if slot.stage is Stage.READY and set(experts) != set(slot.experts):
                slot.experts = experts
                self._set(name, Stage.MOVING, now)
                actions.append(Move(name, experts))
        return actions

    def _assigned(self, wants: Sequence[str]) -> dict[str, tuple[str, ...]]:
        held = {name: slot.experts for name, slot in self.slots.items() if slot.stage is not Stage.LEAVING}
        return assign(held, wants, self._each, self._experts)

    def _alone(self, name: str, wants: Sequence[str]) -> bool:
        """Whether a replica is the only one that serves an expert which somebody wants."""
        mine = set(self.slots[name].experts) & set(wants)
        others = {e for n, experts in self.members().items() if n != name for e in experts}
        return self.slots[name].stage is Stage.READY and bool(mine - others)

    def _number(self, name: str) -> int:
        return int(name.rpartition("/")[2])

    def _set(self, name: str, stage: Stage, now: float) -> None:
        slot = self.slots[name]
        if Stage.READY in (slot.stage, stage) and slot.stage is not stage:
            self.version += 1
        slot.stage, slot.since = stage, now
