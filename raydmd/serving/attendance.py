"""Which replicas of a pool have come to harm, and which are back: from one look at it to the next, pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydmd.serving.order import Look

SERVES = ("ready", "moving")
KEEPER = "keeper"
"""In place of a replica's name, where nobody can say how the replicas are."""
SILENT = 2
"""Looks in a row without an answer, after which the keeper is lost; one alone is a busy machine."""


@dataclass(frozen=True)
class News:
    """What became of a replica.

    Attributes:
        replica: its name.
        state: ``lost`` or ``back``.
        why: it was lost; empty if that is not known.
    """

    replica: str
    state: str
    why: str = ""


class Attendance:
    """Of one pool; replicas that the pool gives up as it shrinks are none of its business."""

    def __init__(self) -> None:
        self._served: set[str] = set()
        self._lost: set[str] = set()
        self._missed = 0

    def news(self, look: Look | None) -> list[News]:
        """What is new.

        Args:
            look: how the keeper sees the pool; ``None`` while no keeper answers.
        """
        if look is None:
            self._missed += 1
            return [News(KEEPER, "lost", "no answer")] if self._missed == SILENT else []
        found = [News(KEEPER, "back")] if self._missed >= SILENT else []
        self._missed = 0
        for name, replica in look.replicas.items():
            serves = replica.stage in SERVES and not replica.error
            harmed = bool(replica.error) or (name in self._served and replica.stage == "loading")
            if harmed and name not in self._lost:
                self._lost.add(name)
                found.append(News(name, "lost", (replica.error.splitlines() or [""])[0]))
            elif serves and name in self._lost:
                self._lost.discard(name)
                found.append(News(name, "back"))
            if serves:
                self._served.add(name)
        for name in sorted(self._served - look.replicas.keys()):
            self._served.discard(name)
            if look.last_error and name not in self._lost:  # it could not load again, and another one replaces it
                found.append(News(name, "lost", look.last_error.splitlines()[0]))
        return found
