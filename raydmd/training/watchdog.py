"""Ending a worker that no longer gets on, with what all its threads are doing written down.

A hang cures itself in no other way: the ranks wait for each other, and Ray for all of them. Python's own fault handler
keeps the time in a thread that needs no interpreter lock, so a wait in NCCL, CUDA or on a file server is seen as well.
"""

from __future__ import annotations

import faulthandler
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from raydmd.training.events import EventLog

STACKS = "stacks"
"""Folder of a run with a file for each rank: what it does, and where its threads were when it did so for too long."""
DUMPED = "Timeout ("
"""What the fault handler begins with."""


class Watchdog:
    """Of one worker's process.

    Args:
        folder: of the run.
        rank: of this process.
        world: how many ranks there are.
        seconds: that anything may take.
    """

    def __init__(self, folder: Path, *, rank: int, world: int, seconds: float) -> None:
        self._who, self._seconds = f"rank {rank} of {world}", seconds
        self.path = folder / STACKS / f"rank{rank:05d}.txt"
        self.path.parent.mkdir(exist_ok=True)
        self._before = kept(self.path)
        self._file = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)

    def tell(self, events: EventLog) -> None:
        """Write into the log that the process before this one was ended by its watchdog, if it was."""
        if self._before is not None:
            doing = self._before.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
            events.write("stalled", doing=doing, stacks=str(self._before))

    def doing(self, what: str) -> None:
        """Say what this rank does from now on; its time starts anew."""
        line = f"{self._who}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {what}\n".encode()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, line, 0)
        os.lseek(self._file, 0, os.SEEK_END)
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def close(self) -> None:
        """Keep the time no longer."""
        faulthandler.cancel_dump_traceback_later()
        os.close(self._file)
        self.path.unlink(missing_ok=True)


def kept(path: Path) -> Path | None:
    """A rank's file that a watchdog has written stacks into, under a name at which it stays."""
    if not path.is_file() or DUMPED not in path.read_text(encoding="utf-8", errors="replace"):
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    return path.rename(path.with_name(f"stalled-{stamp}-{path.name}"))
