"""Whether a folder's holder is still there, as another machine can tell: by a lease that its holder keeps renewing.

Nothing here compares the clocks of two machines. A lease is alive if it changes while somebody looks, and is over if it
has not changed for as long as it runs, by the looker's clock or by the file server's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

SECONDS = 60.0
"""That a lease runs for without being renewed."""
RENEWALS = 12
"""Of a lease in that time."""
LOOK = 1 / 4
"""Of that time a lease is looked at for a renewal, however old the file server calls it."""
SIZE = 1024
"""Bytes of a lease's file, always the same: it is written over in place, and whoever reads it reads a whole one."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What the holder of a folder says of itself.

    Attributes:
        host: its machine's name, for people.
        lock: the running kernel and the file system, as far as its file locks reach.
        processes: the running kernel and the namespace that its process ids are of.
        pid: of its process.
        begun: when that process began, in the kernel's ticks: ids are used again.
        token: of this holding, and no other.
        since: when it began, by its clock; for people.
        beat: how often it was renewed.
        seconds: that it runs for without being renewed.
    """

    host: str
    lock: str
    processes: str
    pid: int
    begun: int
    token: str
    since: float
    beat: int = 0
    seconds: float = SECONDS

    def text(self) -> str:
        """As the file holds it."""
        return json.dumps(asdict(self)).ljust(SIZE - 1) + "\n"


def parse(text: str) -> Lease | None:
    """A lease of its file's text; ``None`` if it is none, or one of another release."""
    try:
        found: dict[str, Any] = json.loads(text)
        lease = Lease(**found)
        return lease if float(lease.seconds) > 0 and isinstance(lease.token, str) else None
    except (ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Reading:
    """A look at a lease's file.

    Attributes:
        text: what it held.
        age: seconds since it was written, by the file server's clock.
    """

    text: str
    age: float

    @property
    def lease(self) -> Lease | None:
        """What it says, if it can be understood."""
        return parse(self.text)


class Verdict(Enum):
    """Of looking at a lease."""

    FREE = "nobody holds it"
    DEAD = "its holder was a process of this machine, and is gone"
    STALE = "its holder has not renewed it for as long as it runs"
    HELD = "its holder is there"
    WAIT = "it can't be told yet"


def judge(
    first: Reading | None, last: Reading | None, *, watched: float, lock: str | None, processes: str, alive: bool
) -> Verdict:
    """Whether a folder is held.

    Args:
        first: the lease when one began to look; ``None`` if there was none.
        last: the lease now.
        watched: seconds in between, by the looker's clock.
        lock: the looker's kernel and file system; ``None`` if it could not lock the folder's file there.
        processes: the looker's kernel and namespace of process ids.
        alive: whether a process with the holder's id and beginning runs in that namespace.
    """
    if last is None:
        return Verdict.FREE
    lease = last.lease
    if lease is not None:
        if lease.lock == lock:
            return Verdict.DEAD  # its lock would be in ours' way
        if lease.processes == processes:
            return Verdict.HELD if alive else Verdict.DEAD
    if first is None or first.text != last.text:
        return Verdict.HELD
    seconds = lease.seconds if lease is not None else SECONDS
    if watched >= seconds or (watched >= LOOK * seconds and last.age >= seconds):
        return Verdict.STALE
    return Verdict.WAIT
