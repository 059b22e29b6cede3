"""A run's event log: one JSON line per thing that happened. People read it, and tests prove recoveries by it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from typing import TYPE_CHECKING, Any

from raydmd.redact import hidden

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO

METRICS = "metrics.jsonl"
"""File of a run with a row for each report."""
PATIENCE = 2.0
"""Seconds that a line waits for those of other hosts."""


class EventLog:
    """Appends events to a file; only rank 0 writes.

    Args:
        path: of the file.
        enabled: whether this process writes.
    """

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        self._path, self._enabled = path, enabled

    def write(self, kind: str, **facts: Any) -> None:
        """Append one event; a single write, so that lines of two processes never mix."""
        if not self._enabled:
            return
        told = {k: hidden(v) if isinstance(v, str) else v for k, v in facts.items()}  # an error may quote an address
        append(self._path, {"time": round(time.time(), 3), "pid": os.getpid(), "event": kind, **told})


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line, by a single write; whoever was torn off in the one before has lost that one alone."""
    with path.open("ab+") as file, _alone(file):
        torn = file.seek(0, os.SEEK_END) > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
        file.flush()  # while nobody else may write


@contextlib.contextmanager
def _alone(file: BinaryIO) -> Iterator[None]:
    """Keep other hosts out, whose NFS would append at an end that they remember; nobody is kept out for long."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:  # somebody has it, or the file system has no locks
            if error.errno not in (errno.EACCES, errno.EAGAIN) or time.monotonic() > until:
                break
        time.sleep(0.01)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_UN)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The file's whole lines; one that is still being written is left out."""
    yield from read_from(path, 0)[0]


def read_from(path: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines that begin at byte ``offset`` or later, and the offset to go on from."""
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        whole, _, _ = file.read().rpartition(b"\n")
    rows = []
    for line in whole.splitlines():
        # A line torn by a crash and run into the next is lost, and nothing else is.
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            rows.append(json.loads(line))
    return rows, offset + len(whole) + bool(whole)
