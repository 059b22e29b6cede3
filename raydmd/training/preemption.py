"""Notices that nodes of a run will be taken away: a checkpoint is written at once, and training goes on until then."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from raydmd.training.ranks import Ranks
    from raydmd.training.session import Session

EVERY = 2.0
"""Seconds between two questions. Each waits for all ranks, through an actor: 7 ms on two busy cores, where the
broadcast that asks whether it is time takes 0.1 ms. Ray itself looks for notices every 5 s."""


@dataclass(frozen=True)
class Notice:
    """What is known of nodes that will be taken away.

    Attributes:
        nodes: their ids.
        ranks: that run on them.
        deadline: when, in seconds since the epoch; ``None`` if nobody said.
    """

    nodes: tuple[str, ...]
    ranks: tuple[int, ...]
    deadline: float | None


class Notices:
    """Asks for notices now and then; all ranks do so together.

    Args:
        session: what is asked.
        ranks: all of the run; the first one keeps the time.
        clock: seconds.
    """

    def __init__(self, session: Session, ranks: Ranks, clock: Callable[[], float] = time.monotonic) -> None:
        self._session, self._ranks, self._clock = session, ranks, clock
        self._asked = clock()
        self._known: set[str] = set()

    def new(self) -> Notice | None:
        """A notice that names a node which none has named before."""
        due = self._session.rank == 0 and self._clock() >= self._asked + EVERY
        if not self._ranks.asked(due):
            return None
        self._asked = self._clock()
        notice = self._session.notice()
        if notice is None or self._known.issuperset(notice.nodes):
            return None
        self._known.update(notice.nodes)
        return notice
