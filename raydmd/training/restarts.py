"""Whether a run whose workers failed starts them again: a count of failures since its last progress, and no I/O.

A long run meets many failures, each of them cured by a restart. What no restart cures shows in that nothing is gained
between two: no newer checkpoint. So that is what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

PAUSES = (0.0, 5.0, 15.0, 30.0, 60.0)
"""Seconds before the first restart without progress, the second, and so on; the last one for all others."""

COMMITTED, FALLBACK = "committed", "fallback"
"""Kind of event of a checkpoint that a restart would go on from: Ray Train's books have it."""

Kind = Literal["error", "death", "memory", "full_node", "stall", "start", "room"]
"""An exception, a process that is gone, an allocation that failed, a process ended by Ray for its node's memory, a
watchdog's work, workers that fail as they start, and no room for them."""

MEMORY_ADVICE = (
    "Make it smaller: a smaller training.batch (or more placement.workers to share it), "
    "training.gradient_checkpointing=true (and with it training.offload_activations=true), training.sharding=fsdp, "
    "adapters (training.student.lora={}, training.fake.lora={}), training.precision=bf16"
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended an attempt.

    Attributes:
        kind: of failure.
        message: in one line: who, what, where.
        rank: whose it was, if it is known.
        node: where that rank was; empty if it is not known.
        doing: what it did, e.g. ``cycle 12``; empty if it is not known.
    """

    kind: Kind
    message: str
    rank: int | None = None
    node: str = ""
    doing: str = ""


@dataclass(frozen=True)
class Again:
    """Start the workers again.

    Attributes:
        count: which failure without progress this is; 0 for one that does not count.
        pause: seconds to wait before.
    """

    count: int
    pause: float


@dataclass(frozen=True)
class GiveUp:
    """End the run.

    Attributes:
        why: for the message, e.g. ``after 3 restarts without a new checkpoint``.
        stopped: as a run that was asked to, and not as one that failed.
    """

    why: str
    stopped: bool = False


class Budget:
    """Counts the failures since the last progress.

    Args:
        most: restarts without progress.
        reached: progress so far, see :func:`progress`.
        patience: seconds to wait for room for the workers; that there is none is not counted.
        stops: whether a stall ends the run instead.
    """

    def __init__(self, most: int, reached: str, *, patience: float = 0.0, stops: bool = False) -> None:
        self._most, self._reached, self._stops, self._patience = most, reached, stops, patience
        self._count = 0
        self._without_room: float | None = None  # since when
        self._short: str | None = None  # what was done when memory was short the last time

    def decide(self, failure: Failure, reached: str, now: float) -> Again | GiveUp:
        """What to do about a failure.

        Args:
            failure: the newest one.
            reached: progress now.
            now: a clock's reading, in seconds.
        """
        if reached > self._reached:
            self._reached, self._count, self._short, self._without_room = reached, 0, None, None
        if failure.kind == "room":
            since = self._without_room = now if self._without_room is None else self._without_room
            if now - since < self._patience:
                return Again(0, PAUSES[1])
            return GiveUp(f"there was none within placement.room_timeout={self._patience:g} s")
        self._without_room = None
        self._count += 1
        if failure.kind == "stall" and self._stops:
            return GiveUp("training.on_stall=stop", stopped=True)
        if failure.kind == "memory" and failure.doing and failure.doing == self._short:
            return GiveUp(f"memory is too small for {failure.doing}, twice in a row. {MEMORY_ADVICE}")
        self._short = failure.doing if failure.kind == "memory" else None
        if self._count > self._most:
            return GiveUp(
                f"training.max_failures={self._most}, and no new checkpoint since the last {self._count} failures"
                if self._most
                else "training.max_failures=0"
            )
        return Again(self._count, PAUSES[min(self._count, len(PAUSES)) - 1])


def progress(events: Iterable[Mapping[str, Any]]) -> str:
    """How far a run has come, by its events: the name of the furthest checkpoint that is committed; empty if none is.

    Names sort in the order of writing, and those after a rollback behind those before. A run that fell back
    stands where it fell back to.
    """
    reached = ""
    for e in events:
        if e["event"] == COMMITTED:
            reached = max(reached, str(e["checkpoint"]))
        elif e["event"] == FALLBACK:
            reached = str(e["checkpoint"])
    return reached
