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
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if line.endswith("\n"):
            # A line torn by a crash and run into the next is lost, and nothing else is.
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)
