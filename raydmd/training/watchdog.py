"""Ending a worker that no longer gets on, with what all its threads are doing written down.

A hang cures itself in no other way: the ranks wait for each other, and Ray for all of them. Python's own fault handler
keeps the time in a thread that needs no interpreter lock, so a wait in NCCL, CUDA or on a file server is seen as well.
What not even that thread survives, e.g. a process that is stopped or a machine that froze, the driver sees in a file
that no longer changes.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import resource
import socket
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

STACKS = "stacks"
"""Folder of a run with a file for each rank: what it does, and where its threads were when it did so for too long."""
DUMPED = "Timeout ("
"""What the fault handler begins with."""
MEGA = 1e6
SIZE = 1024
"""Bytes that what a rank does has in its file, or a multiple."""
SYNC = 1.0
"""Seconds between two times that it is sent to the disk at once."""


@dataclass(frozen=True, kw_only=True)
class Post:
    """What a rank has written about itself.

    Attributes:
        rank: of the process.
        world: how many ranks its group has.
        node: that it runs on, in Ray's words.
        host: that node's name, for people.
        pid: of the process.
        since: when it began what it does; seconds of the clock.
        doing: what that is, e.g. ``cycle 12``.
        waits: for whom, where that is known; else empty.
        resident: megabytes of memory that it held then.
        peak: megabytes that it has held at most.
        free: megabytes that its node had left then.
    """

    rank: int
    world: int
    node: str
    host: str
    pid: int
    since: float
    doing: str
    waits: str = ""
    resident: float = 0.0
    peak: float = 0.0
    free: float = 0.0

    def line(self) -> str:
        """All of it, for people."""
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        waits = f"; {self.waits}" if self.waits else ""
        return f"rank {self.rank} of {self.world} on {self.host} (pid {self.pid}), {when}: {self.doing}{waits}"

    def memory(self) -> str:
        """What it held, for people."""
        return (
            f"the process held {self.resident:.0f} MB as it began that, {self.peak:.0f} MB at most, and its node had "
            f"{self.free:.0f} MB left"
        )


class Watchdog:
    """Of one worker's process.

    Args:
        folder: of the run.
        rank: of this process.
        world: how many ranks there are.
        seconds: that anything may take.
        node: that this process runs on, in Ray's words.
    """

    def __init__(self, folder: Path, *, rank: int, world: int, seconds: float, node: str = "") -> None:
        self._seconds = seconds
        self.post = Post(
            rank=rank, world=world, node=node, host=socket.gethostname(), pid=os.getpid(), since=time.time(), doing=""
        )
        self.path = path_of(folder, rank)
        self.path.parent.mkdir(exist_ok=True)
        self._file = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
        self._synced = -math.inf

    def doing(self, what: str) -> None:
        """Say what this rank does from now on; its time starts anew."""
        self.post = replace(
            self.post,
            since=time.time(),
            doing=what,
            waits="",
            resident=psutil.Process().memory_info().rss / MEGA,
            peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
            free=psutil.virtual_memory().available / MEGA,
        )
        self._write()
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def waits(self, what: str) -> None:
        """Say for whom it waits meanwhile, or no longer; its time goes on."""
        self.post = replace(self.post, waits=what)
        self._write()

    def close(self, *, keep: bool = False) -> None:
        """Keep the time no longer; ``keep`` leaves what was written, for whoever asks what it failed in."""
        faulthandler.cancel_dump_traceback_later()
        os.close(self._file)
        if not keep:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        text = f"{self.post.line()}\n{json.dumps(asdict(self.post))}".encode()
        # At once, over what was there: a file server shows others an empty file at once, and the new text much later.
        size = -(-(len(text) + 1) // SIZE) * SIZE
        os.pwrite(self._file, text.ljust(size - 1) + b"\n", 0)
        os.ftruncate(self._file, size)
        os.lseek(self._file, 0, os.SEEK_END)  # where the stacks go
        if time.monotonic() >= self._synced + SYNC:
            os.fsync(self._file)
            self._synced = time.monotonic()


def path_of(folder: Path, rank: int) -> Path:
    """Where a rank writes down what it does."""
    return folder / STACKS / f"rank{rank:05d}.txt"


def posts(folder: Path) -> dict[int, Post]:
    """What the ranks of a run's last group have written, by rank; one that has ended well has nothing there."""
    found = {}
    for path in sorted((folder / STACKS).glob("rank*.txt")):
        try:
            post = Post(**json.loads(path.read_text(encoding="utf-8", errors="replace").splitlines()[1]))
        except (OSError, IndexError, ValueError, TypeError):  # just being written
            continue
        found[post.rank] = post
    newest = max(found.values(), key=lambda p: p.since, default=None)
    return {rank: post for rank, post in found.items() if newest and post.world == newest.world}


def kept(folder: Path) -> Mapping[Path, str]:
    """Put the last group's files away.

    Returns:
        The files with stacks, under names at which they stay, and what their ranks did.
    """
    found = {}
    for path in sorted((folder / STACKS).glob("rank*.txt")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if DUMPED not in text:
            path.unlink(missing_ok=True)
            continue
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        found[path.rename(path.with_name(f"stalled-{stamp}-{path.name}"))] = text.partition("\n")[0]
    return found
