"""A run's event log: one JSON line per thing that happened. People read it, and tests prove recoveries by it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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
        line = json.dumps({"time": round(time.time(), 3), "pid": os.getpid(), "event": kind, **facts})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


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
